"""Operators that runtimes fuse (domain ``com.microsoft``): products, sums and norms with what follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.conv import convolve
from sparsecc.reference.onnx_ops.linear import gemm, matmul
from sparsecc.reference.onnx_ops.registry import Ctx, op, positive_axis

_ACTIVATIONS: dict[str, Callable[[Tensor, list[float]], Tensor]] = {
    "": lambda x, p: x,
    "Relu": lambda x, p: torch.relu(x),
    "Sigmoid": lambda x, p: torch.sigmoid(x),
    "Tanh": lambda x, p: torch.tanh(x),
    "LeakyRelu": lambda x, p: torch.where(x < 0, x * p[0], x),
    "Clip": lambda x, p: x.clamp(p[0], p[1]),
    "HardSigmoid": lambda x, p: (x * p[0] + p[1]).clamp(0, 1),
    "Elu": lambda x, p: torch.where(x < 0, p[0] * torch.expm1(x), x),
}


def _activated(ctx: Ctx, x: Tensor, parameters: list[float]) -> Tensor:
    name = ctx.text("activation")
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"{ctx.node.op_type} with activation {name}")
    return _ACTIVATIONS[name](x, parameters)


@op("com.microsoft::FusedConv")
def fused_conv(ctx: Ctx, x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """x[N,C,*S] w[O,C/g,*K] b[O] z[N,O,*S'] -> activation(conv + z)[N,O,*S']"""
    y = convolve(ctx, x, w, b)
    return _activated(ctx, y if z is None else y + z, ctx.reals("activation_params") or [])


@op("com.microsoft::FusedGemm")
def fused_gemm(ctx: Ctx, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """a[M,K] b[K,N] c[M,N] -> activation(a b + c)[M,N]"""
    parameters = [ctx.real("activation_alpha"), ctx.real("activation_beta"), ctx.real("activation_gamma")]
    return _activated(ctx, gemm(ctx, a, b, c), parameters)


@op("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
def fused_matmul(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*B,M,K] b[*B,K,N] -> alpha a b[*B,M,N]; any axes of the operands transposed"""
    y: Tensor = matmul(ctx, _turned(ctx, a, "A"), _turned(ctx, b, "B"))
    return y * ctx.real("alpha", 1.0)


def _turned(ctx: Ctx, x: Tensor, which: str) -> Tensor:
    if ctx.flag(f"transBatch{which}"):
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if ctx.flag(f"trans{which}") else x


@op("com.microsoft::BiasGelu")
def bias_gelu(ctx: Ctx, x: Tensor, bias: Tensor) -> Tensor:
    """x[*S,D] bias[D] -> y[*S,D]"""
    return F.gelu(x + bias)


@op("com.microsoft::FastGelu")
def fast_gelu(ctx: Ctx, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[*S,D] bias[D] -> y[*S,D], by the hyperbolic tangent"""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("com.microsoft::QuickGelu")
def quick_gelu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> x sigmoid(alpha x)[*S]"""
    return x * torch.sigmoid(ctx.real("alpha", 1.702) * x)


@op("com.microsoft::BiasSplitGelu")
def bias_split_gelu(ctx: Ctx, x: Tensor, bias: Tensor) -> Tensor:
    """x[*S,D+D] bias[D+D] -> left gelu(right)[*S,D]"""
    left, right = (x + bias).chunk(2, -1)
    return left * F.gelu(right)


@op("com.microsoft::BiasAdd")
def bias_add(ctx: Ctx, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """x[N,S,C] bias[C] skip[N,S,C] -> y[N,S,C]"""
    return x + bias + skip


@op("com.microsoft::Trilu", kind="raw")
def trilu(ctx: Ctx, x: Tensor, k: Tensor | None = None) -> Tensor:
    """x[*B,M,N] k[] -> y[*B,M,N]"""
    diagonal = 0 if k is None else int(ctx.item(k))
    return torch.triu(x, diagonal) if ctx.flag("upper", True) else torch.tril(x, diagonal)


@op("com.microsoft::ExpandDims", kind="raw")
def expand_dims(ctx: Ctx, x: Tensor, axis: Tensor) -> Tensor:
    """x[*S] axis[] -> y[*S with 1]"""
    return x.unsqueeze(int(ctx.item(axis)))


@op("SimplifiedLayerNormalization")
def simplified_layer_norm(ctx: Ctx, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """x[*S,*D] scale[*D] -> y[*S,*D] inv_std[*S,1..]"""
    axes = list(range(positive_axis(ctx.integer("axis", -1), x.ndim), x.ndim))
    inverse = torch.rsqrt((x * x).mean(axes, keepdim=True) + ctx.real("epsilon", 1e-5))
    return x * inverse * scale, inverse


@op("com.microsoft::SkipSimplifiedLayerNormalization")
def skip_simplified_layer_norm(
    ctx: Ctx, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """x[*S,D] skip[*S,D] gamma[D] bias[D] -> y[*S,D] mean inv_std sum[*S,D]"""
    total = x + skip if bias is None else x + skip + bias
    inverse = torch.rsqrt((total * total).mean(-1, keepdim=True) + ctx.real("epsilon", 1e-12))
    return total * inverse * gamma, None, inverse, total


@op("com.microsoft::EmbedLayerNormalization", kind="raw")
def embed_layer_norm(
    ctx: Ctx,
    ids: Tensor,
    kinds: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segments: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """ids[B,L] kinds[B,L] words[V,D] positions[P,D] segments[T,D] gamma[D] beta[D] mask[B,L] places[*,L]
    -> y[B,L,D] lengths[B] sum[B,L,D]"""
    shape = (*ids.shape, words.shape[1])
    if ids.is_meta or words.is_meta:
        total = torch.empty(shape, dtype=words.dtype, device="meta")
        return total, torch.empty(ids.shape[:1], dtype=torch.int32, device="meta"), total
    where = torch.arange(ids.shape[1]) if places is None else places.long()
    total = words[ids.long()] + positions[where]
    if kinds is not None and segments is not None:
        total = total + segments[kinds.long()]
    centred = total - total.mean(-1, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + ctx.real("epsilon", 1e-12))
    return y * gamma + beta, _lengths(ids, mask), total


def _lengths(ids: Tensor, mask: Tensor | None) -> Tensor:
    """How many ones every row holds, wherever they stand."""
    if mask is None:
        return torch.zeros(ids.shape[0], dtype=torch.int32)
    return mask.eq(1).sum(1).to(torch.int32)

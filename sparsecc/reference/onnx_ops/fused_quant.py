"""Quantised operators of runtimes (domain ``com.microsoft``): integers in and out, real numbers between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.pool import average_pool
from sparsecc.reference.onnx_ops.quant import dynamic_quantize_linear
from sparsecc.reference.onnx_ops.registry import Ctx, op, positive_axis


def _real(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Integers as the numbers that they stand for."""
    numbers = x.to(torch.int32)
    if zero is not None:
        numbers = numbers - zero.to(torch.int32)
    return numbers.to(_wide(scale)) * scale.to(_wide(scale))


def _wide(scale: Tensor) -> torch.dtype:
    return torch.float32 if scale.dtype in (torch.float16, torch.bfloat16) else scale.dtype


def _quantised(y: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    dtype = torch.uint8 if zero is None else zero.dtype
    steps = torch.round(y / scale.to(y.dtype)) + (0 if zero is None else zero.to(y.dtype))
    info = torch.iinfo(dtype)
    return steps.clamp(info.min, info.max).to(dtype)


def _unary(function: Callable[[Ctx, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(
        ctx: Ctx,
        x: Tensor,
        x_scale: Tensor,
        x_zero: Tensor | None,
        y_scale: Tensor,
        y_zero: Tensor | None = None,
    ) -> Tensor:
        return _quantised(function(ctx, _real(x, x_scale, x_zero)), y_scale, y_zero)

    return run


def _leaky(ctx: Ctx, x: Tensor) -> Tensor:
    return torch.where(x < 0, x * ctx.real("alpha", 0.01), x)


def _softmax(ctx: Ctx, x: Tensor) -> Tensor:
    axis = positive_axis(ctx.integer("axis", -1), x.ndim)
    if ctx.integer("opset", 13) >= 13:
        return torch.softmax(x, axis)
    return torch.softmax(x.flatten(axis), -1).reshape(x.shape)


def _channels_first(ctx: Ctx, x: Tensor) -> Tensor:
    return x.movedim(-1, 1) if ctx.flag("channels_last") else x


def _channels_back(ctx: Ctx, x: Tensor) -> Tensor:
    return x.movedim(1, -1) if ctx.flag("channels_last") else x


def _pool(ctx: Ctx, x: Tensor) -> Tensor:
    return _channels_back(ctx, average_pool(ctx, _channels_first(ctx, x)))


def _global_pool(ctx: Ctx, x: Tensor) -> Tensor:
    first = _channels_first(ctx, x)
    return _channels_back(ctx, first.mean(list(range(2, x.ndim)), keepdim=True))


_UNARY: dict[str, Callable[[Ctx, Tensor], Tensor]] = {
    "QLinearSigmoid": lambda ctx, x: torch.sigmoid(x),
    "QLinearLeakyRelu": _leaky,
    "QLinearSoftmax": _softmax,
    "QLinearAveragePool": _pool,
    "QLinearGlobalAveragePool": _global_pool,
}
for _name, _function in _UNARY.items():
    op(f"com.microsoft::{_name}", kind="raw")(_unary(_function))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(
        ctx: Ctx,
        a: Tensor,
        a_scale: Tensor,
        a_zero: Tensor | None,
        b: Tensor,
        b_scale: Tensor,
        b_zero: Tensor | None,
        y_scale: Tensor,
        y_zero: Tensor | None = None,
    ) -> Tensor:
        return _quantised(function(_real(a, a_scale, a_zero), _real(b, b_scale, b_zero)), y_scale, y_zero)

    return run


op("com.microsoft::QLinearAdd", kind="raw")(_binary(torch.add))
op("com.microsoft::QLinearMul", kind="raw")(_binary(torch.mul))


@op("com.microsoft::QLinearWhere", kind="raw")
def qlinear_where(
    ctx: Ctx,
    condition: Tensor,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """condition[*S] a[*S] b[*S], each with scale and zero point -> y[*S]"""
    chosen = torch.where(condition, _real(a, a_scale, a_zero), _real(b, b_scale, b_zero))
    return _quantised(chosen, y_scale, y_zero)


@op("com.microsoft::QLinearConcat", kind="raw")
def qlinear_concat(ctx: Ctx, y_scale: Tensor, y_zero: Tensor, *parts: Tensor) -> Tensor:
    """(x[*S], scale[], zero[])... -> y[*S joined at axis]"""
    real = [_real(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return _quantised(torch.cat(real, ctx.integer("axis")), y_scale, y_zero)


def _integer_product(a: Tensor, a_zero: Tensor | None, b: Tensor, b_zero: Tensor | None) -> Tensor:
    """Exact in float64."""
    left, right = a.double(), b.double()
    if a_zero is not None:
        left = left - (a_zero.double().unsqueeze(-1) if a_zero.numel() > 1 else a_zero.double())
    return torch.matmul(left, right if b_zero is None else right - b_zero.double())


@op("com.microsoft::QGemm", kind="raw")
def qgemm(
    ctx: Ctx,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
) -> Tensor:
    """a[M,K] b[K,N], either transposed, with scales and zero points, c[M,N] int32 -> y[M,N]"""
    a = a.T if ctx.flag("transA") else a
    columns = b_zero.unsqueeze(-1) if ctx.flag("transB") and b_zero.numel() > 1 else b_zero
    right = b.to(torch.int32) - columns.to(torch.int32)
    total = _integer_product(a, a_zero, right.T if ctx.flag("transB") else right, None)
    if c is not None:
        total = total + c.double()
    y = total.to(_wide(a_scale)) * (ctx.real("alpha", 1.0) * a_scale * b_scale).to(_wide(a_scale))
    return y.to(a_scale.dtype) if y_scale is None else _quantised(y, y_scale, y_zero)


@op("com.microsoft::MatMulIntegerToFloat", kind="raw")
def matmul_integer_to_float(
    ctx: Ctx,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """a[*B,M,K] b[K,N], with scales and zero points, bias[N] -> y[*B,M,N]"""
    rows = a_scale.unsqueeze(-1) if a_scale.numel() > 1 else a_scale
    y = _integer_product(a, a_zero, b, b_zero).to(a_scale.dtype) * (rows * b_scale)
    return y if bias is None else y + bias


@op("com.microsoft::DynamicQuantizeMatMul", kind="raw")
def dynamic_quantize_matmul(
    ctx: Ctx, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """a[*B,M,K] b[K,N] with scale and zero point, bias[N] -> y[*B,M,N]; a is quantised by its range"""
    if a.is_meta:
        return torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device="meta")
    numbers, scale, zero = dynamic_quantize_linear(ctx, a)
    y: Tensor = matmul_integer_to_float(ctx, numbers, b, scale, b_scale, zero, b_zero, bias)
    return y


@op("com.microsoft::MatMulNBits", kind="raw")
def matmul_nbits(
    ctx: Ctx,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """a[*,K] b[N,K/block,bytes] scales[N,K/block] zeros[N,*] groups[K] bias[N] -> y[*,N]"""
    if a.is_meta or b.is_meta:
        return torch.empty(*a.shape[:-1], ctx.integer("N"), dtype=a.dtype, device="meta")
    w = nbits_weights(ctx, b, scales, zeros, groups).to(a.dtype)
    y = a @ w.T
    return y if bias is None else y + bias


def nbits_weights(
    ctx: Ctx, b: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None = None
) -> Tensor:
    """The weights [N,K] that packed integers stand for."""
    bits, size = ctx.integer("bits", 4), ctx.integer("K")
    rows, blocks = ctx.integer("N"), -(-size // ctx.integer("block_size"))
    numbers = unpacked(b.reshape(rows, blocks, -1), bits).double()
    if zeros is None:
        offsets = torch.full((rows, blocks), 2.0 ** (bits - 1), dtype=torch.float64)
    elif zeros.is_floating_point():
        offsets = zeros.reshape(rows, blocks).double()
    else:
        offsets = unpacked(zeros.reshape(rows, -1), bits)[:, :blocks].double()
    scales = scales.reshape(rows, blocks)
    if groups is not None:
        flat, where = numbers.reshape(rows, -1)[:, :size], groups.long()
        return ((flat - offsets[:, where]) * scales[:, where].double()).to(scales.dtype)
    real = (numbers - offsets[:, :, None]) * scales[:, :, None].double()
    return real.reshape(rows, -1)[:, :size].to(scales.dtype)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """packed[*,n] bytes -> [*,n*8/bits], the lowest bits first"""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    wide = packed.to(torch.int32)[..., None] >> shifts & (1 << bits) - 1
    return wide.reshape(*packed.shape[:-1], -1)

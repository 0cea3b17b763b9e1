"""Convolutions in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, op

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def torch_pads(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Begin and end per axis in the order of ``torch.nn.functional.pad`` (last axis first)."""
    pairs = list(zip(begins, ends, strict=True))
    return [size for pair in reversed(pairs) for size in pair]


def window_pads(
    ctx: Ctx, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis, from ``pads`` or ``auto_pad``."""
    dims = len(kernel)
    auto = ctx.text("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = ctx.integers("pads") or [0] * (2 * dims)
        if len(pads) != 2 * dims:
            raise ValueError(f"{len(pads)} pads for {dims} spatial axes")
        return pads[:dims], pads[dims:]
    if auto == "VALID":
        return [0] * dims, [0] * dims
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins, ends


def _spatial(ctx: Ctx, x: Tensor) -> int:
    dims = x.ndim - 2
    if dims not in _CONV:
        raise UnsupportedModel(f"{ctx.node.op_type} with {dims} spatial axes")
    return dims


def convolve(ctx: Ctx, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The convolution of a node with the attributes of Conv; computed as given."""
    dims = _spatial(ctx, x)
    strides = ctx.integers("strides") or [1] * dims
    dilations = ctx.integers("dilations") or [1] * dims
    begins, ends = window_pads(ctx, x.shape[2:], w.shape[2:], strides, dilations)
    _check_channels(ctx, x, w)
    if x.is_meta or w.is_meta:
        spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
        sizes = [
            (size + begin + end - span) // stride + 1
            for size, begin, end, span, stride in zip(x.shape[2:], begins, ends, spans, strides, strict=True)
        ]
        return _meta(x, [x.shape[0], w.shape[0], *sizes])
    padding: list[int] | int = begins if begins == ends and min(begins) >= 0 else 0
    if padding == 0 and any(begins + ends):
        x = F.pad(x, torch_pads(begins, ends))
    y: Tensor = _CONV[dims](x, w, b, strides, padding, dilations, ctx.integer("group", 1))
    return y


def _check_channels(ctx: Ctx, x: Tensor, w: Tensor) -> None:
    groups = ctx.integer("group", 1)
    if w.ndim != x.ndim or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise ValueError(f"{groups} groups of weights {list(w.shape)} for an input {list(x.shape)}")


def _meta(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A result without data; raises ``ValueError`` where nothing would be left of an axis."""
    if min(shape) < 0 or (0 in shape[2:] and 0 not in x.shape):
        raise ValueError(f"an output of shape {list(shape)}")
    return torch.empty(tuple(shape), dtype=x.dtype, device="meta")


@op("Conv")
def conv(ctx: Ctx, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[N,C,*S] w[O,C/g,*K] b[O] -> y[N,O,*S']"""
    return convolve(ctx, x, w, b)


@op("ConvTranspose")
def conv_transpose(ctx: Ctx, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[N,C,*S] w[C,O/g,*K] b[O] -> y[N,O,*S']"""
    dims = _spatial(ctx, x)
    strides = ctx.integers("strides") or [1] * dims
    dilations = ctx.integers("dilations") or [1] * dims
    extra = ctx.integers("output_padding") or [0] * dims
    spans = [(k - 1) * dilation + 1 for k, dilation in zip(w.shape[2:], dilations, strict=True)]
    full = [(size - 1) * s + span for size, s, span in zip(x.shape[2:], strides, spans, strict=True)]
    begins, ends = _transposed_pads(ctx, x.shape[2:], strides, full, extra)
    if w.ndim != x.ndim or w.shape[0] != x.shape[1]:
        raise ValueError(f"weights {list(w.shape)} for an input {list(x.shape)}")
    if x.is_meta or w.is_meta:
        sizes = [f + e - begin - end for f, e, begin, end in zip(full, extra, begins, ends, strict=True)]
        return _meta(x, [x.shape[0], w.shape[1] * ctx.integer("group", 1), *sizes])
    y: Tensor = _TRANSPOSED[dims](x, w, None, strides, 0, 0, ctx.integer("group", 1), dilations)
    # output_padding lengthens the end before pads crop it
    cropped = [-end + more for end, more in zip(ends, extra, strict=True)]
    y = F.pad(y, torch_pads([-begin for begin in begins], cropped))
    return y if b is None else y + b.reshape(-1, *[1] * dims)


def _transposed_pads(
    ctx: Ctx, sizes: Sequence[int], strides: Sequence[int], full: Sequence[int], extra: Sequence[int]
) -> tuple[list[int], list[int]]:
    dims = len(sizes)
    auto = ctx.text("auto_pad", "NOTSET")
    wanted = ctx.integers("output_shape")
    if wanted is not None:
        wanted = wanted[-dims:]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    else:
        pads = ctx.integers("pads") if auto != "VALID" else None
        pads = pads or [0] * (2 * dims)
        return pads[:dims], pads[dims:]
    begins, ends = [], []
    for axis in range(dims):
        total = full[axis] + extra[axis] - wanted[axis]
        small, large = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
        begin = small if auto == "SAME_UPPER" else large
        begins.append(begin)
        ends.append(total - begin)  # what is missing (total < 0) is appended behind
    return begins, ends


@op("Col2Im")
def col2im(ctx: Ctx, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """x[N,C*prod(K),L] image[D] block[D] -> y[N,C,*image]"""
    sizes, kernel = ctx.int_list(image), ctx.int_list(block)
    dims = len(sizes)
    strides = ctx.integers("strides") or [1] * dims
    dilations = ctx.integers("dilations") or [1] * dims
    pads = ctx.integers("pads") or [0] * (2 * dims)
    n, channels = x.shape[0], x.shape[1]
    for k in kernel:
        channels //= k
    padded = [size + pads[i] + pads[i + dims] for i, size in enumerate(sizes)]
    steps = [
        (p - (k - 1) * d - 1) // s + 1 for p, k, d, s in zip(padded, kernel, dilations, strides, strict=True)
    ]
    y = x.new_zeros([n * channels, *padded])
    if not y.is_meta:
        blocks = x.reshape(n * channels, *kernel, *steps)
        for place in torch.cartesian_prod(*[torch.arange(k) for k in kernel]).reshape(-1, dims).tolist():
            window = tuple(
                slice(at * d, at * d + (count - 1) * s + 1, s)
                for at, d, s, count in zip(place, dilations, strides, steps, strict=True)
            )
            y[(slice(None), *window)] += blocks[(slice(None), *place)]
    inner = tuple(slice(pads[i], pads[i] + sizes[i]) for i in range(dims))
    return y[(slice(None), *inner)].reshape(n, channels, *sizes)


@op("CausalConvWithState")
def causal_conv_with_state(
    ctx: Ctx, x: Tensor, w: Tensor, b: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x[N,C,L] w[C,1,K] b[C] past[N,C,K-1] -> y[N,C,L] state[N,C,K-1]"""
    before = w.shape[2] - 1
    held = x.new_zeros(x.shape[0], x.shape[1], before) if past is None else past
    padded = torch.cat([held, x], 2)
    y = F.conv1d(padded, w, b, groups=x.shape[1])
    if ctx.text("activation", "none") in ("silu", "swish"):
        y = F.silu(y)
    return y, padded[:, :, padded.shape[2] - before :]

"""Quantised arithmetic: real numbers are ``(q - zero_point) * scale``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.onnxfile.model import TORCH_DTYPES, to_torch
from sparsecc.reference.onnx_ops.conv import convolve
from sparsecc.reference.onnx_ops.registry import Ctx, Value, need, op, positive_axis

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16)
_FLOATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def along(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point that broadcasts to ``x``: per tensor, per axis, or per block."""
    if parameter.ndim == 0 or (parameter.ndim == 1 and parameter.numel() == 1 and block == 0):
        return parameter.reshape(())
    axis = positive_axis(axis, x.ndim)
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if parameter.ndim == 1:
        return parameter.reshape(-1, *[1] * (x.ndim - 1 - axis))
    return parameter


def _integers(value: Value) -> Tensor:
    """Quantised integers of any width as int32."""
    if not isinstance(value, Tensor) and value is not None and not isinstance(value, list):
        found = to_torch(value.astype("int32"))
        assert found is not None
        return found
    return need(value).to(torch.int32)


def _round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(dtype)
    return x.clamp(info.min, info.max).to(dtype)


@op("QuantizeLinear", "com.microsoft::QuantizeLinear", kind="raw")
def quantize_linear(ctx: Ctx, x: Tensor, scale: Tensor, zero: Value = None) -> Tensor:
    """x[*S] scale[] zero[] -> y[*S]; scale and zero point also per axis or per block."""
    if zero is not None and not isinstance(zero, Tensor):
        raise UnsupportedModel("QuantizeLinear to a small type")
    wanted = TORCH_DTYPES.get(ctx.integer("output_dtype")) if ctx.integer("output_dtype") else None
    if ctx.integer("output_dtype") and wanted is None:
        raise UnsupportedModel("QuantizeLinear to a small type")
    dtype = zero.dtype if isinstance(zero, Tensor) else wanted or torch.uint8
    if dtype not in (*_INTEGERS, *_FLOATS):
        raise UnsupportedModel("QuantizeLinear to a small type")
    if x.is_meta:
        return torch.empty(x.shape, dtype=dtype, device="meta")
    axis, block = ctx.integer("axis", 1), ctx.integer("block_size", 0)
    numbers, step = _wide(ctx, x, scale)
    ratio = numbers / along(step, x, axis, block)
    if dtype in _FLOATS:
        return _narrowed(ratio, dtype, saturate=ctx.flag("saturate", True))
    y = torch.round(ratio)
    if isinstance(zero, Tensor):
        y = y + along(zero.to(torch.int32), x, axis, block)
    return _round_to(y, dtype)


def _narrowed(x: Tensor, dtype: torch.dtype, *, saturate: bool) -> Tensor:
    """Floats of 8 bits; what is too large becomes the largest of them, or what the type has instead."""
    largest = torch.finfo(dtype).max
    return (x.clamp(-largest, largest) if saturate else x).to(dtype)


def _wide(ctx: Ctx, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scale in the type that is divided in."""
    precision = ctx.torch_dtype(ctx.integer("precision")) if ctx.integer("precision") else None
    if precision is not None:
        return x.to(precision), scale.to(precision)
    dtype = torch.promote_types(x.dtype, scale.dtype) if x.dtype.is_floating_point else torch.float32
    return x.to(dtype), scale.to(dtype)


@op("DequantizeLinear", "com.microsoft::DequantizeLinear", kind="raw")
def dequantize_linear(ctx: Ctx, x: Value, scale: Tensor, zero: Value = None) -> Tensor:
    """x[*S] scale[] zero[] -> y[*S]; scale and zero point also per axis or per block."""
    dtype = ctx.need_dtype(ctx.integer("output_dtype")) if ctx.integer("output_dtype") else scale.dtype
    if isinstance(x, Tensor) and x.is_meta:
        return torch.empty(x.shape, dtype=dtype, device="meta")
    if isinstance(x, Tensor) and x.dtype.is_floating_point:
        numbers = x.to(torch.float32)
    elif not isinstance(x, Tensor) and "float" in str(getattr(x, "dtype", "")):
        found = to_torch(x.astype("float32"))  # type: ignore[union-attr]
        assert found is not None
        numbers, zero = found, None
    else:
        numbers = _integers(x)
    axis, block = ctx.integer("axis", 1), ctx.integer("block_size", 0)
    if zero is not None and not numbers.dtype.is_floating_point:
        numbers = numbers - along(_integers(zero), numbers, axis, block)
    wide = torch.float32 if scale.dtype in (torch.float16, torch.bfloat16) else scale.dtype
    y = numbers.to(wide) * along(scale.to(wide), numbers, axis, block)
    return y.to(dtype)


@op("DynamicQuantizeLinear")
def dynamic_quantize_linear(ctx: Ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x[*S] -> y[*S] scale[] zero[]"""
    low, high = torch.aminmax(F.pad(x.flatten(), (0, 1)))  # of the numbers and zero
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    y = (torch.round(x / scale) + zero).clamp(0, 255)
    return y.to(torch.uint8), scale, zero.to(torch.uint8)


def _zero_rows(zero: Tensor) -> Tensor:
    """A zero point per row of the left operand."""
    return zero.unsqueeze(-1) if zero.ndim else zero


def _product(a: Tensor, b: Tensor) -> Tensor:
    """An integer matrix product, exact in float64."""
    return torch.matmul(a.to(torch.float64), b.to(torch.float64)).to(torch.int32)


@op("MatMulInteger", kind="raw")
def matmul_integer(
    ctx: Ctx, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """a[*B,M,K] b[*B,K,N] a_zero[] b_zero[] -> y[*B,M,N] int32"""
    left, right = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        left = left - _zero_rows(a_zero.to(torch.int32))
    if b_zero is not None:
        right = right - b_zero.to(torch.int32)
    return _product(left, right)


@op("QLinearMatMul", kind="raw")
def qlinear_matmul(
    ctx: Ctx,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """a[*B,M,K] b[*B,K,N], each with scale and zero point -> y[*B,M,N]"""
    left = a.to(torch.int32) - _zero_rows(a_zero.to(torch.int32))
    right = b.to(torch.int32) - b_zero.to(torch.int32)
    wide = torch.float32 if y_scale.dtype in (torch.float16, torch.bfloat16) else y_scale.dtype
    factor = _zero_rows(a_scale.to(wide)) * b_scale.to(wide) / y_scale.to(wide)
    y = torch.round(_product(left, right).to(wide) * factor) + y_zero.to(torch.int32)
    return _round_to(y, y_zero.dtype)


def _centred(x: Tensor, zero: Tensor | None) -> Tensor:
    wide = x.to(torch.float64)
    if zero is None:
        return wide
    if zero.numel() == 1:
        return wide - zero.to(torch.float64).reshape(())
    return wide - zero.to(torch.float64).reshape(-1, *[1] * (x.ndim - 1))


@op("ConvInteger", kind="raw")
def conv_integer(
    ctx: Ctx, x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    """x[N,C,*S] w[O,C/g,*K] x_zero[] w_zero[] -> y[N,O,*S'] int32"""
    return convolve(ctx, _centred(x, x_zero), _centred(w, w_zero)).to(torch.int32)


@op("QLinearConv", kind="raw")
def qlinear_conv(
    ctx: Ctx,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    b: Tensor | None = None,
) -> Tensor:
    """x[N,C,*S] w[O,C/g,*K], each with scale and zero point, b[O] int32 -> y[N,O,*S']"""
    bias = None if b is None else b.to(torch.float64)
    total = convolve(ctx, _centred(x, x_zero), _centred(w, w_zero), bias)
    factor = x_scale * w_scale / y_scale
    factor = factor.reshape(-1, *([1] * (x.ndim - 2))) if factor.numel() > 1 else factor.reshape(())
    y = torch.round(total.to(factor.dtype) * factor) + y_zero.to(torch.int32)
    return _round_to(y, y_zero.dtype)

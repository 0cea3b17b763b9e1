"""Elementwise arithmetic, comparison, logic and casts; shapes broadcast as in numpy."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.onnxfile.model import numpy_dtype
from sparsecc.reference.onnx_ops.registry import Ctx, Value, need, op

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos,
    "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh,
    "Acosh": torch.acosh, "Atanh": torch.atanh, "Erf": torch.erf, "Sign": torch.sign,
    "Reciprocal": torch.reciprocal, "IsNaN": torch.isnan, "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Floor": torch.floor, "Round": torch.round,
    "Tanh": torch.tanh, "Sigmoid": torch.sigmoid,
}  # fmt: skip

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Equal": torch.eq,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip

_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Sum": operator.add, "Max": torch.maximum, "Min": torch.minimum,
}  # fmt: skip


def _register_tables() -> None:
    for name, unary in _UNARY.items():
        op(name)(lambda ctx, x, unary=unary: unary(x))
    for name, binary in _BINARY.items():
        op(name)(lambda ctx, a, b, binary=binary: binary(a, b))
    for name, pairwise in _VARIADIC.items():
        op(name)(lambda ctx, *xs, pairwise=pairwise: reduce(pairwise, xs))


_register_tables()

ELEMENTWISE = frozenset(
    [*_UNARY, *_BINARY, *_VARIADIC, "Div", "Mod", "Pow", "Mean", "Where", "Cast", "Clip", "BitShift"]
)


@op("Div")
def div(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*S] b[*S] -> y[*S]; integers are truncated towards zero."""
    if a.dtype.is_floating_point:
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


@op("Mod")
def mod(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*S] b[*S] -> y[*S]; the sign of the divisor, with ``fmod`` that of the dividend."""
    return torch.fmod(a, b) if ctx.flag("fmod") else torch.remainder(a, b)


@op("Pow")
def power(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*S] b[*S] -> y[*S] in the type of the base."""
    if a.dtype.is_floating_point or not b.dtype.is_floating_point:
        return torch.pow(a, b).to(a.dtype)
    return torch.pow(a.to(torch.float64), b.to(torch.float64)).to(a.dtype)


@op("Mean")
def mean(ctx: Ctx, *xs: Tensor) -> Tensor:
    """n inputs[*S] -> y[*S]"""
    return reduce(operator.add, xs) / len(xs)


@op("BitShift")
def bit_shift(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*S] b[*S] -> y[*S]"""
    return a << b if ctx.text("direction") == "LEFT" else a >> b


@op("IsInf")
def is_inf(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    negative, positive = ctx.flag("detect_negative", True), ctx.flag("detect_positive", True)
    if negative and positive:
        return torch.isinf(x)
    if positive:
        return torch.isposinf(x)
    return torch.isneginf(x) if negative else torch.zeros_like(x, dtype=torch.bool)


@op("Where")
def where(ctx: Ctx, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """condition[*S] a[*S] b[*S] -> y[*S]"""
    return torch.where(condition, a, b)


@op("Clip")
def clip(ctx: Ctx, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """x[*S] low[] high[] -> y[*S]"""
    if low is not None:
        x = torch.maximum(x, low.to(x.dtype).reshape(()))
    if high is not None:
        x = torch.minimum(x, high.to(x.dtype).reshape(()))
    return x


@op("Cast", kind="raw")
def cast(ctx: Ctx, x: Value) -> Value:
    """x[*S] -> y[*S]; under promotion a cast to any float is a cast to the promoted type."""
    return cast_to(ctx, x, ctx.integer("to"))


@op("CastLike", kind="raw")
def cast_like(ctx: Ctx, x: Value, like: Value) -> Value:
    """x[*S] like[*T] -> y[*S] in the type of ``like``."""
    if isinstance(x, Tensor) and isinstance(like, Tensor) and not _small(like.dtype):
        return x.to(like.dtype)
    raise UnsupportedModel("CastLike to a small type")  # numpy's reference knows their rounding


def cast_to(ctx: Ctx, x: Value, elem_type: int) -> Value:
    """``x`` in an ONNX element type."""
    dtype = ctx.torch_dtype(elem_type)
    if dtype is None or _small(dtype):
        raise UnsupportedModel("Cast to a small type")
    if isinstance(x, np.ndarray):
        if x.dtype == object:
            raise UnsupportedModel("Cast of strings")
        return ctx.constant(x.astype(np.float32).astype(numpy_dtype(elem_type)))
    return need(x).to(dtype)


def _small(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 and dtype.is_floating_point

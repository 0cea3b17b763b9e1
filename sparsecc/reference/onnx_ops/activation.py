"""Activation functions, softmax among them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op, positive_axis

SELU_ALPHA = 1.67326319217681884765625
SELU_GAMMA = 1.05070102214813232421875


@op("Relu")
def relu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.relu(x)


@op("LeakyRelu")
def leaky_relu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.where(x < 0, x * ctx.real("alpha", 0.01), x)


@op("PRelu")
def prelu(ctx: Ctx, x: Tensor, slope: Tensor) -> Tensor:
    """x[*S] slope[*T] -> y[*S]; the slope broadcasts to x."""
    return torch.where(x < 0, x * slope, x)


@op("Elu")
def elu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.where(x < 0, ctx.real("alpha", 1.0) * torch.expm1(x), x)


@op("Celu")
def celu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    alpha = ctx.real("alpha", 1.0)
    return torch.clamp(x, min=0) + torch.clamp(alpha * torch.expm1(x / alpha), max=0)


@op("Selu")
def selu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    alpha, gamma = ctx.real("alpha", SELU_ALPHA), ctx.real("gamma", SELU_GAMMA)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@op("HardSigmoid")
def hard_sigmoid(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.clamp(x * ctx.real("alpha", 0.2) + ctx.real("beta", 0.5), 0, 1)


@op("HardSwish")
def hard_swish(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


@op("Softplus")
def softplus(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.clamp(x, min=0) + torch.log1p(torch.exp(-torch.abs(x)))


@op("Softsign")
def softsign(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return x / (1 + torch.abs(x))


@op("ThresholdedRelu")
def thresholded_relu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.where(x > ctx.real("alpha", 1.0), x, torch.zeros_like(x))


@op("Gelu", "com.microsoft::Gelu")
def gelu(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return F.gelu(x, approximate=ctx.text("approximate", "none"))


@op("Mish")
def mish(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return x * torch.tanh(F.softplus(x))


@op("Swish")
def swish(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return x * torch.sigmoid(ctx.real("alpha", 1.0) * x)


@op("SwiGLU")
def swiglu(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*S] b[*S] -> y[*S]"""
    return a * torch.sigmoid(ctx.real("alpha", 1.0) * a) * b


@op("Shrink")
def shrink(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    bias, threshold = ctx.real("bias", 0.0), ctx.real("lambd", 0.5)
    zero = torch.zeros_like(x)
    moved = torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, zero))
    return moved.to(x.dtype)


@op("Softmax", since=1)
def softmax_flat(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]; before opset 13 over all axes from ``axis`` on."""
    return _flat(ctx, x, torch.softmax)


@op("Softmax", since=13)
def softmax(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.softmax(x, ctx.integer("axis", -1))


@op("LogSoftmax", since=1)
def log_softmax_flat(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]; before opset 13 over all axes from ``axis`` on."""
    return _flat(ctx, x, torch.log_softmax)


@op("LogSoftmax", since=13)
def log_softmax(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return torch.log_softmax(x, ctx.integer("axis", -1))


@op("Hardmax", since=1)
def hardmax_flat(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]; before opset 13 over all axes from ``axis`` on."""
    return _flat(ctx, x, _hardmax)


@op("Hardmax", since=13)
def hardmax(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]; one at the first maximum along the axis."""
    return _hardmax(x, ctx.integer("axis", -1))


def _hardmax(x: Tensor, axis: int) -> Tensor:
    if not x.numel():
        return x
    first = torch.argmax((x == x.amax(axis, keepdim=True)).to(torch.uint8), axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1.0)


def _flat(ctx: Ctx, x: Tensor, function: object) -> Tensor:
    axis = ctx.integer("axis", 1)
    axis = x.ndim if axis == x.ndim else positive_axis(axis, x.ndim)
    assert callable(function)
    result: Tensor = function(x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])), 1)
    return result.reshape(x.shape)

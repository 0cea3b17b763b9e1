"""Normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, op, positive_axis


def _per_channel(x: Tensor, parameter: Tensor) -> Tensor:
    return parameter.reshape(1, -1, *[1] * (x.ndim - 2)) if x.ndim > 1 else parameter


@op("BatchNormalization", since=1)
def batch_norm(
    ctx: Ctx, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """x[N,C,*S] scale[C] bias[C] mean[C] var[C] -> y[N,C,*S] (mean[C] var[C])"""
    if ctx.flag("training_mode") or (ctx.opset < 14 and ctx.wants(1)):
        if ctx.opset < 14:
            raise UnsupportedModel("BatchNormalization in training mode before opset 14")
        momentum = ctx.real("momentum", 0.9)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        batch_mean = x.mean(axes)
        batch_var = x.var(axes, unbiased=False)
        y = _normalise(ctx, x, scale, bias, batch_mean.to(x.dtype), batch_var.to(x.dtype))
        running_mean = mean * momentum + batch_mean * (1 - momentum)
        running_var = var * momentum + batch_var * (1 - momentum)
        return y, running_mean.to(mean.dtype), running_var.to(var.dtype)
    return _normalise(ctx, x, scale, bias, mean, var)


def _normalise(ctx: Ctx, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    factor = _per_channel(x, scale) / torch.sqrt(_per_channel(x, var) + ctx.real("epsilon", 1e-5))
    return (x - _per_channel(x, mean)) * factor + _per_channel(x, bias)


@op("InstanceNormalization")
def instance_norm(ctx: Ctx, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x[N,C,*S] scale[C] bias[C] -> y[N,C,*S]"""
    axes = list(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    var = (centred * centred).mean(axes, keepdim=True)
    y = centred / torch.sqrt(var + ctx.real("epsilon", 1e-5))
    return y * _per_channel(x, scale) + _per_channel(x, bias)


@op("LayerNormalization")
def layer_norm(ctx: Ctx, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """x[*S,*D] scale[*D] bias[*D] -> y[*S,*D] mean[*S,1..] inv_std[*S,1..]"""
    axes = list(range(positive_axis(ctx.integer("axis", -1), x.ndim), x.ndim))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + ctx.real("epsilon", 1e-5))
    y = centred * inverse * scale
    return (y if bias is None else y + bias), mean, inverse


@op("GroupNormalization", since=18)
def group_norm_18(ctx: Ctx, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x[N,G*c,*S] scale[G] bias[G] -> y[N,G*c,*S]"""
    groups = ctx.integer("num_groups")
    y = _group_normalise(ctx, x, groups)
    repeat = x.shape[1] // groups
    scale, bias = scale.repeat_interleave(repeat), bias.repeat_interleave(repeat)
    return y * _per_channel(x, scale) + _per_channel(x, bias)


@op("GroupNormalization", since=21)
def group_norm(ctx: Ctx, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x[N,G*c,*S] scale[G*c] bias[G*c] -> y[N,G*c,*S]"""
    y = _group_normalise(ctx, x, ctx.integer("num_groups"))
    return y * _per_channel(x, scale) + _per_channel(x, bias)


def _group_normalise(ctx: Ctx, x: Tensor, groups: int) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    var = (centred * centred).mean(-1, keepdim=True)
    return (centred / torch.sqrt(var + ctx.real("epsilon", 1e-5))).reshape(x.shape)


@op("RMSNormalization")
def rms_norm(ctx: Ctx, x: Tensor, scale: Tensor) -> Tensor:
    """x[*S,*D] scale[*D] -> y[*S,*D]"""
    axes = list(range(positive_axis(ctx.integer("axis", -1), x.ndim), x.ndim))
    inverse = torch.rsqrt((x * x).mean(axes, keepdim=True) + ctx.real("epsilon", 1e-5))
    return x * inverse * scale


@op("LpNormalization")
def lp_norm(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]; zero vectors stay zero."""
    axis, p = ctx.integer("axis", -1), ctx.integer("p", 2)
    size = x.abs().sum(axis, keepdim=True) if p == 1 else (x * x).sum(axis, keepdim=True).sqrt()
    return torch.where(size == 0, torch.zeros_like(x), x / size)


@op("LRN")
def lrn(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*S]"""
    size = ctx.integer("size")
    before = (size - 1) // 2
    squares = F.pad(x * x, [0, 0] * (x.ndim - 2) + [before, size - 1 - before])
    total = squares.unfold(1, size, 1).sum(-1)
    alpha, beta, bias = ctx.real("alpha", 1e-4), ctx.real("beta", 0.75), ctx.real("bias", 1.0)
    return x / (bias + alpha / size * total) ** beta


@op("MeanVarianceNormalization")
def mean_variance_norm(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*S]"""
    axes = ctx.integers("axes") or [0, 2, 3]
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt((centred * centred).mean(axes, keepdim=True)) + 1e-9)


@op("Dropout", kind="raw")
def dropout(
    ctx: Ctx, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """x[*S] ratio[] training[] -> y[*S] mask[*S]; the identity outside of training."""
    if training is not None and ctx.item(training):
        share = 0.5 if ratio is None else float(ctx.item(ratio))
        if share > 0:
            raise UnsupportedModel("Dropout in training mode has no defined result; export in eval mode")
    return x, torch.ones_like(x, dtype=torch.bool)


@op("com.microsoft::SkipLayerNormalization")
def skip_layer_norm(
    ctx: Ctx, x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """x[*S,D] skip[*S,D] gamma[D] beta[D] bias[D] -> y[*S,D] mean inv_std sum[*S,D]"""
    total = x + skip if bias is None else x + skip + bias
    mean = total.mean(-1, keepdim=True)
    centred = total - mean
    epsilon = ctx.real("epsilon", 1e-12)
    inverse = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + epsilon)
    y = centred * inverse * gamma
    return (y if beta is None else y + beta), mean, inverse, total

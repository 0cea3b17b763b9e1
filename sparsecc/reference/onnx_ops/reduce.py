"""Reductions, positions of extremes, running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op, positive_axis

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep).to(x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep).to(x.dtype)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return x.mean(axes, keepdim=keep)
    return x.to(torch.float64).mean(axes, keepdim=keep).to(x.dtype)


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    if any(x.shape[axis] == 0 for axis in axes):
        y = x.new_full(shape, _limit(x.dtype, largest))
        return y if keep else y.reshape([size for axis, size in enumerate(shape) if axis not in axes])
    return x.amax(axes, keepdim=keep) if largest else x.amin(axes, keepdim=keep)


def _limit(dtype: torch.dtype, largest: bool) -> float | int | bool:
    """What the maximum (minimum) of nothing is."""
    if dtype == torch.bool:
        return not largest
    if dtype.is_floating_point:
        return float("-inf") if largest else float("inf")
    info = torch.iinfo(dtype)
    return info.min if largest else info.max


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not x.dtype.is_floating_point:
        return torch.logsumexp(x.to(torch.float64), axes, keepdim=keep).to(x.dtype)
    return torch.logsumexp(x, axes, keepdim=keep)


def _root(x: Tensor) -> Tensor:
    return x.sqrt() if x.dtype.is_floating_point else x.to(torch.float64).sqrt().to(x.dtype)


def _log(x: Tensor) -> Tensor:
    return x.log() if x.dtype.is_floating_point else x.to(torch.float64).log().to(x.dtype)


_REDUCTIONS: dict[str, tuple[Reduction, Callable[[Tensor], Tensor] | None]] = {
    "ReduceSum": (_sum, None),
    "ReduceProd": (_prod, None),
    "ReduceMean": (_mean, None),
    "ReduceMax": (lambda x, axes, keep: _extreme(x, axes, keep, True), None),
    "ReduceMin": (lambda x, axes, keep: _extreme(x, axes, keep, False), None),
    "ReduceL1": (lambda x, axes, keep: _sum(x.abs(), axes, keep), torch.abs),
    "ReduceL2": (lambda x, axes, keep: _root(_sum(x * x, axes, keep)), torch.abs),
    "ReduceSumSquare": (lambda x, axes, keep: _sum(x * x, axes, keep), lambda x: x * x),
    "ReduceLogSum": (lambda x, axes, keep: _log(_sum(x, axes, keep)), _log),
    "ReduceLogSumExp": (_log_sum_exp, lambda x: x),
}
"""Each reduction, and what it is over no axes at all (None: the identity)."""


def _reduce(ctx: Ctx, x: Tensor, axes: Tensor | None, name: str) -> Tensor:
    reduction, pointwise = _REDUCTIONS[name]
    wanted = ctx.integers("axes") if axes is None else ctx.int_list(axes)
    if not wanted:
        if ctx.flag("noop_with_empty_axes"):
            return x if pointwise is None else pointwise(x)
        wanted = list(range(x.ndim))
    if x.ndim == 0:
        return reduction(x.reshape(1), [0], False)
    unique = sorted({positive_axis(axis, x.ndim) for axis in wanted})
    keep = ctx.flag("keepdims", True)
    if x.is_meta:
        sizes = [1 if axis in unique else size for axis, size in enumerate(x.shape)]
        return x.new_empty(sizes if keep else [s for axis, s in enumerate(sizes) if axis not in unique])
    return reduction(x, unique, keep)


def _register_reductions() -> None:
    for name in _REDUCTIONS:
        op(name)(lambda ctx, x, axes=None, name=name: _reduce(ctx, x, axes, name))


_register_reductions()


def _arg(ctx: Ctx, x: Tensor, largest: bool) -> Tensor:
    axis = positive_axis(ctx.integer("axis", 0), x.ndim)
    if ctx.flag("select_last_index"):
        flipped = x.flip(axis)
        found = torch.argmax(flipped, axis, True) if largest else torch.argmin(flipped, axis, True)
        found = x.shape[axis] - 1 - found
    else:
        found = torch.argmax(x, axis, True) if largest else torch.argmin(x, axis, True)
    return found if ctx.flag("keepdims", True) else found.squeeze(axis)


@op("ArgMax")
def argmax(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S with axis 1] positions of the first (last) maximum."""
    return _arg(ctx, x, True)


@op("ArgMin")
def argmin(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S with axis 1] positions of the first (last) minimum."""
    return _arg(ctx, x, False)


@op("TopK")
def topk(ctx: Ctx, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """x[*S] k[1] -> values[*S with axis k] positions[*S with axis k]; ties go to the lower position."""
    count, axis = ctx.int_list(k)[0], positive_axis(ctx.integer("axis", -1), x.ndim)
    if x.is_meta:
        shape = [*x.shape[:axis], count, *x.shape[axis + 1 :]]
        return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)
    values, places = torch.sort(x, dim=axis, descending=ctx.flag("largest", True), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _running(ctx: Ctx, x: Tensor, axis: Tensor, function: Callable[..., Tensor], empty: int) -> Tensor:
    along = positive_axis(ctx.int_list(axis)[0], x.ndim)
    if ctx.flag("reverse"):
        x = x.flip(along)
    y = function(x, along).to(x.dtype)
    if ctx.flag("exclusive") and y.shape[along]:
        first = torch.full_like(y.narrow(along, 0, 1), empty)
        y = torch.cat([first, y.narrow(along, 0, y.shape[along] - 1)], along)
    return y.flip(along) if ctx.flag("reverse") else y


@op("CumSum")
def cumsum(ctx: Ctx, x: Tensor, axis: Tensor) -> Tensor:
    """x[*S] axis[] -> y[*S]"""
    return _running(ctx, x, axis, torch.cumsum, 0)


@op("CumProd")
def cumprod(ctx: Ctx, x: Tensor, axis: Tensor) -> Tensor:
    """x[*S] axis[] -> y[*S]"""
    return _running(ctx, x, axis, torch.cumprod, 1)

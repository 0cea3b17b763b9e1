"""Pooling over windows and over all spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.reference.onnx_ops.conv import torch_pads, window_pads
from sparsecc.reference.onnx_ops.registry import Ctx, op


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a pooling node: per spatial axis kernel, stride, dilation, padding, count."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]
    counts: list[int]

    def reach(self, sizes: Sequence[int]) -> list[int]:
        """Padding after each axis so that the last window fits exactly; negative crops."""
        return [
            (count - 1) * s + (k - 1) * d + 1 - size - begin
            for count, s, k, d, size, begin in zip(
                self.counts, self.strides, self.kernel, self.dilations, sizes, self.begins, strict=True
            )
        ]


def windows(ctx: Ctx, sizes: Sequence[int]) -> Windows:
    """The windows over spatial ``sizes``, as attributes, auto_pad and ceil_mode ask."""
    kernel = ctx.integers("kernel_shape") or []
    if len(kernel) != len(sizes):
        raise ValueError(f"kernel_shape {kernel} for {len(sizes)} spatial axes")
    strides = ctx.integers("strides") or [1] * len(sizes)
    dilations = ctx.integers("dilations") or [1] * len(sizes)
    begins, ends = window_pads(ctx, sizes, kernel, strides, dilations)
    ceil = ctx.flag("ceil_mode")
    counts = []
    for size, k, s, d, begin, end in zip(sizes, kernel, strides, dilations, begins, ends, strict=True):
        room = size + begin + end - (k - 1) * d - 1
        count = (-(-room // s) if ceil else room // s) + 1
        if ceil and (count - 1) * s >= size + begin:
            count -= 1  # a window that starts in the padding behind the data does not count
        counts.append(count)
    if min(counts, default=1) < 1:
        raise ValueError(f"windows {kernel} do not fit into {list(sizes)}")
    return Windows(kernel, strides, dilations, begins, ends, counts)


def _unfold(x: Tensor, at: Windows) -> Tensor:
    """x[N,C,*S] (padded to fit) -> [N,C,*S',*K], a view."""
    dims = len(at.kernel)
    for axis, (k, s, d) in enumerate(zip(at.kernel, at.strides, at.dilations, strict=True)):
        x = x.unfold(axis + 2, (k - 1) * d + 1, s)[..., ::d]
    return x if dims else x[..., None]


def _fit(x: Tensor, at: Windows, value: float) -> Tensor:
    return F.pad(x, torch_pads(at.begins, at.reach(x.shape[2:])), value=value)


@op("MaxPool")
def max_pool(ctx: Ctx, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """x[N,C,*S] -> y[N,C,*S'] (positions[N,C,*S'] in the flattened input)"""
    at = windows(ctx, x.shape[2:])
    shape = [*x.shape[:2], *at.counts]
    if x.is_meta:
        return (
            (x.new_empty(shape), x.new_empty(shape, dtype=torch.int64))
            if ctx.wants(1)
            else x.new_empty(shape)
        )
    values = x if x.dtype.is_floating_point else x.to(torch.float32)
    if not ctx.wants(1) and len(at.kernel) in (1, 2, 3):
        return _native_max(values, at).to(x.dtype)
    flat = _unfold(_fit(values, at, float("-inf")), at).reshape(*shape, math.prod(at.kernel))
    if not ctx.wants(1):
        return flat.amax(-1).to(x.dtype)
    best, place = flat.max(-1)
    return best.to(x.dtype), _positions(ctx, x, at, place)


def _native_max(x: Tensor, at: Windows) -> Tensor:
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(at.kernel)]
    y: Tensor = function(_fit(x, at, float("-inf")), at.kernel, at.strides, 0, at.dilations)
    return y


def _positions(ctx: Ctx, x: Tensor, at: Windows, place: Tensor) -> Tensor:
    """Places within windows as positions in the flattened tensor."""
    dims = len(at.kernel)
    order = list(range(dims))
    if ctx.integer("storage_order") == 1:
        order.reverse()
    inside = place
    coordinates: list[Tensor] = []
    for axis in reversed(range(dims)):
        within = inside % at.kernel[axis]
        inside = inside // at.kernel[axis]
        start = torch.arange(at.counts[axis]).reshape(-1, *[1] * (dims - 1 - axis)) * at.strides[axis]
        coordinates.insert(0, start + within * at.dilations[axis] - at.begins[axis])
    flat = torch.zeros_like(place)
    for axis in order:
        flat = flat * x.shape[axis + 2] + coordinates[axis]
    area = 1
    for size in x.shape[2:]:
        area *= size
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * dims)
    return flat + planes * area


@op("AveragePool")
def average_pool(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*S']"""
    at = windows(ctx, x.shape[2:])
    if x.is_meta:
        return x.new_empty([*x.shape[:2], *at.counts])
    dims = list(range(-len(at.kernel), 0))
    total = _unfold(_fit(x, at, 0.0), at).sum(dims)
    ones = x.new_ones(1, 1, *x.shape[2:])
    if ctx.flag("count_include_pad"):
        ones = F.pad(ones, torch_pads(at.begins, at.ends), value=1.0)
        inner = Windows(at.kernel, at.strides, at.dilations, [0] * len(dims), at.ends, at.counts)
        count = _unfold(_fit(ones, inner, 0.0), at).sum(dims)
    else:
        count = _unfold(_fit(ones, at, 0.0), at).sum(dims)
    return total / count


@op("LpPool")
def lp_pool(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*S']"""
    at = windows(ctx, x.shape[2:])
    if x.is_meta:
        return x.new_empty([*x.shape[:2], *at.counts])
    p = ctx.integer("p", 2)
    return _unfold(_fit(x.abs() ** p, at, 0.0), at).sum(list(range(-len(at.kernel), 0))) ** (1.0 / p)


@op("GlobalAveragePool")
def global_average_pool(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*1]"""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*1]"""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,*S] -> y[N,C,*1]"""
    p = ctx.integer("p", 2)
    return (x.abs() ** p).sum(list(range(2, x.ndim)), keepdim=True) ** (1.0 / p)

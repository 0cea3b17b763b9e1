"""Resampling: Resize, Upsample, GridSample, AffineGrid.

Resize is separable: each axis is resampled with a table of source positions and weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, beside, op, positive_axis

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Axis:
    """How one axis is resampled: its scale, its new size and its part of the region of interest."""

    axis: int
    scale: float
    size: int
    roi: tuple[float, float]


@op("Upsample", kind="compute")
def upsample(ctx: Ctx, x: Tensor, scales: Tensor) -> Tensor:
    """x[*S] scales[rank] -> y[*floor(S * scales)]"""
    factors = [float(item) for item in ctx.values(scales).tolist()]
    axes = [_Axis(a, s, math.floor(x.shape[a] * s), (0.0, 1.0)) for a, s in enumerate(factors)]
    return _resample(ctx, x, axes, ctx.text("mode", "nearest"), "asymmetric", "floor")


@op("Resize", since=11)
def resize(
    ctx: Ctx, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """x[*S] roi[2A] scales[A] sizes[A] -> y[*S with those axes resampled]"""
    axes = _resized_axes(ctx, x, roi, scales, sizes)
    transform = ctx.text("coordinate_transformation_mode", "half_pixel")
    nearest = ctx.text("nearest_mode", "round_prefer_floor")
    return _resample(ctx, x, axes, ctx.text("mode", "nearest"), transform, nearest)


def _resized_axes(
    ctx: Ctx, x: Tensor, roi: Tensor | None, scales: Tensor | None, sizes: Tensor | None
) -> list[_Axis]:
    axes = [positive_axis(axis, x.ndim) for axis in ctx.integers("axes") or range(x.ndim)]
    if scales is not None and scales.numel():
        given = ctx.values(scales)
        factors = [float(item) for item in given.tolist()]
        exact = given.to(torch.float32).tolist()
        wanted = [
            math.floor(np.float32(x.shape[a]) * np.float32(s)) for a, s in zip(axes, exact, strict=True)
        ]
    elif sizes is not None:
        wanted = ctx.int_list(sizes)
        factors = [size / x.shape[axis] for axis, size in zip(axes, wanted, strict=True)]
        policy = ctx.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            common = min(factors) if policy == "not_larger" else max(factors)
            factors = [common] * len(axes)
            wanted = [int(common * x.shape[axis] + 0.5) for axis in axes]
    else:
        raise ValueError("Resize needs scales or sizes")
    region = [0.0] * len(axes) + [1.0] * len(axes)
    if roi is not None and roi.numel() and ctx.text("coordinate_transformation_mode") == "tf_crop_and_resize":
        region = [float(item) for item in ctx.values(roi).tolist()]
    spans = [(region[k], region[k + len(axes)]) for k in range(len(axes))]
    return [_Axis(*item) for item in zip(axes, factors, wanted, spans, strict=True)]


def _resample(ctx: Ctx, x: Tensor, axes: list[_Axis], mode: str, transform: str, nearest: str) -> Tensor:
    shape = list(x.shape)
    for at in axes:
        shape[at.axis] = at.size
    if min(shape, default=1) < 0:
        raise ValueError(f"Resize to {shape}")
    if x.is_meta or 0 in shape:
        return x.new_empty(shape)
    y = x if x.dtype.is_floating_point or mode == "nearest" else x.to(torch.float32)
    outside: list[tuple[int, npt.NDArray[np.bool_]]] = []
    for at in axes:
        if at.scale == 1.0 and at.size == x.shape[at.axis] and at.roi == (0.0, 1.0):
            continue
        centres = _centres(transform, at, x.shape[at.axis])
        if transform == "tf_crop_and_resize":
            outside.append((at.axis, (centres < 0) | (centres > x.shape[at.axis] - 1)))
        if mode == "nearest":
            picked = np.clip(_nearest(centres, nearest), 0, x.shape[at.axis] - 1)
            y = y.index_select(at.axis, beside(y, picked))
        else:
            places, weights = _taps(ctx, centres, mode, at.scale, x.shape[at.axis])
            y = _weighted(y, at.axis, places, weights)
    for axis, mask in outside:
        hidden = beside(y, mask).reshape(-1, *[1] * (y.ndim - 1 - axis))
        y = y.masked_fill(hidden, ctx.real("extrapolation_value"))
    if y.dtype != x.dtype:
        info = torch.iinfo(x.dtype)
        y = y.round().clamp(info.min, info.max).to(x.dtype)
    return y


def _weighted(x: Tensor, axis: int, places: Integers, weights: Floats) -> Tensor:
    total: Tensor | None = None
    for tap in range(places.shape[1]):
        factor = beside(x, weights[:, tap]).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
        term = x.index_select(axis, beside(x, places[:, tap])) * factor
        total = term if total is None else total + term
    assert total is not None
    return total


def _centres(transform: str, at: _Axis, size: int) -> Floats:
    """Where each output position lies on the input axis."""
    y = np.arange(at.size, dtype=np.float64)
    length = at.scale * size
    if transform == "align_corners":
        return np.zeros(at.size) if length == 1 else y * (size - 1) / (length - 1)
    if transform == "asymmetric":
        return y / at.scale
    if transform == "tf_crop_and_resize":
        start, end = at.roi
        if length == 1:
            return np.full(at.size, (start + end) * (size - 1) / 2)
        return start * (size - 1) + y * (end - start) * (size - 1) / (length - 1)
    if transform == "pytorch_half_pixel" and length == 1:
        return np.full(at.size, -0.5)
    centres = (y + 0.5) / at.scale - 0.5
    if transform == "half_pixel_symmetric":
        centres = centres + size / 2 * (1 - at.size / length)
    elif transform not in ("half_pixel", "pytorch_half_pixel"):
        raise UnsupportedModel(f"Resize with coordinate_transformation_mode {transform!r}")
    return np.asarray(centres)


def _nearest(centres: Floats, mode: str) -> Integers:
    if mode == "round_prefer_floor":
        chosen = np.ceil(centres - 0.5)
    elif mode == "round_prefer_ceil":
        chosen = np.floor(centres + 0.5)
    elif mode == "floor":
        chosen = np.floor(centres)
    elif mode == "ceil":
        chosen = np.ceil(centres)
    else:
        raise UnsupportedModel(f"Resize with nearest_mode {mode!r}")
    return chosen.astype(np.int64)


def _taps(ctx: Ctx, centres: Floats, mode: str, scale: float, size: int) -> tuple[Integers, Floats]:
    """Source positions and weights of every output position, each [size, taps]."""
    shrink = min(scale, 1.0) if ctx.flag("antialias") else 1.0
    radius = (1 if mode == "linear" else 2) / shrink
    base = np.floor(centres).astype(np.int64)
    reach = math.floor(radius) + 1
    places = base[:, None] + np.arange(1 - reach, reach + 1)
    distance = np.abs(places - centres[:, None]) * shrink
    weights = (
        np.clip(1 - distance, 0, 1)
        if mode == "linear"
        else _cubic(distance, ctx.real("cubic_coeff_a", -0.75))
    )
    if ctx.flag("exclude_outside"):
        weights = np.where((places < 0) | (places >= size), 0.0, weights)
    if ctx.flag("antialias") or ctx.flag("exclude_outside"):
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    used = np.flatnonzero((weights != 0).any(0))
    return np.clip(places, 0, size - 1)[:, used], weights[:, used]


def _cubic(x: Floats, a: float) -> Floats:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@op("GridSample")
def grid_sample(ctx: Ctx, x: Tensor, grid: Tensor) -> Tensor:
    """x[N,C,*S] grid[N,*S',rank] -> y[N,C,*S']"""
    names = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}
    mode = names.get(ctx.text("mode", "bilinear"), "bicubic")
    if x.is_meta:
        return x.new_empty([x.shape[0], x.shape[1], *grid.shape[1:-1]])
    padding = ctx.text("padding_mode", "zeros")
    return F.grid_sample(x, grid.to(x.dtype), mode, padding, align_corners=ctx.flag("align_corners"))


@op("AffineGrid")
def affine_grid(ctx: Ctx, theta: Tensor, size: Tensor) -> Tensor:
    """theta[N,D,D+1] size[D+2] -> grid[N,*S,D]"""
    return F.affine_grid(theta, ctx.int_list(size), align_corners=ctx.flag("align_corners"))

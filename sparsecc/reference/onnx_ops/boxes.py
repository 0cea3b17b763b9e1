"""Boxes in images: which of them to keep, and what they hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, op


@op("NonMaxSuppression", kind="raw")
def non_max_suppression(
    ctx: Ctx,
    boxes: Tensor,
    scores: Tensor,
    many: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """boxes[B,N,4] scores[B,C,N] many[] overlap[] least[] -> chosen[M,3]: batch, class and box"""
    if ctx.hidden(boxes) or ctx.hidden(scores):
        return torch.empty(ctx.counted(), 3, dtype=torch.int64, device="meta")
    limit = 0 if many is None else int(ctx.item(many))
    share = 0.0 if overlap is None else float(ctx.item(overlap))
    corners = _corners(boxes, centred=ctx.flag("center_point_box"))
    chosen = [
        [b, c, n]
        for b in range(scores.shape[0])
        for c in range(scores.shape[1])
        for n in _kept(corners[b], scores[b, c], limit, share, None if least is None else ctx.item(least))
    ]
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """[*,4] as low and high corners, whichever way they are written."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centred:
        return torch.cat([first - second / 2, first + second / 2], -1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _kept(boxes: Tensor, scores: Tensor, limit: int, share: float, least: float | None) -> list[int]:
    """Boxes of one class, best first, without those that overlap a better one too much."""
    kept: list[int] = []
    for n in torch.argsort(scores, descending=True, stable=True).tolist():
        if len(kept) >= limit or (least is not None and float(scores[n]) <= least):
            break
        if all(_overlap(boxes[n], boxes[k]) <= share for k in kept):
            kept.append(n)
    return kept


def _overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union."""
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    common = float(sides.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - common
    return common / union if union > 0 else 0.0


@op("RoiAlign")
def roi_align(ctx: Ctx, x: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
    """x[N,C,H,W] boxes[R,4] images[R] -> y[R,C,h,w], means of samples between positions"""
    sizes = ctx.integer("output_height", 1), ctx.integer("output_width", 1)
    if x.is_meta or boxes.is_meta:
        return torch.empty((boxes.shape[0], x.shape[1], *sizes), dtype=x.dtype, device="meta")
    if ctx.text("mode", "avg") != "avg":
        raise UnsupportedModel("RoiAlign of largest values")
    pixels = (
        ctx.text("coordinate_transformation_mode", "half_pixel" if ctx.opset >= 16 else "") == "half_pixel"
    )
    corners = boxes * ctx.real("spatial_scale", 1.0) - (0.5 if pixels else 0.0)
    y = x.new_zeros(boxes.shape[0], x.shape[1], *sizes)
    for place, (left, top, right, bottom) in enumerate(corners.tolist()):
        down, across = (
            _means(ctx, x, first, last - first if pixels else max(last - first, 1.0), count, length)
            for first, last, count, length in (
                (top, bottom, sizes[0], x.shape[2]),
                (left, right, sizes[1], x.shape[3]),
            )
        )
        y[place] = down @ x[int(images[place])] @ across.T
    return y


def _means(ctx: Ctx, x: Tensor, start: float, span: float, count: int, length: int) -> Tensor:
    """What ``count`` bins over a span of an axis of ``length`` positions take of each position."""
    samples = ctx.integer("sampling_ratio", 0) or max(0, math.ceil(span / count))
    found = x.new_zeros(count, length)
    if not samples:
        return found
    steps = torch.arange(count)[:, None] + (torch.arange(samples) + 0.5) / samples
    at = start + span / count * steps.to(x.dtype)
    inside = ((at >= -1) & (at <= length)).to(x.dtype) / samples
    at = at.clamp(0, length - 1)
    low = at.floor()
    found.scatter_add_(1, low.long(), (1 - (at - low)) * inside)
    return found.scatter_add_(1, (low + 1).clamp(max=length - 1).long(), (at - low) * inside)

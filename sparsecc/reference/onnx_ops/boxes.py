"""Boxes in images: which of them to keep."""

from __future__ import annotations

import torch
from torch import Tensor

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

"""Convolutions whose kernels sample their input at computed places."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, op


@op("DeformConv")
def deform_conv(
    ctx: Ctx, x: Tensor, w: Tensor, offset: Tensor, b: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """x[N,C,H,W] w[O,C/g,*K] offset[N,G*K*2,*S] b[O] mask[N,G*K,*S] -> y[N,O,*S]; G groups of offsets"""
    if x.ndim != 4:
        raise UnsupportedModel(f"DeformConv with {x.ndim - 2} spatial axes")
    n, channels = x.shape[:2]
    kernel, sizes = w.shape[2:], offset.shape[2:]
    lead, groups = ctx.integer("offset_group", 1), ctx.integer("group", 1)
    shares = mask is None or mask.shape == (n, lead * kernel.numel(), *sizes)
    if offset.shape[1] != lead * kernel.numel() * 2 or w.shape[1] * groups != channels or not shares:
        raise ValueError(f"{groups} and {lead} groups, weights {list(w.shape)}, offsets {list(offset.shape)}")
    if x.is_meta or w.is_meta:
        return torch.empty((n, w.shape[0], *sizes), dtype=x.dtype, device="meta")
    places = _places(ctx, kernel, offset.reshape(n * lead, kernel.numel(), 2, *sizes))
    columns = _sampled(x.reshape(n * lead, channels // lead, *x.shape[2:]), places.flatten(2))
    if mask is not None:
        columns = columns * mask.reshape(n * lead, 1, -1)
    columns = columns.reshape(n, groups, channels // groups * kernel.numel(), -1)
    y = torch.matmul(w.reshape(groups, w.shape[0] // groups, -1), columns).reshape(n, -1, *sizes)
    return y if b is None else y + b.reshape(-1, 1, 1)


def _places(ctx: Ctx, kernel: torch.Size, offset: Tensor) -> Tensor:
    """Rows and columns that are sampled: [2,N*G,K,*S]."""
    strides, dilations = ctx.integers("strides") or [1, 1], ctx.integers("dilations") or [1, 1]
    begins = (ctx.integers("pads") or [0] * 4)[:2]
    found = []
    for axis in (0, 1):
        steps = torch.arange(offset.shape[3 + axis], dtype=offset.dtype) * strides[axis] - begins[axis]
        taps = torch.arange(kernel[axis], dtype=offset.dtype) * dilations[axis]
        taps = taps.repeat_interleave(kernel[1]) if axis == 0 else taps.repeat(kernel[0])
        still = taps[:, None, None] + steps.reshape([-1, 1] if axis == 0 else [1, -1])
        found.append(offset[:, :, axis] + still)
    return torch.stack(found)


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    """x[N,C,H,W] at rows and columns places[2,N,P], between its positions, 0 outside -> [N,C,P]."""
    height, width = x.shape[2:]
    first = places.floor()
    share = places - first
    total = x.new_zeros(*x.shape[:2], places.shape[2])
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = first[0] + down, first[1] + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = (share[0] if down else 1 - share[0]) * (share[1] if right else 1 - share[1]) * inside
        at = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        index = at.long()[:, None].expand(-1, x.shape[1], -1)
        total = total + x.flatten(2).gather(2, index) * weight[:, None].to(x.dtype)
    return total

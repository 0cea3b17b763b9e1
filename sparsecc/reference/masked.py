"""Masked semantics: what a pruned model computes, told on the original graph.

A removed position contributes nothing to a contraction over its axis, and a reduction over a
pruned axis is the operator on the kept positions.  Nothing here is slimmed, so agreement with a
slimmed model is evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sparsecc.axes.analysis import Keeps
from sparsecc.axes.solver import Facts
from sparsecc.axes.terms import Keep, Kept
from sparsecc.errors import PlanConflict
from sparsecc.graph import Call, Value

Tensors = list[torch.Tensor | None]
Masks = list[list[Keep | None]]
#: (operand, dim) -> kept positions
Pruned = dict[tuple[int, int], Keep]
Default = Callable[[Tensors], tuple[torch.Tensor, ...]]


class Masked:
    """Runs single calls of the original graph under masked semantics."""

    def __init__(self, keeps: Keeps) -> None:
        self.keeps = keeps
        self._facts = keeps.analysis.solver.facts

    def __call__(self, call: Call, operands: Tensors, default: Default) -> tuple[torch.Tensor, ...]:
        """The outputs of a call, given its operands at full size (removed positions hold anything)."""
        masks = self._operand_masks(call, operands)
        facts = self._facts.get(call)
        if facts is None:
            return default(operands)
        operands = list(operands)
        pruned = self._pruned(call, facts, masks)
        for index, dim in facts.contractions:
            tensor = operands[index]
            keep = masks[index][dim] if masks[index] else None
            if keep is not None and tensor is not None:
                operands[index] = zeroed(tensor, dim, keep, _zero_point(call, operands, index))
        if not pruned:
            return default(operands)
        if call.op in _NARROWED:
            return self._narrowed(call, operands, masks, default)
        rule = _REDUCTIONS.get(call.op)
        if rule is None:
            raise PlanConflict(
                f"{call.describe()} reduces over a pruned axis in a way without masked semantics; "
                "exclude the groups on this axis",
                node=call.name,
            )
        return rule(call, operands, pruned, masks, default)

    def _narrowed(
        self, call: Call, operands: Tensors, masks: Masks, default: Default
    ) -> tuple[torch.Tensor, ...]:
        """The operator on the kept positions of all that it reads; removed ones of its results are 0."""
        kept = [None if t is None else at_kept(t, m) for t, m in zip(operands, masks, strict=True)]
        results = list(default(kept))
        for place, value in zip(call.attrs["outputs"], call.outputs, strict=True):
            y: torch.Tensor = results[place]
            for dim, keep in enumerate(self.keeps.masks(self.keeps.analysis.solver.axes[value])):
                if keep is not None:
                    y = _spread(y, dim, keep)
            results[place] = y
        return tuple(results)

    def _pruned(self, call: Call, facts: Facts, masks: Masks) -> Pruned:
        """Reduced dims of operands that lose positions."""
        found: Pruned = {}
        for index, dim in facts.reductions:
            keep = masks[index][dim] if masks[index] else None
            if keep is not None:
                found[index, dim % len(masks[index])] = keep
        return found

    def _operand_masks(self, call: Call, operands: Tensors) -> Masks:
        return [
            self.keeps.operand(call, i, t.shape) if isinstance(t, torch.Tensor) else []
            for i, t in enumerate(operands)
        ]


def zeroed(x: torch.Tensor, dim: int, keep: Keep, zero: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` with zeros at the removed positions of ``dim`` (0 * inf would be NaN, so no product).

    ``zero`` is what stands for 0 where ``x`` is quantised: one number, or one per row.
    """
    shape = [1] * x.dim()
    shape[dim] = -1
    mask = torch.from_numpy(np.ascontiguousarray(keep)).to(x.device).reshape(shape)
    fill = torch.zeros((), dtype=x.dtype, device=x.device) if zero is None else zero.to(x.dtype)
    return torch.where(mask, x, fill)


def _zero_point(call: Call, operands: Tensors, index: int) -> torch.Tensor | None:
    place = call.attrs.get("zeros", {}).get(index)
    zero: torch.Tensor | None = None if place is None else operands[place]
    if zero is None:
        return None
    if zero.numel() == 1:
        return zero.reshape(())
    return zero.unsqueeze(-1) if index == 0 and zero.dim() == 1 else zero


def at_kept(x: torch.Tensor, kept: Sequence[Kept | None]) -> torch.Tensor:
    """``x`` at the kept positions of all of its axes: masks, or indices in their new order."""
    for dim, choice in enumerate(kept):
        if choice is not None:
            places = np.flatnonzero(choice) if choice.dtype == np.bool_ else choice
            x = x.index_select(dim, torch.from_numpy(places).to(x.device))
    return x


def renumbered(keeps: Keeps, value: Value, tensor: torch.Tensor) -> torch.Tensor:
    """What a value holds in the new numbering, where it holds positions of an axis that shrinks."""
    term = keeps.analysis.solver.places.holds.get(value)
    mask = None if term is None else keeps.mask(term)
    if mask is None:
        return tensor
    number = torch.from_numpy(np.cumsum(mask) - 1)
    return number[tensor.long()].to(tensor.dtype)


def _gathered(
    call: Call, operands: Tensors, pruned: Pruned, masks: Masks, default: Default
) -> tuple[torch.Tensor, ...]:
    operands = list(operands)
    for (index, dim), keep in pruned.items():
        x = operands[index]
        assert x is not None
        operands[index] = x.index_select(dim, torch.from_numpy(np.flatnonzero(keep)))
    return default(operands)


def _scattered(
    call: Call, operands: Tensors, pruned: Pruned, masks: Masks, default: Default
) -> tuple[torch.Tensor, ...]:
    (y,) = _gathered(call, operands, pruned, masks, default)
    for (_, dim), keep in pruned.items():
        y = _spread(y, dim, keep)
    return (y,)


def _picked(
    call: Call, operands: Tensors, pruned: Pruned, masks: Masks, default: Default
) -> tuple[torch.Tensor, ...]:
    """The best of the kept positions, told as positions of the whole axis."""
    values, places = _gathered(call, operands, pruned, masks, default)
    (keep,) = pruned.values()
    return values, torch.from_numpy(np.flatnonzero(keep)).to(places)[places]


def _spread(y: torch.Tensor, dim: int, keep: Keep) -> torch.Tensor:
    """What is known at the kept positions of ``dim``, with zeros between them."""
    shape = list(y.shape)
    shape[dim] = len(keep)
    return torch.zeros(shape, dtype=y.dtype).index_copy(dim, torch.from_numpy(np.flatnonzero(keep)), y)


def _weighted_mean(x: torch.Tensor, weight: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    along = tuple(dims)
    total = torch.where(weight > 0, x, torch.zeros((), dtype=x.dtype)).sum(along, keepdim=True)
    return total / weight.expand(x.shape).sum(along, keepdim=True)


def _layer_norm(
    call: Call, operands: Tensors, pruned: Pruned, masks: Masks, default: Default
) -> tuple[torch.Tensor, ...]:
    x, dims = operands[0], call.attrs["dims"]
    assert x is not None
    weight = torch.ones([1] * x.dim(), dtype=x.dtype)
    for (_, dim), keep in pruned.items():
        shape = [1] * x.dim()
        shape[dim] = -1
        weight = weight * torch.from_numpy(keep.astype(np.float64)).to(x.dtype).reshape(shape)
    y, *statistics = _standardised(x, weight, dims, call.attrs)
    return (_affine(y, operands).contiguous(), *_put_out(call, statistics))


def _standardised(
    x: torch.Tensor, weight: torch.Tensor, dims: Sequence[int], attrs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The standardised tensor, the mean and one over the deviation."""
    eps = attrs.get("eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    mean = _weighted_mean(x, weight, dims)
    centred = x if attrs.get("kind") == "rms" else x - mean
    scale = torch.rsqrt(_weighted_mean(centred * centred, weight, dims) + eps)
    return centred * scale, mean, scale


def _put_out(call: Call, statistics: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The statistics that a call puts out beside its result."""
    count = len(call.outputs) - 1
    found = zip(statistics[2 - count :], call.outputs[1:], strict=True)
    return [t.reshape(t.shape[: len(value.shape)]) for t, value in found]


def _affine(y: torch.Tensor, operands: Tensors) -> torch.Tensor:
    if len(operands) > 1 and operands[1] is not None:
        y = y * operands[1]
    if len(operands) > 2 and operands[2] is not None:
        y = y + operands[2]
    return y


def _group_norm(
    call: Call, operands: Tensors, pruned: Pruned, masks: Masks, default: Default
) -> tuple[torch.Tensor, ...]:
    x, groups = operands[0], call.attrs["groups"]
    assert x is not None
    keep = pruned.get((0, 1))
    if keep is None:
        return default(operands)
    grid = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    kept = torch.from_numpy(keep.astype(np.float64)).to(x.dtype).reshape(1, groups, -1, 1)
    empty = kept.sum(2, keepdim=True) == 0  # a removed group: nothing of it is read
    weight = torch.where(empty, torch.ones_like(kept), kept)
    y, *statistics = _standardised(grid, weight, (2, 3), call.attrs)
    rest = _put_out(call, statistics)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if call.attrs.get("affine") == "group":
        y = _affine(y, [None, *(None if t is None else t.reshape(1, groups, 1, 1) for t in operands[1:3])])
        return (y.reshape(x.shape), *rest)
    y = y.reshape(x.shape)
    return (_affine(y, [None, *(None if t is None else t.reshape(shape) for t in operands[1:3])]), *rest)


_REDUCTIONS: dict[str, Callable[[Call, Tensors, Pruned, Masks, Default], tuple[torch.Tensor, ...]]] = {
    "reduce": _gathered,
    "paired_reduce": _gathered,
    "softmax": _scattered,
    "topk": _picked,
    "qsoftmax": _scattered,
    "instance_norm": _scattered,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}

#: operators that reduce over what several operands hold together: run on the kept positions alone
_NARROWED = frozenset(
    {
        "skip_layer_norm",
        "embed_layer_norm",
        "dynamic_quantize",
        "dynamic_quantize_matmul",
        "quantisation_range",
    }
)

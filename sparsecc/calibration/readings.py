"""How products read weights: a weight as a matrix, and what it is multiplied with as rows.

A layer computes ``y = x @ w.T`` for ``x[R, K]`` and ``w[O, K]``; a convolution does for every one of its G
groups, with the patches under its kernel as rows.  Which axes those are is what the operators' rules
state; nothing is guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.linear import parse_einsum
from sparsecc.graph import Call, Value
from sparsecc.patterns.layers import readers_of, summed_pair, uses
from sparsecc.subject import Step

#: what is computed from the rows ``[G, R, K]`` of a reading
Rows = torch.Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """One product that reads a weight.

    ``dims[d]`` is the axis of the stored weight behind axis ``d`` of the operand; ``axis`` is the stored
    axis that is summed along, ``place`` the operand that it is multiplied with, and ``along`` its axis.
    """

    weight: str
    call: Call
    operand: int
    dims: tuple[int | None, ...]
    axis: int
    place: int
    along: int
    groups: int = 1

    @property
    def is_conv(self) -> bool:
        """Whether rows are patches."""
        return self.call.op == "conv"

    @property
    def source(self) -> tuple[Any, ...]:
        """Equal for readings with equal rows."""
        value = self.call.inputs[self.place]
        return (self.call,) if self.is_conv else (value, self.along)

    @property
    def name(self) -> str:
        """Equal where ``source`` is, as text."""
        value = self.call.inputs[self.place]
        return self.call.name if self.is_conv or value is None else f"{value.name}[{self.along}]"

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as ``[G, O/G, K]``."""
        if self.is_conv:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        moved = weight.movedim(self.axis, -1)
        return moved.reshape(1, -1, moved.shape[-1])

    def stored(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Inverse of ``matrix``: ``[G, O/G, K]`` as a weight of ``shape``."""
        if self.is_conv:
            return matrix.reshape(shape)
        moved = [n for d, n in enumerate(shape) if d != self.axis]
        return matrix.reshape(*moved, shape[self.axis]).movedim(-1, self.axis)

    def seen(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as the operand that the call reads."""
        held = [d for d in self.dims if d is not None]
        out = weight.permute(held)
        for place, source in enumerate(self.dims):
            if source is None:
                out = out.unsqueeze(place)
        return out

    def rows(self, step: Step) -> Rows:
        """What the weight is multiplied with in a step: ``[G, R, K]``, in the order of ``matrix``."""
        x: torch.Tensor = step.operands[self.place]
        if not self.is_conv:
            return x.movedim(self.along, -1).reshape(1, -1, x.shape[self.along])
        patches = self._patches(step, x)
        channels = patches.movedim(self._channel(step), 0)
        return channels.reshape(self.groups, -1, channels[0].numel()).transpose(1, 2)

    def summed(self, step: Step, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``function(rows).sum(1)``, ``[G, K]``, for an elementwise function with f(0) = 0.

        Patches repeat what they are made of, so that samples can be summed before patches are taken.
        """
        x: torch.Tensor = step.operands[self.place]
        if not self.is_conv:
            values = function(x)
            other = [d for d in range(x.dim()) if d != self.along % x.dim()]
            return (values.sum(other) if other else values)[None]
        values = function(x)
        at = self._channel(step)
        values = values.sum(0, keepdim=True) if at else values
        patches = self._patches(step, values)
        return patches.sum([d for d in range(x.dim()) if d != at]).reshape(self.groups, -1)

    def count(self, step: Step, result: torch.Tensor) -> int:
        """R: how many rows a step has (positions of the result, for a convolution)."""
        x: torch.Tensor = step.operands[self.place]
        whole, size = (
            (result, result.shape[self._channel(step)]) if self.is_conv else (x, x.shape[self.along])
        )
        return int(whole.numel() // max(size, 1))

    def _channel(self, step: Step) -> int:
        return int(step.operands[self.place].dim() - step.operands[self.operand].dim() + 1)

    def _patches(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        """The patches as channels of a result: the convolution itself, with one weight in every kernel.

        It has as many kernels as the original, and runs as often as it takes: masks of its results fit then.
        """
        w: torch.Tensor = step.operands[self.operand]
        size, width = w[0].numel(), len(w) // self.groups
        at = self._channel(step)
        operands = list(step.operands)
        for place, value in enumerate(operands):
            if place not in (self.place, self.operand) and value is not None:
                operands[place] = torch.zeros(len(w), dtype=x.dtype, device=x.device)
        operands[self.place] = x
        parts = []
        rows = -(-size // width) * width
        for kernels in torch.eye(rows, size, dtype=x.dtype, device=x.device).split(width):
            operands[self.operand] = kernels.repeat(self.groups, 1).reshape(w.shape)
            parts.append(step.run(list(operands))[0].unflatten(at, (self.groups, width)))
        return torch.cat(parts, at + 1).narrow(at + 1, 0, size).flatten(at, at + 1)


@dataclass(frozen=True, eq=False)
class Readings:
    """Every product that reads a stored weight as a matrix, by weight and by call."""

    of: Mapping[str, tuple[Reading, ...]]
    why: Mapping[str, str]

    @cached_property
    def at(self) -> dict[Call, list[Reading]]:
        """Readings by the call that does them."""
        out: dict[Call, list[Reading]] = {}
        for every in self.of.values():
            for reading in every:
                out.setdefault(reading.call, []).append(reading)
        return out

    def __contains__(self, weight: str) -> bool:
        return weight in self.of


def readings(analysis: Analysis) -> Readings:
    """The products of a model.  A weight with one product that is no matrix product has a reason instead."""
    readers = readers_of(analysis.view)
    found: dict[str, tuple[Reading, ...]] = {}
    why: dict[str, str] = {}
    for name, value in analysis.view.weights.items():
        if len(value.shape) < 2:
            continue
        every = list(_products(analysis, readers, name, value))
        reasons = [r for r in every if isinstance(r, str)]
        if reasons:
            why[name] = reasons[0]
        elif every:
            found[name] = tuple(r for r in every if isinstance(r, Reading))
    return Readings(found, why)


def _products(
    analysis: Analysis, readers: dict[Value, list[tuple[Call, int]]], name: str, value: Value
) -> Iterator[Reading | str]:
    for call, operand, seen in uses(analysis.view, readers, value):
        pair = summed_pair(analysis, call, operand)
        if pair is None and call.op == "conv" and operand == 1:
            pair = (1, 0, len(call.inputs[0].shape) - len(value.shape) + 1)  # type: ignore[union-attr]
        if pair is None:
            continue
        mine, place, along = pair
        axis = seen.dims[mine % len(seen.dims)]
        if axis is None:
            yield f"{call.describe()} sums along an axis that the stored weight does not have"
            continue
        reason = _refusal(call, operand, seen.dims)
        groups = call.attrs["groups"] if call.op == "conv" else 1
        yield reason or Reading(name, call, operand, seen.dims, axis, place, along, groups)


def _refusal(call: Call, operand: int, dims: tuple[int | None, ...]) -> str:
    """Why the operand is no matrix, or ''."""
    if call.op == "conv":
        straight = dims == tuple(range(len(dims)))
        return "" if straight else f"{call.describe()} reads it transposed"
    if call.op == "einsum":
        labels, output = parse_einsum(
            call.attrs["equation"], [len(v.shape) for v in call.inputs if v is not None]
        )
        shared = set(labels[0]) & set(labels[1]) & set(output)
        return f"{call.describe()} multiplies it along a batch axis" if shared else ""
    value = call.inputs[operand]
    assert value is not None
    if sum(size > 1 for size in value.shape) > 2:
        return f"{call.describe()} reads a batch of matrices"
    return ""

"""How products read weights: a weight as a matrix, and what it is multiplied with as rows.

A layer computes ``y = x @ w.T`` for ``x[R, K]`` and ``w[O, K]``; a convolution does for every one of its G
groups, with the patches under its kernel as rows, and a stack of G matrices (the experts of a mixture) for
every one of them.  Which axes those are is what the operators' rules state; nothing is guessed from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

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

    ``stack``: stored axes along which matrices are stacked, each with the axis of the other operand that
    runs beside it (None: all matrices read the same).  ``ends``: the operand that says at which row of the
    other one each matrix stops to read.
    """

    weight: str
    call: Call
    operand: int
    dims: tuple[int | None, ...]
    axis: int
    place: int
    along: int
    groups: int = 1
    stack: tuple[tuple[int, int | None], ...] = ()
    ends: int | None = None

    @property
    def is_conv(self) -> bool:
        """Whether rows are patches."""
        return self.call.op == "conv"

    @property
    def source(self) -> tuple[Any, ...]:
        """Equal for readings with equal rows."""
        value = self.call.inputs[self.place]
        return (self.call,) if self.is_conv or self.stack else (value, self.along)

    @property
    def name(self) -> str:
        """Equal where ``source`` is, as text."""
        value = self.call.inputs[self.place]
        if self.is_conv or self.stack or value is None:
            return self.call.name
        return f"{value.name}[{self.along}]"

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as ``[G, O/G, K]``."""
        if self.is_conv:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        moved = weight.movedim(*self._moves)
        return moved.reshape(self.groups, -1, moved.shape[-1])

    def stored(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Inverse of ``matrix``: ``[G, O/G, K]`` as a weight of ``shape``."""
        if self.is_conv:
            return matrix.reshape(shape)
        there, here = self._moves
        others = [n for d, n in enumerate(shape) if d not in there]
        sizes = [shape[d] for d in there]
        return matrix.reshape(*sizes[:-1], *others, sizes[-1]).movedim(here, there)

    @property
    def _moves(self) -> tuple[list[int], list[int]]:
        """Stored axes of the stack and of the sum, and where ``matrix`` has them."""
        stack = [axis for axis, _ in self.stack]
        return [*stack, self.axis], [*range(len(stack)), -1]

    def seen(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as the operand that the call reads."""
        held = [d for d in self.dims if d is not None]
        out = weight.permute(held)
        for place, source in enumerate(self.dims):
            if source is None:
                out = out.unsqueeze(place)
        return out

    def rows(self, step: Step) -> Rows:
        """What the weight is multiplied with in a step: ``[G, R, K]``, in the order of ``matrix``.

        Matrices that read fewer rows than others have zeros for the rest.
        """
        x: torch.Tensor = step.operands[self.place]
        if self.ends is not None:
            return pad_sequence(self.parts(step), batch_first=True)
        if self.stack:
            return self._stacked(step, x)
        if not self.is_conv:
            return x.movedim(self.along, -1).reshape(1, -1, x.shape[self.along])
        patches = self._patches(step, x)
        channels = patches.movedim(self._channel(step), 0)
        return channels.reshape(self.groups, -1, channels[0].numel()).transpose(1, 2)

    def parts(self, step: Step) -> list[torch.Tensor]:
        """The rows of every group, ``[R, K]`` each."""
        if self.ends is None:
            return list(self.rows(step))
        x: torch.Tensor = step.operands[self.place]
        ends = [int(end) for end in step.operands[self.ends]]
        return [x[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _stacked(self, step: Step, x: torch.Tensor) -> Rows:
        """Rows ``[G, R, K]`` of what is read beside the axes of the stack."""
        w: torch.Tensor = step.operands[self.operand]
        sizes = [w.shape[self.dims.index(axis)] for axis, _ in self.stack]
        beside = [axis % x.dim() for _, axis in self.stack if axis is not None]
        along = self.along % x.dim()
        others = [d for d in range(x.dim()) if d not in (*beside, along)]
        rows = x.permute(*beside, *others, along).flatten(len(beside), -2) if others else x.unsqueeze(-2)
        for place, (_, axis) in enumerate(self.stack):
            rows = rows.unsqueeze(place) if axis is None else rows
        return rows.expand(*sizes, -1, -1).reshape(self.groups, -1, rows.shape[-1])

    def completed(self, moment: torch.Tensor) -> torch.Tensor:
        """A moment ``[G, ...]`` where matrices of a stack that read nothing have the mean of the others.

        Experts that no calibration data reaches are thus pruned for what the others are fed with; where none
        was reached, as if all they read had one size.
        """
        if not self.stack:
            return moment
        read = moment.flatten(1).any(1)
        if bool(read.all()):
            return moment
        if bool(read.any()):
            instead = moment[read].mean(0)
        else:
            instead = torch.ones_like(moment[0]) if moment.dim() == 2 else torch.eye(len(moment[0]))
        return torch.where(read.reshape(-1, *[1] * (moment.dim() - 1)), moment, instead.to(moment.dtype))

    def summed(self, step: Step, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``function(rows).sum(1)``, ``[G, K]``, for an elementwise function with f(0) = 0.

        Patches repeat what they are made of, so that samples can be summed before patches are taken.
        """
        x: torch.Tensor = step.operands[self.place]
        if self.stack:
            return torch.stack([function(part).sum(0) for part in self.parts(step)])
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
        """R: how many rows a step has (positions of the result, for a convolution).

        Of a stack, how many each matrix reads; where ``ends`` say that, how many all of them do.
        """
        x: torch.Tensor = step.operands[self.place]
        if self.stack:
            beside = math.prod(x.shape[axis] for _, axis in self.stack if axis is not None)
            return x.numel() // max(beside * x.shape[self.along], 1)
        whole, size = (
            (result, result.shape[self._channel(step)]) if self.is_conv else (x, x.shape[self.along])
        )
        return int(whole.numel() // max(size, 1))

    def _channel(self, step: Step) -> int:
        return int(step.operands[self.place].dim() - step.operands[self.operand].dim() + 1)

    def _patches(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        """The patches as channels of a result: the convolution itself, with one weight in every kernel.

        It has as many kernels as the original, and runs as often as it takes.
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
        run = step.whole or step.run  # what a pruned layer would read had it lost nothing, as for matrices
        rows = -(-size // width) * width
        for kernels in torch.eye(rows, size, dtype=x.dtype, device=x.device).split(width):
            operands[self.operand] = kernels.repeat(self.groups, 1).reshape(w.shape)
            parts.append(run(list(operands))[0].unflatten(at, (self.groups, width)))
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
        products = tuple(r for r in every if isinstance(r, Reading))
        if reasons:
            why[name] = reasons[0]
        elif len({tuple(axis for axis, _ in r.stack) for r in products}) > 1:
            why[name] = "products stack it along different axes"
        elif products:
            found[name] = products
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
        stack = _stack(call, operand, place, seen.dims)
        if isinstance(stack, str):
            yield stack
            continue
        groups = call.attrs["groups"] if call.op == "conv" else math.prod(value.shape[d] for d, _ in stack)
        ends = _ENDS.get(call.op)
        yield Reading(name, call, operand, seen.dims, axis, place, along, groups, stack, ends)


#: operators that deal rows to the matrices of a stack, and the operand that says how
_ENDS = {"grouped_matmul": 2}

Stack = tuple[tuple[int, int | None], ...]


def _stack(call: Call, operand: int, place: int, dims: tuple[int | None, ...]) -> Stack | str:
    """The stored axes along which the operand stacks matrices, or why it is none."""
    value, other = call.inputs[operand], call.inputs[place]
    assert value is not None
    assert other is not None
    if call.op == "conv":
        straight = dims == tuple(range(len(dims)))
        return () if straight else f"{call.describe()} reads it transposed"
    found: dict[int, int | None]  # axis of the operand -> that of the other one
    if call.op == "einsum":
        shapes = [len(v.shape) for v in call.inputs if v is not None]
        labels, output = parse_einsum(call.attrs["equation"], shapes)
        mine, theirs = labels[operand], labels[place]
        found = {mine.index(x): theirs.index(x) for x in mine if x in theirs and x in output}
    elif call.op == "grouped_matmul":
        found = {0: None}
    else:
        rank = len(value.shape)
        found = {d: d - rank if rank - d <= len(other.shape) else None for d in range(rank - 2)}
    stacked = {d: axis for d, axis in found.items() if value.shape[d] > 1}
    if stacked and call.op not in _STACKING:
        return f"{call.describe()} reads a batch of matrices"
    pairs = [(stored, axis) for d, axis in stacked.items() if (stored := dims[d]) is not None]
    if len(pairs) < len(stacked):
        return f"{call.describe()} stacks it along an axis that the stored weight does not have"
    return tuple(pairs)


#: operators whose weight may be a stack of matrices
_STACKING = frozenset({"matmul", "einsum", "grouped_matmul"})

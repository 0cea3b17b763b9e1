"""SparseGPT on whole models: masks and updates, layer by layer, on what the pruned model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import Statistics
from sparsecc.calibration.readings import Reading
from sparsecc.patterns.layers import layers
from sparsecc.plan import Action, Pattern, Skip
from sparsecc.recovery.obs import Columns, surgeon
from sparsecc.recovery.sequential import Moment, Recovery, masked_where, second_moment, written
from sparsecc.selection import selected
from sparsecc.subject import Step


@dataclass
class Surgery:
    """What SparseGPT did: actions, what to tell of every layer, and layers left alone."""

    actions: list[Action] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What is to become of every layer: ``unit`` columns have to be a divisor of its width."""

    columns: Columns
    unit: int
    name: str
    damping: float


def sparse_gpt(
    analysis: Analysis,
    statistics: Statistics,
    wanted: Wanted,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Surgery:
    """Prune and update every layer that may be touched, in the order in which they run.

    A layer that several calls read is updated at the first, on what the original model's calls read.
    """
    out = Surgery()
    targets = _targets(analysis, statistics, include, exclude, out)
    recovery = Recovery(statistics, analysis)
    keeps: dict[str, torch.Tensor] = {}
    hessians: dict[tuple[Any, ...], torch.Tensor] = {}

    def update(moment: Moment) -> Mapping[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for reading in statistics.readings.at.get(moment.call, ()):
            if reading.weight not in targets or reading.weight in recovery.values:
                continue
            hessian = _hessian(reading, moment.pruned, statistics, hessians)
            value, keep = _operated(recovery, reading, hessian, wanted, out)
            if keep is not None:
                new[reading.weight], keeps[reading.weight] = value, keep
        return new

    values = recovery.run(update, "pruning layer by layer")
    out.actions += [*written(values, analysis), *masked_where(keeps)]
    return out


def _targets(
    analysis: Analysis,
    statistics: Statistics,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    out: Surgery,
) -> set[str]:
    chosen = selected(analysis, include, exclude)
    found: set[str] = set()
    for layer in layers(analysis):
        if layer.weight in analysis.given.lost:
            continue
        reason = layer.why or chosen(layer.weight) or statistics.readings.why.get(layer.weight, "")
        if not reason and layer.weight not in statistics.readings:
            reason = "no product reads it as a matrix"
        if reason:
            out.skips.append(Skip(layer.weight, reason))
        else:
            found.add(layer.weight)
    return found


def _hessian(
    reading: Reading,
    steps: Sequence[Step],
    statistics: Statistics,
    known: dict[tuple[Any, ...], torch.Tensor],
) -> torch.Tensor:
    if len({r.source for r in statistics.readings.of[reading.weight]}) > 1:
        found = statistics.moments(reading.weight, "hessian")
        assert found is not None
        return found.sums["hessian"]
    if reading.source not in known:
        known.clear()  # layers that read the same value stand side by side
        known[reading.source] = second_moment(reading, steps, steps)
    return known[reading.source]


def _operated(
    recovery: Recovery, reading: Reading, hessian: torch.Tensor, wanted: Wanted, out: Surgery
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """New values and mask of one weight; no mask where it is left as it is."""
    weight, name = recovery.current(reading.weight), reading.weight
    shape = weight.shape
    places = Places.of(recovery, reading, shape)
    reason = _unfit(places.width, weight, hessian, wanted)
    if reason:
        out.skips.append(Skip(name, reason))
        out.patterns.append(Pattern(name, reading.axis, wanted.name, "dense"))
        return weight, None
    given = recovery.analysis.given.masks.get(name)
    mask = torch.ones(shape, dtype=torch.bool) if given is None else torch.from_numpy(np.array(given))
    value, keep = weight.clone(), mask.clone()
    matrix, masks = reading.matrix(weight), reading.matrix(mask)
    new, kept = reading.matrix(value).clone(), reading.matrix(keep).clone()
    for group in range(matrix.shape[0]):
        rows, columns = places.rows(group), places.columns
        part = np.ix_(rows.numpy(), columns.numpy())
        found, stays = surgeon(
            matrix[group][part],
            hessian[group][columns][:, columns].to(weight.dtype),
            wanted.columns,
            damping=wanted.damping,
            allowed=None if given is None else masks[group][part],
        )
        new[group][part], kept[group][part] = found, stays
    value, keep = reading.stored(new, shape), reading.stored(kept, shape)
    before = _sum(torch.where(mask, weight, 0), places, reading)
    after = _sum(torch.where(keep, weight, 0), places, reading)
    out.patterns.append(Pattern(name, reading.axis, wanted.name, "pruned", after, before))
    return value.contiguous(), keep.contiguous()


def _sum(weight: torch.Tensor, places: Places, reading: Reading) -> float:
    matrix = reading.matrix(weight.abs().double())
    return float(sum(matrix[g][places.rows(g)][:, places.columns].sum() for g in range(matrix.shape[0])))


def _unfit(width: int, weight: torch.Tensor, hessian: torch.Tensor, wanted: Wanted) -> str:
    """Why a layer is left as it is, or ''."""
    if width % wanted.unit:
        return f"its sums run over {width} positions, which are no multiple of {wanted.unit}"
    if not torch.isfinite(weight).all():
        return "it holds NaN or infinite elements"
    if not torch.isfinite(hessian).all():
        return "what it reads on the calibration data is not finite"
    return ""


@dataclass(frozen=True)
class Places:
    """Rows and columns of a weight's matrices that earlier passes keep.

    Columns are in the order in which a pattern runs: along the summed axis, for every kernel position.
    """

    out: torch.Tensor
    columns: torch.Tensor
    width: int
    groups: int
    per_group: int

    @classmethod
    def of(cls, recovery: Recovery, reading: Reading, shape: torch.Size) -> Places:
        """The places of a weight of that shape."""
        kept = recovery.kept(reading.weight)
        along = kept[reading.axis]
        along = torch.arange(shape[reading.axis]) if along is None else along
        if not reading.is_conv:
            keep = torch.ones(shape, dtype=torch.bool)
            for axis, places in enumerate(kept):
                if places is not None and axis != reading.axis:
                    hit = torch.zeros(shape[axis], dtype=torch.bool)
                    hit[places] = True
                    keep &= hit.reshape([-1 if d == axis else 1 for d in range(len(shape))])
            out = torch.nonzero(reading.matrix(keep)[0].all(1)).flatten()
            return cls(out, along, len(along), 1, len(out))
        positions = int(np.prod(shape[2:]))
        columns = (torch.arange(positions)[:, None] + along[None] * positions).reshape(-1)
        out = torch.arange(shape[0]) if kept[0] is None else kept[0]
        return cls(out, columns, len(along), reading.groups, shape[0] // reading.groups)

    def rows(self, group: int) -> torch.Tensor:
        """Kept rows of the matrix of a group."""
        if self.groups == 1:
            return self.out
        here = (self.out >= group * self.per_group) & (self.out < (group + 1) * self.per_group)
        return self.out[here] - group * self.per_group

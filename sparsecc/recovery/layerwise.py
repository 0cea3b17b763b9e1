"""Masks and updates, layer by layer, from what each layer reads in the pruned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import Statistics
from sparsecc.calibration.readings import Reading
from sparsecc.patterns.layers import layers
from sparsecc.plan import Action, Pattern, Skip
from sparsecc.recovery.obs import Choose, Columns, surgeon
from sparsecc.recovery.sequential import Moment, Recovery, masked_where, summed, written
from sparsecc.saliency.elementwise import all_finite
from sparsecc.selection import selected
from sparsecc.subject import Step


@dataclass
class Surgery:
    """What was done: actions, what to tell of every layer, and layers left alone."""

    actions: list[Action] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


#: (weight ``[O, K]``, moment, elements that may stay) -> (new values, mask of what stays)
Operate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Method:
    """What becomes of every layer: ``unit`` columns have to be a divisor of its width.

    ``moment``: ``hessian``, the sum of x.T x ``[K, K]`` over the rows that the layer reads, or ``square``,
    its diagonal ``[K]``.
    """

    name: str
    unit: int
    moment: Literal["hessian", "square"]
    operate: Operate


def surgery(columns: Columns, unit: int, name: str, damping: float) -> Method:
    """SparseGPT: what stays makes up for what goes."""
    return Method(
        name,
        unit,
        "hessian",
        lambda w, moment, allowed: surgeon(w, moment, columns, damping=damping, allowed=allowed),
    )


def selection(choose: Choose, unit: int, name: str) -> Method:
    """Wanda: the highest |w| ||x|| stay as they are."""

    def operate(
        weight: torch.Tensor, moment: torch.Tensor, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = weight.square() * moment
        scores = scores if allowed is None else torch.where(allowed, scores, -1.0)
        keep = choose(scores)
        keep = keep if allowed is None else keep & allowed
        return weight * keep, keep

    return Method(name, unit, "square", operate)


#: told every weight with its new values and mask as soon as they are known
Sink = Callable[[str, torch.Tensor, torch.Tensor], None]


def prune_layers(
    analysis: Analysis,
    statistics: Statistics,
    method: Method,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    sink: Sink | None = None,
) -> Surgery:
    """Prune every layer that may be touched, in the order in which they run.

    A layer that several calls read is worked on at the first, on what the original model's calls read.  With
    a ``sink`` nothing is held: it is told, and the result has no actions.
    """
    out = Surgery()
    targets = _targets(analysis, statistics, include, exclude, out)
    recovery = Recovery(statistics, analysis, held=sink is None)
    keeps: dict[str, torch.Tensor] = {}
    moments: dict[tuple[Any, ...], torch.Tensor] = {}
    done: set[str] = set()
    readers = _by_source(statistics, targets)

    def update(moment: Moment) -> Mapping[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for reading in statistics.readings.at.get(moment.call, ()):
            if reading.weight not in targets or reading.weight in done:
                continue
            done.add(reading.weight)
            found = _moment(reading, moment.pruned, statistics, moments, method)
            owned = readers.get(reading.source, set()) <= done
            value, keep = _operated(recovery, reading, found, method, out, owned=owned)
            if owned:
                moments.pop(reading.source, None)
            del found
            if keep is None:
                continue
            out.patterns.append(_told(recovery, reading, keep, method))
            new[reading.weight] = value
            if sink is None:
                keeps[reading.weight] = keep
            else:
                sink(reading.weight, value, keep)
        return new

    last = recovery.last_reader(targets)
    values = recovery.run(update, "pruning layer by layer", last) if last else {}
    if sink is None:
        out.actions += [*written(values, analysis), *masked_where(keeps)]
    return out


def _by_source(statistics: Statistics, targets: set[str]) -> dict[tuple[Any, ...], set[str]]:
    """Weights by the one value that they are multiplied with."""
    out: dict[tuple[Any, ...], set[str]] = {}
    for weight in targets:
        sources = {r.source for r in statistics.readings.of[weight]}
        for source in sources:
            held = {weight} if len(sources) == 1 else {weight, ""}  # the sum of several is nobody's own
            out.setdefault(source, set()).update(held)
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
        if not reason and layer.coded:
            reason = "it is quantised: prune layer by layer before that"
        if not reason and layer.weight not in statistics.readings:
            reason = "no product reads it as a matrix"
        if reason:
            out.skips.append(Skip(layer.weight, reason))
        else:
            found.add(layer.weight)
    return found


def _moment(
    reading: Reading,
    steps: Sequence[Step],
    statistics: Statistics,
    known: dict[tuple[Any, ...], torch.Tensor],
    method: Method,
) -> torch.Tensor:
    """The method's moment over all batches, ``[G, K, K]`` or ``[G, K]``."""
    if len({r.source for r in statistics.readings.of[reading.weight]}) > 1:
        found = statistics.moments(reading.weight, method.moment)
        assert found is not None
        return reading.completed(found.sums[method.moment])
    if reading.source not in known:
        known.clear()  # layers that read the same value stand side by side
        known[reading.source] = reading.completed(summed(reading, steps, method.moment))
    return known[reading.source]


def _operated(
    recovery: Recovery,
    reading: Reading,
    moment: torch.Tensor,
    method: Method,
    out: Surgery,
    *,
    owned: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """New values and mask of one weight; no mask where it is left as it is.

    ``owned``: nobody needs the moment any more.
    """
    weight, name = recovery.current(reading.weight), reading.weight
    shape = weight.shape
    places = Places.of(recovery, reading, shape)
    reason = _unfit(places.width, weight, moment, method)
    if reason:
        out.skips.append(Skip(name, reason))
        out.patterns.append(Pattern(name, reading.axis, method.name, "dense"))
        return weight, None
    given = recovery.analysis.given.masks.get(name)
    matrix = reading.matrix(weight)
    allowed = None if given is None else reading.matrix(torch.from_numpy(np.array(given)))
    if places.everything and len(matrix) == 1:
        found = method.operate(matrix[0], moment[0] if owned else moment[0].clone(), _first(allowed))
        new, kept = found[0][None], found[1][None]
    else:
        new = matrix.clone()
        kept = torch.ones(matrix.shape, dtype=torch.bool) if allowed is None else allowed.clone()
        for group in range(len(matrix)):
            rows = places.rows(group)
            if not len(rows):
                continue
            part = np.ix_(rows.numpy(), places.columns.numpy())
            new[group][part], kept[group][part] = method.operate(
                matrix[group][part],
                _at(moment[group], places.columns).to(weight.dtype),
                None if allowed is None else allowed[group][part],
            )
    value, keep = reading.stored(new, shape), reading.stored(kept, shape)
    return value.contiguous(), keep.contiguous()


def _first(masks: torch.Tensor | None) -> torch.Tensor | None:
    return None if masks is None else masks[0]


def _at(moment: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The moment of some columns, in their order."""
    moment = moment.index_select(0, columns)
    return moment.index_select(1, columns) if moment.dim() == 2 else moment


def _told(recovery: Recovery, reading: Reading, keep: torch.Tensor, method: Method) -> Pattern:
    """What became of a weight, over the positions that earlier passes keep; magnitudes before the update."""
    weight = recovery.current(reading.weight)
    given = recovery.analysis.given.masks.get(reading.weight)
    if given is not None:
        weight = torch.where(torch.from_numpy(np.array(given)), weight, 0)
    places = Places.of(recovery, reading, weight.shape)
    before, stays = _there(reading, places, weight), _there(reading, places, keep)
    return Pattern(
        reading.weight,
        reading.axis,
        method.name,
        "pruned",
        kept=sum(_magnitude(b * s) for b, s in zip(before.split(_FEW), stays.split(_FEW), strict=True)),
        total=_magnitude(before),
        zeros=int(stays.numel() - stays.sum()),
        size=stays.numel(),
    )


#: elements that are looked at together, where a second copy of a layer would matter
_FEW = 1 << 18


def _magnitude(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values.reshape(-1), 1, dtype=torch.float64))


def _there(reading: Reading, places: Places, tensor: torch.Tensor) -> torch.Tensor:
    """The elements at kept positions, in a row."""
    matrix = reading.matrix(tensor)
    if places.everything:
        return matrix.reshape(-1)
    parts = [matrix[g][places.rows(g)][:, places.columns].reshape(-1) for g in range(len(matrix))]
    return torch.cat(parts)


def _unfit(width: int, weight: torch.Tensor, moment: torch.Tensor, method: Method) -> str:
    """Why a layer is left as it is, or ''."""
    if width % method.unit:
        return f"its sums run over {width} positions, which are no multiple of {method.unit}"
    if not all_finite(weight):
        return "it holds NaN or infinite elements"
    if not all_finite(moment):
        return "what it reads on the calibration data is not finite"
    return ""


@dataclass(frozen=True)
class Places:
    """Rows and columns of a weight's matrices that earlier passes keep.

    Columns are in the order in which a pattern runs: along the summed axis, for every kernel position.
    """

    columns: torch.Tensor
    width: int
    rows_of: tuple[torch.Tensor, ...]
    everything: bool

    @classmethod
    def of(cls, recovery: Recovery, reading: Reading, shape: torch.Size) -> Places:
        """The places of a weight of that shape."""
        kept = recovery.kept(reading.weight)
        along = kept[reading.axis]
        along = torch.arange(shape[reading.axis]) if along is None else along
        stays = torch.ones(shape, dtype=torch.bool)
        for axis, places in enumerate(kept):
            if places is not None and axis != reading.axis and (axis == 0 or not reading.is_conv):
                hit = torch.zeros(shape[axis], dtype=torch.bool)
                hit[places] = True
                stays &= hit.reshape([-1 if d == axis else 1 for d in range(len(shape))])
        rows = tuple(torch.nonzero(matrix.all(1)).flatten() for matrix in reading.matrix(stays))
        whole = all(places is None for places in kept)
        if not reading.is_conv:
            return cls(along, len(along), rows, whole)
        positions = int(np.prod(shape[2:]))
        columns = (torch.arange(positions)[:, None] + along[None] * positions).reshape(-1)
        return cls(columns, len(along), rows, whole and positions == 1)  # else in another order

    def rows(self, group: int) -> torch.Tensor:
        """Kept rows of the matrix of a group."""
        return self.rows_of[group]


@runtime_checkable
class LayerwiseOptions(Protocol):
    """A pass that prunes layer by layer."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def method(self) -> Method:
        """What becomes of a layer."""

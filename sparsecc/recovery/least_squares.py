"""Least-squares updates of layers whose inputs lost positions.

A layer computes ``W x + b`` in the original model and reads ``z``, of the positions that are left, in the
pruned one.  The update minimises the mean over rows of ``|W x + b - W' z - b'|^2 + d |W' - W_S|^2``, W_S the
weights of the positions that are left: He et al., "Channel Pruning" (2017), eq. 1 with fixed channels, with
what the pruned model really reads, as in their section 3.2.  How large d should be depends on how many rows
there are; it is found on batches that are left out, and then all are used (unless the next pass needs some
that this one has not seen).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import Statistics
from sparsecc.calibration.readings import Reading
from sparsecc.patterns.layers import layers
from sparsecc.plan import Action, Skip
from sparsecc.recovery.obs import factor
from sparsecc.recovery.sequential import Moment, Recovery, written
from sparsecc.recovery.sums import Sums, equal, relative, sums
from sparsecc.selection import selected


@dataclass
class Reconstructed:
    """New values, and layers left alone with the reason."""

    actions: list[Action] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


#: of x and of z
Means = tuple[torch.Tensor, torch.Tensor]

#: what d is chosen from, as a share of the mean diagonal of z.T z
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: d where there is but one batch
_ALONE = 0.1


def solve(
    weight: torch.Tensor, sums: Sums, kept: torch.Tensor, damping: float, centred: bool
) -> torch.Tensor:
    """``W'`` [G, O, S] from W [G, O, K], and the kept columns of W.

    ``damping``: d, as a share of the mean diagonal of z.T z.  ``centred``: a bias takes up the means.
    """
    cross, second = sums.about(*sums.means) if centred else (sums.cross, sums.second)
    extra = damping * second.diagonal(dim1=1, dim2=2).mean(1)
    extra = torch.where(extra > 0, extra, torch.ones_like(extra))[:, None, None]
    right = weight @ cross + extra * weight[:, :, kept]
    damped = second + extra * torch.eye(second.shape[1], dtype=second.dtype)
    lowers = torch.stack([factor(matrix) for matrix in damped])
    return torch.cholesky_solve(right.transpose(1, 2), lowers).transpose(1, 2)


def loss(weight: torch.Tensor, new: torch.Tensor, sums: Sums, means: Means | None) -> float:
    """Squared error over the rows of ``sums``, less a number that does not depend on ``new``."""
    cross, second = (sums.cross, sums.second) if means is None else sums.about(*means)
    return float((new @ second * new).sum() - 2 * (weight @ cross * new).sum())


@dataclass(frozen=True)
class Options:
    """``everything``: also layers that lost no inputs.  ``damping``: d; None finds it.

    ``own``: x is what the layer would read in the pruned model, had it not lost inputs, instead of what it
    reads in the original one: then nothing is made up for but the layer's own loss.  ``rows``: whether all
    count alike, or relative to what the layer gives for them.  ``refit``: batches that dampings were tried on
    take part in the end.
    """

    damping: float | None
    everything: bool
    own: bool
    rows: Literal["equal", "relative"]
    refit: bool = True


def reconstruct(
    analysis: Analysis,
    statistics: Statistics,
    *,
    options: Options,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Reconstructed:
    """Update layers in the order in which they run."""
    out = Reconstructed()
    recovery = Recovery(statistics, analysis, beside=not options.own)
    targets = _targets(recovery, include, exclude, options.everything, out)

    def update(moment: Moment) -> Mapping[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for reading in statistics.readings.at.get(moment.call, ()):
            if reading.weight in targets and reading.weight not in recovery.values:
                found = _updated(recovery, reading, moment, options)
                if isinstance(found, str):
                    out.skips.append(Skip(reading.weight, found))
                else:
                    new.update(found)
        return new

    if targets:
        last = recovery.last_reader(targets)
        out.actions += written(recovery.run(update, "reconstruction, layer by layer", last), analysis)
    return out


def _targets(
    recovery: Recovery,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    everything: bool,
    out: Reconstructed,
) -> set[str]:
    analysis, known = recovery.analysis, recovery.statistics.readings
    chosen = selected(analysis, include, exclude)
    found: set[str] = set()
    for layer in layers(analysis):
        name = layer.weight
        if name in analysis.given.lost or name not in known:
            continue
        if not everything and recovery.kept(name)[known.of[name][0].axis] is None:
            continue
        reason = chosen(name) or (layer.why if "also read" in layer.why else "")
        if name in analysis.given.masks:
            reason = reason or "single elements of it are pruned: SparseGPT updates such layers"
        if len(known.of[name]) > 1:
            reason = reason or "several calls read it"
        if reason:
            out.skips.append(Skip(name, reason))
        else:
            found.add(name)
    return found


def _updated(
    recovery: Recovery, reading: Reading, moment: Moment, options: Options
) -> dict[str, torch.Tensor] | str:
    """New values of a layer, or why it keeps those that it has."""
    weight = recovery.current(reading.weight)
    matrix = reading.matrix(weight)
    columns = _columns(recovery, reading, weight.shape)
    # Rows that a router deals are other ones where it sees other numbers.
    beside = moment.original if reading.ends is None else ()
    towards = beside or moment.pruned
    bias = _bias(recovery, reading)
    weigh = relative(reading, matrix, towards) if options.rows == "relative" else equal
    held = -(-len(moment.pruned) // 8) if options.damping is None and len(moment.pruned) > 1 else 0
    shown = len(moment.pruned) - held
    total = sums(reading, towards[:shown], moment.pruned[:shown], columns, weigh).to(weight.dtype)
    kept = matrix[:, :, columns]
    damping = _ALONE if options.damping is None else options.damping
    if held:
        others = sums(reading, towards[shown:], moment.pruned[shown:], columns, weigh).to(weight.dtype)
        means = None if bias is None else total.means
        losses = {
            d: loss(matrix, solve(matrix, total, columns, d, bias is not None), others, means)
            for d in DAMPINGS
        }
        losses[math.inf] = loss(matrix, kept, others, means)
        damping = min(losses, key=losses.__getitem__)
        total = total + others if options.refit else total
    if damping == math.inf and bias is None:
        return "no update of it does better on batches that are left out"
    found = kept if damping == math.inf else solve(matrix, total, columns, damping, bias is not None)
    return _values(recovery, reading, found, columns, total)


def _values(
    recovery: Recovery, reading: Reading, found: torch.Tensor, columns: torch.Tensor, total: Sums
) -> dict[str, torch.Tensor]:
    """A layer's weight with ``found`` at the kept columns, and its bias where that may take up means."""
    weight = recovery.current(reading.weight)
    matrix = reading.matrix(weight)
    new = matrix.clone()
    new[:, :, columns] = found
    values = {reading.weight: reading.stored(new, weight.shape).contiguous()}
    bias = _bias(recovery, reading)
    if bias is not None:
        x, z = total.means
        before = recovery.current(bias)
        moved = (matrix @ x[:, :, None] - found @ z[:, :, None]).reshape(before.shape)
        values[bias] = before + moved
    return values


#: d where moments are all that is known
_UNSEEN = 0.01


def from_moments(analysis: Analysis, statistics: Statistics, weights: Collection[str]) -> list[Action]:
    """Updates of those of ``weights`` that lost inputs, towards their own outputs, from moments alone.

    These are of what layers read in the original model; every row counts alike, and nothing is run again.
    """
    recovery = Recovery(statistics, analysis)
    values: dict[str, torch.Tensor] = {}
    for name in sorted(_targets(recovery, (), (), False, Reconstructed()).intersection(weights)):
        reading = statistics.readings.of[name][0]
        weight = recovery.current(name)
        matrix, columns = reading.matrix(weight), _columns(recovery, reading, weight.shape)
        centred = _bias(recovery, reading) is not None
        moments = statistics.moments(name, "hessian", *(("mean",) if centred else ()))
        assert moments is not None
        second = moments.sums["hessian"].to(weight.dtype)
        x = moments.sums["mean"].to(weight.dtype) if centred else second.new_zeros(second.shape[:2])
        cross = second[:, :, columns]
        total = Sums(cross, cross[:, columns], x, x[:, columns], float(moments.count))
        found = solve(matrix, total, columns, _UNSEEN, centred)
        values |= _values(recovery, reading, found, columns, total)
    return list(written(values, analysis))


def _columns(recovery: Recovery, reading: Reading, shape: torch.Size) -> torch.Tensor:
    """Kept columns of the weight's matrices."""
    kept = recovery.kept(reading.weight)[reading.axis]
    along = torch.arange(shape[reading.axis]) if kept is None else kept
    if not reading.is_conv:
        return along
    positions = shape[2:].numel()
    return (along[:, None] * positions + torch.arange(positions)[None]).reshape(-1)


#: operators that add a vector of their own: operator -> its operand
_BIASES = {"conv": 2, "linear": 2, "gemm": 2, "addmm": 0}


def bias_of(analysis: Analysis, reading: Reading) -> str | None:
    """The stored vector that a product adds to its results and that nothing else reads."""
    place = _BIASES.get(reading.call.op)
    value = None if place is None or place >= len(reading.call.inputs) else reading.call.inputs[place]
    if value is None or value.weight not in analysis.view.parameters or len(value.shape) != 1:
        return None
    reads = sum(v is value for call in analysis.view.calls for v in call.inputs)
    size = reading.call.outputs[0].shape[-1 if reading.call.op != "conv" else _channel(reading)]
    return value.weight if reads == 1 and value.shape[0] == size else None


def _channel(reading: Reading) -> int:
    x, w = reading.call.inputs[reading.place], reading.call.inputs[reading.operand]
    assert x is not None
    assert w is not None
    return len(x.shape) - len(w.shape) + 1


def _bias(recovery: Recovery, reading: Reading) -> str | None:
    """The bias that may take up means; it scales with nothing (``alpha`` and ``beta`` are one)."""
    semantics = recovery.analysis.view.semantics
    factors = None if semantics is None else semantics.factors(reading.call)
    if reading.call.op in ("gemm", "addmm") and factors != (1.0, 1.0):
        return None
    return bias_of(recovery.analysis, reading)

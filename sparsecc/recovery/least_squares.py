"""Least-squares updates of layers whose inputs lost positions.

A layer computes ``W x + b`` in the original model and reads ``z``, of the positions that are left, in the
pruned one.  The update minimises the mean over rows of ``|W x + b - W' z - b'|^2 + d |W' - W_S|^2``, W_S the
weights of the positions that are left: He et al., "Channel Pruning" (2017), eq. 1 with fixed channels, with
what the pruned model really reads, as in their section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import Statistics
from sparsecc.calibration.readings import Reading
from sparsecc.patterns.layers import layers
from sparsecc.plan import Action, Skip
from sparsecc.recovery.obs import factor
from sparsecc.recovery.sequential import Moment, Recovery, first_moment, second_moment, written
from sparsecc.selection import selected


@dataclass
class Reconstructed:
    """New values, and layers left alone with the reason."""

    actions: list[Action] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def solve(
    weight: torch.Tensor, cross: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, damping: float
) -> torch.Tensor:
    """``W'`` [O, S] from W [O, K], the moments x.T z [K, S] and z.T z [S, S], and the kept columns of W.

    ``damping``: d, as a share of the mean diagonal of z.T z.
    """
    extra = damping * second.diagonal().mean()
    extra = torch.where(extra > 0, extra, torch.ones_like(extra))
    right = weight @ cross + extra * weight[:, kept]
    lower = factor(second + extra * torch.eye(len(second), dtype=second.dtype))
    return torch.cholesky_solve(right.T, lower).T


def reconstruct(
    analysis: Analysis,
    statistics: Statistics,
    *,
    damping: float,
    everything: bool,
    own: bool = False,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Reconstructed:
    """Update layers in the order in which they run; ``everything``: also those that lost no inputs.

    ``own``: x is what the layer would read in the pruned model, had it not lost inputs, instead of what it
    reads in the original one: then nothing is made up for but the layer's own loss.
    """
    out = Reconstructed()
    recovery = Recovery(statistics, analysis, beside=not own)
    targets = _targets(recovery, include, exclude, everything, out)

    def update(moment: Moment) -> Mapping[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for reading in statistics.readings.at.get(moment.call, ()):
            if reading.weight in targets and reading.weight not in recovery.values:
                new.update(_updated(recovery, reading, moment, damping))
        return new

    out.actions += written(recovery.run(update, "reconstruction, layer by layer"), analysis)
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


def _updated(recovery: Recovery, reading: Reading, moment: Moment, damping: float) -> dict[str, torch.Tensor]:
    weight = recovery.current(reading.weight)
    shape = weight.shape
    matrix = reading.matrix(weight)
    columns = _columns(recovery, reading, shape)
    towards = moment.original or moment.pruned
    whole = second_moment(reading, moment.pruned, moment.pruned).to(weight.dtype)
    second = whole[:, columns][:, :, columns]
    if towards is not moment.pruned:
        whole = second_moment(reading, towards, moment.pruned).to(weight.dtype)
    cross = whole[:, :, columns]
    bias = _bias(recovery, reading)
    if bias is not None:
        x, count = first_moment(reading, towards)
        z, _ = first_moment(reading, moment.pruned)
        x, z = (x / count).to(weight.dtype), (z[:, columns] / count).to(weight.dtype)
        cross = cross - count * x[:, :, None] * z[:, None, :]
        second = second - count * z[:, :, None] * z[:, None, :]
    new = matrix.clone()
    for group in range(len(matrix)):
        found = solve(matrix[group], cross[group], second[group], columns, damping)
        new[group][:, columns] = found
    values = {reading.weight: reading.stored(new, shape).contiguous()}
    if bias is not None:
        before = recovery.current(bias)
        moved = (matrix @ x[:, :, None] - new[:, :, columns] @ z[:, :, None]).reshape(before.shape)
        values[bias] = before + moved
    return values


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

"""Re-estimation of what a model knows about the mean and the deviation of its activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import Statistics
from sparsecc.plan import Action, Skip
from sparsecc.recovery.least_squares import bias_of
from sparsecc.recovery.sequential import Moment, Recovery, written
from sparsecc.selection import selected


@dataclass
class Estimated:
    """New values, and layers left alone with the reason."""

    actions: list[Action] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def channel_moments(values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance over everything but axis 1, of all tensors together."""
    dims = [d for d in range(values[0].dim()) if d != 1]
    count = sum(v.numel() // v.shape[1] for v in values)
    wide = [v.double() for v in values]
    mean = torch.stack([v.sum(dims) for v in wide]).sum(0) / count
    shape = [1, -1, *[1] * (values[0].dim() - 2)]
    return mean, torch.stack([(v - mean.reshape(shape)).square().sum(dims) for v in wide]).sum(0) / count


def reestimate(
    analysis: Analysis,
    statistics: Statistics,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Estimated:
    """Mean and variance of every batch norm from what it reads in the pruned model, one after the other."""
    out = Estimated()
    recovery = Recovery(statistics, analysis)
    chosen = selected(analysis, include, exclude)

    def update(moment: Moment) -> Mapping[str, torch.Tensor]:
        if moment.call.op != "batch_norm":
            return {}
        names = [v.weight if v is not None else None for v in moment.call.inputs[3:5]]
        if len(names) < 2 or None in names:
            return {}
        mean_name, variance_name = (str(n) for n in names)
        reason = chosen(mean_name)
        if mean_name in recovery.values:
            reason = "several calls read it"
        if reason:
            out.skips.append(Skip(mean_name, reason))
            return {}
        mean, variance = channel_moments([s.operands[0] for s in moment.pruned])
        found = {mean_name: mean, variance_name: variance}
        return {n: t.to(recovery.current(n).dtype) for n, t in found.items()}

    out.actions += written(recovery.run(update, "re-estimating batch norms"), analysis)
    return out


def correct_biases(
    analysis: Analysis,
    statistics: Statistics,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Estimated:
    """Biases that give every layer the mean outputs that it has in the original model."""
    out = Estimated()
    recovery = Recovery(statistics, analysis, beside=True)
    chosen = selected(analysis, include, exclude)

    def update(moment: Moment) -> Mapping[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for reading in statistics.readings.at.get(moment.call, ()):
            bias = bias_of(analysis, reading)
            if bias is None or bias in recovery.values or chosen(bias):
                continue
            axis = 1 if reading.is_conv else -1
            before = _means([s.run(s.operands)[0] for s in moment.original], axis)
            after = _means([s.run(recovery.changed(s))[0] for s in moment.pruned], axis)
            current = recovery.current(bias)
            new[bias] = current + (before - after).to(current.dtype)
        return new

    out.actions += written(recovery.run(update, "correcting biases"), analysis)
    return out


def _means(values: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    moved = [v.movedim(axis, -1).reshape(-1, v.shape[axis]).double() for v in values]
    return torch.stack([m.sum(0) for m in moved]).sum(0) / sum(len(m) for m in moved)

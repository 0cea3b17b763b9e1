"""Measures by how much a loss rises when one group alone loses positions; nothing is edited.

The layer-wise sensitivity scan of Li et al., "Pruning Filters for Efficient ConvNets" (2017, section 3.2), on
whole coupled groups, under masked semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from sparsecc.allocation import staying, top
from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.terms import Kept
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.calibration.statistics import blaming
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.lowering import lower
from sparsecc.plan import Plan
from sparsecc.probing.losses import Divergence, kl, relative_error
from sparsecc.probing.side_by_side import Candidate, outputs_beside
from sparsecc.probing.table import Line, Sensitivity
from sparsecc.recovery.least_squares import from_moments
from sparsecc.report import sizes
from sparsecc.saliency import Saliency
from sparsecc.transform import check_count

#: shares of a group that are tried
SHARES = (0.125, 0.25, 0.5, 0.75)
#: what can be measured by name; ``loss`` is that of the calibration data
LOSSES: dict[str, Divergence | None] = {"error": relative_error, "kl": kl, "loss": None}
#: candidates that run side by side, each of which holds its activations and outputs
_ABREAST = 8


def tried(sparsity: float) -> tuple[float, ...]:
    """Shares to try where ``sparsity`` of all is to go: up to twice that, or half of what it leaves besides.

    What several groups lose does more than the sum of what each loses alone, the more so the more they lose.
    """
    most = min(2 * sparsity, (1 + sparsity) / 2)
    return tuple(most * part / 4 for part in (1, 2, 3, 4))


@dataclass(frozen=True)
class Probe:
    """What is measured: ``loss``, for ``shares`` of every group, on the first ``batches`` of ``data``.

    Without ``data`` those are taken that saliency is known from.  ``updates``: layers that lose inputs are
    updated by least squares first, on what they read in the original model.

    ``error``: squared error of the outputs over their squares.  ``kl``: divergence of the first output's
    distributions, given as logits.  ``loss``: the rise of the data's own loss.  A function of (outputs,
    batch) takes its place.
    """

    loss: str | Callable[[Any, Any], Any] = "error"
    shares: tuple[float, ...] = SHARES
    batches: int = 8
    data: CalibrationData | None = None
    updates: bool = False

    def __post_init__(self) -> None:
        if not callable(self.loss) and not (isinstance(self.loss, str) and self.loss in LOSSES):
            known = ", ".join(LOSSES)
            raise InvalidOption(
                f"loss={self.loss!r} is not known; there are {known}, or give a function of (outputs, batch)"
            )
        wrong = not (isinstance(self.shares, (tuple, list)) and self.shares) or not all(
            isinstance(s, (int, float)) and not isinstance(s, bool) and 0 < s < 1 for s in self.shares
        )
        if wrong:
            raise InvalidOption(f"shares={self.shares!r}: give shares of positions between 0 and 1")
        check_count("batches", self.batches)

    @property
    def name(self) -> str:
        """What the loss is called."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "loss")


@dataclass
class _Trial:
    """One group without ``count`` of its positions; ``first``: the place of the first call that differs.

    ``key``: equal for trials that find the same on the same data.
    """

    group: Group
    count: int
    choice: Mapping[str, Kept]
    first: int
    key: Any


@dataclass
class _Row:
    """What becomes a line: trials, or why there are none."""

    group: Group
    trials: list[_Trial] = field(default_factory=list)
    why: str = ""


def measured(
    statistics: Statistics, analysis: Analysis, saliency: Saliency, groups: Sequence[Group], probe: Probe
) -> Sensitivity:
    """The sensitivity of groups, of each of which the least salient positions go.

    What earlier passes decided holds: rises are those over the model that they leave.  Positions are removed
    as masks, from the original model.  Raises InvalidOption where the model fails on the data or a loss is
    not finite.
    """
    given_data = statistics.data if probe.data is None else probe.data
    if probe.loss == "loss" and given_data.loss is None:
        raise InvalidOption(
            "the rise of the data's own loss is asked for, and they have none: give CalibrationData(batches, "
            "loss=...), with loss(outputs, batch) a scalar, or measure error or kl"
        )
    given = analysis.given
    base = lower(analysis, given.kept, extra=given.actions) if given.kept or given.actions else None
    key = (probe.loss, probe.data, probe.batches, probe.updates, base.fingerprint() if base else "")
    rows = [_row(analysis, saliency, group, probe, key) for group in groups]
    trials = [t for row in rows for t in row.trials if t.key not in statistics.trials]
    trials.sort(key=lambda t: t.first)
    limit = probe.batches if given_data.limit is None else min(given_data.limit, probe.batches)
    data = replace(given_data, limit=limit, resume=None)
    source = Statistics(statistics.subject, data, statistics.advance)
    for start in range(0, len(trials), _ABREAST):
        wave = trials[start : start + _ABREAST]
        candidates = [_candidate(statistics, analysis, trial, probe) for trial in wave]
        what = f"sensitivity, trials {start + 1} to {start + len(wave)} of {len(trials)}"
        found = [_rises(source, base, candidates, probe, batch) for batch in source.batches(what)]
        statistics.trials[key] = len(found)
        for trial, rises in zip(wave, zip(*found, strict=True), strict=True):
            statistics.trials[trial.key] = _mean(trial, rises, probe)
    whole = sizes(analysis)["parameters"]
    lines = tuple(_line(analysis, row, whole, statistics.trials) for row in rows)
    batches = int(statistics.trials.get(key, 0))
    return Sensitivity(probe.name, type(saliency.criterion).__name__, batches, lines)


def _row(analysis: Analysis, saliency: Saliency, group: Group, probe: Probe, key: Any) -> _Row:
    row = _Row(group)
    place = {call: i for i, call in enumerate(analysis.view.calls)}
    scores = saliency.of(group)
    kept = [staying(group, share) for share in sorted(probe.shares)]
    for count in dict.fromkeys(kept):
        choice = analysis.feasible({**analysis.given.kept, group.name: top(scores, count)})
        removed = group.size - int(np.count_nonzero(choice[group.name]))
        if not removed or any(t.count == removed for t in row.trials):
            continue
        try:
            plan = lower(analysis, choice, extra=analysis.given.actions)
            masked = Candidate(plan, analysis.keeps(choice)).masked
        except PlanConflict as error:
            row.why = str(error)
            continue
        first = min((place[call] for call in masked if call in place), default=len(place))
        own = (key, group.name, np.asarray(choice[group.name]).tobytes())
        row.trials.append(_Trial(group, removed, choice, first, own))
    return row


def _candidate(statistics: Statistics, analysis: Analysis, trial: _Trial, probe: Probe) -> Candidate:
    actions = analysis.given.actions
    if probe.updates:
        after = analysis.after(replace(analysis.given, kept=trial.choice))
        weights = {member.weight for member in trial.group.members}
        actions = (*actions, *from_moments(after, statistics, weights))
    return Candidate(lower(analysis, trial.choice, extra=actions), analysis.keeps(trial.choice))


def _rises(
    source: Statistics, base: Plan | None, candidates: Sequence[Candidate], probe: Probe, batch: Any
) -> list[float]:
    """What the loss of every candidate rises by on a batch."""
    with torch.no_grad():
        with blaming():
            before, after = outputs_beside(source.subject, source.inputs(batch), base, candidates)
        divergence = LOSSES[probe.loss] if isinstance(probe.loss, str) else None
        if divergence is not None:
            return [divergence(outputs, before) for outputs in after]
        loss = probe.loss if callable(probe.loss) else source.data.loss_of
        whole, *others = [_number(loss(source.subject.structured(o), batch)) for o in (before, *after)]
        return [other - whole for other in others]


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidOption(f"the loss has to give one number; it gave {type(found).__name__}") from error


def _mean(trial: _Trial, rises: Sequence[float], probe: Probe) -> float:
    for batch, rise in enumerate(rises):
        if not np.isfinite(rise):
            raise InvalidOption(
                f"{trial.group.name}: without {trial.count} positions the loss {probe.name!r} is {rise} on "
                f"batch {batch}; check that the model's outputs are finite"
            )
    return sum(rises) / len(rises)


def _line(analysis: Analysis, row: _Row, whole: int, found: Mapping[Any, float]) -> Line:
    group = row.group
    each = 0
    if row.trials:
        largest = row.trials[-1]
        keeps = analysis.keeps({group.name: largest.choice[group.name]})
        each = round((whole - sizes(analysis, keeps)["parameters"]) / largest.count)
    return Line(
        group.name,
        group.kind,
        group.size,
        group.least,
        each,
        tuple(t.count for t in row.trials),
        tuple(found[t.key] for t in row.trials),
        row.why if not row.trials else "",
        group.multiple,
    )

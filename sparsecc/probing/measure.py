"""Measures by how much a loss rises when one group alone loses positions; nothing is edited.

The layer-wise sensitivity scan of Li et al., "Pruning Filters for Efficient ConvNets" (2017, section 3.2), on
whole coupled groups, under masked semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from sparsecc.allocation import top
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
from sparsecc.transform import check_count, keep_count

#: shares of a group that are tried
SHARES = (0.125, 0.25, 0.5, 0.75)
#: what can be measured by name; ``loss`` is that of the calibration data
LOSSES: dict[str, Divergence | None] = {"error": relative_error, "kl": kl, "loss": None}
#: candidates that run side by side, each of which holds its activations and outputs
_ABREAST = 8


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
        if not callable(self.loss) and self.loss not in LOSSES:
            known = ", ".join(LOSSES)
            raise InvalidOption(
                f"loss={self.loss!r} is not known; there are {known}, or give a function of (outputs, batch)"
            )
        wrong = not self.shares or not all(
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
    """One group without ``count`` of its positions; ``rise`` is summed over batches.

    ``first``: the place of the first call that differs.
    """

    group: Group
    count: int
    choice: Mapping[str, Kept]
    first: int
    rise: float = 0.0


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
    rows = [_row(analysis, saliency, group, probe) for group in groups]
    trials = sorted((t for row in rows for t in row.trials), key=lambda t: t.first)
    limit = probe.batches if given_data.limit is None else min(given_data.limit, probe.batches)
    data = replace(given_data, limit=limit, resume=None)
    source = Statistics(statistics.subject, data, statistics.advance)
    done = 0
    for start in range(0, len(trials), _ABREAST):
        wave = trials[start : start + _ABREAST]
        candidates = [_candidate(statistics, analysis, trial, probe) for trial in wave]
        what = f"sensitivity, trials {start + 1} to {start + len(wave)} of {len(trials)}"
        done = _run(source, base, wave, candidates, probe, what)
    lines = tuple(_line(analysis, row, max(done, 1)) for row in rows)
    return Sensitivity(probe.name, type(saliency.criterion).__name__, done, lines)


def _row(analysis: Analysis, saliency: Saliency, group: Group, probe: Probe) -> _Row:
    row = _Row(group)
    place = {call: i for i, call in enumerate(analysis.view.calls)}
    scores = saliency.of(group)
    kept = [keep_count(group.size, share, min_keep=group.least) for share in sorted(probe.shares)]
    for count in dict.fromkeys(kept):
        choice = analysis.feasible({**analysis.given.kept, group.name: top(scores, count)})
        removed = group.size - int(np.count_nonzero(choice[group.name]))
        if not removed or any(t.count == removed for t in row.trials):
            continue
        try:
            plan = lower(analysis, choice, extra=analysis.given.actions)
        except PlanConflict as error:
            row.why = str(error)
            continue
        masked = Candidate(plan, analysis.keeps(choice)).masked
        first = min((place[call] for call in masked if call in place), default=len(place))
        row.trials.append(_Trial(group, removed, choice, first))
    return row


def _candidate(statistics: Statistics, analysis: Analysis, trial: _Trial, probe: Probe) -> Candidate:
    actions = analysis.given.actions
    if probe.updates:
        after = analysis.after(replace(analysis.given, kept=trial.choice))
        weights = {member.weight for member in trial.group.members}
        actions = (*actions, *from_moments(after, statistics, weights))
    return Candidate(lower(analysis, trial.choice, extra=actions), analysis.keeps(trial.choice))


def _run(
    source: Statistics,
    base: Plan | None,
    wave: Sequence[_Trial],
    candidates: Sequence[Candidate],
    probe: Probe,
    what: str,
) -> int:
    """Add what every trial's loss rises by, on every batch; how many there were."""
    done = 0
    for batch in source.batches(what):
        with torch.no_grad(), blaming():
            before, after = outputs_beside(source.subject, source.inputs(batch), base, candidates)
            for trial, rise in zip(wave, _rises(source, probe, before, after, batch), strict=True):
                if not np.isfinite(rise):
                    raise InvalidOption(
                        f"{trial.group.name}: without {trial.count} positions the loss {probe.name!r} is "
                        f"{rise} on batch {done}; check that the model's outputs are finite"
                    )
                trial.rise += rise
        done += 1
    return done


def _rises(
    source: Statistics, probe: Probe, before: list[Any], after: Sequence[list[Any]], batch: Any
) -> Iterator[float]:
    divergence = LOSSES[probe.loss] if isinstance(probe.loss, str) else None
    if divergence is not None:
        yield from (divergence(outputs, before) for outputs in after)
        return
    loss = probe.loss if callable(probe.loss) else source.data.loss_of
    whole = float(loss(source.subject.structured(before), batch))
    for outputs in after:
        yield float(loss(source.subject.structured(outputs), batch)) - whole


def _line(analysis: Analysis, row: _Row, batches: int) -> Line:
    group = row.group
    each = 0
    if row.trials:
        largest = row.trials[-1]
        keeps = analysis.keeps({group.name: largest.choice[group.name]})
        gone = sizes(analysis)["parameters"] - sizes(analysis, keeps)["parameters"]
        each = round(gone / largest.count)
    return Line(
        group.name,
        group.kind,
        group.size,
        group.least,
        each,
        tuple(t.count for t in row.trials),
        tuple(t.rise / batches for t in row.trials),
        row.why if not row.trials else "",
    )

"""What happened, as numbers and tables: sizes, work, latency, groups kept, axes frozen and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.axes.terms import Kept
from sparsecc.blocks import Dropped, dropped, lost
from sparsecc.cost import macs
from sparsecc.errors import InvalidModel, UnsupportedModel
from sparsecc.patterns.hardware import as_nm, use
from sparsecc.plan import Bypass, Fold, Pattern, Plan
from sparsecc.verification.certificate import Certificate

if TYPE_CHECKING:
    from sparsecc.subject import Applied, Arguments, Subject

    Timed = Callable[[Arguments], AbstractContextManager[Callable[[], object]]]


@dataclass(frozen=True)
class GroupLine:
    """One group: how many positions it had and keeps, and who decided."""

    group: str
    kind: str
    size: int
    kept: int
    by: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class FrozenLine:
    """Positions of parameters that stay for one reason."""

    kind: str
    axes: int
    example: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Figures of one run; ``before`` and ``after`` hold parameters, bytes and macs.

    ``bypassed`` names whole blocks that are gone; groups that were only in them keep 0 positions.

    ``patterns`` tells of every layer what a pattern of zeros made of it (``skips`` says why some are dense).

    ``macs`` are for the example input.  ``latency`` is None unless it was measured.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    groups: tuple[GroupLine, ...]
    frozen: tuple[FrozenLine, ...]
    skips: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    certificate: str
    latency: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    bypassed: tuple[str, ...] = ()
    patterns: tuple[Pattern, ...] = ()

    @classmethod
    def of(
        cls,
        subject: Subject,
        applied: Applied,
        kept: Mapping[str, Kept],
        certificate: Certificate,
        *,
        latency: bool = False,
    ) -> Report:
        """The report of an applied plan."""
        analysis = subject.analysis
        keeps = analysis.keeps(kept)
        bypasses = list(applied.plan.of(Bypass))
        gone = dropped(analysis.view, applied.plan.actions)
        left = replace(gone, weights=gone.weights | analysis.unread) if applied.plan.form == "graph" else gone
        folds = list(applied.plan.of(Fold))
        by = {d.group: d.by for d in applied.plan.decisions}
        return cls(
            before=sizes(analysis),
            after=sizes(analysis, keeps, left, folds),
            groups=tuple(
                GroupLine(
                    g.name,
                    g.kind,
                    g.size,
                    0 if lost(g, gone) else keeps.count(g.term),
                    by.get(g.name, ""),
                    tuple(map(str, g.members)),
                )
                for g in analysis.groups
            ),
            frozen=tuple(frozen_lines(analysis)),
            skips=tuple((s.where, s.reason) for s in applied.plan.skips),
            notes=(
                *subject.notes,
                *applied.notes,
                *pattern_notes(applied.plan.patterns),
                *idle_notes(analysis, applied.plan),
            ),
            certificate=str(certificate),
            bypassed=tuple(b.block for b in bypasses),
            patterns=applied.plan.patterns,
        ).timed(subject, applied.timed if latency else None)

    def timed(self, subject: Subject, result: Timed | None) -> Report:
        """The report with the latency of the original against ``result``; without it, as it is.

        A model that cannot be timed here gets a note that says why.
        """
        if result is None:
            return self
        try:
            return replace(self, latency=measure_latency(subject, result))
        except UnsupportedModel as error:
            return replace(self, notes=(*self.notes, f"latency was not measured: {error}"))

    def summary(self, certificate: Certificate) -> str:
        """One line: what is left, and whether that was verified."""
        pairs = ((human(self.before[key]), human(self.after[key]), key) for key in ("parameters", "macs"))
        return f"{', '.join(f'{a} -> {b} {key}' for a, b, key in pairs)}, {certificate.status}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """Inverse of ``to_json``; raises InvalidModel where it is malformed."""
        try:
            groups = tuple(GroupLine(**{**g, "members": tuple(g["members"])}) for g in document["groups"])
            frozen = tuple(FrozenLine(**f) for f in document["frozen"])
            skips = tuple((where, reason) for where, reason in document["skips"])
            notes = tuple(document["notes"])
            patterns = tuple(Pattern(**p) for p in document.get("patterns", ()))
            document = {**document, "bypassed": tuple(document["bypassed"]), "patterns": patterns}
            return cls(**{**document, "groups": groups, "frozen": frozen, "skips": skips, "notes": notes})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidModel(f"this is no report, or it is damaged: {error}") from error

    def __str__(self) -> str:
        return report_text(self)


def measure_latency(subject: Subject, result: Timed) -> Mapping[str, Any]:
    """Milliseconds before and after on this machine, both as users run them: interleaved, medians."""
    from sparsecc.measure import compare_latency

    arguments = subject.arguments(subject.example())
    with subject.timed(arguments) as before, result(arguments) as after:
        # onnxruntime's threads spin for some 20 ms after a call
        return compare_latency(before, after, settle_s=0.03).to_json()


def sizes(
    analysis: Analysis,
    keeps: Keeps | None = None,
    gone: Dropped | None = None,
    folds: Sequence[Fold] = (),
) -> dict[str, int]:
    """Parameters, their bytes, and MACs for the example input; of the whole model, or of what is left."""
    view = analysis.view
    stored = {f.parameter: f for f in folds}.values()  # a shared module's weight once
    made = {v.name: v.dtype for c in view.calls for v in c.outputs} if folds else {}
    count = sum(f.values.size for f in stored)
    size = sum(f.values.size * _BYTES.get(made[f.output], 4) for f in stored)
    for name, value in view.weights.items():
        if name not in view.parameters or (gone is not None and name in gone.weights):
            continue
        masks = keeps.value(value) if keeps is not None else [None] * len(value.shape)
        kept = math.prod(n if m is None else int(m.sum()) for n, m in zip(value.shape, masks, strict=True))
        count += kept
        size += kept * _BYTES.get(value.dtype, 4)
    return {
        "parameters": count,
        "bytes": size,
        "macs": macs(analysis, keeps, gone.calls if gone is not None else ()),
    }


_BYTES = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1}


def frozen_lines(analysis: Analysis) -> list[FrozenLine]:
    """Frozen axes of parameters, gathered by reason."""
    counts = Counter((f.reason.kind, f.reason.text) for f in analysis.frozen)
    examples: dict[tuple[str, str], str] = {}
    for f in analysis.frozen:
        examples.setdefault((f.reason.kind, f.reason.text), f"{f.weight}[{f.axis}]")
    return [FrozenLine(k, n, examples[k, text], text) for (k, text), n in counts.items()]


def idle_notes(analysis: Analysis, plan: Plan) -> list[str]:
    """That a recipe removed nothing, and why, where nobody else says so."""
    if plan.mode != "prune" or not plan.recipe or plan.actions or plan.patterns:
        return []
    if plan.skips:
        why = "see what was left alone, and why"
    elif not analysis.groups:
        why = "no position can go, see the frozen axes"
    else:
        why = "its passes found nothing to remove, by their kinds, sparsity, multiple_of and min_keep"
    return [f"nothing was removed: {why}"]


def pattern_notes(patterns: Sequence[Pattern]) -> list[str]:
    """What one-shot pruning to a pattern did, for everyone who did not ask for the report."""
    notes = []
    for name in dict.fromkeys(p.pattern for p in patterns):
        here = [p for p in patterns if p.pattern == name]
        pruned = [p for p in here if p.state == "pruned"]
        if all(p.state == "dense" for p in here):
            lack = f"was given the pattern {name}" if as_nm(name) else f"was given zeros ({name})"
            notes.append(f"no layer {lack}; the report says why each is left dense")
        if pruned:
            count = f"{len(pruned)} layers were" if len(pruned) > 1 else "1 layer was"
            goal = name if as_nm(name) else f"{share_of_zeros(pruned)} zeros ({name})"
            notes.append(
                f"{count} pruned one-shot to {goal}, "
                f"keeping {kept_share(pruned):.1%} of the magnitude; accuracy was not checked"
            )
    return notes


def pattern_uses(patterns: Sequence[Pattern]) -> list[str]:
    """``2:4: sparse tensor cores can compute faster with it ...``, for every pattern that some layer has."""
    return [
        f"{name}: {use(name)}" for name in dict.fromkeys(p.pattern for p in patterns if p.state != "dense")
    ]


def share_of_zeros(patterns: Sequence[Pattern]) -> str:
    """Share of the elements that are zero, as text; ``-`` where nobody counted."""
    size = sum(p.size for p in patterns)
    return f"{sum(p.zeros for p in patterns) / size:.1%}" if size else "-"


def kept_share(patterns: Sequence[Pattern]) -> float:
    """Share of the magnitude (sum of |w|) that patterns leave."""
    total = sum(p.total for p in patterns)
    return sum(p.kept for p in patterns) / total if total else 1.0


def pattern_totals(patterns: Sequence[Pattern]) -> str:
    """``2:4: 12 layers pruned one-shot, 3 had it, 2 left dense; 85.3% of the magnitude kept``."""
    parts = []
    for name in dict.fromkeys(p.pattern for p in patterns):
        here = [p for p in patterns if p.pattern == name]
        counts = Counter(p.state for p in here)
        parts.append(
            f"{name}: {counts['pruned']} layers pruned one-shot, {counts['there']} had it, "
            f"{counts['dense']} left dense; {kept_share(here):.1%} of the magnitude kept"
        )
    return "; ".join(parts)


def skip_rows(skips: Sequence[tuple[str, str]]) -> list[list[str]]:
    """What passes left alone, by reason: how many, the first, the reason."""
    counts = Counter(reason for _, reason in skips)
    first = {reason: where for where, reason in reversed(skips)}
    return [[str(count), first[reason], reason] for reason, count in counts.items()]


def pattern_rows(patterns: Sequence[Pattern]) -> list[list[str]]:
    """Layers that have a pattern, as rows of ``PATTERN_COLUMNS``."""
    return [
        [p.weight, str(p.axis), p.pattern, _STATES[p.state], share_of_zeros([p]), f"{kept_share([p]):.1%}"]
        for p in patterns
        if p.state != "dense"
    ]


_STATES = {"pruned": "pruned one-shot", "there": "had it"}
PATTERN_COLUMNS = ("weight", "axis", "pattern", "state", "zeros", "magnitude kept")


def human(value: float) -> str:
    """``1.23 M`` for 1,230,000."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.3g} {unit}".strip() if unit else f"{value:g}"
        value /= 1000
    return str(value)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table; the last column may be of any width."""
    widths = [max(len(str(r[i])) for r in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in [headers, *rows]
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def analysis_text(analysis: Analysis) -> str:
    """Groups and frozen axes as tables."""
    groups = [
        [
            g.name,
            g.kind,
            str(g.size),
            ", ".join(map(str, g.members[:4])) + (" ..." if len(g.members) > 4 else ""),
        ]
        for g in analysis.groups
    ]
    frozen = [[f.kind, str(f.axes), f.example, f.reason] for f in frozen_lines(analysis)]
    stuck = len(analysis.frozen)
    return (
        f"{len(groups)} coupled groups\n{table(['group', 'kind', 'size', 'members'], groups)}\n\n"
        f"{stuck} frozen axes of parameters\n{table(['kind', 'axes', 'first', 'reason'], frozen)}"
    )


def plan_text(plan: Plan) -> str:
    """Decisions and actions of a plan as text, the form that golden files hold."""
    lines = [f"plan ({plan.dialect}, {plan.mode}): {plan.recipe or 'no recipe'}"]
    for d in plan.decisions:
        reordered = " in another order" if bool((np.diff(d.kept) < 0).any()) else ""
        lines.append(f"  keep {len(d.kept)} of {d.size} of {d.group}{reordered}: {_ranges(d.kept.tolist())}")
    for action in plan.actions:
        lines.append(f"  {_action_text(action)}")
    lines.extend(f"  {_pattern_text(p)}" for p in plan.patterns if p.state != "dense")
    lines.extend(f"  {line}" for line in pattern_uses(plan.patterns))
    lines.extend(f"  skip {s.where}: {s.reason}" for s in plan.skips)
    return "\n".join(lines)


def _pattern_text(pattern: Pattern) -> str:
    if as_nm(pattern.pattern):
        return f"{pattern.pattern} along {pattern.weight}[{pattern.axis}]: {_STATES[pattern.state]}"
    zeros = share_of_zeros([pattern])
    return f"{pattern.pattern} in {pattern.weight}: {zeros} zeros, {_STATES[pattern.state]}"


def _action_text(action: Any) -> str:
    name = type(action).__name__
    if name == "Take":
        use = f" for {action.use[0]}" if action.use else ""
        return f"Take {action.weight}[{action.axis}]{use}: {len(action.indices)} of {action.size}"
    if name == "SetShape":
        sizes = ", ".join("." if s is None else str(s) for s in action.sizes)
        return f"SetShape {action.node}: ({sizes})"
    if name in ("Mask", "Write", "Renumber"):
        return f"{name} {action.weight}"
    if name == "Bypass":
        return f"Bypass {action.block}: {action.output} = {action.source}"
    if name == "Fold":
        return f"Fold {action.output} into {action.parameter}"
    if name == "Replace":
        return f"Replace {action.module} by {action.by}"
    holder = action.node if name == "SetAttr" else action.module
    return f"{name} {holder}.{action.name} = {action.value}"


def _ranges(indices: Sequence[int]) -> str:
    out: list[str] = []
    start = previous = None
    for i in [*indices, None]:
        if previous is not None and i == previous + 1:
            previous = i
            continue
        if previous is not None:
            out.append(str(start) if start == previous else f"{start}-{previous}")
        start = previous = i
    return ",".join(out)


def report_text(report: Report) -> str:
    """A report for people."""
    rows = []
    for key in ("parameters", "bytes", "macs"):
        before, after = report.before[key], report.after[key]
        ratio = f"{before / after:.2f}x" if after else "-"
        rows.append([key, human(before), human(after), ratio])
    if report.latency is not None:
        before_ms, after_ms = report.latency["before_ms"], report.latency["after_ms"]
        rows.append(
            ["latency (ms)", f"{before_ms:.3f}", f"{after_ms:.3f}", f"{report.latency['ratio']:.2f}x"]
        )
    parts = [table(["", "before", "after", "smaller"], rows)]
    if report.bypassed:
        parts.append(f"bypassed blocks: {', '.join(report.bypassed)}")
    changed = [g for g in report.groups if 0 < g.kept < g.size]
    if changed:
        lines = [[g.group, g.kind, f"{g.kept}/{g.size}", g.by] for g in changed]
        parts.append(table(["group", "kind", "kept", "by"], lines))
    if report.patterns:
        parts.append(pattern_totals(report.patterns))
        if rows := pattern_rows(report.patterns):
            parts.append(table(PATTERN_COLUMNS, rows))
        parts += pattern_uses(report.patterns)
    if report.skips:
        parts.append(table(["left alone", "first", "reason"], skip_rows(report.skips)))
    if report.frozen:
        frozen = [[f.kind, str(f.axes), f.example, f.reason] for f in report.frozen]
        parts.append(table(["frozen", "axes", "first", "reason"], frozen))
    parts.extend(f"note: {note}" for note in report.notes)
    parts.append(report.certificate)
    return "\n\n".join(parts)

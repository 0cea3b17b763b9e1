"""Reports, analyses, plans and certificates as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sparsecc.report import (
    PATTERN_COLUMNS,
    FrozenLine,
    Report,
    frozen_lines,
    human,
    pattern_rows,
    pattern_totals,
    pattern_uses,
    skip_rows,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparsecc.axes.analysis import Analysis
    from sparsecc.plan import Plan
    from sparsecc.signature import TensorSpec
    from sparsecc.target import TargetInfo
    from sparsecc.verification import Certificate

_COLOURS = {"VERIFIED": "green", "VACUOUS": "yellow", "UNCHECKED": "yellow", "FAILED": "bold red"}
_KEYS = ("parameters", "bytes", "macs")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table; columns that start with ``>`` are aligned to the right."""
    found = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    for column in columns:
        found.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        # names of parameters hold brackets, which are no markup here
        found.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return found


def line(text: str) -> Text:
    """One line, taken as it is."""
    return Text(text)


def facts(title: str, rows: Mapping[str, Any]) -> Table:
    """Names and values."""
    found = table(title, ("", ""), rows.items())
    found.show_header = False
    return found


def report_tables(report: Report) -> Iterator[RenderableType]:
    """Sizes before and after, groups that became smaller, what stayed and why."""
    rows = []
    for key in _KEYS:
        before, after = report.before[key], report.after[key]
        rows.append([key, human(before), human(after), f"{before / after:.2f}x" if after else "-"])
    if report.latency is not None:
        times = report.latency
        rows.append(
            [
                "latency (ms)",
                f"{times['before_ms']:.3g}",
                f"{times['after_ms']:.3g}",
                f"{times['ratio']:.2f}x",
            ]
        )
    yield table("", ("", ">before", ">after", ">ratio"), rows)
    changed = [g for g in report.groups if g.kept < g.size]
    if changed:
        lines = [(g.group, g.kind, f"{g.kept}/{g.size}", g.by) for g in changed]
        yield table(f"{len(changed)} groups became smaller", ("group", "kind", ">kept", "by"), lines)
    if report.patterns:
        columns = tuple(">" * (name in ("zeros", "magnitude kept")) + name for name in PATTERN_COLUMNS)
        rows_of_patterns = pattern_rows(report.patterns)
        if rows_of_patterns:
            yield table(pattern_totals(report.patterns), columns, [tuple(r) for r in rows_of_patterns])
        yield from map(Text, pattern_uses(report.patterns))
    if report.skips:
        yield table("left alone", (">number", "first", "reason"), skip_rows(report.skips))
    if report.frozen:
        yield frozen_table(report.frozen)


def frozen_table(lines: Sequence[FrozenLine]) -> Table:
    """Frozen axes of parameters, gathered by reason."""
    count = sum(line.axes for line in lines)
    rows = [(line.kind, line.axes, line.example, line.reason) for line in lines]
    return table(f"{count} frozen axes of parameters", ("kind", ">axes", "first", "reason"), rows)


def analysis_tables(analysis: Analysis, sizes: Mapping[str, int]) -> Iterator[RenderableType]:
    """Size, coupled groups, and frozen axes of a model."""
    yield facts("", {key: f"{human(sizes[key])} ({sizes[key]:,})" for key in _KEYS})
    rows = [(g.name, g.kind, g.size, ", ".join(map(str, g.members))) for g in analysis.groups]
    yield table(f"{len(rows)} coupled groups", ("group", "kind", ">size", "members"), rows)
    yield frozen_table(frozen_lines(analysis))


def signature_table(title: str, specs: Iterable[TensorSpec]) -> Table:
    """Inputs or outputs: name, type, shape."""
    rows = [(s.name, s.dtype, "?" if s.shape is None else list(s.shape)) for s in specs]
    return table(title, ("name", "type", "shape"), rows)


def certificate_tables(certificate: Certificate) -> Iterator[RenderableType]:
    """The verdict, and the worst check of each kind."""
    verdict = Text(certificate.status, style=_COLOURS.get(certificate.status, ""))
    verdict.append(
        f": {certificate.claim}" + (f" ({certificate.why})" if certificate.why else ""), style="default"
    )
    yield verdict
    rows = []
    for what in dict.fromkeys(c.what for c in certificate.checks):
        worst = certificate.worst(what)
        if worst is not None:
            count = sum(c.what == what for c in certificate.checks)
            failed = sum(c.what == what and not c.passed for c in certificate.checks)
            state = Text(f"{failed} failed", style="bold red") if failed else Text("passed", style="green")
            rows.append(
                (what, count, state, worst.measure, f"{worst.error:.2e}", f"{worst.bound:.2e}", worst.where)
            )
    if rows:
        columns = ("check", ">runs", "", "measure", ">worst", ">bound", "where")
        yield table("", columns, rows)


def plan_table(plan: Plan) -> Table:
    """What was decided of every group."""
    title = f"plan ({plan.dialect}, {plan.mode}): {plan.recipe or 'no recipe'}; {len(plan.actions)} actions"
    rows = [(d.group, f"{len(d.kept)}/{d.size}", d.by) for d in plan.decisions]
    return table(title, ("group", ">kept", "by"), rows)


def listing_tables(rows: Sequence[Mapping[str, str]]) -> Iterator[RenderableType]:
    """A target's own table of layers."""
    if rows:
        yield table("layers", list(rows[0]), [list(row.values()) for row in rows])


def targets_table(targets: Iterable[TargetInfo]) -> Table:
    """Every target, what it offers, and whether it can be used here."""
    rows = [
        (
            t.name,
            Text("yes", style="green") if t.available else Text("no", style="yellow"),
            " ".join(t.patterns) or "-",
            " ".join(t.dtypes) or "as in the model",
            t.description if t.available else t.why_not,
        )
        for t in targets
    ]
    return table("", ("target", "usable here", "patterns", "dtypes", "description"), rows)

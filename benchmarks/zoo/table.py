"""Rows as tables: for the terminal, and as docs/zoo.md and docs/zoo.json."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from benchmarks.zoo.entry import PATHS, SUITES
from benchmarks.zoo.measure import EXPECTED, SPARSITY, Row

OUTCOMES = (
    "verified", "vacuous", "refused", "failed", "crash", "export failed", "no model", "skipped (size)",
    "timeout", "memory", "not run",
)  # fmt: skip
PRUNED = ("verified", "vacuous")


def line(row: Row) -> str:
    """One row for the terminal."""
    if row.outcome not in PRUNED:
        return f"{row.key:55} {row.outcome:14} {row.total:5.0f} s  {row.message[:160]}"
    frozen = ", ".join(f"{kind} {count}" for kind, count in row.frozen.items() if kind not in EXPECTED)
    return (
        f"{row.key:55} {row.outcome:14} {row.total:5.0f} s  removed {share(row.removed)} "
        f"of {share(row.prunable)}  {row.groups} groups  {error(row.error64)}  {row.form}"
        + (f"  [{frozen}]" if frozen else "")
    )


def share(value: float | None) -> str:
    """``63 %``."""
    return "" if value is None else f"{100 * value:.0f} %"


def error(value: float | None) -> str:
    """``1.2e-15``."""
    return "" if value is None else f"{value:.1e}"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _summaries(rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for suite in SUITES:
        for path in PATHS:
            mine = [r for r in rows if r.suite == suite and r.path == path]
            if not mine:
                continue
            counts = Counter(r.outcome for r in mine)
            pruned = [r for r in mine if r.outcome in PRUNED]
            worst = max((r.error64 for r in pruned if r.error64 is not None), default=None)
            found.append(
                [
                    suite,
                    path,
                    str(len(mine)),
                    *(str(counts[o] or "") for o in OUTCOMES),
                    share(_median([r.removed for r in pruned if r.removed is not None])),
                    share(_median([r.prunable for r in pruned if r.prunable is not None])),
                    error(worst),
                    f"{sum(r.total for r in mine) / 60:.0f}",
                ]
            )
    return found


_SUMMARY = ("suite", "path", "models", *OUTCOMES, "removed", "prunable", "worst error", "CPU-minutes")


def summary(rows: Sequence[Row]) -> Table:
    """Counts by suite and path; columns of outcomes that never came up are left out."""
    table = Table(title=f"zoo, pruned at {SPARSITY:.0%}")
    body = _summaries(rows)
    used = [i for i in range(len(_SUMMARY)) if any(line[i] for line in body)]
    for i in used:
        table.add_column(_SUMMARY[i], justify="left" if i < 2 else "right")
    for cells in body:
        table.add_row(*(cells[i] for i in used))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """docs/zoo.md: a summary, then a line for each model and path."""
    body = _summaries(rows)
    used = [i for i in range(len(_SUMMARY)) if any(line[i] for line in body)]
    parts = [
        _HEAD,
        _table([_SUMMARY[i] for i in used], [[cells[i] for i in used] for cells in body]),
        _LEGEND,
    ]
    less = lost_on_the_way(rows)
    if less:
        parts += [_LESS, _table(("model", "work removed from PyTorch", "through ONNX"), less)]
    for suite in SUITES:
        mine = [r for r in rows if r.suite == suite]
        if mine:
            parts += [f"## {suite}", _table(_COLUMNS, [_cells(r) for r in mine])]
    return "\n\n".join(parts) + "\n"


_HEAD = f"""# The zoo

Public architectures with random weights, pruned at {SPARSITY:.0%} of the positions of every group and
verified against masked semantics. Written by `make zoo`; `docs/zoo.json` holds the same and more."""

_LEGEND = """\
`removed` is the share of the parameters that went (medians above), `work` that of the multiply-adds (of
newer rows), `prunable` the share of the parameters that would go if every group kept one position.
`failed` and `crash` are defects of sparsecc; `export failed` means that `torch.export` or `torch.onnx`
does not take the model; `no model` that its library cannot build or run it here; `refused` that
sparsecc says why nothing is made of it. `back as`: the user's class, a graph module, or an ONNX file.
`planning` is analysis and plan, in CPU-seconds; `all` includes export and verification. Frozen axes are
counted by kind of reason; those of graph inputs, graph outputs and convolution kernels, which every
model has, are left out. Models that compute weights from parameters are folded first; mixtures of
experts are exported to ONNX with their batched implementation, the one that the exporter can write."""

_LESS = """\
## Less through ONNX

Models of which at least two points more of the work go when they are pruned in PyTorch than after their
export."""

_COLUMNS = (
    "model", "path", "outcome", "parameters", "removed", "work", "prunable", "groups", "back as",
    "error, float64", "planning", "all", "frozen axes, or what happened",
)  # fmt: skip


def lost_on_the_way(rows: Sequence[Row], margin: float = 0.02) -> list[list[str]]:
    """Models of which less work can be removed after their export to ONNX, the worst first."""
    direct = {(r.suite, r.name): r.work for r in rows if r.path == "torch"}
    pairs = [
        (r, before, r.work)
        for r in rows
        if r.path == "onnx" and r.work is not None and (before := direct.get((r.suite, r.name))) is not None
    ]
    pairs.sort(key=lambda p: p[2] - p[1])
    return [[f"{r.suite}/{r.name}", share(a), share(b)] for r, a, b in pairs if a - b > margin]


def _cells(row: Row) -> list[str]:
    frozen = ", ".join(f"{kind} {count}" for kind, count in row.frozen.items() if kind not in EXPECTED)
    words = frozen if row.outcome == "verified" else (row.message or frozen)
    return [
        row.name,
        row.path,
        row.outcome,
        f"{row.parameters / 1e6:.2f} M" if row.parameters else "",
        share(row.removed),
        share(row.work),
        share(row.prunable),
        "" if row.groups is None else str(row.groups),
        row.form,
        error(row.error64),
        f"{row.planning:.2f}" if row.groups is not None else "",
        f"{row.total:.0f}" if row.seconds else "",
        words[:200].replace("|", "\\|").replace("\n", " "),
    ]


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def document(rows: Sequence[Row]) -> str:
    """docs/zoo.json, one row a line."""
    lines = ",\n".join(json.dumps(r.to_json()) for r in rows)
    return f'{{"sparsity": {SPARSITY}, "rows": [\n{lines}\n]}}\n'

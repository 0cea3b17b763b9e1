"""How long planning takes, and how long ``import sparsecc``: ``make bench``.

CPU-seconds of one thread (time.process_time): reading the exported graph, axis analysis, saliency
and plan, and editing (the narrowed module of the user's class; export, verification and fall-back
are not part of it).  Each net is planned several times; the median is reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.nets import NETS

if TYPE_CHECKING:
    from sparsecc.fx.capture import Program


@dataclass(frozen=True)
class Line:
    """Medians of one net, in CPU-seconds; ``copied`` is what the kept weights weigh."""

    net: str
    nodes: int
    read: float
    analyse: float
    plan: float
    edit: float
    total: float
    limit: float | None
    copied_mb: float


def measure(name: str, rounds: int) -> Line:
    """Plan one net ``rounds`` times."""
    from sparsecc.fx.capture import capture

    make, shape, limit = NETS[name]
    torch.manual_seed(0)
    program = capture(make().eval(), (torch.randn(shape),))
    rows = []
    for _ in range(rounds):
        marks, nodes, copied = _round(program)  # what a round made is freed before the next one starts
        rows.append([b - a for a, b in itertools.pairwise(marks)])
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    total = statistics.median(sum(row) for row in rows)
    reading, analysing, planning, editing = medians
    return Line(name, nodes, reading, analysing, planning, editing, total, limit, copied)


def _round(program: Program) -> tuple[list[float], int, float]:
    """Times between the steps, nodes, and megabytes of kept weights."""
    from sparsecc.axes import Analysis
    from sparsecc.fx.module import module_actions, narrowed
    from sparsecc.fx.reader import read
    from sparsecc.passes import ChannelPruning, HeadPruning
    from sparsecc.pipeline import decide

    assert program.module is not None
    marks = [time.process_time()]
    view = read(program)
    marks.append(time.process_time())
    analysis = Analysis(view)
    marks.append(time.process_time())
    plan = decide(analysis, [ChannelPruning(), HeadPruning(head_dims=True)])
    marks.append(time.process_time())
    keeps = analysis.keeps({d.group: np.isin(np.arange(d.size), d.kept) for d in plan.decisions})
    full = plan.with_actions(module_actions(program, view, plan, keeps))
    module = narrowed(program.module, full, program.tied)
    marks.append(time.process_time())
    copied = sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6
    return marks, len(view.calls), copied


def import_times(rounds: int) -> tuple[float, float]:
    """Median seconds of fresh processes: ``import torch`` alone, and with ``import sparsecc`` after it."""
    alone: list[float] = []
    both: list[float] = []
    for _ in range(rounds):
        for code, found in (("import torch", alone), ("import torch, sparsecc", both)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            found.append(time.perf_counter() - start)
    return statistics.median(alone), statistics.median(both)


def main() -> int:
    """The command; exit code 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines = [measure(name, chosen.rounds) for name in NETS]
    alone, both = import_times(11)
    if chosen.json:
        print(
            json.dumps(
                {"planning": [asdict(line) for line in lines], "import": {"torch": alone, "both": both}}
            )
        )
    else:
        console = Console()
        table = Table(title="planning, CPU-seconds, one thread, medians")
        for column in (
            "net",
            "nodes",
            "read",
            "analyse",
            "plan",
            "edit",
            "total",
            "limit",
            "kept weights, MB",
        ):
            table.add_column(column, justify="left" if column == "net" else "right")
        for line in lines:
            times = [f"{t:.3f}" for t in (line.read, line.analyse, line.plan, line.edit, line.total)]
            limit = "-" if line.limit is None else f"{line.limit}"
            table.add_row(line.net, str(line.nodes), *times, limit, f"{line.copied_mb:.0f}")
        console.print(table)
        console.print(
            f"import torch {alone:.2f} s; with sparsecc {both:.2f} s: "
            f"it adds {(both / alone - 1) * 100:.0f} % "
            "(limit 50 %; medians of 11 interleaved fresh processes)"
        )
    late = any(line.limit is not None and line.total > line.limit for line in lines) or both > 1.5 * alone
    return int(late)


if __name__ == "__main__":
    raise SystemExit(main())

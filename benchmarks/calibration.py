"""What statistics cost beside the forward passes that they need: ``python -m benchmarks.calibration``.

CPU-seconds of one thread; runs alternate in one process.  ``forward`` is the module itself without gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.calibration import CALIBRATION
from benchmarks.models import MODELS
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.pipeline import open_subject
from sparsecc.subject import Subject

#: what is asked for -> the most that it may cost, in forward passes
LIMITS = {"square": 1.3, "hessian": 2.0}


def timed(run: Callable[[], object]) -> float:
    """CPU-seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def forward(model: Any, data: CalibrationData) -> None:
    """All batches through the module."""
    with torch.no_grad():
        for batch in data:
            given = data.inputs_of(batch)
            model(**given) if isinstance(given, dict) or hasattr(given, "keys") else model(*given)


def collect(subject: Subject, data: CalibrationData, name: str) -> None:
    """One moment of every layer."""
    Statistics(subject, data).collect([name])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"], choices=sorted(CALIBRATION))
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for model in chosen.models:
        loaded = MODELS[model].load()
        data = CALIBRATION[model](chosen.batches)
        subject = open_subject(loaded.model, loaded.example_inputs, dynamic_shapes=loaded.dynamic_shapes)
        times: dict[str, list[float]] = {"forward": [], **{name: [] for name in LIMITS}}
        for _ in range(chosen.rounds):
            times["forward"].append(timed(partial(forward, loaded.model, data)))
            for name in LIMITS:
                times[name].append(timed(partial(collect, subject, data, name)))
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[name], times["forward"], strict=True))
            for name in LIMITS
        }
        found.append({"model": model, "forward_s": statistics.median(times["forward"]), **ratios})
    late = any(row[name] > limit for row in found for name, limit in LIMITS.items())
    if chosen.json:
        print(json.dumps(found))
        return int(late)
    table = Table(title="statistics of all layers, in forward passes (medians)")
    for name in found[0]:
        table.add_column(f"{name} (limit {LIMITS[name]})" if name in LIMITS else name)
    for row in found:
        table.add_row(*(v if isinstance(v, str) else f"{v:.2f}" for v in row.values()))
    Console().print(table, f"load average {os.getloadavg()[0]:.1f}")
    return int(late)


if __name__ == "__main__":
    sys.exit(main())

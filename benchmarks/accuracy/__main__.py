"""``make bench-accuracy``: runs what is missing, and writes docs/accuracy.md from docs/accuracy.json."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console

from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.measure import dense, measured
from benchmarks.accuracy.page import markdown
from benchmarks.accuracy.plots import draw
from benchmarks.accuracy.store import DOCS, TABLE, load, save


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--only", default="*", help="pattern of experiments, such as 'resnet20/*'")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--no-verify", action="store_true", help="leave verification out (told in the table)")
    chosen = parser.parse_args()
    console = Console()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    todo = [e for e in EXPERIMENTS if fnmatch.fnmatch(e.key, chosen.only)]
    for place, experiment in enumerate(todo, 1):
        kept = load()
        if experiment.key in kept["rows"] and not chosen.fresh:
            continue
        console.print(f"{place}/{len(todo)} {experiment.model}: {experiment.title} ...")
        if experiment.model not in kept["dense"]:
            scores = dense(experiment.model)
            save(partial(_put, part="dense", key=experiment.model, value=scores))
        row = measured(experiment, verify=not chosen.no_verify)
        save(partial(_put, part="rows", key=row.key, value=asdict(row)))
        console.print(f"    {row.scores} {row.certificate} {row.seconds:.0f} s")
    kept = load()
    draw(kept, DOCS)
    TABLE.write_text(markdown(kept))
    return 0


def _put(kept: dict[str, Any], *, part: str, key: str, value: dict[str, Any]) -> None:
    kept[part][key] = value


if __name__ == "__main__":
    sys.exit(main())

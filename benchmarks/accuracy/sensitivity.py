"""``python -m benchmarks.accuracy.sensitivity``: how much every FFN of SmolLM2 minds losing neurons.

Writes docs/accuracy-sensitivity.json, which experiments take their shares from.  Rises are means over the
beginnings of calibration chunks that neither the ranking nor the updates have seen; none of them is scored.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache

import torch
from rich.progress import Progress

from benchmarks.accuracy.store import DOCS
from sparsecc.probing import Sensitivity

TABLE = DOCS / "accuracy-sensitivity.json"
#: chunks that neurons are ranked and layers are updated on, and the shares of neurons that are tried
CHUNKS, SHARES = 32, (0.25, 0.375, 0.5)
#: chunks that trials run on, of which only a beginning is read (how texts begin matters), some at a time
TRIALS, LENGTH, TOGETHER = 16, 96, 8


def main() -> int:
    """The command."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.sensitivity", description=__doc__
    ).parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = measure()
    found.save(TABLE)
    print(found)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def measure() -> Sensitivity:
    """Divergence of the next tokens' distributions, with least squares, for every FFN alone."""
    import sparsecc
    from benchmarks.accuracy.calibration import smol_lm2
    from benchmarks.tasks.language import load

    loaded = load()
    chunks = list(smol_lm2(128 + TRIALS).batches)[128:]
    texts = torch.cat([chunk["input_ids"][:, :LENGTH] for chunk in chunks])
    trials = [{"input_ids": some} for some in texts.split(TOGETHER)]
    with Progress() as shown:
        task = shown.add_task("", total=None)

        def progress(stage: str) -> None:
            shown.update(task, description=stage)

        return sparsecc.sensitivity(
            loaded.model,
            loaded.example_inputs,
            calibration=smol_lm2(CHUNKS),
            trials=trials,
            loss="kl",
            shares=SHARES,
            updates=True,
            saliency="obs",
            include=("*gate_proj*",),
            residual=False,
            dynamic_shapes=loaded.dynamic_shapes,
            progress=progress,
        )


@cache
def shares(sparsity: float) -> dict[str, float]:
    """What the table that is kept says."""
    return Sensitivity.load(TABLE).shares(sparsity)


if __name__ == "__main__":
    sys.exit(main())

"""``make bench-accuracy``: runs what is missing, and writes docs/accuracy.md from docs/accuracy.json."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from benchmarks.accuracy.calibration import CALIBRATION
from benchmarks.accuracy.experiments import EXPERIMENTS, Experiment
from benchmarks.accuracy.store import TABLE, load, save
from benchmarks.accuracy.training import lines
from benchmarks.models import MODELS, as_predict


@dataclass(frozen=True)
class Row:
    """Scores of one experiment; ``seconds`` of pruning, without capture, verification and scoring."""

    key: str
    model: str
    title: str
    recipe: str
    saliency: str
    batches: int
    parameters: float
    zeros: float
    scores: dict[str, float]
    certificate: str
    seconds: float
    load: float


def measured(experiment: Experiment, *, verify: bool) -> Row:
    """Prune, verify and score."""
    import sparsecc

    entry = MODELS[experiment.model]
    loaded = entry.load()
    data = CALIBRATION[experiment.model](experiment.batches) if experiment.batches else None
    marks: dict[str, float] = {}

    def progress(stage: str) -> None:
        marks.setdefault(stage.partition(":")[0], time.perf_counter())

    result = sparsecc.prune(
        loaded.model,
        loaded.example_inputs,
        recipe=experiment.recipe,
        saliency=experiment.saliency,
        calibration=data,
        dynamic_shapes=loaded.dynamic_shapes,
        verify=verify,
        progress=progress,
    )
    report = result.report
    size = sum(p.size for p in report.patterns)
    zeros = sum(p.zeros for p in report.patterns) / size if size else 0.0
    return Row(
        experiment.key,
        experiment.model,
        experiment.title,
        experiment.recipe,
        experiment.saliency,
        experiment.batches,
        report.after["parameters"] / report.before["parameters"],
        zeros,
        dict(entry.score(as_predict(result.model))),
        result.certificate.status,
        marks["edit"] - marks["plan"],
        os.getloadavg()[0],
    )


def dense(model: str) -> dict[str, float]:
    """Scores of a model as it is."""
    entry = MODELS[model]
    return dict(entry.score(entry.load().predict))


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
    TABLE.write_text(markdown(load()))
    return 0


def _put(kept: dict[str, Any], *, part: str, key: str, value: dict[str, Any]) -> None:
    kept[part][key] = value


def markdown(kept: dict[str, Any]) -> str:
    """docs/accuracy.md."""
    out = [_HEAD]
    for model in dict.fromkeys(e.model for e in EXPERIMENTS):
        rows = [kept["rows"][e.key] for e in EXPERIMENTS if e.model == model and e.key in kept["rows"]]
        if not rows:
            continue
        before = kept["dense"][model]
        names = list(before)
        out.append(f"\n## {MODELS[model].title}\n")
        out.append(f"| | parameters left | zeros | {' | '.join(names)} | s | |")
        out.append("|---|---|---|" + "---|" * (len(names) + 2))
        out.append(f"| dense | 1.00 | | {' | '.join(_number(before[n]) for n in names)} | | |")
        for row in rows:
            scores = " | ".join(_number(row["scores"][n]) for n in names)
            zeros = f"{row['zeros']:.2f}" if row["zeros"] else ""
            out.append(
                f"| {row['title']} | {row['parameters']:.2f} | {zeros} | {scores} | "
                f"{row['seconds']:.0f} | {row['certificate']} |"
            )
    if trained := lines(kept):
        out += [_TRAINED, *trained]
    out.append("\n## Recipes\n")
    out += [
        f"- {MODELS[r['model']].title}, {r['title']}: `{r['recipe']}`, saliency {r['saliency']}"
        + (f", {r['batches']} batches of calibration data" if r["batches"] else "")
        for r in (kept["rows"][e.key] for e in EXPERIMENTS if e.key in kept["rows"])
    ]
    return "\n".join(out) + "\n"


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 1.5 else f"{value:.3f}"


_HEAD = """# What pruning costs in accuracy

One shot, no fine-tuning, on trained models; written by `make bench-accuracy` (one thread, a shared 2-core
machine, so that seconds are upper bounds). `zeros` is the share of zeros in the layers that have a pattern;
seconds are those of deciding (statistics, ranking, updates), without capture, verification and scoring.
Calibration data are never in what is scored: training images for ResNet-20, text between the parts of
articles that are scored for MiniLM, other articles for SmolLM2, other rendered lines for the recogniser."""


_TRAINED = """
## ResNet-20, with training

Pruned, then trained on with masks: SGD with momentum, learning rate 0.05 falling to zero (cosine), batches of
128 (`python -m benchmarks.accuracy.training`). Accuracy on the test images, mean over seeds with
its 95 % interval; the standard error of a single run is .0026.
"""


if __name__ == "__main__":
    sys.exit(main())

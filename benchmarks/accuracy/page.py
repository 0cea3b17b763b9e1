"""docs/accuracy.md, from what docs/accuracy.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.plots import file_name, points
from benchmarks.accuracy.training import lines
from benchmarks.models import MODELS

Kept = dict[str, Any]


def markdown(kept: Kept) -> str:
    """The whole page."""
    out = [_HEAD]
    for model in dict.fromkeys(e.model for e in EXPERIMENTS):
        rows = [kept["rows"][e.key] for e in EXPERIMENTS if e.model == model and e.key in kept["rows"]]
        if rows:
            out += _section(model, kept["dense"][model], rows)
    if trained := lines(kept):
        out += [_TRAINED, *trained]
    out.append("\n## Recipes\n")
    out += [
        f"- {MODELS[r['model']].title}, {r['title']}: `{r['recipe']}`, saliency {r['saliency']}"
        + (f", {r['batches']} batches of calibration data" if r["batches"] else "")
        for r in (kept["rows"][e.key] for e in EXPERIMENTS if e.key in kept["rows"])
    ]
    return "\n".join(out) + "\n"


def _section(model: str, dense: Mapping[str, float], rows: list[dict[str, Any]]) -> list[str]:
    """The plot and the table of one model."""
    entry = MODELS[model]
    names = list(dense)
    out = [f"\n## {entry.title}\n"]
    if points(model, rows):
        out.append(f"![{entry.title}: {entry.metric} against what is left]({file_name(model)})\n")
    out.append(
        _line(["", "parameters left", "zeros", "MACs left", *names, "latency, ms", "speed-up", "s", ""])
    )
    out.append("|---" * (len(names) + 8) + "|")
    out.append(_line(["dense", "1.00", "", "1.00", *_scores(dense, names), "", "", "", ""]))
    for row in rows:
        shares = [
            f"{row['parameters']:.2f}",
            f"{row['zeros']:.2f}" if row["zeros"] else "",
            f"{row['macs']:.2f}" if "macs" in row else "",
        ]
        rest = [*_latency(row.get("latency")), f"{row['seconds']:.0f}", row["certificate"]]
        out.append(_line([row["title"], *shares, *_scores(row["scores"], names), *rest]))
    return out


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latency(found: Mapping[str, float] | None) -> list[str]:
    """Two cells; empty for rows from before latency was measured."""
    if found is None:
        return ["", ""]
    return [
        f"{found['before_ms']:.3g} → {found['after_ms']:.3g}",
        f"{found['ratio']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]",
    ]


def _scores(found: Mapping[str, float], names: list[str]) -> list[str]:
    return [_number(found[name]) for name in names]


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 1.5 else f"{value:.3f}"


_HEAD = """# What pruning costs in accuracy

One shot, no fine-tuning, on trained models; written by `make bench-accuracy` (one thread, a shared 2-core
machine, so that seconds are upper bounds). `zeros` is the share of zeros in the layers that have a pattern;
seconds are those of deciding (statistics, ranking, updates), without capture, verification and scoring.

`MACs left` are multiply-accumulates whose weight is there and not zero. The runtimes measured here compute
with zeros as with other numbers, so that only removed channels, neurons and blocks can make them faster.
Latency is that of the dense and the pruned model on the example input (PyTorch: the module itself; ONNX:
onnxruntime), timed alternately in one process on one thread: medians, the median of the ratios of
neighbouring runs, and its quartiles. Differences under 10 % mean nothing. Rows without these figures are
older; `python -m benchmarks.accuracy --fresh` measures them again.

In the plots a line joins one recipe at several strengths, round marks are channels or neurons that are
gone, squares zeros in weights that stay; the dense model is where the dotted lines cross. Bars in the
right-hand plot are quartiles.

Calibration data are never in what is scored: training images for ResNet-20 and the VGG, text between the
parts of articles that are scored for MiniLM, other articles for SmolLM2, other rendered lines for the
recogniser, other speakers for the voice detector. EfficientNet-Lite0 is calibrated on crops of five other
images (a portrait, grass, gravel, stars, tissue), for want of more photographs: less like what it is scored
on than a user's data would be.

Shares by measured sensitivity follow from a table of what the divergence from the dense model is where one
FFN alone loses neurons (`python -m benchmarks.accuracy.sensitivity`, accuracy-sensitivity.json), measured on
calibration text like everything else that decides."""


_TRAINED = """
## ResNet-20, with training

Pruned, then trained on with masks: SGD with momentum, learning rate 0.05 (where no other is named)
falling to zero (cosine), batches of 128 images where no other number is named (`python -m
benchmarks.accuracy.training`). Accuracy on the test images, mean over seeds with its 95 % interval; the
standard error of a single run is .0026. Torch-Pruning has the ratio that leaves FLOPs nearest to half, and
trains in the same way; FLOPs are counted by torch. On a GPU (an H100 and an H200) as many seeds were run as
its time allowed, in bfloat16, most of them as CUDA graphs.
"""

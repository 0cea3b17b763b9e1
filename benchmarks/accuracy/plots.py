"""One picture a model: its score against weights, multiply-accumulates and time that are left."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.models import MODELS

#: family -> colour (Okabe and Ito: told apart by everyone)
COLOURS = {
    "zeros, magnitude": "#999999",
    "zeros, Wanda": "#E69F00",
    "zeros, SparseGPT": "#56B4E9",
    "zeros, SparseGPT, norms": "#0072B2",
    "channels, weights only": "#D55E00",
    "channels, data": "#CC79A7",
    "channels, norms or biases": "#F0E442",
    "channels, least squares": "#009E73",
    "blocks": "#000000",
}
#: field of a row -> what the axis says
AXES = {
    "weights": "weights left, without zeros, share of dense",
    "macs": "MACs left, without zeros, share of dense",
    "time": "measured latency, share of dense",
}
#: saliencies that read nothing but weights
_BLIND = {"l1", "l2", "linf", "bn", "fpgm", "random"}


@dataclass(frozen=True)
class Point:
    """One row; ``time`` with its quartiles.  Points of one ``curve`` differ in strength only."""

    family: str
    curve: str
    score: float
    weights: float
    macs: float
    time: float
    fast: float
    slow: float


def family(recipe: str, saliency: str) -> str:
    """The key in ``COLOURS``."""
    if "DepthPruning" in recipe:
        return "blocks"
    if "ChannelPruning" in recipe:
        if "Reconstruction" in recipe:
            return "channels, least squares"
        if ";" in recipe:
            return "channels, norms or biases"
        return "channels, weights only" if saliency in _BLIND else "channels, data"
    if "SparseGPT" in recipe:
        return "zeros, SparseGPT, norms" if "BatchNormReestimation" in recipe else "zeros, SparseGPT"
    return "zeros, Wanda" if "Wanda" in recipe else "zeros, magnitude"


def points(model: str, rows: list[dict[str, Any]]) -> list[Point]:
    """The rows that have everything that is drawn."""
    metric = MODELS[model].metric
    return [
        Point(
            family(r["recipe"], r["saliency"]),
            re.sub(r"[\d.]+", "", r["recipe"]) + r["saliency"],
            r["scores"][metric],
            r["weights"],
            r["macs"],
            1 / r["latency"]["ratio"],
            1 / r["latency"]["high"],
            1 / r["latency"]["low"],
        )
        for r in rows
        if "latency" in r
    ]


def file_name(model: str) -> str:
    """Beside docs/accuracy.md."""
    return f"accuracy-{model}.svg"


def draw(kept: Mapping[str, Any], folder: Path) -> None:
    """Write the pictures of all models that have points."""
    import matplotlib

    matplotlib.use("Agg")
    # text stays text, and the same numbers give the same bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsecc", "font.size": 9}):
        for model in dict.fromkeys(e.model for e in EXPERIMENTS):
            rows = [kept["rows"][e.key] for e in EXPERIMENTS if e.model == model and e.key in kept["rows"]]
            if found := points(model, rows):
                picture(model, found, kept["dense"][model], folder / file_name(model))


def picture(model: str, found: list[Point], dense: Mapping[str, float], file: Path) -> None:
    """Three plots side by side that share their vertical axis."""
    from matplotlib.figure import Figure

    entry = MODELS[model]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    plots = figure.subplots(1, len(AXES), sharey=True)
    for plot, (field, label) in zip(plots, AXES.items(), strict=True):
        plot.axhline(dense[entry.metric], color="black", linestyle=":", linewidth=1, label="dense")
        for name in dict.fromkeys(p.curve for p in found):
            curve = sorted((p for p in found if p.curve == name), key=lambda p: p.weights)
            _curve(plot, field, curve)
        plot.axvline(1, color="black", linestyle=":", linewidth=1)
        plot.set_xlim(0, 1.1 * max(1, *(getattr(p, field) for p in found)))
        plot.set_xlabel(label)
        plot.grid(alpha=0.3)
    plots[0].set_ylabel(entry.metric + ("" if entry.better == "higher" else " (lower is better)"))
    figure.suptitle(entry.title)
    handles, labels = plots[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = [name for name in ("dense", *COLOURS) if name in unique]
    figure.legend([unique[n] for n in order], order, loc="outside lower center", ncols=4)
    figure.savefig(file, metadata={"Date": None})


def _curve(plot: Any, field: str, curve: list[Point]) -> None:
    """One recipe, in its family's colour."""
    here = curve[0].family
    x, y = [getattr(p, field) for p in curve], [p.score for p in curve]
    mark = "s" if here.startswith("zeros") else "o"
    plot.plot(x, y, color=COLOURS[here], marker=mark, markersize=5, linewidth=1.2, label=here)
    if field == "time":
        bars = [[p.time - p.fast for p in curve], [p.slow - p.time for p in curve]]
        plot.errorbar(x, y, xerr=bars, color=COLOURS[here], linestyle="none", linewidth=0.8)

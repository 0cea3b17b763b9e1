"""One experiment: prune, verify, count what is left, score, time."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from benchmarks.accuracy import logits
from benchmarks.accuracy.calibration import CALIBRATION
from benchmarks.accuracy.experiments import Experiment
from benchmarks.models import MODELS, Loaded, Predict, as_predict
from sparsecc.cost import macs
from sparsecc.measure import Latency, compare_latency
from sparsecc.pipeline import Pruned
from sparsecc.report import Report


@dataclass(frozen=True)
class Row:
    """Scores of one experiment; ``seconds`` of pruning, without capture, verification and scoring.

    Shares of the dense model: ``parameters`` that are left, ``weights`` that are left and not zero, ``macs``
    that are left with weights that are not zero.  ``zeros`` is their share in layers that have a pattern.
    """

    key: str
    model: str
    title: str
    recipe: str
    saliency: str
    batches: int
    parameters: float
    zeros: float
    weights: float
    macs: float
    scores: dict[str, float]
    certificate: str
    latency: dict[str, Any]
    seconds: float
    load: float


def measured(experiment: Experiment, *, verify: bool) -> Row:
    """Prune, verify, score and time."""
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
    if experiment.steps:
        chunks = list(CALIBRATION[experiment.model](experiment.steps).batches)
        assert isinstance(loaded.model, nn.Module)
        logits.train(result.model, loaded.model, chunks)
    predict = as_predict(result.model)
    return Row(
        experiment.key,
        experiment.model,
        experiment.title,
        experiment.recipe,
        experiment.saliency,
        experiment.batches,
        report.after["parameters"] / report.before["parameters"],
        share_of_zeros(report),
        weights_left(report),
        macs_left(result),
        dict(entry.score(predict)),
        result.certificate.status,
        latency(loaded, predict).to_json(),
        marks["edit"] - marks["plan"],
        os.getloadavg()[0],
    )


def dense(model: str) -> dict[str, float]:
    """Scores of a model as it is."""
    entry = MODELS[model]
    return dict(entry.score(entry.load().predict))


def share_of_zeros(report: Report) -> float:
    """Of the elements of all layers that have a pattern."""
    size = sum(p.size for p in report.patterns)
    return sum(p.zeros for p in report.patterns) / size if size else 0.0


def weights_left(report: Report) -> float:
    """Parameters that are there and no zeros of a pattern, as a share of those of the dense model."""
    zeros = sum(p.zeros for p in report.patterns)
    return (report.after["parameters"] - zeros) / report.before["parameters"]


def macs_left(result: Pruned) -> float:
    """Multiply-accumulates whose weight is there and not zero, as a share of those of the dense model.

    Every element of a weight takes part in equally many of them.
    """
    analysis, report = result.subject.analysis, result.report
    weights = analysis.view.weights
    zeros = {p.weight: p.zeros / math.prod(weights[p.weight].shape) for p in report.patterns if p.zeros}
    whole = report.before["macs"]
    idle = 0.0
    for call in analysis.view.calls:
        share = sum(zeros.get(value.weight or "", 0.0) for value in call.inputs if value is not None)
        if share:
            idle += share * (whole - macs(analysis, without=(call.name,)))
    return (report.after["macs"] - idle) / whole


def latency(loaded: Loaded, pruned: Predict) -> Latency:
    """Dense against pruned on the example inputs, one thread: the module itself, or onnxruntime."""
    given = loaded.example_inputs
    before, after = (
        partial(f, **given) if isinstance(given, dict) else partial(f, *given)
        for f in (loaded.predict, pruned)
    )
    return compare_latency(before, after, rounds=51, warmup=5, threads=1)

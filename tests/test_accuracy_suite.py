"""The accuracy suite: its experiments are well formed, its page and pictures show what was measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsecc
from benchmarks.accuracy.calibration import CALIBRATION
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.measure import Row, macs_left, share_of_zeros, weights_left
from benchmarks.accuracy.page import markdown
from benchmarks.accuracy.plots import COLOURS, draw, family, points
from benchmarks.datasets import OTHER_PHOTOGRAPHS, PHOTOGRAPHS
from benchmarks.models import MODELS
from benchmarks.vgg import load_vgg
from sparsecc.passes import PASSES
from sparsecc.recipe import parse

LATENCY = {"before_ms": 2.0, "after_ms": 1.0, "ratio": 2.0, "low": 1.6, "high": 2.5}


def _row(place: int, **changes: Any) -> dict[str, Any]:
    """A result of one of the experiments."""
    e = EXPERIMENTS[place]
    identity = (e.key, e.model, e.title, e.recipe, e.saliency, e.batches)
    scores = {MODELS[e.model].metric: 0.5}
    return {**asdict(Row(*identity, 1.0, 0.5, 0.5, 0.25, scores, "VERIFIED", LATENCY, 1.0, 1.0)), **changes}


def test_every_experiment_has_a_key_and_a_title_of_its_own() -> None:
    assert len({e.key for e in EXPERIMENTS}) == len(EXPERIMENTS)
    assert len({(e.model, e.title) for e in EXPERIMENTS}) == len(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.key)
def test_experiments_are_well_formed(experiment: Any) -> None:
    parse(experiment.recipe, PASSES)
    assert experiment.model in MODELS
    assert not experiment.batches or experiment.model in CALIBRATION
    assert family(experiment.recipe, experiment.saliency) in COLOURS


def test_photographs_of_calibration_are_not_scored() -> None:
    assert not {Path(member).name for _, member in OTHER_PHOTOGRAPHS} & {*PHOTOGRAPHS}


def test_vgg_loads() -> None:
    assert load_vgg()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_shares_count_zeros_and_what_is_gone() -> None:
    """Half the channels of the first layer: half of both layers; then half of the rest is zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    x = (torch.randn(4, 16),)
    gone = sparsecc.prune(net, x, recipe="ChannelPruning(sparsity=0.5)")
    assert share_of_zeros(gone.report) == 0
    assert weights_left(gone.report) == macs_left(gone) == 0.5
    both = sparsecc.prune(net, x, recipe="ChannelPruning(sparsity=0.5); ElementPruning(sparsity=0.5)")
    assert share_of_zeros(both.report) == 0.5
    assert weights_left(both.report) == macs_left(both) == 0.25


def test_page_leaves_blank_what_old_rows_lack() -> None:
    old = {k: v for k, v in _row(0).items() if k not in {"weights", "macs", "latency"}}
    new = _row(1)
    page = markdown({"dense": {new["model"]: {"accuracy": 0.9}}, "rows": {r["key"]: r for r in (old, new)}})
    assert f"| {old['title']} | 1.00 | 0.50 |  | 0.500 |  |  | 1 | VERIFIED |" in page
    assert f"| {new['title']} | 1.00 | 0.50 | 0.25 | 0.500 | 2 → 1 | 2.00x [1.60, 2.50] | 1 |" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


def test_pictures_show_rows_that_have_all_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    new = _row(1)
    old = {k: v for k, v in _row(0).items() if k != "latency"}
    (point,) = points(new["model"], [old, new])
    assert (point.time, point.fast, point.slow) == (0.5, 0.4, 0.625)
    draw({"dense": {new["model"]: {"accuracy": 0.9}}, "rows": {new["key"]: new}}, tmp_path)
    (file,) = tmp_path.iterdir()
    first = file.read_bytes()
    assert b"measured latency" in first
    draw({"dense": {new["model"]: {"accuracy": 0.9}}, "rows": {new["key"]: new}}, tmp_path)
    assert file.read_bytes() == first

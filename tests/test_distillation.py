"""Training part by part: how the graph is divided, that parts repeat exactly, and what comes of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.axes.analysis import Given
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.calibration.readings import readings
from sparsecc.errors import InvalidOption
from sparsecc.graph import View
from sparsecc.passes import ChannelPruning, DepthPruning, Distillation, NMPattern, Reconstruction
from sparsecc.pipeline import open_subject
from sparsecc.recovery import distillation
from sparsecc.recovery.distillation import Run, Schedule, Training, distill
from sparsecc.recovery.regions import Region, regions
from sparsecc.recovery.sequential import Recovery
from tests.patterns import CASES
from tests.test_recovery import Mixed, change, trained


def divided(view: View, found: list[Region]) -> None:
    """Every call is in one region, and nothing but a region's last outputs depends on it from outside."""
    assert [call for region in found for call in region.calls] == view.calls
    trainable = [name for region in found for name in region.weights]
    assert len(trainable) == len(set(trainable))
    produced = {v: region for region in found for c in region.dependent for v in c.outputs}
    for region in found[:-1]:
        assert set(region.targets) <= set(region.last.outputs)
    for region in found:
        for call in region.calls:
            for value in call.inputs:
                other = produced.get(value) if value is not None else None
                if other is not None and other is not region:
                    assert value in other.targets
        for name in region.weights:
            readers = [c for c in view.calls if any(v is not None and v.weight == name for v in c.inputs)]
            assert set(readers) <= set(region.calls)


SOME = {name for place, name in enumerate(CASES) if place % 10 == 0}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.nightly) for n in CASES]
)
def test_parts_repeat_what_the_pruned_model_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every pattern: what a part gives when its calls are repeated is what it gave, bit by bit."""
    module, inputs = CASES[name].make()
    repeated: list[str] = []

    def fit(self: Training, recovery: Recovery, runs: Sequence[Run], schedule: Schedule) -> Any:
        for run in runs:
            for (_, again), before in zip(run.computed(recovery), run._alive, strict=True):
                for a, b in zip(again, before, strict=True):
                    assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())
            assert run.wanted
        repeated.append(self.names[0])
        raise distillation.Unfit("only repeated")

    monkeypatch.setattr(Training, "fit", fit)
    subject = open_subject(module, inputs)
    statistics = Statistics(subject, CalibrationData([inputs]))
    kept = ChannelPruning(sparsity=0.5).choose(subject.analysis).kept
    analysis = subject.analysis.after(Given(kept=subject.analysis.feasible(kept)))
    divided(subject.view, list(regions(analysis, statistics.readings, analysis.keeps(analysis.given.kept))))
    found = distill(analysis, statistics, Schedule(1, 0.1, "relative"), everything=True)
    assert {s.where for s in found.skips if s.reason == "only repeated"} == set(repeated)
    assert repeated or not statistics.readings.of or found.skips


class Block(nn.Module):
    """A transformer block's feed-forward half, gated, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


def stack() -> tuple[nn.Module, list[torch.Tensor]]:
    """Three such blocks, with data."""
    torch.manual_seed(0)
    mix = torch.randn(16, 16)
    return nn.Sequential(*(Block() for _ in range(3))).eval(), [torch.randn(64, 16) @ mix for _ in range(9)]


def test_a_part_is_both_layers_of_a_feed_forward_block() -> None:
    net, data = stack()
    analysis = open_subject(net, (data[0],)).analysis
    found = list(regions(analysis, readings(analysis), analysis.keeps({})))
    names = ("norm.weight", "norm.bias", "gate.weight", "up.weight", "down.weight")
    assert [set(r.weights) for r in found if r.weights] == [{f"{k}.{n}" for n in names} for k in range(3)]


@pytest.mark.parametrize("towards", ["original", "own"])
def test_training_gates_too_beats_least_squares(towards: Any) -> None:
    """Least squares can change the last layer only."""
    net, data = stack()
    fresh = [x + 0.1 * torch.randn_like(x) for x in data]
    pruning = ChannelPruning(sparsity=0.5, include=("*gate*",))
    solved = Reconstruction(towards=towards)
    trained = Distillation(towards=towards, epochs=20)
    results = [
        sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
        for recipe in ([pruning], [pruning, solved], [pruning, solved, trained])
    ]
    assert all(r.certificate.status == "VERIFIED" for r in results)
    bare, solved_error, trained_error = (change(net, r, fresh) for r in results)
    assert trained_error < 0.7 * solved_error < 0.7 * bare


def test_pruned_elements_stay_zero() -> None:
    net, data = trained()
    recipe = [NMPattern(), Distillation()]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    assert result.certificate.status == "VERIFIED"
    bare = sparsecc.prune(net, (data[0],), recipe=[NMPattern()], calibration=data)
    for name, value in bare.model.state_dict().items():
        zeros = (value == 0) & (net.state_dict()[name] != 0)
        assert (result.model.state_dict()[name][zeros] == 0).all()
    assert change(net, result, data) < 0.7 * change(net, bare, data)


def test_what_makes_it_no_better_is_not_taken() -> None:
    """Steps of a hundred times the weights: the old values stay, and the reader is told."""
    net, data = trained()
    recipe = [ChannelPruning(sparsity=0.25), Distillation(rate=100.0, epochs=1)]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    bare = sparsecc.prune(net, (data[0],), recipe=recipe[:1], calibration=data)
    assert {s.reason for s in result.plan.skips} >= {"training it made it no better"}
    assert same(result.model, bare.model)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules have the same weights, bit by bit."""
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_single_batch_is_enough() -> None:
    """It is trained and judged on the same one."""
    net, data = trained()
    recipe = [ChannelPruning(sparsity=0.5), Distillation()]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data[:1])
    assert result.certificate.status == "VERIFIED"
    bare = sparsecc.prune(net, (data[0],), recipe=recipe[:1], calibration=data[:1])
    assert change(net, result, data[:1]) < change(net, bare, data[:1])


def test_onnx_files_are_trained_as_modules_are() -> None:
    net, data = trained()
    program = torch.onnx.export(
        net, (data[0],), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    assert program is not None
    stream = io.BytesIO()
    program.save(stream)
    recipe = [ChannelPruning(sparsity=0.5), Distillation(epochs=20)]
    ours = sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
    theirs = sparsecc.prune(stream.getvalue(), recipe=recipe, saliency="wanda", calibration=data)
    assert theirs.certificate.status == "VERIFIED"
    session = sparsecc.compile(theirs.model, target="cpu")
    bare = sparsecc.prune(net, (data[0],), recipe=recipe[:1], saliency="wanda", calibration=data)
    got = session(data[0])
    found = torch.as_tensor(np.asarray(next(iter(got.values() if isinstance(got, dict) else [got]))))
    want, dense = ours.model(data[0]).detach(), net(data[0]).detach()
    assert (found - dense).norm() < 0.7 * (bare.model(data[0]).detach() - dense).norm()
    assert (found - want).norm() < (want - dense).norm()


class Rounding(nn.Module):
    """A feed-forward block whose hidden activations are rounded: no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x).relu()) * 4).long().float()


class InPlace(nn.Module):
    """What a layer gives is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden[:, 2:4] = 0.5
        hidden.relu_()
        return self.second(hidden)


@pytest.mark.parametrize("kind", [Rounding, InPlace])
def test_parts_that_cannot_be_trained_are_told_or_trained(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, data = kind().eval(), [torch.randn(32, 8) for _ in range(4)]
    recipe = [ChannelPruning(sparsity=0.25), Distillation()]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    assert result.certificate.status in ("VERIFIED", "VACUOUS")
    bare = sparsecc.prune(net, (data[0],), recipe=recipe[:1], calibration=data)
    told = any("gradient" in s.reason or "in place" in s.reason for s in result.plan.skips)
    assert same(result.model, bare.model) == told


def test_a_part_without_products_is_trained_too() -> None:
    """A norm at the end, behind the last two products."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12)).eval()
    data = [torch.randn(32, 8) for _ in range(4)]
    recipe = [ChannelPruning(sparsity=0.5), Distillation(layers="all")]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    bare = sparsecc.prune(net, (data[0],), recipe=recipe[:1], calibration=data)
    assert result.certificate.status == "VERIFIED"
    assert change(net, result, data) < change(net, bare, data)
    assert not torch.equal(result.model[3].weight, bare.model[3].weight)


def test_blocks_that_were_taken_out_stay_out() -> None:
    """A residual branch that depth pruning removed is no constant of the sum that it joined."""
    net, data = stack()
    recipe = [DepthPruning(blocks=("1",)), Distillation(layers="all", epochs=5)]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    assert result.certificate.status == "VERIFIED"
    bare = sparsecc.prune(net, (data[0],), recipe=recipe[:1], calibration=data)
    assert change(net, result, data) <= change(net, bare, data)


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"rate": 0.0}, {"layers": "some"}, {"towards": "you"}, {"include": "head"}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        Distillation(**options)


def test_it_needs_data() -> None:
    with pytest.raises(InvalidOption, match="calibration="):
        sparsecc.prune(Mixed().eval(), (torch.randn(2, 4, 8, 8),), recipe=Distillation())

"""The report: it survives storage, and its latency is that of what users run."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import sparsecc
from sparsecc import InvalidModel
from sparsecc.measure import compare_latency
from sparsecc.report import Report


class Counting(torch.nn.Module):
    """Counts the calls of its own forward, and remembers how it was called."""

    calls: list[tuple[bool, bool]]

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 8)
        self.down = torch.nn.Linear(8, 3)
        self.calls = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers."""
        if not torch.compiler.is_exporting():
            self.calls.append((self.training, torch.is_grad_enabled()))
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


def test_latency_is_that_of_the_modules_themselves() -> None:
    net = Counting().train()
    result = sparsecc.prune(net, (torch.randn(2, 4),), latency=True)
    assert result.report.latency is not None
    assert result.report.latency["rounds"] >= 1
    assert len(net.calls) > 2
    assert set(net.calls) == {(False, False)}, "timed in evaluation mode, without gradients"
    assert set(result.model.calls) == {(False, False)}
    assert net.training
    assert result.model.training
    assert sparsecc.prune(net, (torch.randn(2, 4),)).report.latency is None


def affine(dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = [
        numpy_helper.from_array(np.random.default_rng(k).standard_normal(shape).astype(kind), f"w{k}")
        for k, shape in enumerate([(4, 8), (8, 3)])
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w0"], ["a"]), helper.make_node("MatMul", ["a", "w1"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["batch", 4])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 3])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_latency_of_onnx_models_is_that_of_onnxruntime() -> None:
    report = sparsecc.prune(affine(), latency=True).report
    assert report.latency is not None
    assert report.notes == ()


def test_a_model_that_onnxruntime_cannot_run_is_noted() -> None:
    report = sparsecc.prune(affine(onnx.TensorProto.BFLOAT16), latency=True, verify=False).report
    assert report.latency is None
    assert any("latency was not measured" in note for note in report.notes)


def test_compiled_models_are_timed_as_artifacts() -> None:
    net = Counting().eval()
    compiled = sparsecc.compile(net, (torch.randn(2, 4),), latency=True)
    assert compiled.report.latency is not None
    assert compiled.artifact.manifest["report"]["latency"] == compiled.report.latency


def test_a_report_survives_storage() -> None:
    report = sparsecc.prune(affine(), latency=True).report
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    assert str(again) == str(report)
    for damaged in ({}, {**report.to_json(), "extra_key": 1}, {**report.to_json(), "groups": [{}]}):
        with pytest.raises(InvalidModel):
            Report.from_json(damaged)


def test_settling_rests_and_warms_up_before_every_timed_call() -> None:
    log: list[str] = []
    compare_latency(
        lambda: log.append("a"),
        lambda: log.append("b"),
        rounds=2,
        warmup=0,
        settle_s=1.0,
        sleep=lambda seconds: log.append(f"sleep {seconds}"),
    )
    rest = "sleep 1.0"
    assert log == [rest, "a", "a", rest, "b", "b", rest, "b", "b", rest, "a", "a"]


class Recording(nn.Sequential):
    """Notes the batches that it is run on."""

    seen: list[int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            self.seen.append(len(x))
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("convolution", [False, True])
def test_figures_are_those_of_the_example_that_was_given(batch: int, convolution: bool) -> None:
    """A batch of one is captured as two: products, latency and kernels are still counted for one."""
    layer: nn.Module = nn.Conv2d(4, 6, 3) if convolution else nn.Linear(5, 6)
    x = torch.randn(batch, 4, 7, 5) if convolution else torch.randn(batch, 3, 5)
    net = Recording(layer, nn.Flatten(), nn.Linear(6 * 15 if convolution else 18, 2)).eval()
    result = sparsecc.prune(net, (x,), sparsity=0.5)
    positions, inner, last = (15, 36, 90) if convolution else (3, 5, 18)
    assert result.report.before["macs"] == batch * (positions * inner * 6 + 2 * last)
    assert result.report.after["macs"] == batch * (positions * inner * 3 + last)
    seen = net.seen = []
    result.report.timed(result.subject, result.applied.timed)
    assert set(seen) == {batch}
    assert [tuple(t.shape) for t in result.subject.example()] == [tuple(x.shape)]


def test_results_print_as_what_they_are() -> None:
    """No arrays of a plan: one line as a representation, the report as text."""
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(2, 8)
    result = sparsecc.prune(net, (x,))
    assert repr(result) == "<Pruned Sequential: 212 -> 108 parameters, 384 -> 192 macs, VERIFIED>"
    compiled = sparsecc.compile(result.model, (x,), target="cpu")
    assert repr(compiled) == "<Compiled for cpu: 108 -> 108 parameters, 192 -> 192 macs, VERIFIED>"
    for found in (result, compiled):
        lines = str(found).splitlines()
        assert lines[0] == repr(found)
        assert sum(line.startswith("VERIFIED") for line in lines) == 1
    assert "artifact: " in str(compiled)
    assert repr(sparsecc.compile(net)) == "<Compiled: at its first call>"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("ChannelPruning(multiple_of=64)", "by their kinds, sparsity, multiple_of and min_keep"),
        ("HeadPruning()", "by their kinds, sparsity, multiple_of and min_keep"),
        ("ChannelPruning(exclude=('*',))", "see what was left alone"),
        ("ExpertPruning()", "see what was left alone"),
    ],
)
def test_that_nothing_was_removed_is_said(recipe: str, why: str) -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), (torch.randn(2, 8),)
    (note,) = (n for n in sparsecc.prune(net, x, recipe=recipe).report.notes if "nothing was removed" in n)
    assert why in note
    alone = sparsecc.prune(nn.Linear(8, 4).eval(), x, sparsity=0.5).report.notes
    assert any("nothing was removed: no position can go, see the frozen axes" in n for n in alone)
    assert not any("nothing was removed" in n for n in sparsecc.prune(net, x).report.notes)


class Picks(nn.Module):
    """Rows that data choose go through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.nonzero(x[:, 0] > -9)[:, 0]
        return self.last(torch.relu(self.first(x[rows])))  # type: ignore[no-any-return]


def test_sizes_that_data_decide_are_told() -> None:
    """How many rows there will be nobody knows: the count is for a number that stands for theirs."""
    notes = sparsecc.prune(Picks().eval(), (torch.randn(3, 8),), sparsity=0.5).report.notes
    assert any("sizes depend on data (from 'nonzero' on)" in note for note in notes)

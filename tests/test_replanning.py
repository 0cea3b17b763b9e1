"""What only shows when a graph is made of a plan: what is at fault stays, the rest is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import sparsecc
from sparsecc.axes.analysis import Analysis
from sparsecc.errors import PlanConflict
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.passes import ChannelPruning
from sparsecc.pipeline import Pruned, finish
from sparsecc.transform import Choice, Pass
from tests.onnx_graphs import Graph, complete, error, masked64, ort, run64

KIND = "no such graph"


def pruned(model: onnx.ModelProto) -> Pruned:
    """The model at half its width, beside masked semantics and onnxruntime at two sizes."""
    result = sparsecc.prune(model, sparsity=0.5)
    assert result.certificate.status == "VERIFIED", str(result.certificate)
    assert isinstance(result.subject, OnnxSubject)
    file = OnnxFile.load(result.model)
    for seed, variant in ((0, 0), (3, 1)):
        feeds, _ = result.subject.inputs(seed, variant)
        want = masked64(result.subject, result.plan, result.subject.kept(result.plan), feeds, garbage=True)
        assert error(run64(file, feeds), want) <= 1e-12
        assert error(ort(complete(file), feeds), want) <= 1e-4
    return result


def frozen(result: Pruned) -> set[str]:
    """Weights with an axis that was frozen on the way."""
    return {f.weight for f in result.subject.analysis.frozen if f.reason.kind == KIND}


def kept(result: Pruned) -> dict[str, tuple[int, int]]:
    """Group -> (kept, size) of what shrinks."""
    return {g.group: (g.kept, g.size) for g in result.report.groups if g.kept < g.size}


# -- expressed exactly --------------------------------------------------------------------------------


def dims(g: Graph, x: str, *places: int) -> list[str]:
    """Single sizes of a value, as vectors of one number."""
    shape = g.node("Shape", [x], f"{x}.shape")
    return [g.node("Gather", [shape, g.ints(f"{x}.at{p}", [p])], f"{x}.dim{p}", axis=0) for p in places]


def two_varying(follows: bool) -> onnx.ModelProto:
    """x[N,L,6] -> [N,L,4,8] -> [N,4,L,8] -> Reshape (N * 4, L * 8), where both products lose positions."""
    g = Graph()
    x = g.input("x", ["N", "L", 6])
    h = g.linear(x, "wide", 6, 32)
    grid = g.node("Reshape", [h, g.ints("grid.shape", [0, 0, 4, 8])], "grid")
    turned = g.node("Transpose", [grid], "turned", perm=[0, 2, 1, 3])
    n, m = dims(g, x, 0, 1)
    if follows:
        a, b = dims(g, turned, 1, 3)
    else:
        a, b = g.ints("four", [4]), g.ints("eight", [8])
    sizes = [g.node("Mul", [n, a], "rows"), g.node("Mul", [m, b], "columns")]
    flat = g.node("Reshape", [turned, g.node("Concat", sizes, "flat.shape", axis=0)], "flat")
    mean = g.node("ReduceMean", [g.node("Tanh", [flat], "tanh"), g.ints("all", [0, 1])], "mean", keepdims=0)
    first = g.node("ReduceMean", [g.linear(x, "side", 6, 3), g.ints("both", [0, 1])], "second", keepdims=0)
    g.node("Add", [mean, first], "y")
    return g.build("y")


@pytest.mark.parametrize("follows", [True, False])
def test_two_varying_sizes_that_shrink(follows: bool) -> None:
    result = pruned(two_varying(follows))
    assert not frozen(result)


def scaled_by_a_sum(same: bool) -> onnx.ModelProto:
    """[N, L*8] beside [N, M*5], over the square root of how many there are; ``same``: M is L."""
    g = Graph()
    x = g.input("x", ["N", "L", 6])
    z = x if same else g.input("z", ["N", "M", 6])
    parts = []
    for name, width, read in (("a", 8, x), ("b", 5, z)):
        wide = g.node(
            "Relu", [g.linear(g.linear(read, f"{name}.in", 6, 10), name, 10, width)], f"{name}.relu"
        )
        parts.append(g.node("Reshape", [wide, g.ints(f"{name}.flat", [0, -1])], f"{name}.all"))
    both = g.node("Concat", parts, "both", axis=1)
    (count,) = dims(g, both, 1)
    root = g.node("Sqrt", [g.node("Cast", [count], "count", to=TensorProto.FLOAT)], "root")
    mean = g.node("ReduceMean", [g.node("Div", [both, root], "scaled"), g.ints("one", [1])], "y")
    assert mean
    return g.build("y")


def test_a_count_over_one_varying_size() -> None:
    result = pruned(scaled_by_a_sum(same=True))
    assert not frozen(result)
    assert kept(result) == {
        "a.in.weight[1]": (5, 10), "b.in.weight[1]": (5, 10), "a.weight[1]": (4, 8), "b.weight[1]": (3, 5),
    }  # fmt: skip


# -- frozen -------------------------------------------------------------------------------------------


def test_a_count_that_no_factor_gives_back_freezes_what_it_counts() -> None:
    result = pruned(scaled_by_a_sum(same=False))
    assert set(kept(result)) == {"a.in.weight[1]", "b.in.weight[1]"}
    assert frozen(result) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    (line,) = [f for f in result.report.frozen if f.kind == KIND]
    assert "depends on the inputs" in line.reason


def branching() -> onnx.ModelProto:
    """A scale that an If takes from the width: ``8 > 4 ? 8 : 4``."""
    g = Graph()
    x = g.input("x", ["N", "L", 6])
    h = g.node("Relu", [g.linear(g.linear(x, "in", 6, 12), "wide", 12, 8)], "act")
    flat = g.node("Reshape", [h, g.ints("target", [0, -1])], "flat")
    (size,) = dims(g, flat, 1)

    def branch(name: str, kind: str, *inputs: str) -> onnx.GraphProto:
        node = helper.make_node(kind, list(inputs), [name])
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, TensorProto.INT64, [1])]
        )

    more = g.node("Greater", [size, g.ints("limit", [4])], "more")
    one = g.node("Squeeze", [more], "condition")
    g.node(
        "If", [one], "chosen",
        then_branch=branch("then", "Identity", size), else_branch=branch("else", "Identity", "limit"),
    )  # fmt: skip
    scale = g.node("Cast", ["chosen"], "scale", to=TensorProto.FLOAT)
    g.node("ReduceMean", [g.node("Mul", [flat, scale], "scaled"), g.ints("one", [1])], "y")
    return g.build("y")


def test_a_branch_on_sizes_freezes_what_it_reads() -> None:
    result = pruned(branching())
    assert "in.weight[1]" in kept(result)
    assert frozen(result) <= {"wide.weight", "wide.bias"}


class TwoInferred(nn.Module):
    """view(N * 4, L * 8) of [N, 4, L, 8], where both 4 and 8 are positions of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.wide = nn.Linear(10, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, m, _ = x.shape
        grid = self.wide(self.first(x).relu()).view(n, m, 4, 8).transpose(1, 2).contiguous()
        return grid.view(n * 4, m * 8).tanh().mean((0, 1)) + x.mean()


def test_two_sizes_that_would_be_inferred_freeze_one_at_least() -> None:
    dynamic = {"x": {0: torch.export.Dim("n"), 1: torch.export.Dim("m", min=2)}}
    result = sparsecc.prune(TwoInferred(), (torch.randn(3, 5, 6),), sparsity=0.5, dynamic_shapes=dynamic)
    assert result.certificate.status == "VERIFIED"
    assert kept(result)["first.weight[0]"] == (5, 10)
    assert result.model(torch.randn(2, 3, 6)).shape == ()


class OneInferred(nn.Module):
    """view(N * 8, -1, 16) of [N, 8, 4, 4]: the size that the model leaves out is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        n, c, h, w = y.shape
        y = (y.view(n * c, -1, h * w) * 2).view(n, c, h, w)
        return self.last(y).mean((2, 3))


def test_a_fixed_size_that_was_left_out_is_written_where_another_is_inferred() -> None:
    result = sparsecc.prune(OneInferred(), (torch.randn(3, 3, 4, 4),), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert kept(result) == {"first.weight[0]": (4, 8)}
    assert result.model(torch.randn(2, 3, 4, 4)).shape == (2, 6)


class CutTime(nn.Module):
    """A dynamic axis that is flattened with the channels, and split in two only later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        soft = y.flatten(1).softmax(1).reshape(y.shape)
        pairs = soft.unflatten(2, (-1, 2))
        return pairs.amax((1, 2, 3))


def test_a_flattened_axis_whose_dynamic_factor_is_split_later() -> None:
    dynamic = {"x": {0: torch.export.Dim("n"), 2: 2 * torch.export.Dim("half", min=2)}}
    result = sparsecc.prune(CutTime(), (torch.randn(3, 3, 8),), sparsity=0.5, dynamic_shapes=dynamic)
    assert result.certificate.status == "VERIFIED"
    assert kept(result) == {"conv.weight[0]": (4, 8)}


class Projected(nn.Module):
    """An LSTM with a projection: the operator knows that there is one by the two sizes being different."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, proj_size=4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


def test_sizes_that_an_operator_tells_apart_do_not_become_equal() -> None:
    result = sparsecc.prune(
        Projected(), (torch.randn(2, 4, 5),), recipe="ChannelPruning(sparsity=0.5, multiple_of=4)"
    )
    assert result.certificate.status == "VERIFIED"
    assert frozen(result) >= {"lstm.weight_hr_l0"}
    assert kept(result) == {}


# -- the loop itself ----------------------------------------------------------------------------------


def test_an_explicit_plan_still_raises() -> None:
    model = scaled_by_a_sum(same=False)
    subject = OnnxSubject(model)
    plan = ChannelPruning(sparsity=0.5).plan(subject.analysis)
    with pytest.raises(PlanConflict, match="cannot be spelled out"):
        finish(subject, plan)
    with pytest.raises(PlanConflict, match="cannot be spelled out"):
        plan.apply(model)


def test_a_conflict_that_no_group_explains_is_not_swallowed() -> None:
    class Wrong(Pass):
        def choose(self, analysis: Analysis, saliency: Any = None) -> Choice:
            raise PlanConflict("no axis of this model")

    with pytest.raises(PlanConflict, match="no axis of this model"):
        sparsecc.prune(nn.Linear(3, 3), (torch.randn(2, 3),), recipe=[Wrong()])


def test_what_was_frozen_on_the_way_is_prunable_for_a_fresh_capture() -> None:
    """A plan that was settled applies to a fresh model, although its groups are more there."""
    model = scaled_by_a_sum(same=False)
    result = sparsecc.prune(model, sparsity=0.5)
    again = result.plan.apply(model)
    assert again.SerializeToString() == result.model.SerializeToString()
    assert len(sparsecc.analyze(model).groups) > len(result.subject.analysis.groups)


BUILDERS: list[Callable[[], onnx.ModelProto]] = [
    lambda: two_varying(True),
    lambda: two_varying(False),
    lambda: scaled_by_a_sum(True),
    lambda: scaled_by_a_sum(False),
    branching,
]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_no_share_of_pruning_is_refused(build: Callable[[], onnx.ModelProto], allocation: str) -> None:
    for sparsity in (0.2, 0.5, 0.9):
        result = sparsecc.prune(build(), sparsity=sparsity, allocation=allocation)
        assert result.certificate.status in ("VERIFIED", "VACUOUS")


def test_numbers_are_right() -> None:
    assert np.isfinite(ort(branching(), {"x": np.ones((2, 3, 6), np.float32)})[0]).all()

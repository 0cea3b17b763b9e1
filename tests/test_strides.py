"""Gathers that exporters write for ``as_strided``: those that run through memory in order are reshapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import sparsecc
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.reader import _Reader
from sparsecc.onnxfile.shapes import infer
from sparsecc.onnxfile.strides import Steps, _fitted

CHANNELS, SIDE = 6, 2


def _initial(**arrays: Any) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]


def pooled(*, dynamic: bool, stride: int = CHANNELS, bias: int = 0) -> onnx.ModelProto:
    """conv -> flat -> Gather at range(batch) * stride + arange(channels) + bias -> Gemm."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("ReduceMean", ["y"], ["m"], axes=[2, 3], keepdims=1),
        helper.make_node("Reshape", ["m", "flat"], ["v"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["r"]),
        helper.make_node("Mul", ["stride", "r"], ["rs"]),
        helper.make_node("Unsqueeze", ["rs", "axes"], ["ru"]),
        helper.make_node("Add", ["ru", "iota"], ["i"]),
        helper.make_node("Gather", ["v", "i"], ["g"]),
        helper.make_node("Reshape", ["g", "rows"], ["h"]),
        helper.make_node("Gemm", ["h", "c"], ["z"], transB=1),
    ]
    initial = _initial(
        w=rng.standard_normal((CHANNELS, 3, 1, 1), np.float32),
        c=rng.standard_normal((4, CHANNELS), np.float32),
        flat=[-1],
        zero=np.int64(0),
        one=np.int64(1),
        stride=np.int64(stride),
        axes=[1, 2, 3],
        iota=np.arange(CHANNELS).reshape(1, -1, 1, 1) + bias,
        rows=[-1, CHANNELS],
    )
    batch = "N" if dynamic else 2
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [batch, 4])],
        initial,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("dynamic", [True, False])
def test_in_order(dynamic: bool) -> None:
    """The Gather becomes a Reshape, and channels go through it."""
    pruned = sparsecc.prune(pooled(dynamic=dynamic), sparsity=0.5)
    assert pruned.certificate.status == "VERIFIED"
    assert [g.kept for g in pruned.report.groups] == [CHANNELS // 2]
    kinds = [n.op_type for n in pruned.model.graph.node]
    assert kinds == ["Conv", "ReduceMean", "Reshape", "Reshape", "Reshape", "Gemm"]
    onnx.checker.check_model(pruned.model, full_check=True)


@pytest.mark.parametrize("wrong", [{"stride": 1}, {"stride": 0}, {"stride": CHANNELS - 1}])
def test_out_of_order(wrong: dict[str, int]) -> None:
    """Anything else stays a lookup: the axis is whole, and the result right."""
    pruned = sparsecc.prune(pooled(dynamic=True, **wrong), sparsity=0.5)
    assert pruned.report.groups == ()
    assert any(f.kind == "indexed" for f in pruned.report.frozen)


@given(
    st.lists(st.integers(1, 4), max_size=4),
    st.lists(st.integers(-3, 30), min_size=4, max_size=4),
    st.integers(-2, 5),
)
def test_numbers_fit_exactly_what_they_are(sizes: list[int], strides: list[int], start: int) -> None:
    """Sums of ranges are found; one number changed and they are none."""
    grid = np.full(sizes, start, np.int64)
    for dim, size in enumerate(sizes):
        grid += (np.arange(size) * strides[dim]).reshape([-1 if d == dim else 1 for d in range(len(sizes))])
    found = _fitted(grid)
    assert found is not None
    assert found.contiguous == np.array_equal(grid.reshape(-1), np.arange(grid.size))
    if grid.size > 1 and max(sizes) > 2:
        grid.flat[-1] += 1
        assert _fitted(grid) is None


def test_contiguous() -> None:
    """Sizes of one have no stride; a start, a gap or another order is not contiguous."""
    assert Steps(0, (5, 1, 3), (3, 77, 1), (True, False, False)).contiguous
    assert not Steps(1, (5, 1, 3), (3, 0, 1), (True, False, False)).contiguous
    assert not Steps(0, (5, 3), (1, 5), (True, False)).contiguous
    assert not Steps(0, (5, 3), (4, 1), (True, False)).contiguous


def test_numbers_that_vary_are_not_taken_for_fixed() -> None:
    """A stride that is the batch is not known, whatever it is for the sizes that were tried."""
    model = pooled(dynamic=True)
    next(n for n in model.graph.node if n.op_type == "Mul").input[0] = "n"
    file = OnnxFile.load(model).inlined()
    assert _Reader(file, infer(file)).tracer.steps("i") is None


def test_lengths_that_agree_by_chance_are_no_reshape() -> None:
    """Fixed indices into data as long as the batch, and indices as many as the batch into a fixed table."""
    fixed = pooled(dynamic=True)
    gather = next(n for n in fixed.graph.node if n.output[0] == "g")
    fixed.graph.initializer.append(numpy_helper.from_array(np.arange(18).reshape(3, 6, 1, 1), "all"))
    gather.input[1] = "all"
    pruned = sparsecc.prune(fixed, sparsity=0.5)
    assert pruned.certificate.status == "VERIFIED"
    assert not any(m.startswith("w[") for g in pruned.report.groups for m in g.members)


def test_small_integers_wrap_around() -> None:
    model = pooled(dynamic=True)
    nodes = list(model.graph.node)
    place = next(i for i, n in enumerate(nodes) if n.output[0] == "g")
    casts = [
        helper.make_node("Cast", ["i"], ["i8"], to=TensorProto.INT8),
        helper.make_node("Cast", ["i8"], ["i64"], to=TensorProto.INT64),
    ]
    nodes[place].input[1] = "i64"
    nodes[place:place] = casts
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert sparsecc.prune(model, sparsity=0.5).report.groups == ()


def test_long_chains_take_no_time() -> None:
    """Each link is read once, however often it is."""
    model = pooled(dynamic=True)
    links = [helper.make_node("Add", [f"i{k}", f"i{k}"], [f"i{k + 1}"]) for k in range(40)]
    nodes = list(model.graph.node)
    first = next(n for n in nodes if n.output[0] == "i")
    first.output[0] = "i0"
    place = nodes.index(first) + 1
    nodes[place:place] = links
    next(n for n in nodes if n.output[0] == "g").input[1] = "i40"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    file = OnnxFile.load(model).inlined()
    found = _Reader(file, infer(file)).tracer.steps("i40")
    assert found is not None
    assert found.strides[1] == 2**40

"""A reshape that cuts a dynamic axis together with a prunable one must not be read at one size."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sparsecc


def _model(target: list[int]) -> onnx.ModelProto:
    """x[N,L,8] -> MatMul(12) -> Reshape(target) -> ReduceMean over all but the batch."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((8, 12)).astype(np.float32), "w"),
        numpy_helper.from_array(np.array(target, np.int64), "shape"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["r"]),
        helper.make_node("Tanh", ["r"], ["t"]),
        helper.make_node("ReduceMean", ["t"], ["y"], axes=[1], keepdims=0),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "L", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_a_cut_through_time_and_channels_freezes() -> None:
    analysis = sparsecc.analyze(_model([0, -1, 0, 6]), {"x": np.zeros((2, 6, 8), np.float32)})
    assert not analysis.groups
    assert {f.reason.kind for f in analysis.frozen if f.weight == "w" and f.axis == 1} == {"dynamic"}


def test_a_cut_through_channels_alone_does_not() -> None:
    analysis = sparsecc.analyze(_model([0, 0, 2, 6]), {"x": np.zeros((2, 6, 8), np.float32)})
    assert [g.size for g in analysis.groups] == []  # both factors reach the output
    assert all(f.reason.kind == "graph output" for f in analysis.frozen if f.axis == 1)

"""ONNX operators that nobody here knows: told what to do, frozen, or registered by the user."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsecc
from sparsecc.axes.registry import RULES, rule
from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops import registry


def model() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = {"a": (8, 16), "b": (16, 16), "c": (16, 4)}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "a"], ["p"]),
            helper.make_node("Fancy", ["p"], ["q"], domain="my.ops", factor=3.0),
            helper.make_node("Gemm", ["q", "b"], ["r"]),
            helper.make_node("Relu", ["r"], ["s"]),
            helper.make_node("Gemm", ["s", "c"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [
            numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def test_an_unknown_operator_is_named_with_both_ways_out() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"my.ops::Fancy has no reference.*op\('my.ops::Fancy'\).*verify=F"
    ):
        sparsecc.prune(model(), sparsity=0.5)
    whole = sparsecc.prune(model(), sparsity=0.5, verify=False)
    assert whole.certificate.status == "UNCHECKED"
    kinds = {f.reason.kind for f in whole.subject.analysis.frozen}
    assert "unknown operator" in kinds


def test_a_registered_operator_is_pruned_and_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    @registry.op("my.ops::Fancy")
    def fancy(ctx: Any, x: Any, *, factor: float = 1.0) -> Any:
        return x * factor

    @rule("my.ops.Fancy")
    def axes(solver: Any, call: Any) -> Any:
        return list(solver.of(call, 0))

    try:
        result = sparsecc.prune(model(), sparsity=0.5)
    finally:
        del RULES["my.ops.Fancy"]
    assert result.certificate.status == "VERIFIED"
    assert {t.name: tuple(t.dims) for t in result.model.graph.initializer} == {
        "a": (8, 8), "b": (8, 8), "c": (8, 4),
    }  # fmt: skip

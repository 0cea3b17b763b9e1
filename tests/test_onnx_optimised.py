"""Files that onnxruntime's optimiser wrote are pruned and verified like those that went in."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto

import sparsecc
from tests.onnx_graphs import Graph, check_trial, ort, trial


def optimised(model: ModelProto, level: str = "ORT_ENABLE_EXTENDED") -> ModelProto:
    """The graph that onnxruntime would run."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def heads(g: Graph, x: str, name: str, width: int, count: int, order: list[int]) -> str:
    full = g.linear(x, name, width, width)
    four = g.node("Reshape", [full, g.ints(f"{name}.shape", [0, 0, count, width // count])], f"{name}.4")
    return str(g.node("Transpose", [four], f"{name}.t", perm=order))


def attention(g: Graph, x: str, name: str, width: int, count: int) -> str:
    q, v = (heads(g, x, f"{name}.{n}", width, count, [0, 2, 1, 3]) for n in "qv")
    k = heads(g, x, f"{name}.k", width, count, [0, 2, 3, 1])
    scores = g.node("MatMul", [q, k], f"{name}.scores")
    scaled = g.node("Div", [scores, g.tensor(f"{name}.root", (width / count) ** 0.5)], f"{name}.scaled")
    soft = g.node("Softmax", [scaled], f"{name}.soft", axis=-1)
    mixed = g.node("MatMul", [soft, v], f"{name}.mixed")
    back = g.node("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
    flat = g.node("Reshape", [back, g.ints(f"{name}.flat", [0, 0, width])], f"{name}.joined")
    return g.linear(flat, f"{name}.o", width, width)


def layer_norm(g: Graph, x: str, name: str, width: int) -> str:
    return str(
        g.node(
            "LayerNormalization",
            [x, g.vector(f"{name}.g", width), g.vector(f"{name}.b", width)],
            name,
            axis=-1,
        )
    )


def gelu(g: Graph, x: str, name: str) -> str:
    erf = g.node("Erf", [g.node("Div", [x, g.tensor(f"{name}.root", 2**0.5)], f"{name}.d")], f"{name}.erf")
    one = g.node("Add", [erf, g.tensor(f"{name}.one", 1.0)], f"{name}.a")
    return str(g.node("Mul", [g.node("Mul", [x, one], f"{name}.m"), g.tensor(f"{name}.half", 0.5)], name))


def encoder(width: int = 32, count: int = 4) -> ModelProto:
    """Two layers of a BERT-like encoder."""
    g = Graph(17)
    y = g.linear(g.input("x", ["batch", 5, 6]), "in", 6, width)
    for i in range(2):
        y = layer_norm(
            g, g.node("Add", [y, attention(g, y, f"l{i}", width, count)], f"l{i}.s"), f"l{i}.n", width
        )
        up = gelu(g, g.linear(y, f"l{i}.up", width, 2 * width), f"l{i}.gelu")
        y = layer_norm(
            g, g.node("Add", [y, g.linear(up, f"l{i}.down", 2 * width, width)], f"l{i}.t"), f"l{i}.u", width
        )
    return g.build(g.linear(y, "out", width, 3))


def images() -> ModelProto:
    """Convolutions with activations, a sum and a classifier."""
    g = Graph(17)
    y = g.node("Relu", [g.conv(g.input("x", ["batch", 3, 8, 8]), "a", 3, 8)], "ra")
    z = g.node("Relu", [g.node("Add", [g.conv(y, "b", 8, 8), y], "sum")], "rs")
    z = g.node("LeakyRelu", [g.conv(z, "c", 8, 12, groups=2)], "rc", alpha=0.2)
    return g.build(g.head(z, 12))


def multilayer() -> ModelProto:
    g = Graph(17)
    y = g.input("x", ["batch", 12])
    for i in range(3):
        w, b = g.weight(f"{i}.w", 12, 12), g.vector(f"{i}.b", 12)
        y = g.node("Relu", [g.node("Gemm", [y, w, b], f"{i}.y")], f"{i}.r")
    return g.build(g.linear(y, "z", 12, 3))


MODELS = {"encoder": encoder, "images": images, "multilayer": multilayer}
#: operators that must appear, so that each case tests what it is for
FUSED = {
    "encoder": {"FusedMatMul", "SkipLayerNormalization", "BiasGelu"},
    "images": {"FusedConv"},
    "multilayer": {"FusedGemm"},
}


@cache
def fused(name: str) -> ModelProto:
    return optimised(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_an_optimised_model_is_pruned_and_verified(name: str) -> None:
    model = fused(name)
    assert FUSED[name] <= kinds(model).keys(), kinds(model)
    result = sparsecc.prune(model, sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    plain = sparsecc.prune(MODELS[name](), sparsity=0.5)
    assert result.report.after["parameters"] <= 1.02 * plain.report.after["parameters"]
    assert kinds(result.model) == kinds(model)
    assert result.report.before["macs"] == pytest.approx(plain.report.before["macs"], rel=0.02)
    assert result.report.after["macs"] == pytest.approx(plain.report.after["macs"], rel=0.02)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_random_plans_on_an_optimised_model_equal_masked_semantics(name: str, seed: int) -> None:
    check_trial(trial(fused(name), seed), seed)


def test_a_layout_of_one_device_stays_whole_with_a_reason_that_tells_what_to_do() -> None:
    model = optimised(images(), "ORT_ENABLE_ALL")
    if "com.microsoft.nchwc" not in {n.domain for n in model.graph.node}:
        pytest.skip("this machine has no blocked layout")
    found = sparsecc.analyze(model)
    assert any("extended optimisations" in str(f) for f in found.frozen)


def test_an_optimised_model_slims_without_a_change() -> None:
    model = fused("images")
    feeds: dict[str, Any] = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    slim = sparsecc.slim(model)
    assert np.allclose(ort(slim.model, feeds)[0], ort(model, feeds)[0], atol=1e-5)

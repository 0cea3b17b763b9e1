"""Models that onnxruntime quantised: integers, scales and zero points are cut together, and verified."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

import sparsecc
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.real import real_weight
from sparsecc.reference.onnx_run import Runner
from tests.onnx_graphs import Graph, check_trial, ort, trial

quantization = pytest.importorskip("onnxruntime.quantization")

STATIC = ("qdq", "qdq by channel", "qdq, 4 bits", "operators", "operators by channel")
FORMATS = (*STATIC, "dynamic", "dynamic by channel")


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    """A few inputs to calibrate with."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        random = np.random.default_rng(0)
        self.rest: Iterator[Any] = iter(
            [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> Any:
        return next(self.rest, None)


def images() -> tuple[ModelProto, tuple[int, ...]]:
    """Convolutions with a residual sum, a depthwise one, a concatenation, pools, and a classifier."""
    g = Graph(17)
    y = g.node("Relu", [g.conv(g.input("x", ["batch", 3, 8, 8]), "a", 3, 8)], "ra")
    z = g.node("Relu", [g.conv(g.conv(y, "b", 8, 8, groups=8), "c", 8, 8, 1)], "rc")
    s = g.node("Add", [y, z], "sum")
    p = g.node("MaxPool", [s], "pool", kernel_shape=[2, 2], strides=[2, 2])
    joined = g.node("Concat", [g.conv(p, "d", 8, 6), p], "joined", axis=1)
    m = g.node(
        "AveragePool", [g.node("Sigmoid", [g.conv(joined, "e", 14, 10)], "gate")], "mean", kernel_shape=[2, 2]
    )
    return g.build(g.head(g.node("LeakyRelu", [m], "leaky", alpha=0.1), 10)), (2, 3, 8, 8)


def sequences() -> tuple[ModelProto, tuple[int, ...]]:
    """Linear layers with a sum and a normalisation."""
    g = Graph(17)
    y = g.node("Relu", [g.linear(g.input("x", ["batch", 4, 16]), "a", 16, 32)], "ra")
    s = g.node("Add", [y, g.linear(y, "b", 32, 32)], "sum")
    n = g.node("LayerNormalization", [s, g.vector("n.weight", 32), g.vector("n.bias", 32)], "n", axis=-1)
    return g.build(g.linear(g.node("Mul", [n, y], "gated"), "z", 32, 3)), (2, 4, 16)


MODELS = {"images": images, "sequences": sequences}


@cache
def folder() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="quantised-"))


@cache
def quantised(name: str, kind: str) -> ModelProto:
    model, shape = MODELS[name]()
    source, target = folder() / f"{name}.onnx", folder() / f"{name}-{kind}.onnx"
    onnx.save(model, str(source))
    by_channel = {"per_channel": "by channel" in kind}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind.startswith("dynamic"):
            quantization.quantize_dynamic(
                str(source), str(target), weight_type=quantization.QuantType.QUInt8, **by_channel
            )
        else:
            form = (
                quantization.QuantFormat.QDQ if kind.startswith("qdq") else quantization.QuantFormat.QOperator
            )
            weights = quantization.QuantType.QInt4 if "4 bits" in kind else quantization.QuantType.QInt8
            quantization.quantize_static(
                str(source),
                str(target),
                Samples(shape),
                quant_format=form,
                weight_type=weights,
                reduce_range=weights is quantization.QuantType.QInt8,
                **by_channel,
            )
    return onnx.load(str(target))


def weights(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of integer initializers with two or more axes."""
    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4)
    return {
        t.name: tuple(t.dims) for t in model.graph.initializer if t.data_type in small and len(t.dims) > 1
    }


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_is_pruned_and_verified(name: str, kind: str) -> None:
    model = quantised(name, kind)
    result = sparsecc.prune(model, sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    before, after = weights(model), weights(result.model)
    assert before.keys() == after.keys()
    narrower = [n for n in before if np.prod(after[n]) < np.prod(before[n])]
    assert len(narrower) >= len(before) - 1, (before, after, [str(f) for f in result.report.frozen])
    onnx.checker.check_model(result.model, full_check=True)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_random_plans_on_a_quantised_model_equal_masked_semantics(name: str, kind: str) -> None:
    found = trial(quantised(name, kind), 1)
    # a real number that is near the middle between two steps may be rounded the other way
    check_trial(found, 1, loose=1e-2)


@pytest.mark.parametrize("kind", FORMATS)
def test_integer_weights_are_judged_by_what_they_stand_for(kind: str) -> None:
    original, _ = MODELS["sequences"]()
    wanted = {
        tuple(t.dims): onnx.numpy_helper.to_array(t) for t in original.graph.initializer if len(t.dims) > 1
    }
    file = OnnxFile.load(quantised("sequences", kind))
    for name, shape in weights(file.proto).items():
        real = real_weight(file, name).numpy()
        step = 0.3 if "4 bits" in kind else 0.05
        assert np.abs(real - wanted[shape]).max() <= step * np.abs(wanted[shape]).max(), name


def test_scales_and_zero_points_are_no_parameters() -> None:
    found = trial(quantised("images", "qdq by channel"))
    assert not [n for n in found.subject.view.parameters if "scale" in n or "zero_point" in n]
    cut = [n for n in found.plan.shapes if n.endswith("_scale")]
    assert cut, "scales of channels go with their channels"


def test_a_quantised_model_still_runs_after_slimming() -> None:
    model = quantised("images", "qdq by channel")
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    slim = sparsecc.slim(model)
    assert np.array_equal(ort(slim.model, feeds)[0], ort(model, feeds)[0])


FLOATS_OF_8_BITS = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")


def eight_bit_floats(kind: str) -> ModelProto:
    """Two linear layers whose weights (by channel) and inputs (by tensor) are floats of 8 bits."""
    number = onnx.TensorProto.DataType.Value(kind)
    g = Graph(19)

    def stored(name: str, values: Any) -> str:
        array = np.asarray(values, np.float32)
        g.tensors.append(onnx.helper.make_tensor(name, number, array.shape, array.reshape(-1).tolist()))
        return name

    def read(x: str, name: str, factor: float) -> str:
        scale, zero = g.tensor(f"{name}.scale", factor), stored(f"{name}.zero", 0)
        narrow = g.node("QuantizeLinear", [x, scale, zero], f"{name}.narrow")
        return str(g.node("DequantizeLinear", [narrow, scale, zero], f"{name}.read"))

    def linear(x: str, name: str, cin: int, cout: int) -> str:
        weight = stored(f"{name}.weight", g.random.standard_normal((cin, cout)))
        scale = g.vector(f"{name}.scales", cout, 0.1, 0.4)
        real = g.node("DequantizeLinear", [weight, scale], f"{name}.real", axis=1)
        return str(g.node("MatMul", [read(x, name, 0.05), real], name))

    y = g.node("Relu", [linear(g.input("x", ["batch", 4, 8]), "a", 8, 16)], "r")
    return g.build(linear(y, "z", 16, 3))


@pytest.mark.parametrize("kind", FLOATS_OF_8_BITS)
def test_floats_of_8_bits_are_pruned_and_verified(kind: str) -> None:
    result = sparsecc.prune(eight_bit_floats(kind), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    shapes = {t.name: list(t.dims) for t in result.model.graph.initializer}
    assert (shapes["a.weight"], shapes["a.scales"], shapes["z.weight"]) == ([8, 8], [8], [8, 3])
    check_trial(trial(eight_bit_floats(kind), 1), 1, runtime=False)


@pytest.mark.parametrize("kind", FLOATS_OF_8_BITS)
def test_floats_of_8_bits_are_computed_as_the_standard_says(kind: str) -> None:
    model = eight_bit_floats(kind)
    x = 30 * np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)  # some do not fit
    ours = Runner(OnnxFile.load(model)).run({"x": torch.from_numpy(x)})["z"]
    np.testing.assert_allclose(ours.numpy(), ReferenceEvaluator(model).run(None, {"x": x})[0], 1e-5, 1e-5)


def test_floats_of_8_bits_are_judged_by_what_they_stand_for() -> None:
    file = OnnxFile.load(eight_bit_floats("FLOAT8E4M3FN"))
    stored, scales = file.tensor("a.weight").float(), file.tensor("a.scales")
    assert torch.equal(real_weight(file, "a.weight"), stored * scales)

"""Quantising keeps what pruning promised, and pruning what is quantised keeps scales right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

import sparsecc
from sparsecc.calibration import CalibrationData
from sparsecc.errors import InvalidOption, UnsupportedModel, VerificationFailed
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.patterns.nm import NM
from sparsecc.quantization.folding import folded
from sparsecc.quantization.source import Source
from sparsecc.quantization.transposes import untransposed
from sparsecc.quantization.zeros import check_zeros
from sparsecc.saliency import Saliency
from tests.onnx_graphs import Graph, ort

importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers its operators
decomposed = torch.ops.quantized_decomposed
TWO_OF_FOUR = NM(2, 4)


class Convolutions(nn.Module):
    """Two convolutions with batch norms, the second without a bias, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.na(self.a(x)))
        y: torch.Tensor = self.head(torch.relu(self.nb(self.b(x))).mean((2, 3)))
        return y


class Tied(nn.Module):
    """Products of three axes (weights stand behind a Transpose) that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return y


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {Convolutions: (4, 3, 8, 8), Tied: (4, 5, 16)}


@cache
def net(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    made = kind()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return made.eval()


def batches(kind: type[nn.Module], count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(SHAPES[kind], generator=generator),) for _ in range(count)]


@cache
def pruned(kind: type[nn.Module]) -> sparsecc.Pruned:
    data = batches(kind)
    return sparsecc.prune(net(kind), data[0], recipe="SparseGPT(pattern='2:4')", calibration=data)


@cache
def quantised(kind: type[nn.Module]) -> sparsecc.Quantised:
    return sparsecc.quantize(pruned(kind), calibration=batches(kind), biases=False, reduce_range=True)


def stored(model: ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def with_tensor(model: ModelProto, name: str, change: Callable[[Any], Any]) -> ModelProto:
    """A copy in which a stored tensor is another one."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return copy


# -- prune, then quantise ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Convolutions, Tied])
def test_integer_weights_have_the_pattern_along_what_is_summed(kind: type[nn.Module]) -> None:
    result = quantised(kind)
    onnx.checker.check_model(result.model, full_check=True)
    found = {layer.stored: layer for layer in result.report.layers if "2:4" in layer.patterns}
    assert len(found) == 2
    values = stored(result.model)
    producers = {name: node for node in result.model.graph.node for name in node.output}
    seen = 0
    for node in result.model.graph.node:
        source = producers.get(node.input[1]) if node.op_type in ("Conv", "MatMul", "Gemm") else None
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in found:
            continue
        weight = values[source.input[0]]
        axis = 1 if node.op_type == "Conv" or node.op_type == "Gemm" else 0
        assert weight.dtype == np.int8
        assert TWO_OF_FOUR.holds(weight, axis)
        assert not values[source.input[2]].any()
        seen += 1
    assert seen == (2 if kind is Convolutions else 3)
    assert "BatchNormalization" not in {node.op_type for node in result.model.graph.node}


def test_errors_are_measured_on_batches_that_were_held_out() -> None:
    result = quantised(Tied)
    (error,) = result.report.errors
    assert (error.batches, result.report.calibrated_on) == (1, 3)
    feeds = {"x": batches(Tied)[3][0].numpy()}
    with torch.no_grad():
        wanted = pruned(Tied).model(*batches(Tied)[3]).numpy()
    difference = ort(result.model, feeds)[0] - wanted
    relative = np.linalg.norm(difference) / np.linalg.norm(wanted)
    assert error.relative == pytest.approx(relative, rel=1e-3)
    assert error.sqnr_db == pytest.approx(-20 * np.log10(relative), abs=0.05)
    assert 15 < error.exact_db < 60
    assert "VERIFIED" not in str(result.report)
    assert "held-out" in str(result.report)
    json.dumps(result.report.to_json())


def test_tensorrt_takes_the_result_and_finds_every_layer_eligible() -> None:
    for kind, eligible in ((Tied, 3), (Convolutions, 2)):
        compiled = sparsecc.compile(quantised(kind).model, target="tensorrt-2:4-int8")
        assert compiled.certificate.status == "VERIFIED"
        layers = json.loads(compiled.artifact.read("layers.json"))
        assert {layer["dtype"] for layer in layers} == {"int8"}
        assert sum(layer["holds"] for layer in layers) >= eligible


def test_tensorrt_stands_in_for_exact_sums() -> None:
    full = sparsecc.quantize(pruned(Tied), calibration=batches(Tied), biases=False)
    assert sparsecc.compile(full.model, target="tensorrt-2:4-int8").certificate.status == "VERIFIED"


def test_other_zeros_stay_zeros() -> None:
    data = batches(Convolutions)
    result = sparsecc.prune(net(Convolutions), data[0], recipe="ElementPruning(sparsity=0.7)")
    found = sparsecc.quantize(result, calibration=data, activations="uint8")
    promised = {p.weight: p for p in result.plan.patterns if p.state != "dense"}
    assert promised
    for layer in found.report.layers:
        if layer.weight in promised:
            assert layer.zeros >= promised[layer.weight].zeros
            assert promised[layer.weight].pattern in layer.patterns


def test_channels_that_were_removed_stay_removed() -> None:
    data = batches(Convolutions)
    result = sparsecc.prune(net(Convolutions), data[0], sparsity=0.5)
    found = sparsecc.quantize(result, calibration=data)
    sizes = {layer.weight: layer.size for layer in found.report.layers}
    assert sizes["b.weight"] == result.model.b.weight.numel() == 8 * 4 * 9


def test_activations_may_be_quantised_when_the_model_runs() -> None:
    found = sparsecc.quantize(pruned(Tied), calibration=batches(Tied), activations=None, reduce_range=True)
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {node.op_type for node in found.model.graph.node}
    assert [layer.dtype for layer in found.report.layers] == ["int8", "int8"]
    assert all("2:4" in layer.patterns for layer in found.report.layers)
    assert found.report.errors[0].sqnr_db > 20


def test_an_onnx_model_is_quantised_as_it_was_exported(tmp_path: Path) -> None:
    g = Graph(17)
    y = g.node("Relu", [g.linear(g.input("x", ["batch", 16]), "a", 16, 32)], "r")
    path = tmp_path / "float.onnx"
    onnx.save(g.build(g.linear(y, "b", 32, 4)), str(path))
    data = CalibrationData([{"x": torch.randn(4, 16), "y": 0} for _ in range(3)], lambda b: {"x": b["x"]})
    found = sparsecc.quantize(path, calibration=data, exclude="b")
    assert {layer.weight: layer.dtype for layer in found.report.layers} == {
        "a.weight": "int8",
        "b.weight": "float32",
    }
    assert "stay floats: b.weight" in str(found.report)
    found.save(tmp_path / "int8.onnx")
    assert onnx.load(str(tmp_path / "int8.onnx")) == found.model


def test_a_zero_that_is_lost_is_no_result() -> None:
    result = quantised(Tied)
    before = folded(untransposed(OnnxFile.load(Source.of(pruned(Tied), None, None).file)))
    layer = result.report.layers[0]

    def spoilt(values: Any) -> Any:
        values[np.unravel_index(np.flatnonzero(values == 0)[0], values.shape)] = 1
        return values

    check_zeros(before, OnnxFile.load(result.model), {})
    bad = OnnxFile.load(with_tensor(result.model, layer.stored, spoilt))
    with pytest.raises(VerificationFailed, match=r"1 zeros of 'a.weight' are other numbers"):
        check_zeros(before, bad, {})
    dense = OnnxFile.load(with_tensor(before.proto, "a.weight", lambda w: w + 1))
    spread = OnnxFile.load(with_tensor(result.model, layer.stored, np.ones_like))
    promise = {"a.weight": tuple(p for p in pruned(Tied).plan.patterns if p.weight == "a.weight")}
    with pytest.raises(VerificationFailed, match=r"'a.weight' was pruned to 2:4 and does not have it"):
        check_zeros(dense, spread, promise)
    with pytest.raises(VerificationFailed, match=r"'z.weight' cannot be checked"):
        check_zeros(before, bad, {"z.weight": promise["a.weight"]})


@pytest.mark.parametrize("kind", [Convolutions, Tied])
def test_what_is_done_before_quantising_changes_nothing(kind: type[nn.Module]) -> None:
    before = Source.of(net(kind), batches(kind)[0], None).file
    after = folded(untransposed(before))
    kinds = {node.op_type for node in after.proto.graph.node}
    assert not {"BatchNormalization", "Transpose"} & kinds
    onnx.checker.check_model(after.proto, full_check=True)
    feeds = {"x": batches(kind)[0][0].numpy()}
    np.testing.assert_allclose(ort(after.proto, feeds)[0], ort(before.proto, feeds)[0], rtol=1e-4, atol=1e-5)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, r"calibration: give batches of inputs"),
        ({"calibration": batches(Tied, 1)}, r"1 batches are too few.*evaluation="),
        ({"weights": "int4"}, r"weights='int4' is not known \(did you mean 'int8'\?\)"),
        ({"activations": "fp8"}, r"activations='fp8' is not known"),
        ({"method": "mse"}, r"method='mse' is not known.*minmax"),
        ({"per_channel": 1}, r"per_channel=1: give True or False"),
        ({"exclude": ["nobody"]}, r"exclude: 'nobody' matches no node"),
        ({"calibration": [(torch.randn(2, 7),)] * 2}, r"a batch does not fit the model"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    given = {"calibration": batches(Tied), **options}
    with pytest.raises(InvalidOption, match=message):
        sparsecc.quantize(net(Tied), batches(Tied)[0], **given)


def test_models_that_cannot_be_quantised_are_named() -> None:
    with pytest.raises(InvalidOption, match=r"quantised already: it has (De|Q)\w+ .*prune this one as it is"):
        sparsecc.quantize(quantised(Tied).model, calibration=batches(Tied))
    half = nn.Linear(16, 4).half()
    with pytest.raises(InvalidOption, match=r"is float16; only float32 models are quantised"):
        sparsecc.quantize(half, (torch.randn(4, 16).half(),), calibration=[(torch.randn(4, 16).half(),)] * 2)
    with pytest.raises(InvalidOption, match=r"example_inputs: a Pruned knows"):
        sparsecc.quantize(pruned(Tied), batches(Tied)[0], calibration=batches(Tied))


def test_the_quantisers_are_imported_when_they_are_used() -> None:
    code = "import sys, sparsecc; print('onnxruntime' in sys.modules, 'sparsecc.quantization' in sys.modules)"
    root = Path(sparsecc.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.split() == ["False", "False"]


# -- quantise, then prune ------------------------------------------------------------------------------


def coded(zero: int = 0) -> tuple[ModelProto, np.ndarray[Any, Any]]:
    """Two products of int8 weights; the rows of the first are alike as integers, but not as numbers."""
    random = np.random.default_rng(0)
    scales = random.permutation(np.linspace(0.001, 0.1, 16)).astype(np.float32)
    first = random.integers(90, 127, (8, 16)) * random.choice([-1, 1], (8, 16))
    integers = np.round(first * np.linspace(1.0, 0.9, 16)[np.argsort(np.argsort(scales))]).astype(np.int8)
    tensors = {
        "w": integers,
        "w.scale": scales,
        "w.zero": np.full(16, zero, np.int8),
        "v": random.integers(-127, 127, (16, 4)).astype(np.int8),
        "v.scale": np.float32(0.01) * np.ones((), np.float32),
        "v.zero": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["wr"], axis=1),
        helper.make_node("MatMul", ["x", "wr"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("DequantizeLinear", ["v", "v.scale", "v.zero"], ["vr"]),
        helper.make_node("MatMul", ["r", "vr"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "coded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), scales


def test_channels_are_ranked_by_what_integers_stand_for_and_scales_go_along() -> None:
    model, scales = coded()
    result = sparsecc.prune(model, recipe="ChannelPruning(sparsity=0.5)", reduction="max", saliency="linf")
    before, after = stored(model), stored(result.model)
    real = np.abs(before["w"] * before["w.scale"]).max(0)
    assert set(np.argsort(real)[8:]) != set(np.argsort(np.abs(before["w"].astype(int)).max(0))[8:])
    kept = [int(np.flatnonzero(scales == s)[0]) for s in after["w.scale"]]
    wanted = np.maximum(real, np.abs(before["v"].astype(np.float32) * 0.01).max(1))
    assert sorted(kept) == sorted(np.argsort(-wanted, kind="stable")[:8].tolist())
    assert np.array_equal(after["w"], before["w"][:, kept])
    assert np.array_equal(after["v"], before["v"][kept])
    assert after["w.zero"].shape == (8,)
    assert result.certificate.status == "VERIFIED"


def test_integer_weights_can_have_a_pattern() -> None:
    model, _ = coded()
    result = sparsecc.prune(model, recipe="NMPattern(pattern='2:4')")
    assert result.certificate.status == "VERIFIED"
    before, after = stored(model), stored(result.model)
    for name, axis in (("w", 0), ("v", 0)):
        assert after[name].dtype == np.int8
        assert TWO_OF_FOUR.holds(after[name], axis)
        kept = TWO_OF_FOUR.keep(np.abs(before[name].astype(np.float32)), axis)
        assert np.array_equal(after[name], np.where(kept, before[name], 0))
        assert np.array_equal(after[f"{name}.scale"], before[f"{name}.scale"])
    assert [p.state for p in result.plan.patterns] == ["pruned", "pruned"]
    assert not result.plan.skips


def test_integer_weights_with_zero_points_are_left_alone_with_the_reason() -> None:
    model, _ = coded(zero=3)
    plan = sparsecc.prune(model, recipe="NMPattern(pattern='2:4')").plan
    (skip,) = plan.skips
    assert (skip.where, skip.reason) == ("w", "its elements are int8 with zero points other than 0")
    assert [p.state for p in plan.patterns if p.weight == "v"] == ["pruned"]


def test_what_would_need_other_integers_is_not_done() -> None:
    model, _ = coded()
    data = [{"x": torch.randn(4, 8)} for _ in range(2)]
    plan = sparsecc.prune(model, recipe="SparseGPT(pattern='2:4')", calibration=data).plan
    assert not plan.actions
    assert "quantised" in next(s.reason for s in plan.skips if s.where == "w")
    scored = CalibrationData(data, loss=lambda outputs, batch: outputs["y"].square().mean())
    with pytest.raises(UnsupportedModel, match=r"does not depend on the model's weights in a way"):
        sparsecc.prune(model, sparsity=0.5, saliency="taylor", calibration=scored)


def test_a_model_that_sparsecc_quantised_can_be_pruned_further() -> None:
    data = batches(Convolutions)
    dense = sparsecc.quantize(net(Convolutions), data[0], calibration=data, reduce_range=True).model
    result = sparsecc.prune(dense, recipe="ChannelPruning(sparsity=0.5); NMPattern()")
    assert result.certificate.status == "VERIFIED"
    assert any(p.state == "pruned" for p in result.plan.patterns)


def test_residual_widths_are_known_behind_integer_weights() -> None:
    g = Graph(17)
    y = g.node("Relu", [g.linear(g.input("x", ["batch", 16]), "a", 16, 32)], "ra")
    inner = g.node("Relu", [g.linear(y, "b", 32, 24)], "rb")
    model = g.build(g.linear(g.node("Add", [y, g.linear(inner, "c", 24, 32)], "sum"), "d", 32, 4))
    found = sparsecc.quantize(model, calibration=[{"x": torch.randn(4, 16)} for _ in range(2)])
    for each in (model, found.model):
        assert {group.size: group.residual for group in sparsecc.analyze(each).groups} == {
            32: True,
            24: False,
        }


# -- quantised models of PyTorch -----------------------------------------------------------------------


class Coded(nn.Module):
    """A linear layer as exported quantisers write it: Q/DQ of activations, int8 weights, a scale a row."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        scales = 0.001 + 0.05 * torch.rand(outputs, generator=generator)
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scales)
        self.register_buffer("zero", torch.zeros(outputs, dtype=torch.int64))
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        int8 = (-128, 127, torch.int8)
        x = decomposed.quantize_per_tensor(x, 0.05, 3, *int8)
        x = decomposed.dequantize_per_tensor(x, 0.05, 3, *int8)
        weight = decomposed.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, *int8[1:])
        return nn.functional.linear(x, weight, self.bias)


def coded_net() -> nn.Sequential:
    return nn.Sequential(Coded(8, 16, 0), nn.ReLU(), Coded(16, 4, 1)).eval()


def test_quantised_programs_are_ranked_by_what_integers_stand_for() -> None:
    model, x = coded_net(), torch.randn(3, 8)
    analysis = sparsecc.analyze(model, (x,))
    (group,) = analysis.groups
    assert {m.weight for m in group.members} == {"0.weight", "0.bias", "2.weight"}
    real = model[0].weight * model[0].scale[:, None], model[2].weight * model[2].scale[:, None]
    wanted = real[0].norm(dim=1) + real[1].norm(dim=0)
    np.testing.assert_allclose(Saliency(analysis).of(group), wanted.numpy(), rtol=1e-5)
    result = sparsecc.prune(model, (x,), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    kept = wanted.topk(8).indices.sort().values
    assert torch.equal(result.model[0].scale, model[0].scale[kept])
    assert torch.equal(result.model[0].weight, model[0].weight[kept])
    assert torch.equal(result.model[2].weight, model[2].weight[:, kept])
    assert torch.equal(result.model[2].scale, model[2].scale)
    assert result.model[0].zero.shape == (8,)


def test_quantised_programs_can_have_a_pattern() -> None:
    result = sparsecc.prune(coded_net(), (torch.randn(3, 8),), recipe="NMPattern(pattern='2:4')")
    assert result.certificate.status == "VERIFIED"
    for place in (0, 2):
        assert result.model[place].weight.dtype == torch.int8
        assert TWO_OF_FOUR.holds(result.model[place].weight.numpy(), 1)
    assert not result.plan.skips


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_packed_weights_are_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModel, match=r"'0' \(Linear\) holds packed weights.*sparsecc.quantize"):
        sparsecc.prune(packed, (torch.randn(3, 8),), sparsity=0.5)

"""Targets for sparse tensor cores, without a GPU: layers, fusion, operator, artifact, launch."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel, InvalidOption, SparseccError, TargetUnavailable, VerificationFailed
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.shapes import infer
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.cuda import operator as operator_module
from sparsecc.targets.cuda.build import Image, Kernel
from sparsecc.targets.cuda.choice import CURVES, choose
from sparsecc.targets.cuda.config import Epilogue
from sparsecc.targets.cuda.driver import Driver
from sparsecc.targets.cuda.launch import cells, chosen, image_for, run_time_sizes
from sparsecc.targets.cuda.layers import find_layers
from sparsecc.targets.cuda.operator import Operands, output_shape
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.plan_kernels import wanted
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.reference import DOMAIN, KIND
from sparsecc.targets.cuda.rewrite import rewritten
from sparsecc.targets.cuda.tiles import default_config
from sparsecc.targets.cuda.tune import Table, Times, remembered

ALWAYS = {"choose": "always"}


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of four consecutive elements of a matrix [out, k], by brute force."""
    out = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            group = weight[row, start : start + 4]
            for place in group.abs().argsort(descending=True)[:2].tolist():
                out[row, start + place] = group[place]
    return out


def kernel_order(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [O,C,kH,kW] as a matrix over positions and, fastest, channels."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


# -- random graphs ------------------------------------------------------------------------------------


class Builder:
    """An ONNX graph in the making; ``half`` are the weights of products, which kernels round to fp16."""

    def __init__(self, seed: int, spatial: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.spatial = spatial
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}
        self.half: set[str] = set()
        self.values: list[tuple[str, int]] = [("x", 8)]

    def name(self, kind: str) -> str:
        return f"{kind}{len(self.nodes) + len(self.weights)}"

    def add(self, op: str, inputs: list[str], width: int, **attributes: Any) -> str:
        out = self.name(op)
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"n_{out}", **attributes))
        self.values.append((out, width))
        return out

    def store(self, array: Any, *, half: bool = False) -> str:
        name = self.name("w")
        self.weights[name] = np.asarray(array, np.float32)
        if half:
            self.half.add(name)
        return name

    def normal(self, *shape: int) -> Any:
        return self.random.standard_normal(shape) / 2

    def product(self, x: str, width: int, out: int, choice: int) -> str:
        """A product with a 2:4 weight, or (one in four) with a dense one, in one of its spellings."""
        sparse = choice % 4 > 0
        if self.spatial:
            size = 3 if choice % 3 else 1
            weight = torch.from_numpy(self.normal(out, width, size, size)) / size
            if sparse:
                order = two_of_four(kernel_order(weight))
                weight = order.reshape(out, size, size, width).permute(0, 3, 1, 2)
            stored = self.store(weight.numpy(), half=sparse)
            bias = [self.store(self.normal(out))] if choice % 2 else []
            pads = [size // 2] * 4
            return self.add("Conv", [x, stored, *bias], out, pads=pads, kernel_shape=[size, size])
        weight = torch.from_numpy(self.normal(out, width))
        weight = two_of_four(weight) if sparse else weight
        if choice % 2:
            stored = self.store(weight.numpy(), half=sparse)
            flipped = self.add("Transpose", [stored], 0, perm=[1, 0])
            self.values.pop()
            return self.add("MatMul", [x, flipped], out)
        return self.add("MatMul", [x, self.store(weight.T.numpy(), half=sparse)], out)

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        dims: list[Any] = ["n", 8, 5, 4] if self.spatial else ["n", 6, 8]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _bias(b: Builder, x: str, width: int, c: int) -> str:
    shape = (width, 1, 1) if b.spatial else (width,)
    other = b.store(b.normal(*shape))
    return b.add("Add", [x, other] if c % 2 else [other, x], width)


def _norm(b: Builder, x: str, width: int, c: int) -> str:
    if not b.spatial:
        return b.add("Mul", [x, b.store(b.normal(width))], width)
    rest = [b.store(b.normal(width)) for _ in range(3)]
    return b.add("BatchNormalization", [x, *rest, b.store(np.abs(b.normal(width)) + 0.5)], width)


def _act(b: Builder, x: str, width: int, c: int) -> str:
    if c % 4 == 3:
        gate = b.add("Sigmoid", [x], width)
        return b.add("Mul", [x, gate] if c % 2 else [gate, x], width)
    kind, given = (("Relu", {}), ("Gelu", {}), ("Gelu", {"approximate": "tanh"}))[c % 4]
    return b.add(kind, [x], width, **given)


def _residual(b: Builder, x: str, width: int, c: int) -> str:
    same = [name for name, w in b.values if w == width]
    return b.add("Add", [x, same[c % len(same)]], width)


STEPS = {"bias": _bias, "norm": _norm, "act": _act, "residual": _residual}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[onnx.ModelProto, set[str]]:
    small = st.integers(0, 11)
    b = Builder(draw(st.integers(0, 99)), draw(st.booleans()))
    last, width = "x", 8
    for _ in range(draw(st.integers(1, 6))):
        out = draw(st.sampled_from([8, 12, 16]))
        last = b.product(last, width, out, draw(small))
        width = out
        for step in draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=4)):
            last = STEPS[step](b, last, width, draw(small))
    taps = draw(st.lists(st.sampled_from([name for name, _ in b.values[1:]]), max_size=2, unique=True))
    return b.model(list(dict.fromkeys([last, *taps]))), b.half


@given(graphs())
def test_the_rewritten_graph_computes_the_same_with_rounded_weights(
    given_: tuple[onnx.ModelProto, set[str]],
) -> None:
    proto, half = given_
    file = OnnxFile.load(proto)
    layers = [layer for layer in find_layers(file, infer(file)) if not layer.refusal]
    assert {layer.weight for layer in layers} == half
    event(f"{sum(len(layer.nodes) for layer in layers) > len(layers)}")
    result = OnnxFile.load(rewritten(file, layers, {}, None))
    assert sum(node.op_type == KIND for node in result.proto.graph.node) == len(layers)
    rounded = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in rounded.graph.initializer:
        if tensor.name in half:
            values = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    shape = [3, *(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:])]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = Runner(OnnxFile.load(rounded), dtype=torch.float64).run({"x": x})
    found = Runner(result, dtype=torch.float64).run({"x": x})
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale  # scale and bias are float32
    narrow = Runner(result).run({"x": x})
    for name, value in wanted.items():
        assert float((narrow[name] - value).abs().max()) <= 0.05 * max(1.0, float(value.abs().max()))


def one_layer(op: str, weight: Any, x: list[Any], dtype: int = TensorProto.FLOAT, **attributes: Any) -> Any:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(np.asarray(weight).astype(kind), "w")],
    )
    return OnnxFile.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (one_layer("MatMul", np.ones((8, 4)), [2, 8]), "not 2:4"),
        (one_layer("MatMul", np.zeros((6, 4)), [2, 6]), "6 weights, not a multiple of 4"),
        (one_layer("MatMul", np.zeros((8, 4)), [2, 8], TensorProto.DOUBLE), "its weight is float64"),
        (one_layer("MatMul", np.zeros((3, 8, 4)), [3, 2, 8]), "3 axes"),
        (one_layer("MatMul", np.zeros(8), [2, 8]), "1 axes"),
        (one_layer("MatMul", np.zeros((8, 0)), [2, 8]), "no elements"),
        (one_layer("Conv", np.zeros((4, 4, 3)), [1, 4, 9]), "1 spatial axes"),
        (one_layer("Conv", np.zeros((8, 4, 3, 3)), [1, 8, 9, 9], group=2), "2 groups"),
        (one_layer("Conv", np.zeros((4, 4, 3, 3)), [1, 4, 9, 9], pads=[1, 1, 0, 0]), "differs between sides"),
        (one_layer("Conv", np.zeros((4, 3, 3, 3)), [1, 3, 9, 9]), "3 input channels"),
        (one_layer("Gemm", np.zeros((8, 4)), [2, 8], alpha=2.0), "scales its operands"),
    ],
)
def test_layers_that_cannot_be_sparse_say_why(file: OnnxFile, reason: str) -> None:
    (layer,) = find_layers(file, infer(file))
    assert reason in layer.refusal
    choice = choose(layer, "sm80", "always")
    assert not choice.sparse
    assert reason in str(choice)


def test_two_products_with_one_weight_store_it_once() -> None:
    weight = two_of_four(torch.randn(8, 8)).T.numpy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    file = OnnxFile.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    proto = rewritten(file, find_layers(file, infer(file)), {}, None)
    assert len(proto.graph.initializer) == 2
    assert proto.graph.node[0].input[1:] == proto.graph.node[1].input[1:]


# -- the choice ---------------------------------------------------------------------------------------


def test_measured_points_come_back_and_nothing_is_extrapolated() -> None:
    for curve in CURVES.values():
        for width, ratio in curve.ratios.items():
            assert curve.at(2.0 * width**3) == pytest.approx(ratio)
        assert curve.at(1.0) == curve.ratios[min(curve.ratios)]
        assert curve.at(1e18) == curve.ratios[max(curve.ratios)]


def test_small_layers_stay_dense_unless_asked_for() -> None:
    (layer,) = find_layers(file := one_layer("MatMul", np.zeros((64, 64)), [16, 64]), infer(file))
    assert not choose(layer, "sm90", "modelled").sparse
    assert choose(layer, "sm90", "always").sparse
    with pytest.raises(InvalidOption, match="modelled, measured, always"):
        choose(layer, "sm90", "fastest")


def test_measured_times_decide_and_are_remembered(tmp_path: Path) -> None:
    (layer,) = find_layers(file := one_layer("MatMul", np.zeros((64, 64)), [16, 64]), infer(file))
    asked: list[str] = []

    def measure(layer: Any, dtype: str) -> Times:
        asked.append(dtype)
        return Times(10.0, {"small": 8.0, "batch16": 4.0})

    path = tmp_path / "deep" / "tuned.json"
    choice = choose(layer, "sm90", "measured", "bf16", remembered(Table(path, "a GPU"), measure))
    assert (choice.sparse, choice.expected, choice.tile) == (True, 2.5, "batch16")
    assert "2.50x measured" in str(choice)
    again = choose(layer, "sm90", "measured", "bf16", remembered(Table(path, "a GPU"), None))
    assert again == choice
    other = choose(layer, "sm90", "measured", "bf16", remembered(Table(path, "another"), None))
    assert not other.sparse
    assert other.why.startswith("not measured here; 0.60x expected")
    assert asked == ["bf16"]
    slow = choose(layer, "sm90", "measured", "fp16", lambda *_: Times(3.0, {"small": 4.0}))
    assert not slow.sparse
    path.write_text("[1")
    with pytest.raises(InvalidModel, match="remove it"):
        Table(path, "a GPU")


def test_a_measured_tile_is_the_one_that_is_built() -> None:
    (layer,) = find_layers(file := one_layer("MatMul", np.zeros((64, 64)), [16, 64]), infer(file))
    found = list(wanted(layer, None, "sm90", varies=False, best="wgmma64"))
    assert [(one.config.instruction, one.arches) for one in found] == [("wgmma.sp", ("sm_90a",))]


# -- the operator -------------------------------------------------------------------------------------


def operands(dtype: torch.dtype = torch.float32, conv: Conv | None = None, **given: Any) -> Operands:
    torch.manual_seed(0)
    if conv is None:
        weight, x = two_of_four(torch.randn(24, 32)), torch.randn(3, 5, 32, dtype=dtype)
        numbers: list[int] = []
    else:
        weight = two_of_four(torch.randn(24, conv.k))
        x = torch.randn(2, conv.channels, 7, 6, dtype=dtype)
        numbers = [conv.channels, *conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
    packed = pack(weight.half())
    values, metadata = torch.from_numpy(packed.values), torch.from_numpy(packed.metadata)
    extra = {"scale": None, "bias": None, "residual": None, "activation": "none", "kernels": "", **given}
    return Operands(x, values, metadata, out=24, k=weight.shape[1], dtype="fp16", conv=numbers, **extra)


def call(given: Operands) -> torch.Tensor:
    result: torch.Tensor = torch.ops.sparsecc.sparse_matmul(*_arguments(given))
    return result


def _arguments(given: Operands) -> tuple[Any, ...]:
    return tuple(getattr(given, name) for name in Operands.__slots__)


@pytest.mark.parametrize("conv", [None, Conv(8), Conv(8, (3, 3), (2, 1), (1, 1), (1, 2))])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_the_operator_is_one_for_pytorch(conv: Conv | None, activation: str) -> None:
    given = operands(conv=conv, activation=activation, scale=torch.rand(24), bias=torch.randn(24))
    torch.library.opcheck(torch.ops.sparsecc.sparse_matmul.default, _arguments(given))
    assert list(call(given).shape) == output_shape(given.x.shape, 24, given.conv)


def test_the_operator_multiplies_rounded_operands() -> None:
    residual = torch.randn(3, 5, 24)
    given = operands(bias=torch.randn(24), residual=residual, activation="silu")
    weight = operator_module._weight(given).float()
    wanted = F.silu(given.x.half().float() @ weight.T + given.bias) + residual
    torch.testing.assert_close(call(given), wanted)
    assert (weight != 0).sum() == 24 * 16


def test_the_operator_works_in_compiled_and_exported_code() -> None:
    given = operands(activation="relu", bias=torch.randn(24))

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rest = _arguments(given)[1:]
            result: torch.Tensor = torch.ops.sparsecc.sparse_matmul(x * 2, *rest)
            return result + 1

    wanted = Net()(given.x)
    program = torch.export.export(Net(), (given.x,))
    torch.testing.assert_close(program.module()(given.x), wanted)
    torch.testing.assert_close(torch.compile(Net(), backend="aot_eager")(given.x), wanted)


def test_gpu_without_kernels_is_a_clear_error() -> None:
    with pytest.raises(TargetUnavailable, match="compiled without kernels"):
        operator_module._on_gpu(*_arguments(operands()))


# -- compile ------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 6)
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.weight.copy_(two_of_four(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x + self.down(F.gelu(self.up(self.norm(x)))))
        return y


@pytest.fixture(scope="module")
def built() -> tuple[Block, torch.Tensor, sparsecc.Compiled]:
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 32)
    return model, x, sparsecc.compile(model, (x,), target="sm80", options=ALWAYS)


def test_a_model_with_the_pattern_is_compiled_verified_and_loaded(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], tmp_path: Path
) -> None:
    model, x, compiled = built
    assert compiled.certificate.status == "VERIFIED"
    layers = json.loads(compiled.artifact.read("layers.json"))
    assert [(entry["weight"], entry["sparse"]) for entry in layers] == [
        ("up.weight", True), ("down.weight", True), ("head.weight", False),
    ]  # fmt: skip
    assert "not 2:4" in layers[2]["why"]
    assert all(entry["kernels"] for entry in layers if entry["sparse"])
    y = compiled(x)
    assert y.dtype == torch.float32
    assert float((y - model(x)).abs().max()) < 0.01
    compiled.save(tmp_path / "a.scc")
    again = sparsecc.load(tmp_path / "a.scc")
    assert torch.equal(again(x), y)
    assert torch.equal(torch.from_numpy(again(x.numpy())), y)
    assert sparsecc.verify(model, again, (x,)).status == "VERIFIED"
    compiled.save(tmp_path / "b.scc")
    assert (tmp_path / "a.scc").read_bytes() == (tmp_path / "b.scc").read_bytes()


def test_an_artifact_runs_without_what_built_it(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], tmp_path: Path
) -> None:
    built[2].save(tmp_path / "a.scc")
    code = (
        "import sys, torch\n"
        "for name in ('tvm', 'tvm_ffi'):\n    sys.modules[name] = None\n"
        "import sparsecc\n"
        f"print(sparsecc.load({str(tmp_path / 'a.scc')!r})(torch.zeros(1, 5, 32)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[1, 5, 6]" in done.stdout


def test_a_wrong_weight_in_the_artifact_fails_verification(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled],
) -> None:
    model, x, compiled = built
    proto = onnx.ModelProto.FromString(compiled.artifact.read("model.onnx"))
    values = next(t for t in proto.graph.initializer if t.name.startswith("down.weight.values"))
    array = numpy_helper.to_array(values).copy()
    array.view(np.uint16).reshape(-1)[::7] ^= 0x8000  # some signs
    values.CopyFrom(numpy_helper.from_array(array, values.name))
    members = {**compiled.artifact.members, "model.onnx": proto.SerializeToString()}
    broken = sparsecc.Compiled(
        type(compiled._ready())(
            Artifact(compiled.artifact.manifest, members),
            compiled.plan,
            compiled.certificate,
            compiled.report,
        )
    )
    certificate = sparsecc.verify(model, broken, (x,))
    assert certificate.status == "FAILED"
    with pytest.raises(VerificationFailed):
        certificate.require()


@pytest.mark.parametrize("member", ["layers.json", "kernels.json"])
def test_damaged_artifacts_are_refused(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], member: str
) -> None:
    from sparsecc.targets.cuda.target import Sm80

    artifact = built[2].artifact
    damaged = Artifact(artifact.manifest, {**artifact.members, member: b"[1, {"})
    with pytest.raises(InvalidModel, match=member):
        Sm80().executor(damaged)


def test_onnx_files_and_convolutions_compile(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)
    ).eval()
    with torch.no_grad():
        for layer in (net[0], net[3]):
            order = two_of_four(kernel_order(layer.weight))
            o, c, h, w = layer.weight.shape
            layer.weight.copy_(order.reshape(o, h, w, c).permute(0, 3, 1, 2))
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 8, 6, 7)
    sparsecc.compile(net, (x,), target="onnx").save(tmp_path / "net.onnx")
    compiled = sparsecc.compile(str(tmp_path / "net.onnx"), target="sm90-bf16", options=ALWAYS)
    layers = json.loads(compiled.artifact.read("layers.json"))
    assert [entry["sparse"] for entry in layers] == [True, True]
    assert {entry["dtype"] for entry in layers} == {"bf16"}
    assert compiled.certificate.status == "VERIFIED"
    scale = float(net(x).abs().max())
    assert float((torch.as_tensor(compiled(x)) - net(x)).abs().max()) < 0.03 * scale


@pytest.mark.parametrize("target", ["sm75-2:4", "sm80-1:3", "sm80-2:4-fp64"])
def test_targets_that_do_not_exist_are_refused(target: str) -> None:
    with pytest.raises(TargetUnavailable, match=r"targets here|it has"):
        sparsecc.compile(Block(), (torch.randn(2, 5, 32),), target=target)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InvalidOption, match=r"no option 'chose'.*choose"):
        sparsecc.compile(Block(), (torch.randn(2, 5, 32),), target="sm80", options={"chose": "always"})
    with pytest.raises(InvalidOption, match="it has none"):
        sparsecc.compile(Block(), (torch.randn(2, 5, 32),), target="cpu", options={"chose": 1})


# -- the launch ---------------------------------------------------------------------------------------


def kernel(tile: str = "large", images: tuple[str, ...] = ("sm_80",), ptx_arch: str = "sm_80") -> Kernel:
    config = default_config(tile, epilogue=Epilogue(bias=True))
    found = {arch: Image(arch, arch.encode(), 1, 0, 0, False) for arch in images}
    parameters = ("weight", "metadata", "x", "d", "bias", "tokens")
    return Kernel(config, Problem(64, 64), f"k_{tile}", parameters, "", "ptx", ptx_arch, found)


@pytest.mark.parametrize(
    ("images", "capability", "expected"),
    [
        (("sm_80",), (8, 0), b"sm_80"),
        (("sm_80",), (8, 9), b"sm_80"),
        (("sm_80", "sm_86"), (8, 6), b"sm_86"),
        (("sm_80", "sm_86"), (8, 9), b"sm_86"),
        (("sm_86",), (8, 0), None),
        (("sm_80",), (9, 0), b"ptx\0"),
        (("sm_80",), (7, 5), None),
        (("sm_90", "sm_90a"), (9, 0), b"sm_90a"),
        (("sm_90a",), (9, 1), b"ptx\0"),
    ],
)
def test_a_gpu_gets_the_code_that_it_can_run(
    images: tuple[str, ...], capability: tuple[int, int], expected: bytes | None
) -> None:
    ptx_arch = images[0] if not images[0].endswith("a") else "sm_80"
    assert image_for(kernel(images=images, ptx_arch=ptx_arch), *capability) == expected


def test_few_rows_get_small_tiles() -> None:
    kernels = [kernel("large"), kernel("batch16"), kernel("batch8")]
    assert [chosen(kernels, rows).entry for rows in (1, 8, 16, 4096)] == [
        "k_batch8", "k_batch8", "k_batch16", "k_large",
    ]  # fmt: skip


def test_hopper_prefers_its_warpgroups() -> None:
    kernels = [kernel("large"), kernel("wgmma128"), kernel("batch16")]
    assert [chosen(kernels, rows).entry for rows in (16, 4096)] == ["k_batch16", "k_wgmma128"]


def test_hopper_artifacts_hold_both_families() -> None:
    pytest.importorskip("tvm")
    model, x = Block().eval(), torch.randn(300, 5, 32)
    compiled = sparsecc.compile(model, (x,), target="sm90", options=ALWAYS)
    assert compiled.certificate.status == "VERIFIED"
    cubins = {name.split(".")[-2] for name in compiled.artifact.members if name.endswith(".cubin")}
    assert cubins == {"sm_90", "sm_90a"}


def test_arguments_come_in_the_kernels_own_order() -> None:
    tensors = {name: torch.zeros(1) for name in ("weight", "metadata", "x", "d", "bias", "unused")}
    one = replace(kernel(), parameters=("bias", "tokens", "d", "metadata", "weight", "x"))
    found = cells(one, one.launch(tokens=7), tensors)
    assert found[1].value == 7
    names = ("bias", "d", "metadata", "weight", "x")
    assert [c.value for c in (found[0], *found[2:])] == [tensors[name].data_ptr() for name in names]


def test_arguments_with_strides_are_refused() -> None:
    tensors = {name: torch.zeros(2, 2) for name in kernel().parameters} | {"x": torch.zeros(2, 2).t()}
    with pytest.raises(InvalidOption, match=r"x of kernel .* has strides \(1, 2\): it must be contiguous"):
        cells(kernel(), kernel().launch(tokens=7), tensors)


def test_sizes_of_a_launch() -> None:
    assert run_time_sizes(operands(), [3, 5, 24]) == ({"tokens": 15}, 15)
    given = operands(conv=Conv(8, (3, 3), padding=(1, 1)))
    assert run_time_sizes(given, [2, 24, 7, 6]) == ({"batch": 2, "height": 7, "width": 6}, 42)


RECORDER = r"""
#include <stdint.h>
#include <string.h>
static uint64_t record[32];
extern "C" {
uint64_t* recorded() { return record; }
int cuModuleLoadData(void** m, const char* image) {
  *m = (void*)0x11;
  return strcmp(image, "image") ? 200 : 0;
}
int cuModuleGetFunction(void** f, void* m, const char* name) {
  *f = (void*)0x22;
  return strcmp(name, "entry") ? 500 : 0;
}
int cuFuncSetAttribute(void* f, int which, int value) {
  uint64_t seen[] = {(uint64_t)f, (uint64_t)which, (uint64_t)value};
  memcpy(record, seen, sizeof seen);
  return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  uint64_t seen[] = {(uint64_t)f, gx, gy, gz, bx, by, bz, shared, (uint64_t)stream, *(uint64_t*)params[0],
                     *(uint64_t*)params[1], (uint64_t)*(int32_t*)params[2], (uint64_t)extra};
  memcpy(record + 3, seen, sizeof seen);
  return gx == 99 ? 700 : 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 700 ? "an illegal memory access" : "bad";
  return 0;
}
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build a stand-in for the driver")
def test_the_driver_is_called_as_its_header_says(tmp_path: Path) -> None:
    (tmp_path / "cuda.cpp").write_text(RECORDER)
    library = tmp_path / "libcuda.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, tmp_path / "cuda.cpp"], check=True)
    loaded = ctypes.CDLL(str(library))
    driver = Driver(loaded)
    function = driver.function(b"image", "entry", 70_000)
    given = [ctypes.c_void_p(0x7F00_0000_1230), ctypes.c_void_p(None), ctypes.c_int32(-7)]
    driver.launch(function, (3, 4, 5), 128, 70_000, 0x33, given)
    loaded.recorded.restype = ctypes.POINTER(ctypes.c_uint64)
    seen = loaded.recorded()[:16]
    assert seen[:3] == [0x22, 8, 70_000]
    assert seen[3:12] == [0x22, 3, 4, 5, 128, 1, 1, 70_000, 0x33]
    assert seen[12:] == [0x7F00_0000_1230, 0, 2**64 - 7, 0]
    with pytest.raises(SparseccError, match="cuLaunchKernel failed with CUDA error 700: an illegal memory"):
        driver.launch(function, (99, 1, 1), 32, 0, 0, given)
    with pytest.raises(SparseccError, match="cuModuleLoadData failed with CUDA error 200"):
        driver.function(b"other", "entry", 0)


def test_names_of_the_graphs_operator() -> None:
    assert f"{DOMAIN}::{KIND}" == "sparsecc::SparseMatMul"


def test_the_listing_and_the_notes_say_what_runs_how(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from sparsecc.cli.commands import cli

    compiled = built[2]
    assert "2 of 3 products run on sparse tensor cores" in " ".join(compiled.report.notes)
    if not torch.cuda.is_available():
        assert "checked in its CPU form" in compiled.report.notes[-2]
    assert "not been measured on hardware" in compiled.report.notes[-1]
    compiled.save(tmp_path / "a.scc")
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.scc"), "--json"]).output)
    assert [row["runs"] for row in shown["layers"]] == ["2:4 fp16", "2:4 fp16", "dense"]
    assert int(shown["layers"][0]["registers"]) > 16
    assert "not 2:4" in shown["layers"][2]["why"]
    assert CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.scc")]).exit_code == 0


def test_half_precision_models_are_held_to_bounds_that_can_fail() -> None:
    """The bound is that of rounded operands, and not 4,096 units of the model's own short type."""
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    model, x = Block().eval().half(), torch.randn(2, 5, 32).half()
    compiled = sparsecc.compile(model, (x,), target="sm80", options=ALWAYS)
    assert compiled.certificate.status == "VERIFIED"
    bounds = [c.bound for c in compiled.certificate.checks if c.what == "artifact"]
    assert max(bounds) < 0.1 * float(model(x).abs().max().clamp(min=1))

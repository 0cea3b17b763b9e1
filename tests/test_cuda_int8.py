"""Quantised models on targets for sparse tensor cores: integers, scales and zero points, without a GPU."""

from __future__ import annotations

import json
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

import sparsecc
from sparsecc.artifact import Artifact
from sparsecc.errors import TargetRefused
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.shapes import infer
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.cuda.choice import INT8_CURVES, choose
from sparsecc.targets.cuda.launch import kernels_of
from sparsecc.targets.cuda.layers import find_layers
from sparsecc.targets.cuda.operator import Operands, output_shape
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.plan_kernels import element_of
from sparsecc.targets.cuda.reference import KIND
from sparsecc.targets.cuda.rewrite import rewritten
from tests.cuda_sim.simulator import COMPILER, Simulator, aligned
from tests.onnx_graphs import ort

ALWAYS = {"choose": "always"}
Array = np.ndarray[Any, Any]


class Builder:
    """A quantised graph in the making.

    ``exact``: scales are powers of two, so that float32, float64 and integers give the same to the last bit.
    ``taken`` are the outputs of products that an int8 kernel can compute.
    """

    def __init__(self, seed: int, kind: str, exact: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.kind, self.exact = kind, exact
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, Array] = {}
        self.taken: set[str] = set()
        self.ends: list[str] = []
        self.sizes: dict[str, tuple[int, int]] = {"x": (8, 0)}  # width, and by how much images are smaller

    def node(self, op: str, inputs: list[str], size: tuple[int, int] = (0, 0), **given: Any) -> str:
        out = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], f"n_{out}", **given))
        self.sizes[out] = size
        return out

    def store(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = np.asarray(values).astype(dtype)
        return name

    def scale(self, *shape: int) -> Array:
        powers = 2.0 ** self.random.integers(-5, -2, shape)
        return powers if self.exact else powers * self.random.uniform(0.5, 1.5, shape)

    def quantised(self, x: str, c: int) -> str:
        """x behind QuantizeLinear and DequantizeLinear."""
        dtype = np.uint8 if c % 2 else np.int8
        zero = (0, 128, 119)[c % 3] if dtype is np.uint8 else (0, -7, None)[c % 3]
        given = [self.store(self.scale())] + ([] if zero is None else [self.store(zero, dtype)])
        q = self.node("QuantizeLinear", [x, *given])
        return self.node("DequantizeLinear", [q, *given], self.sizes[x])

    def weight(self, integers: Array, axis: int, c: int) -> str:
        """Integers behind DequantizeLinear, with one scale or one an output, in one of its spellings."""
        scales = self.scale(*([integers.shape[axis]] if c % 2 else []))
        given: dict[str, Any] = {"axis": axis} if c % 2 else {}
        zeros = np.zeros(scales.shape)
        if c % 5 == 1:  # unsigned, with the zero point in the middle
            stored, zero = self.store(integers + 128, np.uint8), self.store(zeros + 128, np.uint8)
        else:
            stored, zero = self.store(integers, np.int8), self.store(zeros, np.int8)
        step = self.store(scales)
        if c % 5 == 2:  # floats, and a quantiser
            along = (
                scales.reshape([-1 if d == axis else 1 for d in range(integers.ndim)]) if c % 2 else scales
            )
            stored = self.node("QuantizeLinear", [self.store(integers * along), step, zero], **given)
        if c % 5 == 4:  # as torch.export's quantisers have it
            zero = self.node("Cast", [self.store(zeros, np.int64)], to=TensorProto.INT8)
        rest = [] if c % 5 == 3 else [zero]
        return self.node("DequantizeLinear", [stored, step, *rest], **given)

    def product(self, x: str, out: int, c: int) -> str:
        """A product of quantised operands, 2:4 but for one in four."""
        source = self.quantised(x, c)
        (width, crop), sparse = self.sizes[x], c % 4 != 0
        same = (out, crop)
        size = (1, 3)[c % 3 == 1] if self.kind == "images" else 1
        integers = self.random.integers(-127, 128, (out, size * size * width))
        if sparse:
            rank = self.random.random((out, integers.shape[1] // 4, 4)).argsort(-1)
            integers[rank.reshape(out, -1) < 2] = 0
        if self.kind == "images":
            kernel = integers.reshape(out, size, size, width).transpose(0, 3, 1, 2)
            pads = [size // 2 if c % 2 else 0] * 4
            bias = [self.bias(out, c)] if c % 3 else []
            operand = self.weight(kernel, 0, c)
            same = (out, crop + size // 2 - pads[0])
            y = self.node("Conv", [source, operand, *bias], same, pads=pads, kernel_shape=[size, size])
        elif self.kind == "rows" and c % 3:
            bias = [self.bias(out, c)] if c % 2 else []
            matrix = integers if c % 3 == 1 else integers.T
            operand = self.weight(np.ascontiguousarray(matrix), 0 if c % 3 == 1 else 1, c)
            y = self.node("Gemm", [source, operand, *bias], same, transB=int(c % 3 == 1))
        elif c % 2:
            flipped = self.node("Transpose", [self.weight(integers, 0, c)], perm=[1, 0])
            y = self.node("MatMul", [source, flipped], same)
        else:
            y = self.node("MatMul", [source, self.weight(np.ascontiguousarray(integers.T), 1, c)], same)
        if sparse:
            self.taken.add(y)
        return y

    def bias(self, out: int, c: int, shape: tuple[int, ...] = ()) -> str:
        shape = shape or (out,)
        if c % 2:
            return self.store(self.random.integers(-64, 65, shape) / 16)
        step, zero = self.store(self.scale()), self.store(0, np.int32)
        return self.node(
            "DequantizeLinear", [self.store(self.random.integers(-99, 99, shape), np.int32), step, zero]
        )

    def follow(self, y: str, what: str, c: int) -> str:
        size = self.sizes[y]
        width = size[0]
        if what == "bias":
            shape = (width, 1, 1) if self.kind == "images" else (width,)
            return self.node("Add", [y, self.bias(width, c, shape)], size)
        if what == "residual":
            same = [name for name, other in self.sizes.items() if other == size]
            return self.node("Add", [y, same[c % len(same)]], size)
        if what == "relu" or self.exact:
            return self.node("Relu", [y], size)
        if what == "norm" and self.kind == "images":
            rest = [self.store(self.random.standard_normal(width)) for _ in range(3)]
            variance = self.store(self.random.uniform(0.5, 2, width))
            return self.node("BatchNormalization", [y, *rest, variance], size)
        return self.node("Mul", [y, self.node("Sigmoid", [y], size)], size)

    def model(self) -> onnx.ModelProto:
        return built(self.nodes, self.tensors, ["n", *self.shape], self.ends)

    @property
    def shape(self) -> tuple[int, ...]:
        return {"images": (8, 9, 8), "rows": (8,), "sequences": (3, 8)}[self.kind]


def built(
    nodes: list[onnx.NodeProto], tensors: dict[str, Array], shape: list[Any], outputs: list[str]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@st.composite
def graphs(draw: st.DrawFn) -> Builder:
    """Chains of products where arithmetic is exact; else products of the input, side by side."""
    small = st.integers(0, 29)
    exact = draw(st.booleans())
    b = Builder(draw(st.integers(0, 99)), draw(st.sampled_from(["images", "rows", "sequences"])), exact)
    last, ends = "x", []
    for _ in range(draw(st.integers(1, 3))):
        last = b.product(last if exact else "x", draw(st.sampled_from([8, 12])), draw(small))
        for what in draw(st.lists(st.sampled_from(["bias", "norm", "relu", "silu", "residual"]), max_size=3)):
            last = b.follow(last, what, draw(small))
        ends.append(last)
    b.ends = list(dict.fromkeys(ends if draw(st.booleans()) or not exact else [last]))
    return b


@given(graphs())
def test_products_of_integers_give_what_the_quantised_model_says(b: Builder) -> None:
    proto = b.model()
    file = OnnxFile.load(proto)
    layers = [layer for layer in find_layers(file, infer(file), "int8") if not layer.refusal]
    assert {layer.product for layer in layers} == b.taken
    assert {element_of(layer, None) for layer in layers} <= {"int8"}
    event(f"exact {b.exact}, {len(layers)} layers")
    result = OnnxFile.load(rewritten(file, layers, {}, "int8"))
    x = torch.from_numpy(np.random.default_rng(0).integers(-64, 64, (3, *b.shape)) / 16).float()
    wanted = Runner(file, dtype=torch.float64).run({"x": x})
    plain = ort(proto, {"x": x.numpy()}) if b.exact else []
    for dtype in (torch.float64, None):
        found = Runner(result, dtype=dtype).run({"x": x})
        assert found.keys() == wanted.keys()
        for place, (name, value) in enumerate(wanted.items()):
            if b.exact:
                assert torch.equal(found[name].double(), value)
                np.testing.assert_array_equal(plain[place], found[name].float().numpy())
            else:
                error = float((found[name].double() - value).abs().max())
                assert error <= 4e-6 * max(1.0, float(value.abs().max()))


# -- scales that the model computes -------------------------------------------------------------------


def two_of_four(out: int, k: int, seed: int = 0, most: int = 127) -> Array:
    """Random integers [out, k] with two zeros in every four."""
    random = np.random.default_rng(seed)
    integers = random.integers(-most, most + 1, (out, k))
    integers[random.random((out, k // 4, 4)).argsort(-1).reshape(out, -1) < 2] = 0
    return integers.astype(np.int8)


def dynamic(
    by_channel: bool = True, zero: bool = True, bias: bool = True, kind: Any = np.uint8
) -> onnx.ModelProto:
    """A product as onnxruntime's dynamic quantiser writes it; int8 inputs and lost zero points by hand."""
    tensors: dict[str, Array] = {
        "w": np.ascontiguousarray(two_of_four(12, 32).T),
        "w.zero": np.zeros(12 if by_channel else (), np.int8),
        "w.scale": np.random.default_rng(1).uniform(0.01, 0.02, 12 if by_channel else ()).astype(np.float32),
        "b": np.random.default_rng(2).standard_normal(12).astype(np.float32),
    }
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "z"])]
    source, point = "q", "z"
    if kind is np.int8:
        tensors |= {"n": np.float32(0.05).reshape(()), "n.zero": np.array(-9, np.int8)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "n", "n.zero"], ["q8"]),
            helper.make_node("Identity", ["n"], ["step"]),
        ]
        source, point = "q8", "n.zero"
    nodes += [
        helper.make_node("Mul", ["step", "w.scale"], ["scale"]),
        helper.make_node("MatMulInteger", [source, "w", point if zero else "", "w.zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "floats"], ["y" if not bias else "scaled"]),
        *(
            [helper.make_node("Add", ["scaled", "b"], ["sum"]), helper.make_node("Relu", ["sum"], ["y"])]
            if bias
            else []
        ),
    ]
    return built(nodes, tensors, ["n", 5, 32], ["y"])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"by_channel": False},
        {"zero": False},
        {"bias": False},
        {"kind": np.int8},
        {"kind": np.int8, "zero": False},
    ],
)
def test_scales_that_the_model_computes_reach_the_kernel(given: dict[str, Any]) -> None:
    file = OnnxFile.load(dynamic(**given))
    (layer,) = find_layers(file, infer(file), "int8")
    assert not layer.refusal
    result = OnnxFile.load(rewritten(file, [layer], {}, "int8"))
    assert "MatMulInteger" not in {node.op_type for node in result.proto.graph.node}
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    for dtype, bound in ((torch.float64, 1e-9), (None, 1e-5)):
        wanted = Runner(file, dtype=dtype).run({"x": x})["y"]
        found = Runner(result, dtype=dtype).run({"x": x})["y"]
        assert found.dtype == wanted.dtype
        assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda n: n["Cast"].attribute[0].__setattr__("i", TensorProto.DOUBLE), "not cast to float32"),
        (lambda n: n["MatMulInteger"].input.__setitem__(2, "points"), "several zero points"),
        (lambda n: n["MatMulInteger"].input.__setitem__(3, "w.later"), "computed when the model runs"),
    ],
)
def test_other_sums_of_integers_stay_dense(edit: Any, reason: str) -> None:
    proto = dynamic(bias=False)
    edit({node.op_type: node for node in proto.graph.node})
    proto.graph.node.insert(0, helper.make_node("Abs", ["w.zero"], ["w.later"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(5, np.uint8), "points"))
    file = OnnxFile.load(proto)
    (layer,) = find_layers(file, infer(file), "int8")
    assert reason in layer.refusal


# -- what stays dense ---------------------------------------------------------------------------------


def single(
    op: str = "MatMul", w: Any = None, axis: int = 1, *, wide: Any = 1, zero: int = 0, kind: Any = np.int8,
    step: Any = 0.1, x_step: Any = 0.1, shape: tuple[Any, ...] = ("n", 8), **given: Any,
) -> OnnxFile:  # fmt: skip
    """One product of quantised operands."""
    integers = two_of_four(4, 8).T if w is None else w
    steps = np.broadcast_to(np.asarray(step, np.float32), (np.shape(integers)[axis],))
    tensors = {
        "w": np.ascontiguousarray(integers).astype(np.int8),
        "w.scale": np.ascontiguousarray(steps) * np.float32(wide),
        "x.scale": np.asarray(x_step, np.float32),
        "x.zero": np.full(np.shape(x_step), zero, kind),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "x.scale", "x.zero"], ["xd"], axis=1),
        helper.make_node("DequantizeLinear", ["w", "w.scale"], ["wd"], axis=axis),
        helper.make_node(op, ["xd", "wd"], ["y"], **given),
    ]
    return OnnxFile.load(built(nodes, tensors, list(shape), ["y"]))


def kernel(size: int) -> Array:
    return two_of_four(4, size * size * 8).reshape(4, size, size, 8).transpose(0, 3, 1, 2)


IMAGES = ("n", 8, 6, 6)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (single(w=np.ones((8, 4))), "not 2:4"),
        (single(w=np.ones((8, 0))), "no elements"),
        (single(w=two_of_four(4, 8).T[:6], shape=("n", 6)), "6 weights, not a multiple of 4"),
        (single(x_step=np.full(8, 0.1)), "its input has several scales"),
        (single(axis=0, step=np.linspace(0.1, 0.2, 8)), "several scales along what is summed"),
        (single("Conv", kernel(1), 0, shape=IMAGES, pads=[1, 1, 0, 0]), "differs between sides"),
        (single("Conv", two_of_four(4, 4).reshape(4, 4, 1, 1), 0, shape=IMAGES, group=2), "2 groups"),
        (single(x_step=1e-30, step=1e-30), "no normal float32"),
        (single("Gemm", alpha=2.0), "scales its operands"),
        (single(kind=np.int16), "its input is int16"),
    ],
)  # fmt: skip
def test_quantised_products_that_no_kernel_computes_say_why(file: OnnxFile, reason: str) -> None:
    (layer,) = find_layers(file, infer(file), "int8")
    assert layer.coded
    assert reason in layer.refusal
    for dtype in ("int8", None):  # the model is quantised, so nothing is rounded to floats unasked
        (again,) = find_layers(file, infer(file), dtype)
        assert again.refusal == layer.refusal


@pytest.mark.parametrize("axis", [5, -4])
def test_constants_that_cannot_be_computed_are_none(axis: int) -> None:
    proto = single().proto
    proto.graph.node[2].attribute[0].i = axis
    file = OnnxFile.load(proto)
    assert find_layers(file, infer(file), "int8") == []


def test_scales_along_the_sum_that_are_equal_are_one_scale() -> None:
    (layer,) = find_layers(file := single(axis=0), infer(file), "int8")
    assert not layer.refusal


def test_sums_that_could_overflow_are_left_alone() -> None:
    wide = np.zeros((1, 2 * 132_112), np.int8)
    wide[:, ::2] = 127
    (layer,) = find_layers(file := single(w=wide.T, shape=("n", wide.shape[1])), infer(file), "int8")
    assert layer.refusal == "its sums can overflow int32"
    few = wide[:, : 2 * 132_000]
    (layer,) = find_layers(file := single(w=few.T, shape=("n", few.shape[1])), infer(file), "int8")
    assert not layer.refusal


def test_the_element_type_asked_for_decides_what_is_multiplied() -> None:
    """One product of integers, one of a float, one of a float input and a quantised weight."""
    source = single().proto
    float_weight = two_of_four(4, 8).T.astype(np.float32)
    source.graph.initializer.append(numpy_helper.from_array(float_weight, "f"))
    for name, operands in (("yf", ["x", "f"]), ("yw", ["x", "wd"])):
        source.graph.node.append(helper.make_node("MatMul", operands, [name]))
        source.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    file = OnnxFile.load(source)
    shapes = infer(file)

    def types(asked: str | None) -> list[str]:
        layers = find_layers(file, shapes, asked)
        return [(layer.refusal and "dense") or element_of(layer, asked) for layer in layers]

    assert types(None) == ["int8", "fp16", "fp16"]
    assert types("int8") == ["int8", "dense", "dense"]
    assert types("bf16") == ["bf16", "bf16", "bf16"]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    wanted = Runner(file, dtype=torch.float64).run({"x": x})
    for asked in (None, "bf16", "int8"):
        layers = [layer for layer in find_layers(file, shapes, asked) if not layer.refusal]
        found = Runner(OnnxFile.load(rewritten(file, layers, {}, asked))).run({"x": x})
        for name, value in wanted.items():
            assert float((found[name] - value).abs().max()) <= 0.02 * float(value.abs().max())


def test_one_weight_with_two_scales_is_stored_once_and_scaled_twice() -> None:
    source = single().proto
    source.graph.initializer.append(numpy_helper.from_array(np.float32(0.7), "other"))
    source.graph.node.extend(
        [
            helper.make_node("DequantizeLinear", ["w", "other"], ["wo"]),
            helper.make_node("MatMul", ["xd", "wo"], ["z"]),
        ]
    )
    source.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    file = OnnxFile.load(source)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    wanted = Runner(file, dtype=torch.float64).run({"x": x})
    for asked, sizes in (("int8", 1), ("fp16", 2)):  # dequantised, the two are different weights
        layers = find_layers(file, infer(file), asked)
        result = rewritten(file, layers, {}, asked)
        assert sum(".values." in t.name for t in result.graph.initializer) == sizes
        found = Runner(OnnxFile.load(result), dtype=torch.float64).run({"x": x})
        for name, value in wanted.items():
            assert float((found[name] - value).abs().max()) <= 0.002 * float(value.abs().max())


def test_half_precision_results_keep_their_type() -> None:
    source = single().proto
    for tensor in source.graph.initializer:
        if tensor.name.endswith("scale"):
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
            )
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    file = OnnxFile.load(source)
    layers = find_layers(file, infer(file), "int8")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half()
    found = Runner(OnnxFile.load(rewritten(file, layers, {}, "int8"))).run({"x": x})["y"]
    wanted = Runner(file).run({"x": x})["y"]
    assert found.dtype == wanted.dtype == torch.float16
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_products_spelled_as_one_operator_stay_dense() -> None:
    """QLinearMatMul: a quantised model, which is named as such, and no product of float operands."""
    tensors: dict[str, Array] = {
        "w": np.ascontiguousarray(two_of_four(4, 8).T),
        "s": np.asarray(0.1, np.float32),
        "z": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearMatMul", ["q", "s", "z", "w", "s", "z", "s", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    file = OnnxFile.load(built(nodes, tensors, ["n", 8], ["y"]))
    (layer,) = find_layers(file, infer(file), "int8")
    assert layer.coded
    assert "it is a QLinearMatMul" in layer.refusal


def test_products_of_integers_are_none_of_floats() -> None:
    file = OnnxFile.load(dynamic())
    (layer,) = find_layers(file, infer(file), "bf16")
    assert layer.refusal == "it is a product of integers, and bf16 was asked for"


def test_published_speeds_of_int8_decide() -> None:
    """Known points come back; GPUs without measurements get the slower of those that have some."""
    assert INT8_CURVES.keys() >= {"sm80", "sm86", "sm89", "sm90", "sm120"}
    file = single(w=np.zeros((512, 512)), shape=(512, 512))
    (layer,) = find_layers(file, infer(file), "int8")
    small = {arch: choose(layer, arch, "modelled", "int8") for arch in INT8_CURVES}
    assert [small[a].sparse for a in ("sm80", "sm90", "sm89")] == [True, False, False]
    assert "A100 PCIe, int8" in small["sm80"].why
    assert "none was measured here" in small["sm120"].why
    for curve in INT8_CURVES.values():
        for width, ratio in curve.ratios.items():
            assert curve.at(2.0 * width**3) == pytest.approx(ratio)
            assert ratio >= min(INT8_CURVES[a].ratios[width] for a in ("sm80", "sm90"))


# -- the operator -------------------------------------------------------------------------------------


def operands(x: torch.Tensor, **given: Any) -> tuple[Any, ...]:
    packed = pack(torch.from_numpy(two_of_four(24, x.shape[-1])))
    values, metadata = torch.from_numpy(packed.values), torch.from_numpy(packed.metadata)
    rest = {
        "scale": torch.rand(24),
        "bias": None,
        "residual": None,
        "activation": "none",
        "conv": [],
        **given,
    }
    made = Operands(x, values, metadata, out=24, k=x.shape[-1], dtype="int8", kernels="", **rest)
    return tuple(getattr(made, name) for name in Operands.__slots__)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_the_operator_takes_integers(dtype: torch.dtype) -> None:
    x = torch.randint(0, 128, (3, 5, 32)).to(dtype)
    given = operands(x, bias=torch.randn(24), residual=torch.randn(3, 5, 24), activation="relu")
    torch.library.opcheck(torch.ops.sparsecc.sparse_matmul.default, given)
    y = torch.ops.sparsecc.sparse_matmul(*given)
    assert y.dtype == torch.float32
    assert list(y.shape) == output_shape(x.shape, 24, [])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_sums_are_exact_where_float32_has_no_room(dtype: torch.dtype) -> None:
    """Sums beyond 2**24 are rounded once, as the hardware's conversion from int32 does."""
    info = torch.iinfo(dtype)
    x = torch.randint(info.min, info.max + 1, (7, 16384), generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    x[0] = info.max
    weight = two_of_four(24, 16384).astype(np.int64)
    exact = (x.numpy().astype(np.int64) - (128 if dtype == torch.uint8 else 0)) @ weight.T
    weight_sum = np.abs(weight).sum(1).max()
    assert weight_sum * 127 > 2**24
    y = torch.ops.sparsecc.sparse_matmul(*operands(x, scale=torch.ones(24)))
    np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


# -- artifacts ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, and a linear layer beside a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x)).mean((2, 3))
        return y + torch.relu(self.fc(y))


def batches(count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 8, 7, 7, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def compiled() -> tuple[onnx.ModelProto, sparsecc.Compiled]:
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    result = sparsecc.prune(Net().eval(), batches()[0], recipe="NMPattern(pattern='2:4')")
    model = sparsecc.quantize(result, calibration=batches(), activations="uint8").model
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2  # one kernel a layer is enough
    return model, sparsecc.compile(model, batches()[0], target="sm80-2:4-int8", options=ALWAYS)


def test_a_model_is_pruned_quantised_compiled_verified_and_loaded(
    compiled: tuple[onnx.ModelProto, sparsecc.Compiled], tmp_path: Path
) -> None:
    model, artifact = compiled
    assert artifact.certificate.status == "VERIFIED"
    entries = json.loads(artifact.artifact.read("layers.json"))
    assert [(entry["sparse"], entry["dtype"]) for entry in entries] == [(True, "int8")] * 2
    alone = [c for c in artifact.certificate.checks if c.what == "each product in integers"]
    assert alone
    assert all(c.bound < 1e-4 for c in alone)
    (x,) = batches()[3]
    artifact.save(tmp_path / "a.scc")
    again = sparsecc.load(tmp_path / "a.scc")
    assert torch.equal(again(x), artifact(x))
    wanted = Runner(OnnxFile.load(model), dtype=torch.float64).run({"x": x})
    (value,) = wanted.values()
    step = float(value.abs().max()) / 100
    assert float((again(x) - value).abs().max()) < step
    assert sparsecc.verify(model, again, batches()[0]).status == "VERIFIED"


@pytest.mark.parametrize("what", ["values", "scale", "bias"])
def test_the_least_change_of_an_artifact_fails_verification(
    compiled: tuple[onnx.ModelProto, sparsecc.Compiled], what: str
) -> None:
    """One weight off by one, one scale or one bias off by a hundredth: less than quantisers round."""
    model, artifact = compiled
    proto = onnx.ModelProto.FromString(artifact.artifact.read("model.onnx"))
    node = next(node for node in proto.graph.node if node.op_type == KIND)
    name = node.input[{"values": 1, "scale": 3, "bias": 4}[what]]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    if what == "values":
        flat = array.view(np.int8).reshape(-1)
        flat[np.flatnonzero(flat > 1)[0]] -= 1
    else:
        array.reshape(-1)[3] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    members = {**artifact.artifact.members, "model.onnx": proto.SerializeToString()}
    ready = artifact._ready()
    broken = sparsecc.Compiled(
        type(ready)(
            Artifact(artifact.artifact.manifest, members), ready.plan, ready.certificate, ready.report
        )
    )
    certificate = sparsecc.verify(model, broken, batches()[0])
    assert certificate.status == "FAILED"
    assert {c.what for c in certificate.checks if not c.passed} == {"each product in integers"}


@pytest.mark.skipif(COMPILER is None, reason="the simulator needs a C++ compiler")
def test_the_artifacts_kernels_give_the_operators_bits(
    compiled: tuple[onnx.ModelProto, sparsecc.Compiled],
) -> None:
    """On what every layer really reads: simulated instructions against the operator on the CPU."""
    artifact = compiled[1].artifact
    kernels = kernels_of(artifact)
    seen: list[str] = []

    def compare(node: onnx.NodeProto, index: int, given: list[Any], default: Any) -> tuple[Any, ...]:
        outputs: tuple[torch.Tensor, ...] = default(given)
        if node.op_type == KIND:
            names = next(list(a.strings) for a in node.attribute if a.name == "kernels")
            found = simulated(kernels[names[0].decode()], given, outputs[0].shape)
            assert torch.equal(found, outputs[0])
            seen.append(names[0].decode())
        return outputs

    file = OnnxFile.load(onnx.ModelProto.FromString(artifact.read("model.onnx")))
    (x,) = batches()[0]
    Runner(file).run({"x": x}, hook=compare)
    assert [("conv" in name or "_k3x3" in name) for name in seen] == [True, False]


def simulated(kernel: Any, given: list[Any], shape: torch.Size) -> torch.Tensor:
    """The output of a kernel's own source, as stored, for the inputs of its node."""
    x, values, metadata, scale, bias, residual = (*given, None, None)[:6]
    x = (x.to(torch.int16) - (128 if x.dtype == torch.uint8 else 0)).to(torch.int8)
    out = aligned(np.full(shape.numel(), np.nan, np.float32))
    tensors = {
        "weight": values,
        "metadata": metadata,
        "x": x,
        "scale": scale,
        "bias": bias,
        "residual": residual,
    }
    arrays = {name: aligned(t.contiguous().numpy()) for name, t in tensors.items() if t is not None}
    if kernel.problem.conv is None:
        launch = kernel.launch(tokens=x.numel() // x.shape[-1])
    else:
        launch = kernel.launch(batch=x.shape[0], height=x.shape[2], width=x.shape[3])
    simulator = Simulator(kernel.source, kernel.entry, kernel.parameters, [*tensors, "d"])
    report = simulator.run(
        {**arrays, "d": out}, launch.scalars, launch.grid, launch.block, launch.shared_bytes
    )
    assert not report.errors, report.messages
    assert report.counts["mma.sp"] > 0
    return torch.from_numpy(out).view(shape)


def test_dynamically_quantised_models_compile() -> None:
    pytest.importorskip("tvm")
    proto = dynamic()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    made = sparsecc.compile(proto, target="sm86-2:4-int8", options=ALWAYS)
    assert made.certificate.status == "VERIFIED"
    (entry,) = json.loads(made.artifact.read("layers.json"))
    assert entry["sparse"]
    assert {"q", "z", "scale"} <= set(entry["reads"])
    assert any(c.what == "each product in integers" for c in made.certificate.checks)


def test_float_models_are_refused_with_the_way_out() -> None:
    """Also those whose weights alone are integers."""
    pytest.importorskip("tvm")
    floats = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = built(floats, {"w": two_of_four(4, 8).T.astype(np.float32)}, [2, 8], ["y"])
    weights = single().proto
    weights.graph.node[-1].input[0] = "x"
    for model in (proto, weights):
        with pytest.raises(TargetRefused, match=r"sm80-2:4-int8.*\n.*sparsecc\.quantize\(model, calibration"):
            sparsecc.compile(model, target="sm80-2:4-int8")

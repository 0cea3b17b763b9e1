"""Quantised graphs: random ones, and single products in every spelling."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparsecc.onnxfile.model import OnnxFile

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
        tensors |= {"n": np.array(0.05, np.float32), "n.zero": np.array(-9, np.int8)}
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

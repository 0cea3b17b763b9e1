"""Graphs of products in many spellings, and what they compute by the standard's own interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.tensorrt.gate import runtime

Array = np.ndarray[Any, Any]

needs_rtx = pytest.mark.skipif(
    runtime() is None, reason="TensorRT-RTX is not installed: pip install 'sparsecc[tensorrt-rtx]'"
)


def probed(proto: onnx.ModelProto, node: onnx.NodeProto) -> Array | None:
    """The matrix [terms, outputs] that a product multiplies activations by, found by giving it unit vectors.

    Terms come in the order of the activations' axis; for convolutions [positions, channels, outputs].  None
    where no operand, or every one, follows from constants.
    """
    graph = proto.graph
    makers = {name: n for n in graph.node for name in n.output}
    stored = {t.name for t in graph.initializer}

    def ancestors(name: str) -> list[onnx.NodeProto] | None:
        if name in stored:
            return []
        if name not in makers:
            return None
        below = [ancestors(n) for n in makers[name].input if n]
        found = [n for part in below if part is not None for n in part]
        return None if None in below else [*found, makers[name]]

    fixed = [ancestors(name) if name else None for name in node.input[:2]]
    if (fixed[0] is None) == (fixed[1] is None):
        return None
    place = 1 if fixed[1] is not None else 0
    constant = fixed[place]
    assert constant is not None
    single = onnx.NodeProto()
    single.CopyFrom(node)
    del single.input[2:]
    single.input[1 - place] = "activation"
    nodes = list({n.output[0]: n for n in constant}.values())
    model = helper.make_model(
        helper.make_graph(
            [*nodes, single],
            "probe",
            [helper.make_tensor_value_info("activation", TensorProto.FLOAT, None)],
            [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
            [t for t in graph.initializer if t.name in {i for n in (*nodes, single) for i in n.input}],
        ),
        opset_imports=list(proto.opset_import),
    )
    run = ReferenceEvaluator(model)
    operand = ReferenceEvaluator(_giving(model, node.input[place], nodes)).run(None, {})[0]
    kind = operand.dtype
    if node.op_type == "Conv":
        return _probed_conv(run, operand.shape, kind)
    flags = {a.name: a.i for a in node.attribute}
    flipped = flags.get(("transA", "transB")[place], 0)
    terms = operand.shape[(1 - place) ^ flipped] if operand.ndim == 2 else operand.shape[-1 - place]
    found = np.asarray(run.run(None, {"activation": np.eye(terms, dtype=kind)})[0], np.float64)
    return found if place == 1 else found.T


def _giving(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.node[:], found.graph.output[:], found.graph.input[:]
    found.graph.node.extend(nodes)
    if not nodes:
        found.graph.node.append(helper.make_node("Identity", [name], ["probe_out"]))
    out = name if nodes else "probe_out"
    found.graph.output.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, None))
    return found


def _probed_conv(run: ReferenceEvaluator, shape: tuple[int, ...], kind: Any) -> Array:
    outputs, channels, *kernel = shape
    found = np.zeros((int(np.prod(kernel)), channels, outputs))
    for position in range(found.shape[0]):
        for channel in range(channels):
            x = np.zeros((1, channels, *kernel), kind)
            x[(0, channel, *np.unravel_index(position, kernel))] = 1
            y = np.asarray(run.run(None, {"activation": x})[0], np.float64)
            centre = tuple(n // 2 for n in y.shape[2:])
            found[position, channel] = y[(0, slice(None), *centre)]
    return found


def two_of_four(matrix: Array) -> bool:
    """Whether of four consecutive terms at most two count, for every output (and position)."""
    for rows in matrix if matrix.ndim == 3 else [matrix]:
        if len(rows) % 4:
            return False
        for start in range(0, len(rows), 4):
            for column in range(rows.shape[1]):
                if sum(value != 0 for value in rows[start : start + 4, column]) > 2:
                    return False
    return True


class Builder:
    """An ONNX graph in the making.  ``sparse`` are outputs of products whose weights are 2:4."""

    def __init__(self, seed: int, spatial: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.spatial = spatial
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.sparse: dict[str, bool] = {}

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"n_{out}", **attributes))
        return out

    def store(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def ints(self, *values: int) -> str:
        return self.store(np.array(values, np.int64))

    def matrix(self, terms: int, out: int, sparse: bool) -> Array:
        """w[terms, out], exact in 8 bits; zeros of both signs."""
        found = self.random.integers(-60, 60, (terms, out)) | 1
        for start in range(0, terms, 4):
            for column in range(out):
                zeros = 2 if sparse else self.random.integers(1, 3)
                gone = self.random.permutation(4)[:zeros] + start
                found[gone[gone < terms], column] = 0
        if not sparse and terms >= 4:  # three of the first four, and no more
            found[:4, 0] = (0, 1, 3, 5)
        signs = self.random.choice([-1.0, 1.0], found.shape)
        return (found * signs / 64).astype(np.float32)

    def model(self, outputs: list[str], opset: int = 20) -> onnx.ModelProto:
        dims: list[Any] = ["n", 8, 5, 4] if self.spatial else ["n", 6, 8]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _plain(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.store(w)])


def _transposed(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.add("Transpose", [b.store(w.T)], perm=[1, 0])])


def _reversed(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.add("Identity", [b.add("Transpose", [b.store(w.T)])])])


def _first(b: Builder, x: str, w: Array) -> str:
    flipped = b.add("Transpose", [x], perm=[0, 2, 1])
    return b.add("Transpose", [b.add("MatMul", [b.store(w.T), flipped])], perm=[0, 2, 1])


def _first_of_four(b: Builder, x: str, w: Array) -> str:
    axis = b.ints(1)
    flipped = b.add("Unsqueeze", [b.add("Transpose", [x], perm=[0, 2, 1]), axis])
    found = b.add("Squeeze", [b.add("MatMul", [b.store(w.T), flipped]), axis])
    return b.add("Transpose", [found], perm=[0, 2, 1])


def _einsum(b: Builder, x: str, w: Array) -> str:
    return b.add("Einsum", [x, b.store(w.T)], equation="bik,nk->bin")


def _einsum_first(b: Builder, x: str, w: Array) -> str:
    return b.add("Einsum", [b.store(w), x], equation="kn,bik->bin")


def _batched(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.store(w[None])])


def _half(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.add("Cast", [b.store(w.astype(np.float16))], to=TensorProto.FLOAT)])


def _flat(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.add("Reshape", [b.store(w.reshape(-1)), b.ints(*w.shape)])])


def _rows(b: Builder, x: str, product: Callable[[str], str], terms: int, out: int) -> str:
    flat = product(b.add("Reshape", [x, b.ints(-1, terms)]))
    return b.add("Reshape", [flat, b.ints(-1, 6, out)])


def _gemm(b: Builder, x: str, w: Array) -> str:
    bias = b.store(b.matrix(1, w.shape[1], False)[0])
    return _rows(b, x, lambda v: b.add("Gemm", [v, b.store(w.T), bias], transB=1, alpha=0.5), *w.shape)


def _gemm_folded(b: Builder, x: str, w: Array) -> str:
    flipped = b.add("Transpose", [b.store(w)])
    return _rows(b, x, lambda v: b.add("Gemm", [v, flipped], transB=1), *w.shape)


def _gemm_first(b: Builder, x: str, w: Array) -> str:
    def product(v: str) -> str:
        return b.add("Transpose", [b.add("Gemm", [b.store(w), v], transA=1, transB=1)])

    return _rows(b, x, product, *w.shape)


def _rows_first(b: Builder, x: str, w: Array) -> str:
    def product(v: str) -> str:
        return b.add("Transpose", [b.add("MatMul", [b.store(w.T), b.add("Transpose", [v])])])

    return _rows(b, x, product, *w.shape)


def _constant(b: Builder, x: str, w: Array) -> str:
    return b.add("MatMul", [x, b.add("Constant", [], value=numpy_helper.from_array(w))])


def _quantised(b: Builder, x: str, w: Array) -> str:
    """int8 weights, one scale an output, dequantised and then transposed, as exporters write it"""
    scale, zero = b.store(np.full(w.shape[1], 1 / 64, np.float32)), b.store(np.zeros(w.shape[1], np.int8))
    stored = b.store(np.round(w.T * 64).astype(np.int8))
    wide = b.add("DequantizeLinear", [stored, scale, zero], axis=0)
    return b.add("MatMul", [x, b.add("Transpose", [wide], perm=[1, 0])])


def _conv(b: Builder, x: str, kernel: Array) -> str:
    bias = b.store(b.matrix(1, len(kernel), False)[0])
    return b.add("Conv", [x, b.store(kernel), bias], pads=[1, 1, 1, 1])


def _conv_folded(b: Builder, x: str, kernel: Array) -> str:
    moved = b.add("Transpose", [b.store(kernel.transpose(2, 3, 1, 0))], perm=[3, 2, 0, 1])
    return b.add("Conv", [x, moved], pads=[1, 1, 1, 1])


def _conv_quantised(b: Builder, x: str, kernel: Array) -> str:
    scale = b.store(np.full(len(kernel), 1 / 64, np.float32))
    zero = b.store(np.zeros(len(kernel), np.int8))
    stored = b.store(np.round(kernel * 64).astype(np.int8))
    return b.add("Conv", [x, b.add("DequantizeLinear", [stored, scale, zero], axis=0)], pads=[1, 1, 1, 1])


Spelling = Callable[[Builder, str, Array], str]
MATRICES: dict[str, Spelling] = {
    name.lstrip("_"): function
    for name, function in list(globals().items())
    if function in (
        _plain, _transposed, _reversed, _first, _first_of_four, _einsum, _einsum_first, _batched, _half,
        _flat, _gemm, _gemm_folded, _gemm_first, _rows_first, _constant, _quantised,
    )
}  # fmt: skip
KERNELS: dict[str, Spelling] = {"plain": _conv, "folded": _conv_folded, "quantised": _conv_quantised}
QUANTISED = ("quantised",)


def product(b: Builder, x: str, terms: int, out: int, spelling: str, sparse: bool) -> str:
    """One more product in some spelling; its own node's output is noted in ``b.sparse``."""
    start = len(b.nodes)
    if b.spatial:
        positions = [b.matrix(terms, out, sparse) for _ in range(9)]
        kernel = np.stack(positions).reshape(3, 3, terms, out).transpose(3, 2, 0, 1)
        found = KERNELS[spelling](b, x, np.ascontiguousarray(kernel))
    else:
        found = MATRICES[spelling](b, x, b.matrix(terms, out, sparse))
    kinds = ("MatMul", "Gemm", "Conv", "Einsum")
    (own,) = (node.output[0] for node in b.nodes[start:] if node.op_type in kinds)
    b.sparse[own] = sparse and terms % 4 == 0
    return found


@st.composite
def graphs(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, bool]]:
    b = Builder(draw(st.integers(0, 99)), draw(st.booleans()))
    last, width = "x", 8
    values = []
    for _ in range(draw(st.integers(1, 4))):
        out = draw(st.sampled_from([6, 8, 12]))
        spelling = draw(st.sampled_from(sorted(KERNELS if b.spatial else MATRICES)))
        last = product(b, last, width, out, spelling, draw(st.booleans()))
        width = out
        values.append(last)
        if draw(st.booleans()):
            last = b.add("Relu", [last])
    taps = draw(st.lists(st.sampled_from(values), max_size=2, unique=True))
    return b.model(list(dict.fromkeys([last, *taps]))), b.sparse


def example(proto: onnx.ModelProto) -> torch.Tensor:
    shape = [3, *(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:])]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def exact(proto: onnx.ModelProto, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return Runner(OnnxFile.load(proto), dtype=torch.float64).run({"x": x})


def on_ort(proto: onnx.ModelProto, x: torch.Tensor) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = [value.name for value in proto.graph.output]
    return dict(zip(names, session.run(names, {"x": x.numpy()}), strict=True))


def assert_near(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        reference = np.asarray(value, np.float64)
        error = np.abs(np.asarray(found[name], np.float64) - reference).max()
        assert error <= tolerance * max(1.0, float(np.abs(reference).max())), name


def one(spelling: str, spatial: bool = False, sparse: bool = True, terms: int = 8) -> onnx.ModelProto:
    b = Builder(1, spatial)
    return b.model([product(b, "x", terms, 12, spelling, sparse)])


def quantised_model() -> onnx.ModelProto:
    """A product in 8 bits: Q/DQ around the activations, int8 weights with one scale an output."""
    b = Builder(3, False)
    scale, zero = b.store(np.float32(1 / 16)), b.store(np.int8(0))
    x = b.add("DequantizeLinear", [b.add("QuantizeLinear", ["x", scale, zero]), scale, zero])
    return b.model([product(b, x, 8, 12, "quantised", True)])


def edited(proto: onnx.ModelProto, name: str, change: Callable[[Array], Array]) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    return proto

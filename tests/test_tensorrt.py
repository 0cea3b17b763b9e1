"""TensorRT: the surgery, the sparsity-axis checker, profiles, the build script, the target, acceptance."""

from __future__ import annotations

import ast
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel, InvalidOption, TargetRefused, TargetUnavailable
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.reference.onnx_run import Runner

gs = pytest.importorskip("onnx_graphsurgeon")

from sparsecc.targets.tensorrt import build_engine, prepare, prepare_file, sparsity  # noqa: E402
from sparsecc.targets.tensorrt.gate import accepted, runtime  # noqa: E402
from sparsecc.targets.tensorrt.packing import script, trtexec  # noqa: E402
from sparsecc.targets.tensorrt.profiles import profiles  # noqa: E402

Array = np.ndarray[Any, Any]

needs_rtx = pytest.mark.skipif(
    runtime() is None, reason="TensorRT-RTX is not installed: pip install 'sparsecc[tensorrt-rtx]'"
)

# -- an oracle that trusts nothing --------------------------------------------------------------------


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


# -- random graphs ------------------------------------------------------------------------------------


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


# -- the surgery --------------------------------------------------------------------------------------


@given(graphs(), st.sampled_from(["matmul", "conv"]))
def test_the_surgery_changes_no_value_and_the_rule_then_holds(
    case: tuple[onnx.ModelProto, dict[str, bool]], linear: str
) -> None:
    proto, sparse = case
    before = proto.SerializeToString(deterministic=True)
    done = prepare_file(OnnxFile.load(proto), linear=linear)
    result = done.file.proto
    assert proto.SerializeToString(deterministic=True) == before
    x = example(proto)
    assert_near(exact(result, x), exact(proto, x), 1e-13)
    assert_near(on_ort(result, x), on_ort(proto, x), 1e-5)
    rows = sparsity(result)
    assert {done.origin.get(row.output, row.output): row.holds for row in rows} == sparse
    makers = {node.output[0]: node for node in result.graph.node}
    for row in rows:
        matrix = probed(result, makers[row.output])
        assert matrix is not None
        assert two_of_four(matrix) == row.holds, row
        assert bool(row.why) != row.holds
        terms = matrix.shape[-2]
        assert row.axis is not None
        assert row.shape[row.axis] == terms
    event(f"products {len(rows)}, notes {bool(done.notes)}")


@given(graphs(), st.sampled_from(["matmul", "conv"]))
def test_weights_are_rounded_once_and_nothing_else_is(
    case: tuple[onnx.ModelProto, dict[str, bool]], linear: str
) -> None:
    """In float64, where casts do nothing, the result is the original with rounded weights and biases."""
    proto, sparse = case
    done = prepare_file(OnnxFile.load(proto), "fp16", linear=linear)
    quantised = {row.output for row in sparsity(proto) if row.dtype == "int8"}
    assert done.rounds == dict.fromkeys(sparse.keys() - quantised, "fp16")
    x = example(proto)
    assert_near(exact(done.file.proto, x), exact(proto, x), 1e-13)  # all weights are exact in fp16
    assert_near(on_ort(done.file.proto, x), on_ort(proto, x), 0.02)
    for value in done.file.proto.graph.output:
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    held = {done.origin.get(row.output, row.output): row.holds for row in sparsity(done.file)}
    assert held == sparse


@given(graphs())
def test_what_was_not_edited_keeps_its_bytes(case: tuple[onnx.ModelProto, dict[str, bool]]) -> None:
    proto, _ = case
    result = prepare(proto)
    nodes = {node.output[0]: node.SerializeToString() for node in result.graph.node}
    folded = {"Transpose", "Identity", "Cast", "Reshape", "DequantizeLinear", "Constant"}
    for node in proto.graph.node:
        if node.op_type not in (*folded, "MatMul", "Gemm", "Einsum", "Conv"):
            assert nodes[node.output[0]] == node.SerializeToString()
    tensors = {t.name: t.SerializeToString() for t in proto.graph.initializer}
    for tensor in result.graph.initializer:
        assert tensors.get(tensor.name, b"") in (b"", tensor.SerializeToString())
    assert list(result.graph.input) == list(proto.graph.input)
    assert list(result.graph.output) == list(proto.graph.output)
    again = prepare(result)
    assert again.SerializeToString(deterministic=True) == result.SerializeToString(deterministic=True)


def one(spelling: str, spatial: bool = False, sparse: bool = True, terms: int = 8) -> onnx.ModelProto:
    b = Builder(1, spatial)
    return b.model([product(b, "x", terms, 12, spelling, sparse)])


@pytest.mark.parametrize(
    ("spelling", "ops"),
    [
        ("plain", ["MatMul"]),
        ("transposed", ["MatMul"]),
        ("first", ["Transpose", "Conv", "Transpose"]),
        ("rows_first", ["Reshape", "Transpose", "Gemm", "Transpose", "Transpose", "Reshape"]),
        ("einsum", ["MatMul"]),
        ("batched", ["MatMul"]),
        ("quantised", ["DequantizeLinear", "MatMul"]),
    ],
)
def test_spellings(spelling: str, ops: list[str]) -> None:
    assert [node.op_type for node in prepare(one(spelling)).graph.node] == ops


@pytest.mark.parametrize("equation", ["bik,nk->bni", "bki,nk->bni", "bik,nk->bk", "...k,nk->...n", "bik,nk"])
def test_other_einsums_stay(equation: str) -> None:
    from sparsecc.targets.tensorrt.spelling import _matrix_product

    assert _matrix_product(equation, 1) is None


def test_scales_stay_with_the_outputs() -> None:
    result = prepare(one("quantised"))
    dequantize = result.graph.node[0]
    assert [a.i for a in dequantize.attribute if a.name == "axis"] == [1]
    weight = next(t for t in result.graph.initializer if t.name == dequantize.input[0])
    assert list(weight.dims) == [8, 12]
    assert weight.data_type == TensorProto.INT8


def test_casts_between_products_are_left_out_and_shared() -> None:
    b = Builder(0, False)
    h = product(b, "x", 8, 8, "plain", True)
    left, right = (product(b, h, 8, 8, "plain", True) for _ in range(2))
    proto = b.model([b.add("Add", [left, right])])
    ops = [node.op_type for node in prepare(proto, "fp16").graph.node]
    assert ops == ["Cast", "MatMul", "MatMul", "Cast", "MatMul", "Cast", "Add"]


def test_casts_move_past_what_only_moves_elements() -> None:
    b = Builder(0, True)
    h = product(b, "x", 8, 8, "plain", True)
    h = b.add("Clip", [b.add("MaxPool", [h], kernel_shape=[1, 1]), "", b.store(np.float32(6))])
    odd = b.add("Clip", [product(b, h, 8, 8, "plain", True), "", b.store(np.float32(0.1))])
    last = b.add("Relu", [product(b, odd, 8, 8, "plain", True)])
    proto = b.model([last])
    done = prepare(proto, "fp16")
    ops = " ".join(node.op_type for node in done.graph.node)
    assert ops == "Cast Conv MaxPool Clip Conv Cast Clip Cast Conv Cast Relu"
    x = example(proto)
    assert_near(exact(done, x), exact(proto, x), 1e-13)
    assert_near(on_ort(done, x), on_ort(proto, x), 0.02)


def test_auto_takes_products_that_have_the_pattern_and_float32_weights() -> None:
    b = Builder(0, False)
    h = product(b, "x", 8, 8, "plain", True)
    proto = b.model([product(b, h, 8, 8, "plain", False)])
    done = prepare_file(OnnxFile.load(proto), "auto")
    assert list(done.rounds) == [h]
    half = prepare(proto, "fp16")
    assert not prepare_file(OnnxFile.load(half), "auto").rounds


def test_weights_that_a_type_cannot_hold_keep_theirs() -> None:
    proto = one("plain")
    big = numpy_helper.to_array(proto.graph.initializer[0]) * np.float32(1e6)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(big, "w0"))
    done = prepare_file(OnnxFile.load(proto), "fp16")
    assert not done.rounds
    assert "fp16 cannot hold its weights" in done.notes["v0"][-1]
    assert prepare_file(OnnxFile.load(proto), "bf16").rounds == {"v0": "bf16"}


def test_products_of_integers_and_of_other_domains_are_left_alone() -> None:
    b = Builder(0, False)
    whole = b.add("Cast", ["x"], to=TensorProto.INT32)
    flipped = b.add("Transpose", [whole], perm=[0, 2, 1])
    y = b.add("MatMul", [b.store(np.ones((4, 8), np.int32)), flipped])
    proto = b.model([b.add("Cast", [y], to=TensorProto.FLOAT)])
    assert prepare(proto, "fp16") is proto
    other = one("transposed")
    for node in other.graph.node:
        node.domain = "somewhere"
    other.opset_import.append(helper.make_opsetid("somewhere", 1))
    assert prepare(other, "fp16") is other


def test_models_in_bfloat16_get_no_convolutions_that_onnx_lacks() -> None:
    import ml_dtypes

    b = Builder(0, False)
    half = b.add("Cast", ["x"], to=TensorProto.BFLOAT16)
    flipped = b.add("Transpose", [half], perm=[0, 2, 1])
    y = b.add("MatMul", [b.store(b.matrix(8, 4, True).T.astype(ml_dtypes.bfloat16)), flipped])
    proto = b.model([b.add("Cast", [y], to=TensorProto.FLOAT)])
    x = example(proto)
    for linear in ("matmul", "conv"):
        result = prepare(proto, linear=linear)
        assert "Conv" not in [node.op_type for node in result.graph.node]
        assert [row.holds for row in sparsity(result)] == [True]
        assert_near(exact(result, x), exact(proto, x), 1e-13)


@pytest.mark.parametrize("spelling", ["transposed", "first", "quantised"])
def test_old_opsets(spelling: str) -> None:
    b = Builder(1, False)
    last = product(b, "x", 8, 12, spelling, True)
    if spelling == "quantised":
        for node in b.nodes:
            if node.op_type == "DequantizeLinear":
                del node.attribute[:]
        b.weights["w0"], b.weights["w1"] = np.array(1 / 64, np.float32), np.array(0, np.int8)
    proto = b.model([last], 12)
    x = example(proto)
    for linear in ("matmul", "conv"):
        result = prepare(proto, linear=linear)
        assert_near(on_ort(result, x), on_ort(proto, x), 1e-6)


@pytest.mark.parametrize("opset", [20, 21, 22])
def test_bfloat16_convolutions_raise_the_opset(opset: int) -> None:
    b = Builder(1, True)
    last = product(b, "x", 8, 12, "plain", True)
    file = OnnxFile.load(b.model([last], opset))
    done = prepare_file(file, "bf16")
    assert (file.opset, done.file.opset) == (opset, 22)
    assert done.rounds == {last: "bf16"}
    assert {row.dtype for row in sparsity(done.file)} == {"bfloat16"}
    assert_near(exact(done.file.proto, x := example(file.proto)), exact(file.proto, x), 1e-13)


@pytest.mark.parametrize(("linear", "kind"), [("matmul", "MatMul"), ("conv", "Conv")])
def test_every_product_is_in_bfloat16_where_that_is_asked_for(linear: str, kind: str) -> None:
    done = prepare_file(OnnxFile.load(one("first")), "bf16", linear=linear)
    assert [(row.op, row.dtype) for row in sparsity(done.file)] == [(kind, "bfloat16")]


def test_an_opset_that_would_mean_another_model_is_not_raised() -> None:
    b = Builder(1, True)
    last = product(b, "x", 8, 12, "plain", True)
    pooled = b.add("MaxPool", [last], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    for proto in (b.model([pooled], 20), b.model([last], 18)):
        done = prepare_file(OnnxFile.load(proto), "bf16")
        assert not done.rounds
        assert "from opset 22 on" in done.notes[last][-1]


def test_negative_zeros_of_sparse_weights_become_positive_ones() -> None:
    def zeros(proto: onnx.ModelProto) -> Array:
        found = numpy_helper.to_array(proto.graph.initializer[0])
        return np.asarray(np.signbit(found[found == 0]))

    assert zeros(one("plain")).any()
    assert not zeros(prepare(one("plain"))).any()
    dense = edited(one("plain"), "w0", lambda w: np.where(np.arange(8)[:, None] < 3, w + 2, w))
    assert zeros(dense).any()
    assert prepare(dense) is dense, "what has no pattern is not touched"


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_one_weight_in_several_spellings(dtype: str | None) -> None:
    b = Builder(5, False)
    w = b.store(b.matrix(8, 8, False))
    h = b.add("MatMul", ["x", b.add("Transpose", [w], perm=[1, 0])])
    h = b.add("MatMul", [h, b.add("Identity", [w])])
    h = b.add("MatMul", [h, b.add("Reshape", [w, b.ints(8, 8)])])
    h = b.add("MatMul", [h, w])
    h = b.add("Einsum", [h, w], equation="bik,nk->bin")
    proto = b.model([b.add("MatMul", [w, b.add("Transpose", [h], perm=[0, 2, 1])])])
    x = example(proto)
    result = prepare(proto, dtype)
    assert_near(exact(result, x), exact(proto, x), 1e-13)
    straight = [t for t in result.graph.initializer if len(t.dims) == 2]
    assert len(straight) <= 4


def test_graphsurgeon_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    proto = one("transposed")
    for node in proto.graph.node:
        node.name = "same"
    prepare(proto, "bf16")
    assert capfd.readouterr().out == ""


def test_initializers_that_are_inputs_as_well() -> None:
    proto = one("transposed")
    weight = proto.graph.initializer[0]
    proto.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, list(weight.dims)))
    x = example(proto)
    for dtype in (None, "fp16"):
        result = prepare(proto, dtype)
        assert [value.name for value in result.graph.input] == ["x", "w0"]
        assert_near(on_ort(result, x), on_ort(proto, x), 0.02 if dtype else 1e-6)


def test_values_that_bodies_of_control_flow_read_stay() -> None:
    b = Builder(0, False)
    flipped = b.add("Transpose", [b.store(b.matrix(12, 8, False))], perm=[1, 0])
    y = b.add("MatMul", ["x", flipped])
    body = helper.make_graph(
        [helper.make_node("ReduceSum", [flipped], ["r"], keepdims=0)],
        "body",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    condition = b.store(np.array(True))
    b.nodes.append(helper.make_node("If", [condition], ["s"], then_branch=body, else_branch=body))
    proto = b.model([b.add("Add", [y, "s"])])
    x = example(proto)
    for dtype in (None, "fp16"):
        result = prepare(proto, dtype)
        assert_near(on_ort(result, x), on_ort(proto, x), 0.02 if dtype else 1e-5)


def test_models_come_back_in_the_form_that_they_were_given(tmp_path: Path) -> None:
    import onnx_ir

    proto = one("transposed")
    onnx.save(proto, tmp_path / "m.onnx")
    x = example(proto)
    forms: list[tuple[Any, type]] = [
        (proto, onnx.ModelProto),
        (proto.SerializeToString(), bytes),
        (str(tmp_path / "m.onnx"), onnx.ModelProto),
        (onnx_ir.from_proto(proto), onnx_ir.Model),
        (gs.import_onnx(proto), gs.Graph),
    ]
    for given_, kind in forms:
        result = prepare(given_)
        assert isinstance(result, kind)
        file = OnnxFile.load(result)
        assert [node.op_type for node in file.proto.graph.node] == ["MatMul"]
        assert_near(Runner(file, dtype=torch.float64).run({"x": x}), exact(proto, x), 1e-13)
    graph = gs.import_onnx(proto)
    prepare(graph)
    assert [node.op for node in graph.nodes] == ["Transpose", "MatMul"], "the graph given is not changed"


def test_weights_in_external_data(tmp_path: Path) -> None:
    proto = one("transposed")
    onnx.save(
        one("transposed"),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    file = OnnxFile.load(tmp_path / "m.onnx")
    done = prepare_file(file, "fp16")
    x = example(proto)
    assert_near(Runner(done.file, dtype=torch.float64).run({"x": x}), exact(proto, x), 1e-13)


@pytest.mark.parametrize("wrong", [{"dtype": "fp8"}, {"linear": "gemm"}])
def test_options_of_prepare_are_checked(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidOption, match=r"must be .*; got"):
        prepare(one("plain"), **wrong)


# -- the checker --------------------------------------------------------------------------------------


def verdict(proto: onnx.ModelProto) -> Any:
    (row,) = sparsity(proto)
    return row


def test_the_checker_looks_through_what_keeps_elements() -> None:
    row = verdict(one("transposed"))
    assert (row.weight, row.axis, row.holds) == ("w0", 1, True)
    row = verdict(one("reversed"))
    assert (row.weight, row.axis, row.holds) == ("w0", 1, True)
    row = verdict(one("quantised"))
    assert (row.dtype, row.axis, row.holds) == ("int8", 1, True)
    row = verdict(one("folded", spatial=True))
    assert (row.shape, row.axis, row.holds) == ((3, 3, 8, 12), 2, True)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ("batched", "3 axes, and sparse products take matrices"),
        ("flat", "computed by Reshape: fold constants first"),
    ],
)
def test_the_checker_says_why_a_spelling_is_none(spelling: str, reason: str) -> None:
    row = verdict(one(spelling))
    assert not row.holds
    assert reason in row.why
    assert verdict(prepare(one(spelling))).holds


def edited(proto: onnx.ModelProto, name: str, change: Callable[[Array], Array]) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    return proto


def _one_more(w: Array) -> Array:
    found = w.copy()
    found[:4, 0] = (1, 0, 1, 1)
    return found


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (one("plain", sparse=False), "of 24 groups along axis 0 hold more than two"),
        (edited(one("plain"), "w0", _one_more), "1 of 24 groups along axis 0"),
        (edited(one("plain"), "w0", lambda w: w[:6]), "6 positions, which are no multiple of 4"),
        (edited(one("plain"), "w0", lambda w: w.astype(np.float64)), "stored as float64"),
        (edited(one("quantised"), "w1", lambda z: z + np.int8(3)), "zero point of its weight is not 0"),
        (edited(one("quantised"), "w0", lambda s: s[:8]), ""),
    ],
)
def test_the_checker_says_why_not(proto: onnx.ModelProto, reason: str) -> None:
    row = verdict(proto)
    assert reason in row.why
    assert row.holds == (not reason)


def test_scales_along_the_sum_are_told() -> None:
    proto = one("quantised")
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            node.attribute[0].i = 1
    edited(proto, "w0", lambda s: s[:8])
    edited(proto, "w1", lambda z: z[:8])
    assert "vary along the axis that it sums over" in verdict(proto).why


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@given(graphs())
def test_the_checker_agrees_with_polygraphy(case: tuple[onnx.ModelProto, dict[str, bool]]) -> None:
    """On what Polygraphy looks at: floats in initializers."""
    sparse = pytest.importorskip("polygraphy.tools.sparse")
    pytest.importorskip("polygraphy.logger").G_LOGGER.module_severity = 50
    proto, _ = case
    prepared = prepare(proto)
    pruner = sparse.SparsityPruner(prepared)
    pruner.check()
    stored = {tensor.name for tensor in prepared.graph.initializer if tensor.data_type != TensorProto.INT8}
    floats = [row for row in sparsity(prepared) if row.weight in stored]
    assert {row.weight for row in floats if row.holds} == pruner.sparse_tensors
    for row in floats:
        assert pruner.prune_infos[row.weight].axis == row.axis


# -- profiles and scripts -----------------------------------------------------------------------------


def test_profiles_cover_dynamic_sizes_and_take_wishes() -> None:
    file = OnnxFile.load(one("plain"))
    assert profiles(file).ranges == {"x": ((1, 6, 8), (8, 6, 8), (32, 6, 8))}
    assert profiles(file, "n=2:3:4").ranges == {"x": ((2, 6, 8), (3, 6, 8), (4, 6, 8))}
    assert profiles(file, "n=5").ranges == {"x": ((5, 6, 8),) * 3}
    for wrong in ("m=1:2:3", "n=3:2:1", "n=a", "n=1:2"):
        with pytest.raises(InvalidOption, match="profile: "):
            profiles(file, wrong)
    line = trtexec(profiles(file))
    assert "--sparsity=enable" in line
    assert "--minShapes=x:1x6x8 --optShapes=x:8x6x8 --maxShapes=x:32x6x8" in line


def test_sizes_that_do_not_fit_are_not_proposed() -> None:
    """A table of 100 positions bounds the length; a model of fixed sizes has no profile."""
    table = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["s"], start=1, end=2),
            helper.make_node("Slice", ["w", "zero", "s"], ["p"]),
            helper.make_node("Add", ["x", "p"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones((100, 4), np.float32), "w"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
        ],
    )
    proto = helper.make_model(table, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    low, usual, high = profiles(OnnxFile.load(proto)).ranges["x"]
    assert low[1] <= usual[1] <= high[1] <= 100
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 9, 4]))
    assert profiles(OnnxFile.load(proto)).ranges == {}
    assert "Shapes" not in trtexec(profiles(OnnxFile.load(proto)))


def test_the_script_stands_alone(tmp_path: Path) -> None:
    text = script(profiles(OnnxFile.load(one("plain"))))
    imports = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imports <= set(sys.stdlib_module_names)
    (tmp_path / "build_engine.py").write_text(text)
    where = {"cwd": tmp_path, "capture_output": True, "text": True}
    shown = subprocess.run([sys.executable, "-I", "build_engine.py", "--help"], **where)  # type: ignore[call-overload]
    assert shown.returncode == 0
    assert "names: n" in shown.stdout
    assert "Layers eligible for sparse math" in shown.stdout
    missing = [sys.executable, "-I", "build_engine.py", "--module", "no_such_tensorrt"]
    failed = subprocess.run(missing, **where)  # type: ignore[call-overload]
    assert failed.returncode == 1
    assert "no_such_tensorrt" in failed.stderr


@needs_rtx
def test_the_script_builds_an_engine(tmp_path: Path) -> None:
    trt = runtime()
    assert trt is not None
    proto = prepare(one("transposed"), "fp16")
    (tmp_path / "build_engine.py").write_text(script(profiles(OnnxFile.load(proto))))
    onnx.save(proto, tmp_path / "model.onnx")
    command = [sys.executable, "-I", str(tmp_path / "build_engine.py"), "--module", trt.__name__]
    done = subprocess.run(
        [*command, "--capability", "SM80", "--profile", "n=1:2:4"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.engine").stat().st_size > 100
    assert "bytes in" in done.stdout
    for extra, message in (
        (["--capability", "SM80", "--profile", "m=1"], "there is no dynamic size 'm'; there is n"),
        (["--capability", "SM999"], "SM999"),
        (["--onnx", str(tmp_path / "absent.onnx"), "--capability", "SM80"], "absent.onnx"),
    ):
        failed = subprocess.run([*command, *extra], capture_output=True, text=True)
        assert failed.returncode == 1
        assert message in failed.stderr


# -- acceptance ---------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, bool]]:
    yield from ((name, False) for name in MATRICES if name not in QUANTISED)
    yield from ((name, True) for name in KERNELS if name not in QUANTISED)


@needs_rtx
@pytest.mark.parametrize("linear", ["matmul", "conv"])
@pytest.mark.parametrize(("spelling", "spatial"), list(cases()))
def test_tensorrt_rtx_accepts_every_spelling(spelling: str, spatial: bool, linear: str) -> None:
    proto = one(spelling, spatial)
    for dtype in (None, "fp16", "bf16"):
        assert accepted(prepare(proto, dtype, linear=linear).SerializeToString()), (spelling, dtype)


@needs_rtx
def test_what_is_not_accepted_is_told() -> None:
    node = helper.make_node("NoSuch", ["x"], ["y"], domain="elsewhere")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    found = accepted(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), {})
    assert not found
    assert "NoSuch" in found.why


def quantised_model() -> onnx.ModelProto:
    """A product in 8 bits: Q/DQ around the activations, int8 weights with one scale an output."""
    b = Builder(3, False)
    scale, zero = b.store(np.float32(1 / 16)), b.store(np.int8(0))
    x = b.add("DequantizeLinear", [b.add("QuantizeLinear", ["x", scale, zero]), scale, zero])
    return b.model([product(b, x, 8, 12, "quantised", True)])


@needs_rtx
def test_quantised_products_are_accepted() -> None:
    found = accepted(prepare(quantised_model()).SerializeToString())
    assert found, found.why


# -- the target ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, 4, 8).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 32)
        x = x + self.out(mixed)
        y: torch.Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return y


def dynamic() -> Any:
    return ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)},)


@pytest.fixture(scope="module")
def built() -> tuple[Block, torch.Tensor, sparsecc.Compiled]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 32)
    options = {"check": "rtx"} if runtime() is not None else {}
    return model, x, sparsecc.compile(
        model, (x,), target="tensorrt-2:4", options=options, dynamic_shapes=dynamic()
    )  # fmt: skip


def test_a_transformer_is_compiled_verified_and_loaded(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], tmp_path: Path
) -> None:
    model, x, compiled = built
    assert compiled.certificate.status == "VERIFIED"
    layers = json.loads(compiled.artifact.read("layers.json"))
    assert [(entry["holds"], entry["rounds"]) for entry in layers] == [(True, "fp16")] * 5
    assert {"build_engine.py", "trtexec.txt", "model.onnx"} <= compiled.artifact.members.keys()
    assert "x:8x128x32" in compiled.artifact.read("trtexec.txt").decode()
    y = compiled(x)
    assert y.dtype == torch.float32
    compiled.save(tmp_path / "a.scc")
    again = sparsecc.load(tmp_path / "a.scc")
    assert torch.equal(again(x), y)
    assert torch.equal(torch.from_numpy(again(x.numpy())), y)
    assert sparsecc.verify(model, again, (x,)).status == "VERIFIED"
    options = {"check": "rtx"} if runtime() is not None else {}
    other = sparsecc.compile(model, (x,), target="tensorrt-2:4", options=options, dynamic_shapes=dynamic())
    other.save(tmp_path / "b.scc")
    assert (tmp_path / "a.scc").read_bytes() == (tmp_path / "b.scc").read_bytes()


def test_the_notes_say_what_holds_and_what_is_not_measured(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled],
) -> None:
    text = "\n".join(built[2].report.notes)
    assert "holds for 5 of 5 products" in text
    assert "nothing here has been measured on hardware" in text
    assert "trtexec --onnx=model.onnx" in text
    if runtime() is not None:
        assert "parses and builds the model" in text


def test_a_wrong_weight_in_the_artifact_fails_verification(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled],
) -> None:
    model, x, compiled = built
    proto = onnx.ModelProto.FromString(compiled.artifact.read("model.onnx"))
    weight = next(
        t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT16 and len(t.dims) == 2
    )
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    members = {**compiled.artifact.members, "model.onnx": proto.SerializeToString()}
    ready = compiled._ready()
    broken = Artifact(compiled.artifact.manifest, members)
    other = sparsecc.Compiled(type(ready)(broken, ready.plan, ready.certificate, ready.report))
    assert sparsecc.verify(model, other, (x,)).status == "FAILED"


@pytest.mark.parametrize("member", ["layers.json", "build.json"])
def test_damaged_artifacts_are_refused(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], member: str
) -> None:
    from sparsecc.targets.tensorrt.target import Tensorrt

    artifact = built[2].artifact
    with pytest.raises(InvalidModel, match=member):
        Tensorrt().notes(Artifact(artifact.manifest, {**artifact.members, member: b"[1, {"}))


@pytest.mark.parametrize("target", ["tensorrt-2:4-bf16", "tensorrt-2:4-fp16"])
def test_a_convnet_is_compiled(target: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 12, 12)
    options = {"check": "rtx"} if runtime() is not None else {}
    compiled = sparsecc.compile(net, (x,), target=target, options=options)
    assert compiled.certificate.status == "VERIFIED"
    layers = json.loads(compiled.artifact.read("layers.json"))
    assert [entry["holds"] for entry in layers] == [True, False, True, True]
    assert {entry["rounds"] for entry in layers} == {target[-4:]}
    assert "1 positions" in layers[1]["why"]


def test_int8_needs_a_quantised_model() -> None:
    with pytest.raises(TargetRefused, match=r"int8 needs the ranges of activations.*quantise it first"):
        sparsecc.compile(Block(), (torch.randn(2, 5, 32),), target="tensorrt-2:4-int8")
    compiled = sparsecc.compile(quantised_model(), target="tensorrt-int8")
    assert compiled.certificate.status == "VERIFIED"
    (entry,) = json.loads(compiled.artifact.read("layers.json"))
    assert (entry["dtype"], entry["holds"], entry["axis"]) == ("int8", True, 0)


def test_options_of_the_target_are_checked() -> None:
    for options, message in (
        ({"linear": "gemm"}, "matmul or conv"),
        ({"check": "x"}, "none or rtx"),
        ({"profile": "nobody=3"}, "there is no dynamic size 'nobody'"),
        ({"shape": "1"}, "no option 'shape'"),
    ):
        with pytest.raises(InvalidOption, match=message):
            sparsecc.compile(one("plain"), target="tensorrt", options=options)
    for target in ("tensorrt-1:4", "tensorrt-2:4-fp64"):
        with pytest.raises(TargetUnavailable, match="it has"):
            sparsecc.compile(one("plain"), target=target)


def test_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from sparsecc.cli.commands import cli

    onnx.save(one("transposed"), tmp_path / "m.onnx")
    out = tmp_path / "m.scc"
    command = ["compile", str(tmp_path / "m.onnx"), "--target", "tensorrt-2:4", "-o", str(out)]
    done = CliRunner().invoke(cli, [*command, "--option", "profile=n=1:4:16"])
    assert done.exit_code == 0, done.output
    assert Artifact.load(out).read("trtexec.txt").decode().endswith("--maxShapes=x:16x6x8\n")
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(out), "--json"]).output)
    (row,) = shown["layers"]
    assert (row["sparse"], row["type"], row["axis"]) == ("eligible", "float16", "0")
    assert row["done"] == "Transpose folded into its weight; computed in fp16"
    assert CliRunner().invoke(cli, ["inspect", str(out)]).exit_code == 0
    assert CliRunner().invoke(cli, ["run", str(out)]).exit_code == 0


# -- the engine, with a stand-in for TensorRT ---------------------------------------------------------


def test_settings_reach_tensorrt() -> None:
    """What no wheel can show here: the calls, on an object that records them."""
    from unittest.mock import MagicMock

    trt = MagicMock()
    trt.ILogger, trt.__name__ = object, "tensorrt"
    builder = trt.Builder.return_value
    network = builder.create_network.return_value
    network.num_inputs, network.get_input.return_value.name = 1, "x"
    network.get_input.return_value.shape = (-1, 6, 8)
    builder.build_serialized_network.return_value = b"engine"
    ranges = {"x": ((1, 6, 8), (8, 6, 8), (32, 6, 8))}
    assert build_engine.build(trt, b"model", ranges, MagicMock(), workspace=1 << 20) == b"engine"
    config = builder.create_builder_config.return_value
    config.set_flag.assert_called_once_with(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, 1 << 20)
    builder.create_optimization_profile.return_value.set_shape.assert_called_once_with("x", *ranges["x"])
    config.add_optimization_profile.assert_called_once()
    with pytest.raises(build_engine.BuildFailed, match="input x has dynamic sizes and no profile"):
        build_engine.build(trt, b"model", {}, MagicMock())
    builder.build_serialized_network.return_value = None
    log = MagicMock()
    log.errors.return_value = "no tactic"
    with pytest.raises(build_engine.BuildFailed, match="no tactic"):
        build_engine.build(trt, b"model", ranges, log)


class FakeContext:
    """An execution context of an engine for y = 2 x, on memory that it is told the addresses of."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "x" and shape[0] <= 32

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shape[:-1], 12)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        rows = int(np.prod(self.shape[:-1]))
        x = np.ctypeslib.as_array((ctypes.c_float * (rows * 8)).from_address(self.addresses["x"]))
        (out,) = self.addresses.keys() - {"x"}
        y = np.ctypeslib.as_array((ctypes.c_float * (rows * 12)).from_address(self.addresses[out]))
        y.reshape(rows, 12)[:] = 2 * x.reshape(rows, 8)[:, :1]
        return True


def fake_tensorrt(context: FakeContext | None) -> Any:
    from types import SimpleNamespace

    engine = SimpleNamespace(
        create_execution_context=lambda: context, get_tensor_dtype=lambda name: "DataType.FLOAT"
    )
    runtime_ = SimpleNamespace(deserialize_cuda_engine=lambda data: None if context is None else engine)
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(Logger=logger, Runtime=lambda log: runtime_, __version__="11.4")


def with_engine() -> Artifact:
    artifact = sparsecc.compile(one("plain"), target="tensorrt-2:4").artifact
    return Artifact(artifact.manifest, {**artifact.members, "model.engine": b"engine"})


def test_an_engine_is_run_on_memory_of_torch() -> None:
    from sparsecc.targets.tensorrt.executor import EngineExecutor

    class Here(EngineExecutor):
        device = "cpu"

        def _launch(self) -> bool:
            return bool(self._context.execute_async_v3(0))

    found = Here(with_engine(), fake_tensorrt(FakeContext()))
    x = torch.randn(3, 6, 8)
    assert torch.equal(found(x), (2 * x[..., :1]).expand(3, 6, 12))
    assert isinstance(found(x.numpy()), np.ndarray)
    with pytest.raises(TargetRefused, match="outside the engine's profile"):
        found(torch.randn(33, 6, 8))


def test_an_engine_that_cannot_be_read_here_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecc.targets.ort import OrtExecutor
    from sparsecc.targets.tensorrt.executor import executor

    artifact = with_engine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(None))
    with pytest.warns(UserWarning, match="for another version or GPU: build it here"):
        found = executor(artifact)
    assert isinstance(found, OrtExecutor)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.warns(UserWarning, match="the engine is not used"):
        assert isinstance(executor(artifact), OrtExecutor)

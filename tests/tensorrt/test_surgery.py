"""The surgery changes no value, and the rule then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.tensorrt import prepare, prepare_file, sparsity
from tests.tensorrt.graphs import (
    Array,
    Builder,
    assert_near,
    edited,
    exact,
    example,
    graphs,
    on_ort,
    one,
    probed,
    product,
    two_of_four,
)


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

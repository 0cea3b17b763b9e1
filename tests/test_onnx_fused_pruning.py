"""Operators that runtimes fuse, between layers that are pruned."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import sparsecc
from sparsecc.onnxfile.model import OnnxFile
from tests.onnx_cases import Case, check_case
from tests.onnx_graphs import Graph, check_trial, error, run64, trial
from tests.test_onnx_optimised import encoder, images, kinds, optimised
from tests.test_patterns import groups_text

DOMAIN = "com.microsoft"
OPSETS = [helper.make_opsetid(DOMAIN, 1)]
CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = function
    return function


def model(g: Graph, **outputs: list[int | str]) -> ModelProto:
    """A model with declared outputs: onnx knows no shapes of these operators."""
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in outputs.items()]
    graph = helper.make_graph(g.nodes, "graph", g.inputs, infos, g.tensors)
    opsets = [helper.make_opsetid("", g.opset), *OPSETS]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def fused(g: Graph, kind: str, inputs: list[str], out: Any, **attributes: Any) -> Any:
    return g.node(kind, inputs, out, domain=DOMAIN, **attributes)


def projections(g: Graph, x: str, *widths: int, bias: bool = False) -> list[str]:
    return [
        g.linear(x, n, 6, w) if bias else g.node("MatMul", [x, g.weight(f"{n}.weight", 6, w)], n)
        for n, w in zip("qkv", widths, strict=False)
    ]


def ending(g: Graph, y: str, width: int, *free: tuple[str, int], **fields: Any) -> Case:
    z = g.linear(y, "z", width, 3)
    return Case(model(g, **{z: ["batch", 5, 3]}), *free, ("z.weight", 0), **fields)


# -- attention ---------------------------------------------------------------------------------------


@case
def multi_head_attention() -> Case:
    g = Graph(17)
    parts = projections(g, g.input("x", ["batch", 5, 6]), 16, 16, 24)
    bias = g.tensor("bias", g.random.uniform(-1, 1, 56))
    y = fused(g, "MultiHeadAttention", [*parts, bias], "y", num_heads=4, unidirectional=1)
    return ending(g, y, 24, ("q.weight", 1), ("k.weight", 1), ("v.weight", 1), ("bias", 0))


@case
def multi_head_attention_with_masks() -> Case:
    g = Graph(17)
    parts = projections(g, g.input("x", [2, 5, 6]), 8, 8, 8)
    seen = g.tensor("seen", [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    mask = g.tensor("mask", g.random.uniform(-1, 1, (1, 2, 5, 5)))
    y = fused(g, "MultiHeadAttention", [*parts, "", seen, mask], "y", num_heads=2, scale=0.4)
    return ending(g, y, 8, ("q.weight", 1), ("k.weight", 1), ("v.weight", 1))


@case
def attention_that_projects() -> Case:
    g = Graph(17)
    x = g.linear(g.input("x", ["batch", 5, 6]), "a", 6, 8)
    w, b = g.weight("w", 8, 24), g.tensor("b", g.random.uniform(-1, 1, 24))
    y = fused(g, "Attention", [x, w, b], "y", num_heads=2)
    return ending(g, y, 8, ("a.weight", 1), ("w", 0), ("w", 1), ("b", 0))


@case
def attention_that_projects_to_two_widths() -> Case:
    g = Graph(17)
    x = g.linear(g.input("x", [2, 5, 6]), "a", 6, 8)
    w, b = g.weight("w", 8, 28), g.tensor("b", g.random.uniform(-1, 1, 28))
    lengths = g.tensor("lengths", [3, 5], np.int32)
    y = fused(
        g, "Attention", [x, w, b, lengths], "y", num_heads=2, qkv_hidden_sizes=[8, 8, 12], unidirectional=1
    )
    return ending(g, y, 12, ("a.weight", 1), ("w", 0), ("w", 1), ("b", 0))


def group_query(rotary: bool, packed: bool) -> Case:
    g = Graph(17)
    x = g.input("x", [2, 5, 6])
    if packed:
        y = g.node("MatMul", [x, g.weight("q.weight", 6, 8 * 16)], "q")
        parts, free = [y, "", ""], [("q.weight", 1)]
    else:
        parts = projections(g, x, 64, 32, 32)
        free = [("q.weight", 1), ("k.weight", 1), ("v.weight", 1)]
    lengths, total = g.tensor("lengths", [4, 4], np.int32), g.tensor("total", [5], np.int32)
    tables = [g.tensor(n, g.random.uniform(-1, 1, (9, 8))) for n in ("cos", "sin")] if rotary else []
    y, _, _ = fused(
        g, "GroupQueryAttention", [*parts, "", "", lengths, total, *tables], ["y", "key", "value"],
        num_heads=4, kv_num_heads=2, do_rotary=int(rotary),
    )  # fmt: skip
    return ending(g, y, 64, *free)


@case
def group_query_attention() -> Case:
    return group_query(False, False)


@case
def group_query_attention_that_rotates() -> Case:
    return group_query(True, False)


@case
def group_query_attention_of_joint_operands() -> Case:
    return group_query(True, True)


@case
def rotation() -> Case:
    g = Graph(17)
    x = g.input("x", [2, 5, 6])
    tables = [g.tensor(n, g.random.uniform(-1, 1, (9, 4))) for n in ("cos", "sin")]
    where = g.ints("where", [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    q, k, v = projections(g, x, 16, 16, 16)
    q, k = (fused(g, "RotaryEmbedding", [p, where, *tables], f"{p}.turned") for p in (q, k))
    y = fused(g, "MultiHeadAttention", [q, k, v], "y", num_heads=2)
    return ending(g, y, 16, ("q.weight", 1), ("k.weight", 1), ("v.weight", 1))


# -- norms, activations ------------------------------------------------------------------------------


@case
def sums_and_root_mean_squares() -> Case:
    g = Graph(17)
    x = g.input("x", ["batch", 5, 6])
    a, b = g.linear(x, "a", 6, 8), g.linear(x, "b", 6, 8)
    y, total = fused(
        g, "SkipSimplifiedLayerNormalization", [a, b, g.vector("gamma", 8), g.vector("bias", 8)],
        ["y", "", "", "total"], epsilon=1e-3,
    )[::3]  # fmt: skip
    return ending(
        g, g.node("Mul", [y, total], "m"), 8, ("a.weight", 1), ("b.weight", 1), ("gamma", 0), ("bias", 0)
    )


@case
def embeddings_and_their_norm() -> Case:
    g = Graph(17)
    ids = g.input("ids", [2, 5], np.int32)
    kinds_ = g.tensor("kinds", np.zeros((2, 5)), np.int32)
    tables = [g.weight(n, rows, 8) for n, rows in (("words", 11), ("places", 7), ("segments", 2))]
    y, _ = fused(
        g, "EmbedLayerNormalization", [ids, kinds_, *tables, g.vector("gamma", 8), g.vector("beta", 8)],
        ["y", "lengths"], epsilon=1e-3,
    )  # fmt: skip
    return ending(g, y, 8, ("words", 1), ("places", 1), ("segments", 1), ("gamma", 0), ("beta", 0))


@case
def activations_with_bias() -> Case:
    g = Graph(17)
    y = g.node("MatMul", [g.input("x", ["batch", 5, 6]), g.weight("a.weight", 6, 8)], "a")
    y = fused(g, "BiasGelu", [y, g.vector("b1", 8)], "y1")
    y = fused(g, "FastGelu", [y, g.vector("b2", 8)], "y2")
    y = fused(g, "QuickGelu", [y], "y3", alpha=1.2)
    return ending(g, y, 8, ("a.weight", 1), ("b1", 0), ("b2", 0))


@case
def a_gate_of_halves() -> Case:
    g = Graph(17)
    y = g.linear(g.input("x", ["batch", 5, 6]), "a", 6, 16)
    y = fused(g, "BiasSplitGelu", [y, g.vector("b", 16)], "y")
    return ending(g, y, 8, ("a.weight", 1), ("b", 0), runtime=False)


# -- packed weights ----------------------------------------------------------------------------------


def nbits(size: int, bits: int, zeros: str) -> Case:
    """Two products with packed weights; the width between them is one of rows and of blocks."""
    g = Graph(17)
    y, width = g.input("x", ["batch", 5, 32]), 32
    for name, rows in (("a", size), ("b", 24)):
        blocks = -(-width // 16)
        packed = g.tensor(f"{name}.packed", g.random.integers(0, 256, (rows, blocks, 2 * bits)), np.uint8)
        operands = [y, packed, g.tensor(f"{name}.scales", g.random.uniform(0.01, 0.05, (rows, blocks)))]
        if zeros == "packed":
            held = -(-blocks * bits // 8)
            operands.append(g.tensor(f"{name}.zeros", g.random.integers(0, 256, (rows, held)), np.uint8))
        elif zeros == "real":
            operands.append(g.tensor(f"{name}.zeros", g.random.uniform(6, 9, (rows, blocks))))
        y = fused(g, "MatMulNBits", operands, name, K=width, N=rows, bits=bits, block_size=16)
        width = rows
    free = [("a.packed", 0), ("b.packed", 0), ("a.scales", 0)]
    if size % 16 == 0:
        free.append(("b.packed", 1))
    return ending(g, y, 24, *free)


@case
def packed_four_bits() -> Case:
    return nbits(64, 4, "none")


@case
def packed_four_bits_with_packed_zero_points() -> Case:
    return nbits(96, 4, "packed")


@case
def packed_four_bits_with_real_zero_points() -> Case:
    return nbits(48, 4, "real")


@case
def packed_eight_bits() -> Case:
    return nbits(48, 8, "packed")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_fused_operator_prunes_to_its_masked_semantics(name: str, seed: int) -> None:
    check_case(CASES[name](), seed)


@pytest.mark.parametrize("name", CASES)
def test_groups_of_fused_operators_are_the_golden_ones(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"onnx/{name}.txt", groups_text(sparsecc.analyze(CASES[name]().model)))


@pytest.mark.parametrize("name", CASES)
def test_dead_positions_of_a_fused_operator_go_without_a_change(name: str) -> None:
    model, found = with_dead(CASES[name]().model)
    result = sparsecc.slim(model)
    assert result.certificate.status == "VERIFIED"
    feeds, _ = result.subject.inputs(0, 0)
    assert error(run64(OnnxFile.load(result.model), feeds), run64(OnnxFile.load(model), feeds)) <= 1e-12
    assert found or not result.plan.decisions


def with_dead(model: ModelProto) -> tuple[ModelProto, int]:
    """Zeros at the first and the last position of every group, wherever its weights are floats."""
    groups = [g for g in sparsecc.analyze(model).groups if g.size > 2]
    places = {(m.weight, m.axis, g.size) for g in groups for m in g.members}
    count = 0
    for tensor in model.graph.initializer:
        values = np.array(numpy_helper.to_array(tensor))
        if values.dtype.kind != "f":
            continue
        for weight, axis, size in places:
            if weight == tensor.name and values.shape[axis] == size:
                np.moveaxis(values, axis, 0)[[0, -1]] = 0
                count += 1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model, count


def test_blocks_go_in_pairs_where_zero_points_share_bytes() -> None:
    found = trial(CASES["packed_four_bits_with_packed_zero_points"]().model)
    sizes = {
        g.size
        for g in found.subject.analysis.groups
        if ("b.packed", 1) in {(m.weight, m.axis) for m in g.members}
    }
    assert sizes == {3}, "96 = 3 pairs of blocks of 16"


def test_a_last_block_that_is_not_full_keeps_the_width() -> None:
    g = Graph(17)
    y = g.linear(g.input("x", ["batch", 5, 6]), "a", 6, 40)
    packed, scales = g.tensor("w", g.random.integers(0, 256, (8, 2, 16)), np.uint8), g.vector("scales", 16)
    y = fused(g, "MatMulNBits", [y, packed, scales], "y", K=40, N=8, bits=4, block_size=32)
    found = trial(model(g, **{g.linear(y, "z", 8, 3): ["batch", 5, 3]}))
    assert any("not full" in str(f) for f in found.subject.analysis.frozen)
    check_trial(found)


def test_unusual_arguments_of_attention_freeze() -> None:
    g = Graph(17)
    x = g.input("x", [2, 5, 6])
    wide = g.node(
        "Reshape", [g.node("MatMul", [x, g.weight("w", 6, 24)], "q"), g.ints("s", [2, 5, 2, 3, 4])], "r"
    )
    y = fused(g, "MultiHeadAttention", [wide], "y", num_heads=2)
    g.linear(y, "z", 8, 3)
    found = sparsecc.analyze(model(g, z=[2, 5, 3]))
    assert any("unusual arguments" in str(f) or "shape that is not known" in str(f) for f in found.frozen)


# -- what the tools of onnxruntime write -------------------------------------------------------------


@cache
def by_the_transformer_optimiser() -> ModelProto:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, target = str(Path(folder, "a.onnx")), str(Path(folder, "b.onnx"))
        onnx.save(encoder(), source)
        optimizer.optimize_model(
            source, model_type="bert", num_heads=4, hidden_size=32, opt_level=0
        ).save_model_to_file(target)
        return onnx.load(target)


def quantised_dynamically(source: ModelProto) -> ModelProto:
    quantization = pytest.importorskip("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = str(Path(folder, "a.onnx")), str(Path(folder, "b.onnx"))
        onnx.save(source, first)
        quantization.quantize_dynamic(first, second, weight_type=quantization.QuantType.QUInt8)
        return onnx.load(second)


WRITTEN: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "attention": (by_the_transformer_optimiser, "Attention"),
    "quantised attention": (lambda: quantised_dynamically(by_the_transformer_optimiser()), "QAttention"),
    "dynamic products": (lambda: optimised(quantised_dynamically(encoder())), "DynamicQuantizeMatMul"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_tools_of_onnxruntime_write_is_pruned_and_verified(name: str) -> None:
    build, kind = WRITTEN[name]
    source = build()
    assert kind in kinds(source), kinds(source)
    result = sparsecc.prune(source, sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert result.report.after["bytes"] < 0.6 * result.report.before["bytes"]
    check_trial(trial(source, 1), 1, loose=1e-2)


def test_a_model_laid_out_for_one_device_is_refused_with_a_reason() -> None:
    source = optimised(images(), "ORT_ENABLE_ALL")
    if DOMAIN + ".nchwc" not in {n.domain for n in source.graph.node}:
        pytest.skip("this machine has no blocked layout")
    with pytest.raises(sparsecc.UnsupportedModel, match="nchwc"):
        sparsecc.prune(source, sparsity=0.5)


def test_operations_of_fused_attention_are_counted() -> None:
    """Joint or not, attention takes as many multiplications as its parts do."""
    source = by_the_transformer_optimiser()
    plain = sparsecc.prune(encoder(), sparsity=0.5).report.before["macs"]
    assert sparsecc.prune(source, sparsity=0.5).report.before["macs"] == pytest.approx(plain, rel=0.02)


def decoder(hidden: int = 64, heads: int = 4, kv: int = 2, wide: int = 96) -> ModelProto:
    """One layer of a language model as ONNX Runtime GenAI writes it: four bits, caches, joint norms."""
    g, head = Graph(20), 16
    ids = g.input("input_ids", ["batch", "length"], np.int64)
    mask = g.input("attention_mask", ["batch", "total"], np.int64)
    past = [g.input(f"past_{n}", ["batch", kv, "past", head]) for n in ("key", "value")]
    count = g.node("ReduceSum", [mask, g.ints("one", [1])], "count", keepdims=0)
    lengths = g.node("Sub", [count, g.ints("1", 1)], "last")
    lengths = g.node("Cast", [lengths], "lengths", to=TensorProto.INT32)
    total = g.node("Gather", [g.node("Shape", [mask], "mask.shape"), g.ints("at", 1)], "total64")
    total = g.node("Cast", [total], "total32", to=TensorProto.INT32)
    tables = [g.tensor(n, g.random.uniform(-1, 1, (64, head // 2))) for n in ("cos", "sin")]

    def packed(x: str, name: str, inner: int, rows: int) -> str:
        blocks = inner // 16
        operands = [
            x,
            g.tensor(f"{name}.w", g.random.integers(0, 256, (rows, blocks, 8)), np.uint8),
            g.tensor(f"{name}.scales", g.random.uniform(0.005, 0.02, (rows, blocks))),
        ]
        return str(fused(g, "MatMulNBits", operands, name, K=inner, N=rows, bits=4, block_size=16))

    x = g.node("Gather", [g.weight("words", 50, hidden), ids], "embedded")
    y = g.node("SimplifiedLayerNormalization", [x, g.vector("n0", hidden)], "normed", axis=-1, epsilon=1e-3)
    q, k, v = (packed(y, n, hidden, rows * head) for n, rows in (("q", heads), ("k", kv), ("v", kv)))
    y, _, _ = fused(
        g, "GroupQueryAttention", [q, k, v, *past, lengths, total, *tables], ["attended", "key", "value"],
        num_heads=heads, kv_num_heads=kv, do_rotary=1,
    )  # fmt: skip
    projected, norm = packed(y, "o", heads * head, hidden), {"epsilon": 1e-3}
    places = ["n1.y", "", "", "n1.x"]
    fused(g, "SkipSimplifiedLayerNormalization", [x, projected, g.vector("n1", hidden)], places, **norm)
    y, x = "n1.y", "n1.x"
    gate, up = packed(y, "gate", hidden, wide), packed(y, "up", hidden, wide)
    mixed = g.node("Mul", [g.node("Mul", [gate, g.node("Sigmoid", [gate], "sigmoid")], "silu"), up], "mixed")
    down = packed(mixed, "down", wide, hidden)
    y = fused(g, "SkipSimplifiedLayerNormalization", [x, down, g.vector("n2", hidden)], "n2.y", **norm)
    z = g.linear(y, "head", hidden, 7)
    return model(g, **{z: ["batch", "length", 7]})


def test_a_decoder_of_four_bits_is_pruned_and_verified() -> None:
    source = decoder()
    found = trial(source, 2)
    groups = {(m.weight, m.axis) for q in found.subject.analysis.groups for m in q.members}
    assert {("gate.w", 0), ("up.w", 0), ("down.w", 1), ("o.w", 0), ("words", 1), ("n1", 0)} <= groups
    check_trial(found, 2, runtime=False)
    assert sparsecc.prune(source, sparsity=0.5).certificate.status == "VERIFIED"

"""Every operator with an axis rule of its own: what it lets go, and that the result is right.

Each case puts an operator between layers whose channels may go; random plans are held against masked
semantics in float64, against onnxruntime, and operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparsecc
from sparsecc.errors import InvalidModel
from tests.onnx_cases import Case, built, check_case, image, sequence
from tests.onnx_graphs import Graph
from tests.test_patterns import groups_text

CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = function
    return function


# -- statistics, neighbours ---------------------------------------------------------------------------


@case
def lrn_keeps_channels() -> Case:
    g, y = image()
    y = g.conv(g.node("LRN", [y], "lrn", size=3), "b", 8, 8)
    z = g.conv(y, "z", 8, 3)
    return Case(g.build(z), ("b.weight", 0), ("z.weight", 1))


@case
def mean_variance_over_space() -> Case:
    g, y = image()
    return built(g, g.node("MeanVarianceNormalization", [y], "mvn", axes=[2, 3]), 8)


@case
def mean_variance_over_channels() -> Case:
    g, y = image()
    return built(g, g.node("MeanVarianceNormalization", [y], "mvn", axes=[1, 2, 3]), 8)


@case
def lp_normalization() -> Case:
    g, y = image()
    return built(g, g.node("LpNormalization", [y], "norm", axis=1, p=2), 8)


@case
def lp_pool() -> Case:
    g, y = image()
    return built(g, g.node("LpPool", [y], "pool", kernel_shape=[2, 2], p=2), 8)


@case
def rms_normalization() -> Case:
    g, y = sequence(23)
    return built(
        g,
        g.node("RMSNormalization", [y, g.vector("rms.weight", 8)], "rms"),
        8,
        ("rms.weight", 0),
        linear=True,
    )


@case
def swish() -> Case:
    g, y = sequence(24)
    return built(g, g.node("Swish", [y], "swish", alpha=1.5), 8, linear=True)


# -- places ------------------------------------------------------------------------------------------


def channels_last(*inputs: Any, **attributes: Any) -> Case:
    """A Resize between transposes, as converters from layouts with channels last write it."""
    g, y = image()
    y = g.node("Transpose", [y], "last", perm=[0, 2, 3, 1])
    kinds = {"f": np.float32, "i": np.int64}
    names = [
        "" if v is None else g.tensor(f"number{i}", v, kinds[np.asarray(v).dtype.kind])
        for i, v in enumerate(inputs)
    ]
    y = g.node("Resize", [y, *names], "resized", **attributes)
    return built(g, g.node("Transpose", [y], "first", perm=[0, 3, 1, 2]), 8)


@case
def resized_channels_last() -> Case:
    return channels_last(None, [1.0, 2.0, 1.5, 1.0], mode="linear")


@case
def resized_channels_last_by_axes() -> Case:
    return channels_last(None, [2.0, 1.5], mode="nearest", axes=[1, 2])


@case
def resized_crop() -> Case:
    g, y = image()
    region = g.tensor("region", [0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8], np.float32)
    factors = g.tensor("factors", [1, 1, 2, 2], np.float32)
    mode = {"coordinate_transformation_mode": "tf_crop_and_resize"}
    return built(g, g.node("Resize", [y, region, factors], "crop", mode="linear", **mode), 8)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        ([None, [1.0, 1.05, 2.0, 2.0]], {"mode": "nearest"}),  # as many channels, but others
        (
            [[0, 0.3, 0, 0, 1, 0.8, 1, 1.0], [1.0, 1.0, 2.0, 2.0]],
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
        ),
        ([None, None, [3, 8, 12, 12]], {"keep_aspect_ratio_policy": "not_smaller"}),
    ],
    ids=["scaled", "cropped", "by one factor"],
)
def test_channels_that_a_resize_changes_stay(inputs: list[Any], attributes: dict[str, Any]) -> None:
    g, y = image()
    names = [
        "" if v is None else g.tensor(f"number{i}", v, np.float32 if i < 2 else np.int64)
        for i, v in enumerate(inputs)
    ]
    y = g.node("Resize", [y, *names], "resized", **attributes)
    g.node("GlobalAveragePool", [y], "pooled")
    found = sparsecc.analyze(g.build("pooled"))
    assert found.groups == []
    assert any("Resize" in str(f) and f.weight == "a.weight" and f.axis == 0 for f in found.frozen)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_that_trains_draws_random_numbers_and_stays(training: bool) -> None:
    g, y = image()
    mode = g.tensor("training", training, np.bool_)
    y = g.node("Dropout", [y, g.tensor("ratio", 0.5, np.float32), mode], "dropped")
    found = sparsecc.analyze(g.build(g.conv(y, "z", 8, 3)))
    assert bool(found.groups) is not training
    assert any("export in eval mode" in str(f) for f in found.frozen) is training


@case
def gather_elements() -> Case:
    g = Graph()
    y = g.linear(g.input("x", [2, 5, 6]), "a", 6, 8)
    index = g.ints("index", np.random.default_rng(0).integers(0, 5, (2, 3, 8)))
    return built(g, g.node("GatherElements", [y, index], "taken", axis=1), 8, linear=True)


@case
def gather_nd_of_constant_places() -> Case:
    """What torch.onnx makes of ``x[:, order]``."""
    g, y = sequence()
    first = g.node("Transpose", [y], "first", perm=[2, 0, 1])
    order = g.ints("order", [[3], [-8], [7], [1], [-2], [4], [2], [5]])
    found = g.node("GatherND", [first, order], "found")
    return built(g, g.node("Transpose", [found], "last", perm=[1, 2, 0]), 8, linear=True)


@case
def scatter_elements() -> Case:
    g = Graph()
    x = g.input("x", [2, 5, 6])
    y = g.linear(x, "a", 6, 8)
    u = g.linear(g.input("u", [2, 3, 6]), "b", 6, 8)
    index = g.ints(
        "index",
        np.random.default_rng(0).permuted(np.tile(np.arange(5)[None, :, None], (2, 1, 8)), axis=1)[:, :3],
    )
    return built(
        g,
        g.node("ScatterElements", [y, index, u], "written", axis=1, reduction="add"),
        8,
        ("b.weight", 1),
        linear=True,
    )


@case
def scatter_nd() -> Case:
    g = Graph()
    y = g.linear(g.input("x", [2, 5, 6]), "a", 6, 8)
    u = g.linear(g.input("u", [3, 6]), "b", 6, 8)
    return built(
        g,
        g.node("ScatterND", [y, g.ints("at", [[0, 1], [1, 4], [1, 0]]), u], "written"),
        8,
        ("b.weight", 1),
        linear=True,
    )


@case
def tensor_scatter() -> Case:
    g = Graph(24)
    cache = g.linear(g.input("x", [2, 5, 6]), "a", 6, 8)
    new = g.linear(g.input("u", [2, 2, 6]), "b", 6, 8)
    return built(
        g,
        g.node("TensorScatter", [cache, new, g.ints("at", [0, 3])], "written"),
        8,
        ("b.weight", 1),
        linear=True,
    )


@case
def compress() -> Case:
    g, y = sequence()
    picked = g.node(
        "Compress", [y, g.tensor("which", [True, False, True, True, False], np.bool_)], "picked", axis=1
    )
    return built(g, picked, 8, linear=True)


@case
def reverse_sequence() -> Case:
    g = Graph()
    y = g.linear(g.input("x", [3, 5, 6]), "a", 6, 8)
    lengths = g.ints("lengths", [2, 5, 1])
    return built(
        g, g.node("ReverseSequence", [y, lengths], "turned", batch_axis=0, time_axis=1), 8, linear=True
    )


@case
def center_crop_pad() -> Case:
    g, y = image()
    return built(g, g.node("CenterCropPad", [y, g.ints("size", [4, 8])], "cut", axes=[2, 3]), 8)


@case
def cumulated_along_the_sequence() -> Case:
    g, y = sequence()
    return built(g, g.node("CumSum", [y, g.ints("axis", 1)], "sums"), 8, linear=True)


@case
def largest_along_the_sequence() -> Case:
    g, y = sequence()
    top = g.node("TopK", [y, g.ints("k", [2])], ["top", "places"], axis=1)
    return built(g, top[0], 8, linear=True)


@case
def hardmax_along_the_sequence() -> Case:
    g, y = sequence()
    return built(g, g.node("Hardmax", [y], "hard", axis=1), 8, linear=True)


@case
def grid_sample() -> Case:
    g = Graph()
    y = g.conv(g.input("x", [2, 3, 6, 6]), "a", 3, 8)
    grid = g.tensor("grid", np.random.default_rng(1).uniform(-1, 1, (2, 4, 5, 2)))
    return built(g, g.node("GridSample", [y, grid], "sampled"), 8)


@case
def roi_align() -> Case:
    g = Graph()
    y = g.conv(g.input("x", [2, 3, 6, 6]), "a", 3, 8)
    boxes = g.tensor("boxes", [[0, 0, 3, 3], [1, 1, 5, 5], [0, 2, 4, 5]])
    pooled = g.node(
        "RoiAlign", [y, boxes, g.ints("which", [0, 1, 1])], "rois", output_height=2, output_width=2
    )
    return built(g, pooled, 8)


@case
def column_to_image() -> Case:
    g = Graph()
    y = g.conv(g.input("x", [2, 3, 1, 9]), "a", 3, 16, 1)
    flat = g.node("Reshape", [y, g.ints("shape", [2, 16, 9])], "flat")
    grown = g.node("Col2Im", [flat, g.ints("size", [4, 4]), g.ints("block", [2, 2])], "grown")
    return built(g, grown, 4)


@case
def deformed_convolution() -> Case:
    g = Graph(19)
    y = g.conv(g.input("x", [2, 3, 5, 5]), "a", 3, 4)
    offset = g.tensor("offset", np.random.default_rng(2).uniform(-1, 1, (2, 18, 3, 3)))
    bent = g.node(
        "DeformConv",
        [y, g.weight("d.weight", 6, 4, 3, 3), offset, g.vector("d.bias", 6)],
        "bent",
        kernel_shape=[3, 3],
    )
    return built(g, bent, 6, ("d.weight", 0), ("d.weight", 1), ("d.bias", 0))


@case
def spectrum_of_channels() -> Case:
    g = Graph()
    y = g.conv(g.input("x", [2, 3, 1, 8]), "a", 3, 6, 1)
    wide = g.node("Reshape", [y, g.ints("shape", [2, 6, 8, 1])], "wide")
    spectrum = g.node("DFT", [wide, "", g.ints("axis", 2)], "spectrum")
    return built(g, spectrum, 6)


@case
def determinants_of_channels() -> Case:
    g = Graph()
    y = g.conv(g.input("x", [2, 3, 4, 4]), "a", 3, 8)
    z = g.node("Det", [y], "det")
    out = g.linear(z, "z", 8, 3)
    return Case(g.build(out), ("a.weight", 0), ("z.weight", 0))


@case
def causal_convolution_with_a_state() -> Case:
    g = Graph(27)
    y = g.conv(g.input("x", [2, 3, 1, 6]), "a", 3, 8, 1)
    flat = g.node("Reshape", [y, g.ints("shape", [2, 8, 6])], "flat")
    weights = [g.weight("c.weight", 8, 1, 3), g.vector("c.bias", 8)]
    past = g.tensor("past", g.random.uniform(-1, 1, (2, 8, 2)))
    z, state = g.node("CausalConvWithState", [flat, *weights, past], ["conv", "state"], activation="silu")
    both = g.node("Concat", [z, state], "both", axis=2)
    wide = g.node("Unsqueeze", [both, g.ints("axis", [2])], "wide")
    return built(g, wide, 8, ("c.weight", 0), ("c.bias", 0), runtime=False)


@case
def a_gate_with_two_inputs() -> Case:
    g = Graph(28)
    x = g.input("x", ["batch", 5, 6])
    y = g.node("SwiGLU", [g.linear(x, "a", 6, 8), g.linear(x, "b", 6, 8)], "gated", alpha=1.3)
    return built(g, y, 8, ("b.weight", 1), linear=True, runtime=False)


# -- attention ---------------------------------------------------------------------------------------


def attention(opset: int, heads: int, kv: int, width: int, packed: bool, **attributes: Any) -> Case:
    g = Graph(opset)
    x = g.input("x", [2, 5, 6])
    sizes = [heads * width, kv * width, kv * width]
    parts = [
        g.node("MatMul", [x, g.weight(f"{n}.weight", 6, size)], n)
        for n, size in zip("qkv", sizes, strict=True)
    ]
    if packed:
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv}
    else:
        counts = (heads, kv, kv)
        parts = [
            g.node(
                "Transpose",
                [g.node("Reshape", [p, g.ints(f"{p}.shape", [2, 5, n, width])], f"{p}.4")],
                f"{p}.t",
                perm=[0, 2, 1, 3],
            )
            for p, n in zip(parts, counts, strict=True)
        ]
    mask = g.tensor("mask", np.random.default_rng(0).uniform(-1, 1, (heads, 5, 5)))
    y = g.node("Attention", [*parts, mask], "attended", **attributes)
    if not packed:
        y = g.node(
            "Reshape",
            [g.node("Transpose", [y], "back", perm=[0, 2, 1, 3]), g.ints("flat", [2, 5, heads * width])],
            "joined",
        )
    z = g.linear(y, "z", heads * width, 3)
    return Case(g.build(z), ("q.weight", 1), ("k.weight", 1), ("v.weight", 1), ("z.weight", 0))


@case
def attention_of_packed_heads() -> Case:
    return attention(23, 4, 4, 4, True)


@case
def attention_of_shared_keys() -> Case:
    return attention(23, 4, 2, 4, True, is_causal=1)


@case
def attention_with_a_scale() -> Case:
    return attention(24, 2, 2, 4, True, scale=0.3, softcap=2.0)


@case
def attention_of_four_axes() -> Case:
    return attention(23, 6, 2, 4, False)


@case
def attention_with_a_past() -> Case:
    g = Graph(23)
    x, memory = g.input("x", [2, 1, 6]), g.input("memory", [2, 5, 6])
    parts = [g.node("MatMul", [x, g.weight(f"{n}.weight", 6, 8)], n) for n in "qkv"]
    past = []
    for n in ("pk", "pv"):
        wide = g.node("MatMul", [memory, g.weight(f"{n}.weight", 6, 8)], n)
        four = g.node("Reshape", [wide, g.ints(f"{n}.shape", [2, 5, 2, 4])], f"{n}.4")
        past.append(g.node("Transpose", [four], f"{n}.t", perm=[0, 2, 1, 3]))
    y, key, value = g.node(
        "Attention", [*parts, "", *past], ["y", "key", "value"], q_num_heads=2, kv_num_heads=2
    )
    seen = g.node(
        "Add",
        [g.node("ReduceSum", [key], "ks", keepdims=0), g.node("ReduceSum", [value], "vs", keepdims=0)],
        "seen",
    )
    z = g.linear(g.node("Add", [y, g.node("Mul", [seen, g.tensor("small", 0.01)], "less")], "sum"), "z", 8, 3)
    return Case(g.build(z), ("q.weight", 1), ("pk.weight", 1), ("pv.weight", 1), ("z.weight", 0))


def rotary(interleaved: int, partly: bool, packed: bool) -> Case:
    g = Graph(23)
    x = g.input("x", [2, 5, 6])
    width = 8
    turned_width = 4 if partly else width
    tables = [
        g.tensor(n, np.random.default_rng(i).uniform(-1, 1, (9, turned_width // 2)))
        for i, n in enumerate(("cos", "sin"))
    ]
    where = g.ints("where", [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    turned = []
    attributes = {
        "interleaved": interleaved,
        "num_heads": 2,
        "rotary_embedding_dim": turned_width if partly else 0,
    }
    for n in "qk":
        part = g.node("MatMul", [x, g.weight(f"{n}.weight", 6, 2 * width)], n)
        if not packed:
            four = g.node("Reshape", [part, g.ints(f"{n}.shape", [2, 5, 2, width])], f"{n}.4")
            part = g.node("Transpose", [four], f"{n}.t", perm=[0, 2, 1, 3])
        part = g.node("RotaryEmbedding", [part, *tables, where], f"{n}.turned", **attributes)
        if not packed:
            back = g.node("Transpose", [part], f"{n}.back", perm=[0, 2, 1, 3])
            part = g.node("Reshape", [back, g.ints(f"{n}.flat", [2, 5, 2 * width])], f"{n}.joined")
        turned.append(part)
    v = g.node("MatMul", [x, g.weight("v.weight", 6, 2 * width)], "v")
    y = g.node("Attention", [*turned, v], "attended", q_num_heads=2, kv_num_heads=2)
    z = g.linear(y, "z", 2 * width, 3)
    return Case(g.build(z), ("q.weight", 1), ("k.weight", 1), ("v.weight", 1))


@case
def rotation_of_halves() -> Case:
    return rotary(0, False, True)


@case
def rotation_of_neighbours() -> Case:
    return rotary(1, False, True)


@case
def rotation_of_some_dimensions() -> Case:
    return rotary(0, True, True)


@case
def rotation_of_four_axes() -> Case:
    return rotary(1, True, False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_an_operator_prunes_to_its_masked_semantics(name: str, seed: int) -> None:
    check_case(CASES[name](), seed)


@pytest.mark.parametrize("name", CASES)
def test_groups_are_the_golden_ones(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"onnx/{name}.txt", groups_text(sparsecc.analyze(CASES[name]().model)))


def test_integers_that_only_the_example_has_right_are_taken_from_it() -> None:
    """A shape among the inputs fits the other one's size alone."""
    g = Graph()
    y = g.linear(g.node("Relu", [g.linear(g.input("x", ["n", 6]), "a", 6, 8)], "r"), "z", 8, 4)
    model = g.build(g.node("Reshape", [y, g.input("shape", [2], np.int64)], "back"))
    result = sparsecc.prune(model, [np.ones((3, 6), np.float32), np.array([2, 6])], sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert all("shape: given" in check.inputs for check in result.certificate.checks)
    with pytest.raises(InvalidModel, match="made up for x, shape that do not fit, give example inputs"):
        sparsecc.prune(model, sparsity=0.5)

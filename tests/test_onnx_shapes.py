"""Shapes by abstract execution, the search for sizes, and inputs made up from both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.shapes import infer
from sparsecc.onnxfile.synth import synthesise
from sparsecc.reference.onnx_run import Runner

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Node = onnx.NodeProto


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(
    nodes: list[Node],
    inputs: dict[str, tuple[int, list[Any] | None]],
    outputs: list[str],
    weights: dict[str, Any] | None = None,
    opset: int = 17,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def agrees(proto: ModelProto, overrides: dict[str, torch.Tensor] | None = None) -> None:
    """Inferred shapes, types and known values are those of a run, under both assignments."""
    model = OnnxFile.load(proto)
    shapes = infer(model)
    inputs = synthesise(model, shapes, overrides=overrides).inputs
    for name, value in Runner(model).run(inputs, keep_values=True).items():
        info = shapes[name]
        assert info.shape == tuple(value.shape), name
        assert info.dtype == value.dtype, name
        if info.known is not None:
            np.testing.assert_array_equal(info.known, value)
    if shapes.other is None:
        return
    others = Runner(model).run(synthesise(model, shapes.other, overrides=overrides).inputs, keep_values=True)
    for name, value in others.items():
        info = shapes[name]
        assert info.shape is not None
        assert info.dynamic == tuple(a != b for a, b in zip(info.shape, value.shape, strict=True)), name


def flattening() -> ModelProto:
    """The usual ``x.view(x.size(0), -1)`` with the batch taken from Shape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "axes"], ["b1"]),
        helper.make_node("Concat", ["b1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    weights = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1])}
    return build(nodes, {"x": (FLOAT, ["n", 6, 4])}, ["y"], weights)


def test_known_integers_say_where_they_come_from() -> None:
    shapes = infer(OnnxFile.load(flattening()))
    assert shapes["y"].shape == (3, 24)
    assert shapes["y"].dynamic == (True, False)
    target = shapes["target"]
    assert target.known is not None
    assert target.origin is not None
    assert target.varies is not None
    assert target.known.tolist() == [3, -1]
    assert target.origin.tolist() == [("dim", "x", 0), ("literal", "rest", 0)]
    assert target.varies.tolist() == [True, False]
    agrees(flattening())


def test_arithmetic_has_no_origin() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=1),
        helper.make_node("Mul", ["s", "two"], ["m"]),
        helper.make_node("Slice", ["s", "k0", "k1"], ["part"]),
        helper.make_node("Expand", ["x0", "m"], ["y"]),
    ]
    weights = {
        "two": np.int64(2),
        "k0": np.array([1]),
        "k1": np.array([2]),
        "x0": np.ones((1, 1), np.float32),
    }
    proto = build(nodes, {"x": (FLOAT, ["n", 6, 4])}, ["y"], weights)
    shapes = infer(OnnxFile.load(proto))
    assert shapes["m"].known is not None
    assert shapes["m"].known.tolist() == [12, 8]
    assert shapes["m"].origin is None
    part = shapes["part"].origin
    assert part is not None
    assert part.tolist() == [("dim", "x", 2)]
    assert shapes["y"].shape == (12, 8)
    agrees(proto)


def test_weights_keep_their_shape_alone() -> None:
    weights = {"w": np.zeros((300, 400), np.float32)}
    shapes = infer(
        OnnxFile.load(
            build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (FLOAT, ["n", 300])}, ["y"], weights)
        )
    )
    assert shapes["w"].shape == (300, 400)
    assert shapes["w"].known is None
    assert shapes["y"].shape == (3, 400)


def strided(steps: int) -> ModelProto:
    """Halved ``steps`` times, doubled again and added: only multiples of 2**steps fit."""
    nodes, previous = [], "x"
    for k in range(steps):
        nodes.append(helper.make_node("Conv", [previous, "w"], [f"d{k}"], strides=[2, 2], pads=[1, 1, 1, 1]))
        previous = f"d{k}"
    for k in range(steps):
        nodes.append(helper.make_node("Resize", [previous, "", "scales"], [f"u{k}"], mode="nearest"))
        previous = f"u{k}"
    nodes.append(helper.make_node("Add", ["x", previous], ["y"]))
    weights = {"w": np.zeros((3, 3, 3, 3), np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    return build(nodes, {"x": (FLOAT, ["n", 3, "h", "w_"])}, ["y"], weights)


def test_sizes_that_fit_strides_are_found() -> None:
    shapes = infer(OnnxFile.load(strided(5)))
    assert not shapes.failed
    assert shapes["y"].dynamic == (True, False, True, True)
    sizes = [*shapes.dims.values(), *(shapes.other or {}).values()]
    assert len(set(sizes)) == 6
    agrees(strided(5))


def test_given_sizes_take_precedence() -> None:
    shapes = infer(OnnxFile.load(strided(2)), {"n": 1, ("x", 2): 64})
    assert shapes.dims["n"] == 1
    assert shapes.dims["h"] == 64
    assert shapes["y"].dynamic == (True, False, True, True)
    with pytest.raises(InvalidOption, match="no dynamic dimension 'q'; it has: n, h, w_"):
        infer(OnnxFile.load(strided(2)), {"q": 1})
    with pytest.raises(InvalidOption, match="not positive"):
        infer(OnnxFile.load(strided(2)), {"n": 0})


def test_dimensions_that_have_to_agree_are_found() -> None:
    nodes = [
        helper.make_node("Concat", ["x", "h"], ["c"], axis=1),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    inputs = {"x": (FLOAT, ["a", None]), "h": (FLOAT, ["b", 128])}
    proto = build(nodes, inputs, ["y"], {"w": np.zeros((192, 2), np.float32)})
    shapes = infer(OnnxFile.load(proto))
    assert not shapes.failed
    assert shapes.dims["a"] == shapes.dims["b"]
    assert shapes.dims["x", 1] == 64
    assert shapes["y"].dynamic == (True, False)
    agrees(proto)


def test_symbols_without_meaning_are_kept_apart() -> None:
    """``?`` is written for any dimension that is not known."""
    nodes = [helper.make_node("Transpose", ["x"], ["t"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = build(nodes, {"x": (FLOAT, ["?", "?"])}, ["y", "t"], {"w": np.zeros((17, 2), np.float32)})
    shapes = infer(OnnxFile.load(proto))
    assert set(shapes.dims) == {("x", 0), ("x", 1)}
    assert shapes.dims["x", 1] == 17
    assert shapes["y"].dynamic == (True, False)


def test_a_model_that_fits_no_sizes_still_gives_shapes() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Add", ["w5", "w7"], ["bad"]),
        helper.make_node("Mul", ["r", "bad"], ["y"]),
    ]
    weights = {"w5": np.zeros(100, np.float32), "w7": np.zeros(77, np.float32)}
    shapes = infer(OnnxFile.load(build(nodes, {"x": (FLOAT, ["n", 3])}, ["y"], weights)))
    assert shapes["r"].shape == (3, 3)
    assert shapes["y"].shape is None
    assert "do not broadcast" in shapes["y"].why
    assert "Add" in shapes.failed[0]


@pytest.mark.parametrize("rows", ["n", 3])
def test_sizes_that_depend_on_data_are_dynamic(rows: str | int) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["z"]),
        helper.make_node("Transpose", ["z"], ["t"]),
        helper.make_node("Shape", ["t"], ["s"]),
        helper.make_node("Relu", ["x"], ["r"]),
    ]
    shapes = infer(OnnxFile.load(build(nodes, {"x": (FLOAT, [rows, 3])}, ["t", "r", "s"])))
    found = shapes["t"].shape
    assert found is not None
    assert found[1] == 2
    assert shapes["t"].dynamic == (True, False)
    varies = shapes["s"].varies
    assert varies is not None
    assert varies.tolist() == [True, False]
    assert shapes["r"].shape == (3, 3)
    assert shapes.get("nowhere").shape is None


def test_values_behind_sizes_that_do_not_fit_are_unknown() -> None:
    """No size can stand for one that the data make fit."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["z"]),
        helper.make_node("Reshape", ["z", "fixed"], ["y"]),
        helper.make_node("Relu", ["x"], ["r"]),
    ]
    proto = build(nodes, {"x": (FLOAT, ["n", 3])}, ["y", "r"], {"fixed": np.array([2, 5], np.int64)})
    shapes = infer(OnnxFile.load(proto))
    assert shapes["z"].shape is None
    assert "NonZero" in shapes["z"].why
    assert shapes["r"].shape == (3, 3)


def test_declared_shapes_help_where_execution_cannot() -> None:
    proto = build([helper.make_node("NonZero", ["x"], ["z"]), helper.make_node("Relu", ["x"], ["r"])],
                  {"x": (FLOAT, ["n", 3])}, ["z"])  # fmt: skip
    proto.graph.value_info.append(helper.make_tensor_value_info("z", INT64, [2, 9]))
    assert infer(OnnxFile.load(proto))["z"].shape == (2, 9)


def branch(op: str, name: str) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node(op, ["x", "w"], [name])], name, [], [helper.make_empty_tensor_value_info(name)]
    )


def test_branches_of_the_same_shape() -> None:
    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("Add", "t"), else_branch=branch("Mul", "e")
    )
    inputs = {"x": (FLOAT, ["n", 4]), "c": (BOOL, [])}
    shapes = infer(OnnxFile.load(build([node], inputs, ["y"], {"w": np.ones(4, np.float32)})))
    assert shapes["y"].shape == (3, 4)
    assert shapes["y"].dynamic == (True, False)


def test_absurd_sizes_allocate_nothing() -> None:
    huge = np.array([1 << 20, 1 << 20, 1 << 10])
    nodes = [
        helper.make_node("ConstantOfShape", ["huge"], ["a"]),
        helper.make_node("Tile", ["one", "huge"], ["b"]),
        helper.make_node("Expand", ["one", "huge"], ["c"]),
        helper.make_node("Range", ["start", "limit", "delta"], ["d"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    weights = {"huge": huge, "one": np.ones((1, 1, 1), np.int64)}
    weights |= {"start": np.int64(0), "limit": np.int64(1 << 35), "delta": np.int64(1)}
    shapes = infer(OnnxFile.load(build(nodes, {"x": (FLOAT, ["n", 3])}, ["y", "a", "b", "c", "d"], weights)))
    assert shapes["a"].shape == shapes["b"].shape == shapes["c"].shape == tuple(huge)
    assert shapes["d"].shape == (1 << 35,)
    impossible = build([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [1 << 40, 1 << 40])}, ["y"])
    assert infer(OnnxFile.load(impossible))["y"].shape is None


def fits(shape: tuple[int, ...], dynamic: tuple[bool, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is the wanted one but for sizes that depend on data."""
    return len(shape) == len(wanted) and all(
        varies or a == b for a, b, varies in zip(shape, wanted, dynamic, strict=True)
    )


def test_every_operator_has_the_shape_that_it_computes() -> None:
    """Against the results that come with the operators' own test data."""
    import warnings

    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases()
    # a declared size of 0 counts as unknown
    skipped = {"test_triu_zero", "test_tril_zero"}
    wrong, unknown, right = [], 0, 0
    for case in cases:
        opset = min((o.version for o in case.model.opset_import if not o.domain), default=99)
        if opset < 11 or case.name in skipped:
            continue
        shapes = infer(OnnxFile.load(case.model))
        wrong += [f"{case.name}: {failure}" for failure in shapes.failed]
        for value, wanted in zip(case.model.graph.output, case.data_sets[0][1], strict=False):
            if not isinstance(wanted, np.ndarray):
                continue
            found = shapes[value.name]
            unknown, right = unknown + (found.shape is None), right + (found.shape == wanted.shape)
            if found.shape is not None and not fits(found.shape, found.dynamic, wanted.shape):
                wrong.append(f"{case.name}: {value.name} is {wanted.shape}, not {found.shape}")
            if found.known is not None and not np.array_equal(found.known, wanted):
                wrong.append(f"{case.name}: {value.name} is known wrongly")
    assert not wrong, "\n".join(wrong)
    assert unknown < 0.05 * right


def chain(blocks: int) -> ModelProto:
    """A residual chain of eight nodes a block, with sizes taken from Shape."""
    nodes, previous = [], "x"
    for k in range(blocks):
        names = [f"v{k}_{j}" for j in range(8)]
        nodes += [
            helper.make_node("LayerNormalization", [previous, "g", "g"], [names[0]]),
            helper.make_node("MatMul", [names[0], "w"], [names[1]]),
            helper.make_node("Shape", [names[1]], [names[2]]),
            helper.make_node("Reshape", [names[1], "split"], [names[3]]),
            helper.make_node("Transpose", [names[3]], [names[4]], perm=[0, 2, 1, 3]),
            helper.make_node("Transpose", [names[4]], [names[5]], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [names[5], names[2]], [names[6]]),
            helper.make_node("Add", [names[6], previous], [names[7]]),
        ]
        previous = names[7]
    nodes.append(helper.make_node("Identity", [previous], ["y"]))
    weights = {
        "g": np.ones(64, np.float32),
        "w": np.ones((64, 64), np.float32),
        "split": np.array([0, 0, 4, 16]),
    }
    return build(nodes, {"x": (FLOAT, ["n", "s", 64])}, ["y"], weights)


def calls_of(run: Callable[[], object]) -> int:
    """How many functions, Python's and built-in ones, a run calls."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_the_work_grows_with_the_number_of_nodes_and_no_faster() -> None:
    small, large = (OnnxFile.load(chain(blocks)) for blocks in (50, 200))
    for model in (small, large):
        assert infer(model)["y"].dynamic == (True, True, False)
    assert calls_of(lambda: infer(large)) < 5 * calls_of(lambda: infer(small))
    agrees(chain(2))


# ---------------------------------------------------------------------- inputs


def language_model() -> ModelProto:
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["e"]),
        helper.make_node("Add", ["positions", "two"], ["p2"]),
        helper.make_node("Gather", ["places", "p2"], ["p"]),
        helper.make_node("Add", ["e", "p"], ["h"]),
        helper.make_node("Cast", ["mask"], ["m"], to=FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"]),
        helper.make_node("Mul", ["h", "m3"], ["y"]),
    ]
    inputs = {name: (INT64, ["b", "s"]) for name in ("ids", "positions", "mask")}
    weights = {
        "words": np.zeros((31, 8), np.float32),
        "places": np.zeros((12, 8), np.float32),
        "two": np.int64(2),
        "last": np.array([-1]),
    }
    return build(nodes, inputs, ["y"], weights)


def test_integers_are_drawn_from_what_they_index() -> None:
    model = OnnxFile.load(language_model())
    made = synthesise(model, {"b": 40, "s": 50}, seed=3)
    ids, positions, mask = (made.inputs[name] for name in ("ids", "positions", "mask"))
    assert ids.shape == (40, 50)
    assert (ids.min().item(), ids.max().item()) == (0, 30)
    assert (positions.min().item(), positions.max().item()) == (0, 9)
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask.double().mean() > 0.8
    assert made.notes[0] == "ids: int64[40, 50], uniform in [0, 31), indexes 'words'"
    assert "a mask" in made.notes[2]
    Runner(model).run(made.inputs)


#: operator, its integer input, the shapes of the others, attributes, and what is drawn: lowest and highest
COUNTS: list[tuple[str, int, dict[int, list[int]], dict[str, Any], tuple[int, int]]] = [
    ("LSTM", 4, {0: [7, 50, 3], 1: [1, 16, 3], 2: [1, 16, 4]}, {"hidden_size": 4}, (1, 7)),
    ("GRU", 4, {0: [50, 7, 3], 1: [1, 12, 3], 2: [1, 12, 4]}, {"hidden_size": 4, "layout": 1}, (1, 7)),
    ("RNN", 4, {0: [7, 50, 3], 1: [1, 4, 3], 2: [1, 4, 4]}, {"hidden_size": 4}, (1, 7)),
    ("ReverseSequence", 1, {0: [7, 50, 3]}, {}, (1, 7)),
    ("ReverseSequence", 1, {0: [50, 7, 3]}, {"time_axis": 1, "batch_axis": 0}, (1, 7)),
    ("RoiAlign", 2, {0: [7, 3, 8, 8], 1: [50, 4]}, {}, (0, 6)),
]


@pytest.mark.parametrize(("kind", "place", "others", "attributes", "wanted"), COUNTS)
def test_integers_are_drawn_from_what_operators_take(
    kind: str,
    place: int,
    others: dict[int, list[int]],
    attributes: dict[str, Any],
    wanted: tuple[int, int],
) -> None:
    names = [f"i{i}" if i in (*others, place) else "" for i in range(place + 1)]
    integer = INT64 if kind in ("ReverseSequence", "RoiAlign") else TensorProto.INT32
    inputs: dict[str, Any] = {f"i{i}": (FLOAT, shape) for i, shape in others.items()}
    proto = build([helper.make_node(kind, names, ["y"], **attributes)], inputs, ["y"])
    proto.graph.input.append(helper.make_tensor_value_info(f"i{place}", integer, [50]))
    made = synthesise(OnnxFile.load(proto), seed=2)
    drawn = made.inputs[f"i{place}"]
    assert (drawn.min().item(), drawn.max().item()) == wanted
    Runner(OnnxFile.load(proto)).run(made.inputs)


def test_fused_operators_get_the_integers_that_they_take() -> None:
    tables = {f"t{i}": np.zeros((n, 8), np.float32) for i, n in ((2, 31), (3, 50), (4, 2))}
    norm = {f"t{i}": np.ones(8, np.float32) for i in (5, 6)}
    weights: dict[str, Any] = {
        **tables,
        **norm,
        "w": np.ones((8, 24), np.float32),
        "b": np.ones(24, np.float32),
    }
    fused = [
        helper.make_node(
            "EmbedLayerNormalization",
            ["ids", "kinds", "t2", "t3", "t4", "t5", "t6", "mask"],
            ["e", "count"],
            domain="com.microsoft",
        ),
        helper.make_node("Attention", ["e", "w", "b", "lengths"], ["y"], num_heads=2, domain="com.microsoft"),
    ]
    shapes = {"ids": [60, 9], "kinds": [60, 9], "mask": [60, 9], "lengths": [60]}
    proto = build(fused, {name: (TensorProto.INT32, shape) for name, shape in shapes.items()}, ["y"], weights)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    made = synthesise(OnnxFile.load(proto), seed=1).inputs
    drawn = {name: (value.min().item(), value.max().item()) for name, value in made.items()}
    assert drawn == {"ids": (0, 30), "kinds": (0, 1), "mask": (0, 1), "lengths": (1, 9)}


def test_the_same_seed_gives_the_same_inputs() -> None:
    model = OnnxFile.load(language_model())
    one, two, other = (synthesise(model, seed=seed).inputs for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["ids"], other["ids"])
    overridden = synthesise(model, seed=1, overrides={"mask": torch.ones(3, 5, dtype=torch.int64)})
    assert torch.equal(overridden.inputs["ids"], one["ids"])
    assert overridden.notes[2].startswith("mask: given")


def test_a_scalar_takes_a_value_that_the_model_knows() -> None:
    nodes = [
        helper.make_node("Equal", ["sr", "k"], ["c"]),
        helper.make_node("Where", ["c", "x", "x"], ["y"]),
    ]
    proto = build(nodes, {"x": (FLOAT, [2]), "sr": (INT64, [])}, ["y"], {"k": np.int64(16000)})
    made = synthesise(OnnxFile.load(proto))
    assert made.inputs["sr"].item() == 16000


def test_overrides_have_to_fit() -> None:
    model = OnnxFile.load(language_model())
    with pytest.raises(InvalidOption, match="no input is named q"):
        synthesise(model, overrides={"q": torch.ones(1)})
    with pytest.raises(InvalidOption, match="has shape"):
        synthesise(model, overrides={"ids": torch.ones(1, dtype=torch.int64)})


def test_inputs_that_cannot_be_made_up_are_named() -> None:
    proto = build([helper.make_node("Identity", ["x"], ["y"])], {"x": (TensorProto.STRING, [2])}, ["y"])
    with pytest.raises(InvalidOption, match="give it as an example input"):
        synthesise(OnnxFile.load(proto))
    proto = build([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [1 << 20, 1 << 20])}, ["y"])
    with pytest.raises(InvalidOption, match="too large"):
        synthesise(OnnxFile.load(proto))

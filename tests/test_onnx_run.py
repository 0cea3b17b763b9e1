"""The ONNX reference against the operators' own test data, onnxruntime, and its contract."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparsecc.errors import InvalidModel, InvalidOption, UnsupportedModel
from sparsecc.onnxfile.model import OnnxFile, to_numpy
from sparsecc.reference.onnx_run import Runner

KNOWN_EXCLUSIONS = {
    # random numbers: deterministic here, but no two implementations draw the same
    "test_bernoulli",
    "test_bernoulli_expanded",
    "test_bernoulli_double",
    "test_bernoulli_double_expanded",
    "test_bernoulli_seed",
    "test_bernoulli_seed_expanded",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def node_cases() -> list[Any]:
    """The operators' test cases that come with onnx; those below opset 11 are refused on load."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases()
    return [
        case
        for case in cases
        if min((o.version for o in case.model.opset_import if not o.domain), default=99) >= 11
    ]


def assert_same(wanted: Any, found: Any, rtol: float, atol: float) -> None:
    if isinstance(wanted, (list, tuple)):
        assert len(wanted) == len(found)
        for pair in zip(wanted, found, strict=True):
            assert_same(*pair, rtol, atol)
        return
    if wanted is None:
        assert found is None
        return
    wanted = plain(wanted)
    found = to_numpy(found)
    assert wanted.shape == found.shape
    if wanted.dtype == object or wanted.dtype.kind in "US":
        assert [text(w) for w in wanted.ravel()] == [text(f) for f in found.ravel()]
        return
    assert wanted.dtype == found.dtype
    if wanted.dtype.name in ("float16", "bfloat16"):
        rtol, atol = max(rtol, 2e-2), max(atol, 1e-3)
    if wanted.dtype.kind not in "fiubc":
        wanted, found = wanted.astype(np.float32), found.astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def feeds(model: OnnxFile, inputs: Any) -> dict[str, Any]:
    names = [value.name for value in model.proto.graph.input]
    return {
        name: numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
        for name, value in zip(names, inputs, strict=False)
    }


@pytest.mark.parametrize("block", range(8))
def test_every_operator_gives_the_results_of_the_specification(block: int) -> None:
    failures = []
    cases = node_cases()
    assert len(cases) > 1000
    for case in cases[block::8]:
        if case.name in KNOWN_EXCLUSIONS:
            continue
        model = OnnxFile.load(case.model)
        runner = Runner(model)
        for inputs, outputs in case.data_sets:
            try:
                found = runner.run(feeds(model, inputs))
                for value, wanted in zip(model.proto.graph.output, outputs, strict=False):
                    assert_same(wanted, found[value.name], max(case.rtol, 1e-3), max(case.atol, 1e-5))
            except Exception as error:
                failures.append(f"{case.name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("block", range(4))
def test_promotion_to_float64_changes_types_and_not_results(block: int) -> None:
    failures = []
    for case in node_cases()[block::4]:
        if case.name in KNOWN_EXCLUSIONS:
            continue
        model = OnnxFile.load(case.model)
        for inputs, outputs in case.data_sets:
            found = Runner(model, dtype=torch.float64).run(feeds(model, inputs))
            for value, wanted in zip(model.proto.graph.output, outputs, strict=False):
                if not isinstance(wanted, np.ndarray) or wanted.dtype.name not in (
                    "float16",
                    "float32",
                    "bfloat16",
                ):
                    continue
                tensor = found[value.name]
                close = np.allclose(tensor, wanted.astype(np.float64), rtol=2e-2, atol=1e-3, equal_nan=True)
                if tensor.dtype != torch.float64 or not close:
                    failures.append(f"{case.name}: {tensor.dtype}")
    assert not failures, "\n".join(failures)


# ---------------------------------------------------------------------- against onnxruntime


def node_model(
    op: str, inputs: dict[str, Any], opset: int = 17, outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    """A model of one node, whose inputs are all graph inputs."""
    names = [f"y{k}" for k in range(outputs)]
    node = helper.make_node(op, list(inputs), names, **attributes)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
        for name, x in inputs.items()
        if name
    ]
    graph = helper.make_graph([node], "g", values, [helper.make_empty_tensor_value_info(n) for n in names])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def compare(
    op: str, inputs: dict[str, Any], opset: int = 17, tolerance: float = 1e-5, **attributes: Any
) -> None:
    import onnxruntime

    proto = node_model(op, inputs, opset, **attributes)
    given = {name: x for name, x in inputs.items() if name}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    wanted = onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, given)[0]
    model = OnnxFile.load(proto)
    found = Runner(model).run(given)["y0"]
    assert tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    wide = Runner(model, dtype=torch.float64).run(given)["y0"]
    np.testing.assert_allclose(wide, wanted, rtol=tolerance, atol=tolerance)


def floats(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_convolutions_agree_with_onnxruntime(dims: int, groups: int, data: st.DataObject) -> None:
    draw = data.draw
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    attributes: dict[str, Any] = {
        "strides": [draw(st.integers(1, 3)) for _ in range(dims)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(dims)],
        "group": groups,
    }
    auto = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * dims)]
    else:
        attributes["auto_pad"] = auto
        attributes["dilations"] = [1] * dims  # onnxruntime has no others with automatic padding
    sizes = [draw(st.integers(6, 9)) for _ in range(dims)]
    inputs = {"x": floats((2, 2 * groups, *sizes)), "w": floats((3 * groups, 2, *kernel), 1)}
    if draw(st.booleans()):
        inputs["b"] = floats((3 * groups,), 2)
    compare("Conv", inputs, tolerance=1e-4, **attributes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(dims=st.integers(1, 2), groups=st.sampled_from([1, 2]), data=st.data())
def test_transposed_convolutions_agree_with_onnxruntime(dims: int, groups: int, data: st.DataObject) -> None:
    draw = data.draw
    strides = [draw(st.integers(1, 3)) for _ in range(dims)]
    attributes: dict[str, Any] = {
        "strides": strides,
        "dilations": [draw(st.integers(1, 2)) for _ in range(dims)],
        "group": groups,
        "pads": [draw(st.integers(0, 1)) for _ in range(2 * dims)],
        "output_padding": [draw(st.integers(0, stride - 1)) for stride in strides],
    }
    kernel = [draw(st.integers(2, 3)) for _ in range(dims)]
    inputs = {"x": floats((2, 2 * groups, *[5] * dims)), "w": floats((2 * groups, 3, *kernel), 1)}
    inputs["b"] = floats((3 * groups,), 2)
    compare("ConvTranspose", inputs, tolerance=1e-4, **attributes)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(op=st.sampled_from(["MaxPool", "AveragePool", "LpPool"]), dims=st.integers(1, 3), data=st.data())
def test_pooling_agrees_with_onnxruntime(op: str, dims: int, data: st.DataObject) -> None:
    draw = data.draw
    kernel = [draw(st.integers(2, 3)) for _ in range(dims)]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(dims)],
        "pads": [draw(st.integers(0, 1)) for _ in range(2 * dims)],
    }
    if op != "LpPool":  # before opset 18
        attributes["ceil_mode"] = draw(st.integers(0, 1))
    if op == "MaxPool":
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(dims)]
    if op == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    sizes = [draw(st.integers(6, 9)) for _ in range(dims)]
    compare(op, {"x": floats((2, 3, *sizes))}, tolerance=1e-4, **attributes)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_resizing_agrees_with_onnxruntime(data: st.DataObject) -> None:
    draw = data.draw
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    transforms = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]
    attributes: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": draw(st.sampled_from(transforms)),
    }
    if mode == "nearest":
        modes = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        attributes["nearest_mode"] = draw(st.sampled_from(modes))
    height, width = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    x = floats((1, 2, height, width))
    if draw(st.booleans()):
        new = np.array([1, 2, draw(st.integers(3, 17)), draw(st.integers(3, 17))], np.int64)
        inputs = {"x": x, "": None, "sizes": new}
        proto_inputs = ["x", "", "", "sizes"]
    else:
        # where align_corners meets a fractional length, onnxruntime departs from the specification
        whole = attributes["coordinate_transformation_mode"] == "align_corners"
        factors = st.sampled_from([1.0, 2.0, 3.0] if whole else [0.5, 0.75, 1.0, 1.5, 2.0, 3.0])
        inputs = {"x": x, "scales": np.array([1, 1, draw(factors), draw(factors)], np.float32)}
        proto_inputs = ["x", "", "scales"]
    compare_resize(proto_inputs, {k: v for k, v in inputs.items() if k}, attributes)


def compare_resize(names: list[str], inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    import onnxruntime

    node = helper.make_node("Resize", names, ["y0"], **attributes)
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
        for n, x in inputs.items()
    ]
    graph = helper.make_graph([node], "g", values, [helper.make_empty_tensor_value_info("y0")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, inputs)[0]
    found = Runner(OnnxFile.load(proto)).run(inputs)["y0"]
    assert tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("masked", [True, False])
def test_deformed_convolutions_agree_with_onnxruntime(
    strides: list[int], groups: int, offset_groups: int, masked: bool
) -> None:
    kernel, pads, dilations, image = (3, 2), [1, 0, 2, 1], [2, 1], (9, 7)
    sizes = [
        (n + pads[i] + pads[i + 2] - (k - 1) * dilations[i] - 1) // strides[i] + 1
        for i, (n, k) in enumerate(zip(image, kernel, strict=True))
    ]
    inputs = {
        "x": floats((2, 4, *image)),
        "w": floats((6, 4 // groups, *kernel)),
        "offset": 2 * floats((2, offset_groups * 12, *sizes)),
        "b": floats((6,)),
    }
    if masked:
        inputs["mask"] = floats((2, offset_groups * 6, *sizes))
    attributes = {"group": groups, "offset_group": offset_groups, "strides": strides}
    compare("DeformConv", inputs, 19, 1e-4, pads=pads, dilations=dilations, **attributes)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize(
    ("opset", "mode"), [(11, None), (16, None), (16, "half_pixel"), (16, "output_half_pixel")]
)
def test_what_boxes_hold_agrees_with_onnxruntime(opset: int, samples: int, mode: str | None) -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(-4, 18, (12, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + random.uniform(0.1, 14, (12, 2))], 1, dtype=np.float32)
    inputs = {"x": floats((3, 4, 9, 7)), "boxes": boxes, "images": np.arange(12) % 3}
    attributes = {"output_height": 3, "output_width": 2, "sampling_ratio": samples, "spatial_scale": 0.6}
    chosen = {} if mode is None else {"coordinate_transformation_mode": mode}
    compare("RoiAlign", inputs, opset, 1e-4, **attributes, **chosen)


@pytest.mark.parametrize("opset", [11, 16])
def test_the_largest_values_in_boxes_agree_with_onnxruntime(opset: int) -> None:
    """onnx.reference, which computes these, knows the default of newer opsets alone."""
    inputs = {"x": floats((2, 2, 6, 6)), "boxes": [[0, 0, 2, 2], [1, 0, 3, 2]], "images": np.arange(2)}
    inputs["boxes"] = np.array(inputs["boxes"], np.float32)
    attributes = {"mode": "max", "output_height": 2, "output_width": 2, "sampling_ratio": 1}
    compare("RoiAlign", inputs, opset, 1e-4, **attributes)


_NONE = np.zeros((0, 1), np.int64)
#: operator, inputs without elements, opset, attributes
EMPTY: dict[str, tuple[str, list[Any], int, dict[str, Any]]] = {
    "places in nothing": ("GatherND", [floats((0, 3)), _NONE], 17, {}),
    "places of many in nothing": ("GatherND", [floats((2, 0, 3)), np.zeros((2, 0, 1), np.int64)], 17, {}),
    "no places": ("GatherND", [floats((2, 3)), _NONE], 17, {}),
    "nothing is written": ("ScatterND", [floats((2, 21)), _NONE, floats((0, 21))], 17, {}),
    "rows without elements are written": (
        "ScatterND", [floats((2, 0)), np.array([[1]]), floats((1, 0))], 17, {},
    ),
    "nothing is gathered": ("Gather", [floats((0, 3)), np.zeros(0, np.int64)], 17, {}),
    "nothing is compressed": ("Compress", [floats((0, 3)), np.zeros(0, bool)], 17, {"axis": 0}),
    "running sums": ("CumSum", [floats((0, 3)), np.array(0)], 17, {"exclusive": 1}),
    "spectra": ("DFT", [floats((0, 8, 1))], 17, {"axis": 1, "onesided": 1}),
    "spectra of frames": (
        "STFT", [floats((0, 32, 1)), np.array(8), floats((16,))], 17, {"onesided": 1},
    ),
    "a pool of no image": ("MaxPool", [floats((0, 2, 5, 5))], 17, {"kernel_shape": [3, 3]}),
    "no maximum": ("Hardmax", [floats((4, 0))], 13, {}),
    "no maximum of all": ("Hardmax", [floats((4, 0, 2))], 11, {"axis": 1}),
    "no share": ("LogSoftmax", [floats((0, 4, 2))], 11, {"axis": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_tensors_without_elements_agree_with_onnxruntime(case: str) -> None:
    op, inputs, opset, attributes = EMPTY[case]
    compare(op, {f"x{k}": x for k, x in enumerate(inputs)}, opset, **attributes)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax_before_and_after_opset_13(op: str, opset: int, axis: int) -> None:
    compare(op, {"x": floats((2, 3, 4))}, opset, axis=axis)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [None, [4, 2, 3]])
def test_recurrent_operators_agree_with_onnxruntime(
    op: str, direction: str, lengths: list[int] | None
) -> None:
    gates, directions, hidden = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 1 + (direction == "bidirectional"), 5
    inputs = {
        "x": floats((4, 3, 2)),
        "w": floats((directions, gates * hidden, 2), 1),
        "r": floats((directions, gates * hidden, hidden), 2),
        "b": floats((directions, 2 * gates * hidden), 3),
    }
    if lengths is not None:
        inputs["lengths"] = np.array(lengths, np.int32)
    extra = {"linear_before_reset": 1} if op == "GRU" else {}
    compare(op, inputs, tolerance=1e-5, hidden_size=hidden, direction=direction, **extra)


# ---------------------------------------------------------------------- contract of the runner


def small_model() -> onnx.ModelProto:
    """x[b,3] -> relu(x @ w) -> Shape-dependent reshape."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT16),
    ]
    weight = numpy_helper.from_array(floats((3, 4), 7), "w")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["b", 4])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_promotion_covers_weights_inputs_and_casts() -> None:
    x = floats((2, 3))
    y = Runner(OnnxFile.load(small_model()), dtype=torch.float64).run({"x": x})["y"]
    exact = np.maximum(x.astype(np.float64) @ floats((3, 4), 7).astype(np.float64), 0)
    np.testing.assert_allclose(y, exact, rtol=1e-15)


@pytest.mark.parametrize("as_node", [False, True])
def test_sizes_keep_their_precision_under_promotion(as_node: bool) -> None:
    """floor(10 * 0.7) is 7 in float32, and 6 when 0.7 is promoted after it was rounded."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "k"], ["m"]),
        helper.make_node("Floor", ["m"], ["fl"]),
        helper.make_node("Cast", ["fl"], ["n"], to=TensorProto.INT64),
        helper.make_node("Expand", ["k", "n"], ["y"]),
    ]
    factor = numpy_helper.from_array(np.array([0.7], np.float32), "k")
    if as_node:
        nodes.insert(0, helper.make_node("Constant", [], ["k"], value=factor))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [] if as_node else [factor],
    )
    model = OnnxFile.load(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )
    for dtype in (None, torch.float64):
        assert tuple(Runner(model, dtype=dtype).run({"x": np.zeros(10, np.float32)})["y"].shape) == (7,)


def test_a_hook_sees_every_node_and_replaces_its_outputs() -> None:
    model = OnnxFile.load(small_model())
    seen = []

    def hook(node: Any, index: int, inputs: Any, default: Any) -> Any:
        seen.append((node.op_type, index, [tuple(x.shape) for x in inputs]))
        if node.op_type == "MatMul":
            keep = torch.tensor([True, False, True])
            return default([torch.where(keep, inputs[0], 0), inputs[1]])
        return default(inputs)

    x = floats((2, 3))
    masked = Runner(model).run({"x": x}, hook=hook)["y"]
    assert seen == [("MatMul", 0, [(2, 3), (3, 4)]), ("Relu", 1, [(2, 4)]), ("Cast", 2, [(2, 4)])]
    x[:, 1] = 0
    torch.testing.assert_close(masked, Runner(model).run({"x": x})["y"])


def test_values_can_be_kept() -> None:
    values = Runner(OnnxFile.load(small_model())).run({"x": floats((2, 3))}, keep_values=True)
    assert {"x", "h", "r", "y"} <= set(values)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "missing \\['x'\\]"),
        ({"z": np.zeros(3, np.float32)}, "unknown \\['z'\\]"),
        ({"x": np.zeros((2, 4), np.float32)}, "has shape \\[2, 4\\]"),
        ({"x": np.zeros(3, np.float32)}, "has shape \\[3\\]"),
        ({"x": np.zeros((2, 3), np.int64)}, "the model takes FLOAT"),
    ],
)
def test_wrong_inputs_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        Runner(OnnxFile.load(small_model())).run(inputs)


def test_a_node_that_cannot_be_computed_is_named() -> None:
    proto = small_model()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(floats((5, 4)), "w"))
    with pytest.raises(InvalidModel, match="MatMul 'product' \\(node 0\\)"):
        Runner(OnnxFile.load(proto)).run({"x": floats((2, 3))})


def test_an_operator_without_implementation_is_named() -> None:
    proto = small_model()
    proto.opset_import.append(helper.make_opsetid("my.domain", 1))
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Mystery", "my.domain"
    with pytest.raises(UnsupportedModel, match="Mystery"):
        Runner(OnnxFile.load(proto)).run({"x": floats((2, 3))})


def test_unsorted_nodes_are_executed_in_order() -> None:
    proto = small_model()
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node][::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    wanted = Runner(OnnxFile.load(small_model())).run({"x": floats((2, 3))})["y"]
    torch.testing.assert_close(Runner(OnnxFile.load(proto)).run({"x": floats((2, 3))})["y"], wanted)


def test_control_flow_sees_outer_values() -> None:
    then_graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["t"])], "t", [], [helper.make_empty_tensor_value_info("t")]
    )
    else_graph = helper.make_graph(
        [helper.make_node("Sub", ["x", "w"], ["e"])], "e", [], [helper.make_empty_tensor_value_info("e")]
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=then_graph, else_branch=else_graph)]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array([1, 2], np.float32), "w")],
    )
    model = OnnxFile.load(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )
    x = np.array([5, 5], np.float32)
    for dtype in (None, torch.float64):
        runner = Runner(model, dtype=dtype)
        assert runner.run({"x": x, "c": np.array(True)})["y"].tolist() == [6, 7]
        assert runner.run({"x": x, "c": np.array(False)})["y"].tolist() == [4, 3]


def test_half_precision_is_rounded_after_each_node_and_not_within() -> None:
    x = (floats((1, 4096)) * 10).astype(np.float16)
    w = floats((4096, 1), 1).astype(np.float16)
    y = Runner(OnnxFile.load(node_model("MatMul", {"a": x, "b": w}))).run({"a": x, "b": w})["y0"]
    assert y.dtype == torch.float16
    exact = (x.astype(np.float64) @ w.astype(np.float64)).item()
    assert abs(y.item() - exact) <= 2**-10 * abs(exact)

"""Quantised products that targets for sparse tensor cores multiply in integers, and what stays dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import event, given
from onnx import TensorProto, helper, numpy_helper

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.shapes import infer
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.cuda.choice import INT8_CURVES, Choice, choose
from sparsecc.targets.cuda.layers import find_layers
from sparsecc.targets.cuda.plan_kernels import element_of
from sparsecc.targets.cuda.rewrite import rewritten
from tests.onnx_graphs import ort
from tests.quantised_graphs import Array, Builder, built, dynamic, graphs, kernel, single, two_of_four


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


@pytest.mark.parametrize(
    "proto", [dynamic(), single("Conv", kernel(3), 0, zero=3, shape=IMAGES, pads=[1] * 4).proto]
)
def test_names_that_are_taken_stay_with_their_values(proto: onnx.ModelProto) -> None:
    """Every name that is made up is first given to another value of the model."""
    file = OnnxFile.load(proto)
    before = {name for node in proto.graph.node for name in node.output}
    layers = find_layers(file, infer(file), "int8")
    made = rewritten(file, layers, {}, "int8").graph
    new = {n for node in made.node for n in node.output if n not in before}
    new |= {t.name for t in made.initializer} - {t.name for t in proto.graph.initializer}
    for name in sorted(new):
        proto.graph.node.append(helper.make_node("Neg", ["x"], [name]))
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    file = OnnxFile.load(proto)
    x = torch.randn(2, *[d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]])
    wanted = Runner(file, dtype=torch.float64).run({"x": x})
    result = OnnxFile.load(rewritten(file, find_layers(file, infer(file), "int8"), {}, "int8"))
    for name, value in Runner(result, dtype=torch.float64).run({"x": x}).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)


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


def _int8_choices(width: int) -> dict[str, Choice]:
    """What is chosen on every architecture for a square product of the given width."""
    file = single(w=np.zeros((width, width)), shape=(width, width))
    (layer,) = find_layers(file, infer(file), "int8")
    return {arch: choose(layer, arch, "modelled", "int8") for arch in INT8_CURVES}


def test_published_speeds_of_int8_decide() -> None:
    """Known points come back; GPUs without measurements get the slower of those that have some."""
    assert INT8_CURVES.keys() >= {"sm80", "sm86", "sm89", "sm90", "sm120"}
    small, large = (_int8_choices(width) for width in (512, 2048))
    assert [small[a].sparse for a in ("sm80", "sm90", "sm89")] == [True, False, False]
    assert "memory limits the dense product" in small["sm80"].why  # less than the 1.05 of the curve
    assert small["sm80"].expected < INT8_CURVES["sm80"].ratios[512]
    assert "A100 PCIe, int8" in large["sm80"].why
    assert "none was measured here" in large["sm120"].why
    for curve in INT8_CURVES.values():
        for width, ratio in curve.ratios.items():
            assert curve.at(2.0 * width**3) == pytest.approx(ratio)
            assert ratio >= min(INT8_CURVES[a].ratios[width] for a in ("sm80", "sm90"))

"""What an artifact may differ by from the model that it was made of, and what a failure says."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto

import sparsecc
from sparsecc.errors import TargetRefused, VerificationFailed
from sparsecc.lowered import check_lowered, lowered
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.reference.onnx_run import Runner
from sparsecc.target import Executor
from sparsecc.verification import Certificate
from sparsecc.verification.certificate import Check
from tests.onnx_graphs import Graph

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32}


def layers(dtype: str, wide: bool) -> ModelProto:
    """Three linear layers; ``wide``: inputs and outputs are float32 whatever is inside."""
    g = Graph(20, dtype=DTYPES[dtype])
    cast = wide and dtype != "float32"
    number = TensorProto.BFLOAT16 if dtype == "bfloat16" else TensorProto.FLOAT16

    def inside(name: str) -> str:
        return str(g.node("Cast", [name], f"{name}.inside", to=number)) if cast else name

    y = inside(g.input("x", ["batch", 5, 16], np.float32 if wide else None))
    for name, cin, cout in (("a", 16, 32), ("b", 32, 32), ("z", 32, 4)):
        weight = g.weight(f"{name}.weight", cin, cout)
        weight = inside(weight) if dtype == "bfloat16" else weight
        y = g.node("Relu", [g.node("MatMul", [y, weight], f"{name}.product")], name)
    return g.build(g.node("Cast", [y], "y", to=TensorProto.FLOAT) if cast else y)


def certified(model: ModelProto, factor: float, batches: Container[int] = range(99)) -> Certificate:
    """The certificate of an artifact that is off by a factor, and takes some batches only."""
    result = sparsecc.prune(model, sparsity=0.25)
    file, _ = lowered(result.subject, result.applied)

    class Off(Executor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if len(feeds["x"]) not in batches:
                raise TargetRefused("the batch has to be another one.")
            return {n: y * factor for n, y in Runner(file).run(dict(feeds)).items()}

    return check_lowered(result, file, Off())


CASES = [("float32", True), ("float16", False), ("float16", True), ("bfloat16", True)]


@pytest.mark.parametrize(("dtype", "wide"), CASES)
def test_an_artifact_is_held_to_the_rounding_of_the_model(dtype: str, wide: bool) -> None:
    assert certified(layers(dtype, wide), 1.0).status == "VERIFIED"
    assert certified(layers(dtype, wide), 1.3).status == "FAILED"


def test_what_a_runtime_does_not_take_is_tried_at_the_first_sizes() -> None:
    first = len(OnnxSubject(layers("float32", True)).inputs(0, 0)[0]["x"])
    assert certified(layers("float32", True), 1.0, [first]).status == "VERIFIED"
    with pytest.raises(TargetRefused, match=r"another one\. Give example inputs .* x: float32"):
        certified(layers("float32", True), 1.0, [])


@pytest.mark.parametrize(
    ("failed", "wanted", "other"),
    [
        (("artifact",), "what runs it here computes something else", "defect of sparsecc"),
        (("artifact", "float64"), "defect of sparsecc", "what runs it"),
        (("lowered graph",), "defect of sparsecc", "what runs it"),
    ],
)
def test_a_failure_says_whether_the_graph_is_wrong(failed: tuple[str, ...], wanted: str, other: str) -> None:
    checks = tuple(Check(what, "absolute error", 2.0, 1.0, "x") for what in failed)
    with pytest.raises(VerificationFailed, match=wanted) as caught:
        Certificate("FAILED", "a = b", checks).require()
    assert other not in str(caught.value)

"""Quantisers that read numbers off by a hair: other roundings, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsecc.lowered import check_lowered, lowered
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.pipeline import open_subject, run
from sparsecc.plan import Plan
from sparsecc.reference.onnx_run import Runner
from sparsecc.target import Executor


def net(quantised: bool, part: float = 0.5) -> ModelProto:
    """Two products; the quantiser between them reads whole numbers and a part, of which 0.5 is a tie."""
    generator = np.random.default_rng(0)
    first = (generator.integers(0, 8, (16, 16)) + part).astype(np.float32)
    weights = {"a": first, "b": generator.normal(size=(16, 4)).astype(np.float32)}
    weights |= {"s": np.float32(1), "z": np.int8(0)}
    middle = [
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        *(middle if quantised else []),
        helper.make_node("MatMul", ["d" if quantised else "h", "b"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [16, 16]), ("y", [16, 4]))
    )
    held = [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], held), opset_imports=opsets, ir_version=9
    )


@pytest.mark.parametrize("quantised", [True, False])
def test_only_what_quantisers_round_moves(quantised: bool) -> None:
    subject = open_subject(net(quantised))
    inputs = {"x": torch.eye(16)}
    plain = subject.masked(Plan("onnx"), {}, inputs)[0]
    first, again, other = (subject.masked(Plan("onnx"), {}, inputs, nudge=n)[0] for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(plain, first) == (not quantised)
    assert torch.equal(first, other) == (not quantised)
    assert (subject.step > 0) == quantised


class Off(Executor):
    """A model whose outputs are all off by a share of the largest."""

    def __init__(self, file: OnnxFile, share: float) -> None:
        self.runner, self.share = Runner(file), share

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        found = self.runner.run(feeds)
        return {name: y + self.share * y.abs().max() for name, y in found.items()}


@pytest.mark.parametrize(
    ("part", "share", "passes"),
    [(0.25, 0.01, True), (0.25, 0.03, False), (0.5, 0.03, True), (0.5, 3.0, False)],
)
def test_an_artifact_may_err_as_the_quantised_model_does(part: float, share: float, passes: bool) -> None:
    """Four steps of 255; more only where numbers near a middle move the model itself by more."""
    result = run(net(True, part), {"x": torch.eye(16)}, [], verify=False)
    file, _ = lowered(result.subject, result.applied)
    certificate = check_lowered(result, file, Off(file, share))
    assert (certificate.status != "FAILED") == passes

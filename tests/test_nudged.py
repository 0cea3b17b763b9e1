"""Quantisers that read numbers off by a hair: other roundings, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsecc.pipeline import open_subject
from sparsecc.plan import Plan


def net(quantised: bool) -> ModelProto:
    """Two products, with a quantiser between them that has most of its numbers near a middle."""
    generator = np.random.default_rng(0)
    first = (generator.integers(0, 8, (16, 16)) + 0.5).astype(np.float32)
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

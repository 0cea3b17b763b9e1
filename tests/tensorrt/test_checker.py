"""The sparsity-axis checker."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx import TensorProto

from sparsecc.targets.tensorrt import prepare, sparsity
from tests.tensorrt.graphs import (
    Array,
    edited,
    graphs,
    one,
)


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

"""Branches that only say how many axes a value has.

``x.squeeze(1)`` of an axis whose size the exporter did not know becomes an ``If``: Squeeze where the axis is
of size one, Identity where it is not.  Both branches pass the same value on, with whatever channels it has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from sparsecc.onnxfile.shapes import Shapes

_PASSING = frozenset({"Identity", "Squeeze", "Unsqueeze"})
_VALUES = ("value", "value_int", "value_ints")


def passed_on(node: NodeProto, shapes: Shapes) -> tuple[str, list[int | None]] | None:
    """The value that an ``If`` passes on, and which of its axes stand where (None: one of size one).

    None for anything else, and where the branch that is taken varies with the sizes of the inputs.
    """
    if node.op_type != "If" or len(node.output) != 1:
        return None
    taken = shapes.get(node.input[0])
    if taken.known is None or taken.known.size != 1 or not taken.settled:
        return None
    branches = {a.name: _passes(a.g) for a in node.attribute}
    one, other = branches.get("then_branch"), branches.get("else_branch")
    if one is None or other is None or one[1] != other[1]:
        return None
    kind, source, axes = one if bool(taken.known.reshape(-1)[0]) else other
    shape = shapes.get(source).shape
    return None if shape is None else (source, _axes(kind, len(shape), axes))


def _passes(graph: GraphProto) -> tuple[str, str, list[int]] | None:
    """Operator, captured value and axes of a body that does no more than that."""
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    if len(nodes) != 1 or len(graph.output) != 1 or nodes[0].output[0] != graph.output[0].name:
        return None
    (node,) = nodes
    source, *rest = node.input
    own = {t.name for t in graph.initializer} | {n for other in graph.node for n in other.output}
    if node.op_type not in _PASSING or node.domain not in ("", "ai.onnx") or source in own:
        return None
    axes = [_numbers(graph, name) for name in rest] or [
        list(a.ints) for a in node.attribute if a.name == "axes"
    ]
    if node.op_type != "Identity" and len(axes) != 1:
        return None  # every axis of size one goes, whichever those are
    if any(found is None for found in axes):
        return None
    return node.op_type, source, [a for found in axes for a in found or ()]


def _numbers(graph: GraphProto, name: str) -> list[int] | None:
    """Integers that a body stores; None where they come from elsewhere, or lie in a file of their own."""
    stored: Any = next((t for t in graph.initializer if t.name == name), None)
    for node in graph.node:
        if node.op_type == "Constant" and name in node.output and node.attribute[0].name in _VALUES:
            stored = onnx.helper.get_attribute_value(node.attribute[0])
    if stored is None or (isinstance(stored, TensorProto) and stored.data_location == TensorProto.EXTERNAL):
        return None
    found = numpy_helper.to_array(stored) if isinstance(stored, TensorProto) else np.asarray(stored)
    return [int(a) for a in np.atleast_1d(found)]


def _axes(kind: str, rank: int, axes: list[int]) -> list[int | None]:
    if kind == "Unsqueeze":
        new = {a % (rank + len(axes)) for a in axes}
        rest = iter(range(rank))
        return [None if d in new else next(rest) for d in range(rank + len(axes))]
    gone = {a % rank for a in axes}
    return [d for d in range(rank) if d not in gone]

"""Raises the declared opset of a model where that changes the meaning of none of its operators.

From 20 to 22 operators take more types, and QuantizeLinear and DequantizeLinear have new attributes with
defaults; GroupNormalization is another operator in 21, and pools round up otherwise in 22 (ONNX's operator
schemas).  Convolutions in bfloat16 are what 22 is wanted for.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from sparsecc.onnxfile.model import OnnxFile, graphs
from sparsecc.reference.onnx_ops.registry import attributes

FIRST, WANTED = 20, 22
_IR_VERSION = 10
_POOLS = ("AveragePool", "MaxPool")


def raised(file: OnnxFile) -> OnnxFile:
    """The model at opset 22; itself where that would mean another model."""
    nodes = (node for graph in graphs(file.proto) for node in graph.node)
    if not FIRST <= file.opset < WANTED or any(map(_changes, nodes)):
        return file
    proto = ModelProto()
    proto.CopyFrom(file.proto)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = WANTED
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    return file.derive(proto)


def _changes(node: NodeProto) -> bool:
    """Whether an operator means something else at opset 22."""
    if node.op_type in _POOLS:
        return bool(attributes(node).get("ceil_mode", 0))
    return node.op_type == "GroupNormalization"

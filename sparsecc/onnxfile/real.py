"""What integer and 8-bit float weights stand for, so that their magnitudes can be compared."""

from __future__ import annotations

import torch
from onnx import NodeProto

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.site import attribute
from sparsecc.reference.onnx_ops import Ctx
from sparsecc.reference.onnx_ops.fused_quant import nbits_weights
from sparsecc.reference.onnx_ops.quant import along

#: (operator, input) -> inputs that hold its scale and its zero point, and the axis that they run along
_PLACES: dict[tuple[str, int], tuple[int | None, int | None, int]] = {
    ("DequantizeLinear", 0): (1, 2, 1),
    ("QLinearConv", 3): (4, 5, 0),
    ("ConvInteger", 1): (None, 3, 0),
    ("QLinearMatMul", 0): (1, 2, -1),
    ("QLinearMatMul", 3): (4, 5, -1),
    ("MatMulInteger", 1): (None, 3, -1),
    ("MatMulIntegerToFloat", 1): (3, 5, -1),
    ("DynamicQuantizeMatMul", 1): (2, 3, -1),
    ("QGemm", 3): (4, 5, -1),
    ("QAttention", 1): (4, 7, -1),
    ("QLinearAdd", 0): (1, 2, -1),
    ("QLinearAdd", 3): (4, 5, -1),
    ("QLinearMul", 0): (1, 2, -1),
    ("QLinearMul", 3): (4, 5, -1),
}


def real_weight(model: OnnxFile, name: str) -> torch.Tensor:
    """A weight as real numbers, shape and all; those without known scales count as they are.

    Bytes that pack several numbers hold the root of their sum of squares.
    """
    numbers = model.tensor(name)
    if numbers.is_floating_point() and numbers.dtype.itemsize > 1:
        return numbers
    for node in model.proto.graph.node:
        for place, read in enumerate(node.input):
            if read == name and (node.op_type, place) == ("MatMulNBits", 1):
                return _packed(model, node, numbers)
            if read == name and (node.op_type, place) in _PLACES:
                return _scaled(model, node, place, numbers)
    return numbers.float()


def _stored(model: OnnxFile, node: NodeProto, place: int | None) -> torch.Tensor | None:
    if place is None or place >= len(node.input):
        return None
    name = node.input[place]
    return model.tensor(name) if name in model.initializers or name in model.constants else None


def _later(model: OnnxFile, node: NodeProto) -> torch.Tensor | None:
    """The scale of integer products that are scaled behind: ``Mul(Cast(product), Mul(x_scale, w_scale))``."""
    producers = {n: other for other in model.proto.graph.node for n in other.output}
    name = node.output[0]
    for other in model.proto.graph.node:
        if other.op_type == "Cast" and other.input[0] == name:
            name = other.output[0]
        elif other.op_type == "Mul" and name in other.input:
            both = producers.get(next((n for n in other.input if n != name), ""))
            found = [_stored(model, both, i) for i in (0, 1)] if both is not None else []
            known = [t for t in found if t is not None]
            return known[0] if len(known) == 1 else None
    return None


def _scaled(model: OnnxFile, node: NodeProto, place: int, numbers: torch.Tensor) -> torch.Tensor:
    scale_at, zero_at, axis = _PLACES[node.op_type, place]
    scale, zero = _stored(model, node, scale_at), _stored(model, node, zero_at)
    if scale_at is None:
        scale = _later(model, node)
    axis, block = attribute(node, "axis", axis), attribute(node, "block_size", 0)
    if attribute(node, "transB", 0):
        axis = 0
    real = numbers.float()
    if zero is not None:
        real = real - along(zero.float(), numbers, axis, block)
    return real if scale is None else real * along(scale.float(), numbers, axis, block)


def _packed(model: OnnxFile, node: NodeProto, numbers: torch.Tensor) -> torch.Tensor:
    scales = _stored(model, node, 2)
    if scales is None:
        return numbers.float()
    ctx = Ctx(node, model.opset, read=model.read)
    ctx.attrs["K"] = numbers.shape[1] * ctx.integer("block_size")  # the last block as if it were full
    w = nbits_weights(ctx, numbers, scales.float(), _stored(model, node, 3))
    return w.reshape(*numbers.shape, -1).square().sum(-1).sqrt()

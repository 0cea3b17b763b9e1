"""Products of quantised models as an int8 kernel computes them: integers, scale and bias.

    QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- w      y = s (W q) + (b - s z W 1)
    DynamicQuantizeLinear -> MatMulInteger(w) -> Cast -> Mul(s) -> Add(b)      the same, s and z known later

``q`` are the input's integers and ``z`` their zero point, both 128 lower where they are unsigned, so that
they are int8; ``s`` [out] is the input's scale times the weight's.  Sums fit int32, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from sparsecc.reference.onnx_ops.quant import along
from sparsecc.reference.onnx_ops.registry import attributes
from sparsecc.targets.cuda.layers import Border, Dynamic, Graph, Layer, Refused, biased

#: products of integers that no kernel stands for, and their input that holds the weight
OTHER_SPELLINGS: Mapping[str, int] = MappingProxyType(
    {
        "QLinearConv": 3,
        "QLinearMatMul": 3,
        "QGemm": 3,
        "ConvInteger": 1,
        "MatMulIntegerToFloat": 1,
        "DynamicQuantizeMatMul": 1,
    }
)
#: what is taken off the integers of a type to make int8 of them
SHIFTS: Mapping[torch.dtype, int] = MappingProxyType({torch.int8: 0, torch.uint8: 128})
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_LARGEST = 2**31


@dataclass(frozen=True, eq=False, slots=True)
class Decoded:
    """A weight behind DequantizeLinear: int8 or uint8, with zero points and scales of the same shape."""

    integers: Tensor
    zeros: Tensor
    scales: Tensor

    def permuted(self, order: list[int]) -> Decoded:
        return Decoded(self.integers.permute(order), self.zeros.permute(order), self.scales.permute(order))


def is_coded(graph: Graph, node: NodeProto) -> bool:
    """Whether both operands of a product are integers that stand for numbers, whatever they are."""
    if node.op_type in OTHER_SPELLINGS or node.op_type == "MatMulInteger":
        return True
    return _decoder(graph, node.input[0]) is not None and decoded(graph, node.input[1]) is not None


def coded(graph: Graph, node: NodeProto, layer: Layer, read: Callable[[Tensor], Layer]) -> Layer:
    """The layer in integers; ``read`` gives the layer for a weight as the product's operand.

    Raises ``Refused`` where its sums are not those of int8 with one scale for each output.
    """
    if node.op_type in OTHER_SPELLINGS:
        raise Refused(f"it is a {node.op_type}; products in Q/DQ form and MatMulInteger run in int8")
    return (_dynamic if node.op_type == "MatMulInteger" else _static)(graph, node, layer, read)


def decoded(graph: Graph, name: str) -> Decoded | None:
    """The stored integers behind an operand, through Transpose and Identity; None for anything else."""
    index = graph.producer.get(name)
    if index is None:
        return None
    node = graph.node(index)
    if node.op_type in ("Transpose", "Identity") and node.domain in _DOMAINS[:2]:
        inner = decoded(graph, node.input[0])
        if inner is None or node.op_type == "Identity":
            return inner
        return inner.permuted(attributes(node).get("perm") or list(range(inner.integers.dim()))[::-1])
    found = _decoder(graph, name)
    if found is None:
        return None
    constants = [graph.constant(n) if n else None for n in found.input]
    if constants[0] is None or constants[1] is None or constants[0][0].dtype not in SHIFTS:
        return None
    given, integers, scale = attributes(found), constants[0][0], constants[1][0]
    if len(found.input) > 2 and found.input[2] and constants[2] is None:
        return None
    zero = constants[2][0] if len(constants) > 2 and constants[2] is not None else torch.zeros(())

    def wide(values: Tensor) -> Tensor:
        return along(values, integers, given.get("axis", 1), given.get("block_size", 0)).expand(
            integers.shape
        )

    return Decoded(integers, wide(zero.to(torch.int32)), wide(scale.float()))


def _decoder(graph: Graph, name: str) -> NodeProto | None:
    """The DequantizeLinear that gives a value."""
    index = graph.producer.get(name)
    node = None if index is None else graph.node(index)
    return node if node is not None and _is(node, "DequantizeLinear") else None


def _is(node: NodeProto, kind: str) -> bool:
    return node.op_type == kind and node.domain in _DOMAINS


def _static(graph: Graph, node: NodeProto, layer: Layer, read: Callable[[Tensor], Layer]) -> Layer:
    """x and w behind DequantizeLinear, all scales stored"""
    source, weight = _decoder(graph, node.input[0]), decoded(graph, node.input[1])
    assert source is not None
    assert weight is not None
    step, zero = _one(graph, source, 1), _one(graph, source, 2)
    found = _summed(read(_int8(weight.integers, weight.zeros)))
    scales = read(weight.scales).matrix
    if not torch.equal(scales, scales[:, :1].expand(scales.shape)):
        raise Refused("its weight has several scales along what is summed")
    scale = step * scales[:, 0].double()
    tiny = torch.finfo(torch.float32).tiny
    if not bool(((scale == 0) | (scale.abs() >= tiny)).all() and torch.isfinite(scale.float()).all()):
        raise Refused("its scales, multiplied, are no normal float32")
    offset = zero - _shift(graph, source.input[0])
    found = replace(
        found,
        x=source.input[0],
        scale=scale.float().numpy(),
        epilogue=replace(found.epilogue, scale=True),
        result=graph.shapes.get(layer.product).dtype,
    )
    if not offset:
        return found
    found = _bordered(graph, found, zero)
    return biased(found, -offset * scale * found.matrix.sum(1, dtype=torch.int64))


def _bordered(graph: Graph, layer: Layer, zero: float) -> Layer:
    """The layer with the padding of a convolution, which stands for the number 0, put around its input."""
    if layer.conv is None or not any(layer.conv.padding):
        return layer
    kind = np.uint8 if graph.shapes.get(layer.x).dtype == torch.uint8 else np.int8
    border = Border(*layer.conv.padding, kind(zero))
    return replace(layer, conv=replace(layer.conv, padding=(0, 0)), border=border)


def _dynamic(graph: Graph, node: NodeProto, layer: Layer, read: Callable[[Tensor], Layer]) -> Layer:
    """MatMulInteger(x, w, z) -> Cast -> Mul(s)"""
    weight = graph.constant(node.input[1])
    assert weight is not None
    zeros = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    if len(node.input) > 3 and node.input[3] and zeros is None:
        raise Refused("the zero points of its weight are computed when the model runs")
    offset = torch.zeros(()) if zeros is None else zeros[0]
    found = _summed(read(_int8(weight[0], offset)))
    zero = node.input[2] if len(node.input) > 2 else ""
    if zero and graph.shape(zero) not in ((), (1,)):
        raise Refused("its input has several zero points")
    steps = _scaling(graph, layer, found.out)
    if steps is None:
        raise Refused("its sums are not cast to float32 and multiplied by one scale for each output")
    cast, product, scale = steps
    return replace(
        found,
        nodes=(*layer.nodes, cast, product),
        output=graph.node(product).output[0],
        dynamic=Dynamic(scale, zero, _shift(graph, node.input[0])),
        epilogue=replace(found.epilogue, scale=True, bias=True),
        result=torch.float32,
    )


def _scaling(graph: Graph, layer: Layer, out: int) -> tuple[int, int, str] | None:
    """The places of Cast and Mul behind a product, and the value that the Mul scales by."""
    cast = graph.only_reader(layer.output)
    if cast is None or not _is(graph.node(cast), "Cast"):
        return None
    if attributes(graph.node(cast)).get("to") != TensorProto.FLOAT:
        return None
    product = graph.only_reader(graph.node(cast).output[0])
    if product is None or not _is(graph.node(product), "Mul"):
        return None
    given = list(graph.node(product).input)
    given.remove(graph.node(cast).output[0])
    if not given or graph.shape(given[0]) not in ((), (1,), (out,)):
        return None
    return cast, product, given[0]


def _shift(graph: Graph, name: str) -> int:
    """What a kernel takes off an input; raises ``Refused`` for types that it does not take."""
    dtype = graph.shapes.get(name).dtype
    if dtype is None or dtype not in SHIFTS:
        raise Refused(f"its input is {str(dtype).removeprefix('torch.')}, and kernels take int8 and uint8")
    return SHIFTS[dtype]


def _one(graph: Graph, node: NodeProto, place: int) -> float:
    """The scale (input 1) or zero point (input 2) of an input's DequantizeLinear, 0 where there is none."""
    if place >= len(node.input) or not node.input[place]:
        return 0.0
    found = graph.constant(node.input[place])
    if found is None:
        raise Refused("its input's scale or zero point is computed when the model runs")
    if found[0].numel() != 1:
        raise Refused("its input has several scales, and a kernel has one for all that it sums")
    return float(found[0].double())


def _int8(integers: Tensor, zeros: Tensor) -> Tensor:
    """Integers less their zero points; raises ``Refused`` where they are no int8."""
    if integers.dtype not in SHIFTS:
        raise Refused(f"its weight is {str(integers.dtype).removeprefix('torch.')}")
    moved = integers.to(torch.int32) - zeros.to(torch.int32)
    if moved.numel() and (int(moved.min()) < -128 or int(moved.max()) > 127):
        raise Refused("its weight less its zero points does not fit int8")
    return moved.to(torch.int8)


def _summed(layer: Layer) -> Layer:
    """The layer, if no input makes its sums overflow int32."""
    if 128 * int(layer.matrix.to(torch.int64).abs().sum(1).max()) >= _LARGEST:
        raise Refused("its sums can overflow int32")
    return layer

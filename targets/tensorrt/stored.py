"""The stored weight behind an operand, and the operand made anew with what stood between folded into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsecc.onnxfile.model import OnnxFile, numpy_dtype
from sparsecc.targets.tensorrt.rule import PATTERN

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Array = npt.NDArray[Any]

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_BYTES_AND_FLOATS = ("int8", "uint8", "float8_e4m3fn", "float32", "float16", "bfloat16")
SUMMED = {"Conv": 1, "MatMul": 0, "Gemm": 0}
"""Products, and the axis of their second operand that they sum over (of a Gemm without transB)."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant as an operand sees it.

    ``name`` is what it is stored under, ``values`` are the operand's, with ``between`` applied: the nodes
    from the constant to the operand.  ``quantizers`` are those among them that give other elements: they
    stay, and ``orders`` says for each how the axes of its operand come in the operand of the product.
    """

    name: str
    values: Array
    between: tuple[gs.Node, ...] = ()
    quantizers: tuple[gs.Node, ...] = ()
    orders: tuple[tuple[int, ...], ...] = ()

    @property
    def quantized(self) -> bool:
        return bool(self.quantizers)

    @property
    def folded(self) -> bool:
        """Whether the operand is not what is stored, or stands behind nodes that could go."""
        return len(self.between) > len(self.quantizers)


def stored(file: OnnxFile, operand: gs.Tensor) -> Stored | None:
    """What an operand is made of; None where that is no constant, or not through nodes that fold away."""
    chain: list[gs.Node] = []
    tensor = operand
    while not _is_constant(file, tensor):
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or not is_standard(maker) or maker.op not in (*_FOLDS, *QUANTIZERS):
            return None
        chain.append(maker)
        tensor = maker.inputs[0]
    values = file.array(tensor.name)
    chain.reverse()
    if any(node.op in QUANTIZERS for node in chain):
        return _quantized(file, tensor.name, values, chain)
    for node in chain:
        folded = _FOLDS[node.op](file, node, values)
        if folded is None:
            return None
        values = folded
    return Stored(tensor.name, values, tuple(chain))


def is_standard(node: gs.Node) -> bool:
    """Whether a node is an operator of ONNX's own."""
    return node.domain in (None, "", "ai.onnx")


def _quantized(file: OnnxFile, name: str, values: Array, chain: Sequence[gs.Node]) -> Stored | None:
    """A weight under quantizers, with transposes among them; what else there is would need other scales."""
    if values.dtype.name not in _BYTES_AND_FLOATS:
        return None
    for node in chain:
        if node.op not in (*QUANTIZERS, "Transpose", "Identity") or node.attrs.get("block_size"):
            return None
        if node.op in QUANTIZERS and not _is_constant(file, node.inputs[1]):
            return None
    order = tuple(range(values.ndim))
    quantizers: list[gs.Node] = []
    orders: list[tuple[int, ...]] = []
    for node in reversed(chain):
        if node.op == "Transpose":
            above = _order(node, values.ndim)
            order = tuple(above[axis] for axis in order)
        elif node.op in QUANTIZERS:
            quantizers.insert(0, node)
            orders.insert(0, order)
    return Stored(name, values.transpose(order), tuple(chain), tuple(quantizers), tuple(orders))


def moved_axis(node: gs.Node, order: Sequence[int]) -> int:
    """Where the axis that a quantizer has scales along comes to lie."""
    return order.index(int(node.attrs.get("axis", 1)) % len(order))


def _is_constant(file: OnnxFile, tensor: gs.Tensor) -> bool:
    return tensor.name in file.initializers or tensor.name in file.constants


def _order(node: gs.Node, rank: int) -> list[int]:
    return list(node.attrs.get("perm", reversed(range(rank))))


def _transpose(file: OnnxFile, node: gs.Node, values: Array) -> Array | None:
    return values.transpose(_order(node, values.ndim))


def _identity(file: OnnxFile, node: gs.Node, values: Array) -> Array | None:
    return values


def _cast(file: OnnxFile, node: gs.Node, values: Array) -> Array | None:
    """Casts that lose nothing fold; one that rounds is what the model says, and stays."""
    wider = numpy_dtype(int(node.attrs["to"]))
    widens = values.dtype.name in ("float16", "bfloat16", "float32") and wider.itemsize > values.itemsize
    return values.astype(wider) if widens and wider.name in ("float32", "float64") else None


def _reshape(file: OnnxFile, node: gs.Node, values: Array) -> Array | None:
    if not _is_constant(file, node.inputs[1]):
        return None
    sizes = [int(size) for size in file.array(node.inputs[1].name)]
    return None if 0 in sizes else values.reshape(sizes)


_FOLDS: Mapping[str, Callable[[OnnxFile, Any, Array], Array | None]] = {
    "Transpose": _transpose,
    "Identity": _identity,
    "Cast": _cast,
    "Reshape": _reshape,
}


def normal(values: Array) -> Array:
    """The values in order, with every zero a positive one, so that zeros are zeros to the last bit."""
    found = np.ascontiguousarray(values)
    if not has_negative_zero(found):
        return found
    return np.where(found == 0, np.zeros((), found.dtype), found)


def has_negative_zero(values: Array) -> bool:
    """Whether some zero has a sign."""
    return values.dtype.kind not in "iub" and bool((np.signbit(values) & (values == 0)).any())


def has_pattern(node: gs.Node, values: Array) -> bool:
    """Whether the second operand of a product is 2:4 along what is summed."""
    axis = int(node.attrs["transB"]) if node.attrs.get("transB") else SUMMED[node.op]
    if values.ndim != 2 and node.op != "Conv":
        return False
    return PATTERN.fits(values.shape[axis]) and PATTERN.holds(values != 0, axis)

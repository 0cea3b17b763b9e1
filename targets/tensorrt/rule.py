"""The sparsity-axis checker: which products of an ONNX file satisfy TensorRT's rule for sparse weights.

    Conv      w[O,C,*K]    groups of four along C, for every output channel and kernel position
    MatMul    x w[K,N]     groups of four along K        w[M,K] x    likewise
    Gemm      w[K,N], or [N,K] with transB                likewise

In every group at least two weights are zero, and the axis is a multiple of four (TensorRT, "Structured
Sparsity"; Polygraphy's ``inspect sparsity`` checks the same).  The rule makes a layer eligible; whether
TensorRT then picks a sparse kernel, it decides by timing on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from sparsecc.onnxfile.model import OnnxFile, subgraphs
from sparsecc.onnxfile.structure import describe
from sparsecc.patterns.nm import NM
from sparsecc.reference.onnx_ops.registry import attributes

PATTERN = NM(2, 4)

#: element types whose weights sparse kernels read; the stored ones, under any Cast or DequantizeLinear
SPARSE_TYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8")

#: operators that the rule looks through, since each gives its first operand's elements
_SAME_AXES = frozenset(
    {
        "Cast",
        "Identity",
        "QuantizeLinear",
        "DequantizeLinear",
        "TRT_FP8QuantizeLinear",
        "TRT_FP8DequantizeLinear",
    }
)
_DEQUANTIZE = frozenset({"DequantizeLinear", "TRT_FP8DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class Row:
    """One product with a constant weight.

    ``node`` says where it is and ``output`` names what it gives, ``weight`` is the stored tensor of ``shape``
    and ``dtype``, ``axis`` the one of its axes that groups of four run along (None where the rule has none).
    ``holds``: TensorRT's rule holds; ``why`` says why it does not.
    """

    node: str
    op: str
    output: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    holds: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """A stored weight behind an operand, and what stands between the two."""

    name: str
    axis: int
    scales: tuple[tuple[NodeProto, int], ...] = ()


@dataclass(frozen=True, eq=False)
class _Graph:
    """The main graph of a model: who makes which value, and which values follow from constants alone."""

    file: OnnxFile
    producer: Mapping[str, NodeProto]
    fixed: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, file: OnnxFile) -> _Graph:
        graph = file.proto.graph
        fixed = {*file.initializers, *file.constants}
        for index in file.order:
            node = graph.node[index]
            given = [name for name in node.input if name]
            if given and fixed.issuperset(given) and not subgraphs(node):
                fixed.update(node.output)
        producer = {name: node for node in graph.node for name in node.output if name}
        return cls(file, producer, frozenset(fixed))

    def stored(self, name: str) -> bool:
        return name in self.file.initializers or name in self.file.constants


def sparsity(model: Any) -> list[Row]:
    """Every Conv, MatMul and Gemm with a constant weight, in the order of the graph.

    Takes what ``OnnxFile.load`` takes, and raises what it raises.  Bodies of control flow are not looked at.
    """
    file = OnnxFile.load(model).inlined()
    graph = _Graph.of(file)
    nodes = file.proto.graph.node
    return [row for index in file.order for row in _rows(graph, nodes[index], index)]


def _rows(graph: _Graph, node: NodeProto, index: int) -> Iterator[Row]:
    operands = _OPERANDS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if operands is None:
        return
    for place in operands:
        if place < len(node.input) and node.input[place] in graph.fixed:
            yield _row(graph, node, index, place)
            return


def _row(graph: _Graph, node: NodeProto, index: int, place: int) -> Row:
    """The verdict on one product whose operand ``place`` is constant."""

    def made(
        weight: str, shape: Sequence[int] = (), dtype: str = "", axis: int | None = None, why: str = ""
    ) -> Row:
        where = describe(node, index)
        return Row(where, node.op_type, node.output[0], weight, tuple(shape), dtype, axis, not why, why)

    name = node.input[place]
    rank = _rank(graph, name)
    if rank is None:
        maker = graph.producer[name]
        return made(name, why=f"its weight is computed by {maker.op_type}: fold constants first")
    if node.op_type != "Conv" and rank != 2:
        return made(name, why=f"its weight has {rank} axes, and sparse products take matrices")
    found = _behind(graph, name, _axis(node, place))
    assert found is not None  # its rank is known
    array = graph.file.array(found.name)
    dtype = array.dtype.name
    return made(found.name, array.shape, dtype, found.axis % array.ndim, _why(graph, found, array))


def _axis(node: NodeProto, place: int) -> int:
    """The axis of operand ``place`` that the product sums over."""
    if node.op_type == "Conv":
        return 1
    flipped = bool(attributes(node).get(("transA", "transB")[place], 0)) if node.op_type == "Gemm" else False
    return (1 - place) ^ flipped


def _rank(graph: _Graph, name: str) -> int | None:
    """The number of axes of an operand; None where it is not stored as it is read."""
    found = _behind(graph, name, 0)
    return None if found is None else len(graph.file.array(found.name).shape)


def _behind(graph: _Graph, name: str, axis: int) -> _Found | None:
    """The stored tensor whose axis is axis ``axis`` of an operand, through what keeps elements."""
    scales: list[tuple[NodeProto, int]] = []
    while not graph.stored(name):
        node = graph.producer.get(name)
        if node is None or (node.op_type not in _SAME_AXES and node.op_type != "Transpose"):
            return None
        if node.op_type in _DEQUANTIZE:
            scales.append((node, axis))
        if node.op_type == "Transpose":
            axis = _moved(node, axis)
        name = node.input[0]
    return _Found(name, axis, tuple(scales))


def _moved(node: NodeProto, axis: int) -> int:
    """The axis of a Transpose's operand that becomes axis ``axis`` (reversed order without ``perm``)."""
    order = attributes(node).get("perm")
    return -1 - axis if order is None else int(order[axis])


def _why(graph: _Graph, found: _Found, array: npt.NDArray[Any]) -> str:
    """Why a stored weight is not sparse along an axis for TensorRT; empty where it is."""
    if array.dtype.name not in SPARSE_TYPES:
        return f"its weight is stored as {array.dtype.name}"
    for node, axis in found.scales:
        if why := _scale(graph, node, axis, array.ndim):
            return why
    size = array.shape[found.axis]
    if not PATTERN.fits(size):
        return f"it sums over {size} positions, which are no multiple of {PATTERN.m}"
    groups = np.moveaxis(array, found.axis, -1).reshape(-1, PATTERN.m) != 0
    full = int((groups.sum(-1) > PATTERN.n).sum())
    return (
        f"{full} of {len(groups)} groups along axis {found.axis % array.ndim} hold more than two weights"
        if full
        else ""
    )


def _scale(graph: _Graph, node: NodeProto, axis: int, rank: int) -> str:
    """Why a DequantizeLinear stands in the way of a sparse kernel; empty where it does not."""
    zero = node.input[2] if len(node.input) > 2 else ""
    if zero and not (graph.stored(zero) and not graph.file.array(zero).astype(np.float32).any()):
        return "the zero point of its weight is not 0"
    if not graph.stored(node.input[1]):
        return "the scale of its weight is computed"
    scale = graph.file.array(node.input[1])
    if scale.ndim > 1:
        return "its weight has a scale for each block"
    along = int(attributes(node).get("axis", 1))
    if scale.ndim == 1 and scale.size > 1 and (along - axis) % rank == 0:
        return "the scales of its weight vary along the axis that it sums over"
    return ""


_OPERANDS: Mapping[str, tuple[int, ...]] = MappingProxyType({"Conv": (1,), "MatMul": (1, 0), "Gemm": (1, 0)})

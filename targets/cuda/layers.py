"""Finds the products with 2:4 weights in an ONNX graph, and what follows them that a kernel can do as well.

    MatMul -> Add(bias) -> Gelu -> Add(residual)    becomes one Layer with an Epilogue

Nothing is decided here: a layer that cannot be sparse is listed with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto

from sparsecc.errors import SparseccError
from sparsecc.onnxfile.model import OnnxFile, to_torch
from sparsecc.onnxfile.shapes import Shapes
from sparsecc.onnxfile.structure import describe
from sparsecc.reference.onnx_ops.registry import Ctx, attributes, find
from sparsecc.reference.onnx_run import execute
from sparsecc.targets.cuda.config import Epilogue
from sparsecc.targets.cuda.pack import GROUP, KEPT, is_packable
from sparsecc.targets.cuda.problem import Conv

Array: TypeAlias = npt.NDArray[np.float32]

#: operators behind which a constant is one still: what they give is computed
_SPELLED = ("Transpose", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear")

#: why a product is dense whose weight lacks the pattern
LACKING = "its weight is not 2:4 along the contraction"

#: element types that a kernel can take the weights of
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Dynamic:
    """A scale that the model computes: the values that hold it (one number or [out]) and the zero point.

    ``shift`` is what the kernel takes off the integers, and off their zero point (empty: there is none).
    """

    scale: str
    zero: str
    shift: int


@dataclass(frozen=True, slots=True)
class Border:
    """Rows above and below and columns left and right of images, which hold a zero point other than 0."""

    high: int
    wide: int
    zero: np.integer[Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One product with a constant weight [out, k], and what a kernel for it would replace.

    ``nodes`` are the places of the replaced nodes, the product first; ``output`` is the value that the last
    of them gives, and ``product`` that of the product alone.  ``rows`` is the number of tokens (or output
    pixels) for the graph's representative sizes.  ``refusal`` says why the layer cannot be sparse; it is
    empty where it can.

    ``coded``: both operands are integers that stand for numbers.  Where they are multiplied as such, the
    matrix is int8, ``x`` int8 or uint8, ``result`` the type of what comes out, and ``dynamic`` says where the
    scale is when the model computes it.  ``border`` is put around images before a kernel that pads none.
    """

    name: str
    weight: str
    nodes: tuple[int, ...]
    x: str
    output: str
    product: str
    matrix: torch.Tensor
    rows: int = 0
    conv: Conv | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)
    scale: Array | None = None
    bias: Array | None = None
    residual: str = ""
    refusal: str = ""
    coded: bool = False
    dynamic: Dynamic | None = None
    border: Border | None = None
    result: torch.dtype | None = None

    @property
    def out(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def k(self) -> int:
        return int(self.matrix.shape[1])

    @property
    def reads(self) -> list[str]:
        """The values of the graph that a kernel for it depends on."""
        scaled = () if self.dynamic is None else (self.dynamic.scale, self.dynamic.zero)
        return [name for name in (self.x, self.residual, *scaled) if name]

    @property
    def flops(self) -> int:
        """Operations of the dense product, two for a multiplication and an addition."""
        return 2 * self.out * self.k * self.rows


class Refused(Exception):
    """Why a product cannot be sparse."""


@dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX graph with who reads what."""

    file: OnnxFile
    shapes: Shapes
    producer: Mapping[str, int]
    readers: Mapping[str, tuple[int, ...]]
    outputs: frozenset[str]

    @classmethod
    def of(cls, file: OnnxFile, shapes: Shapes) -> Graph:
        """Index a graph; values that bodies of control flow read count as outputs, since they must stay."""
        graph = file.proto.graph
        readers: dict[str, list[int]] = {}
        outer: set[str] = set()
        for index, node in enumerate(graph.node):
            for name in node.input:
                readers.setdefault(name, []).append(index)
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    outer.update(name for inner in body.node for name in inner.input)
        return cls(
            file,
            shapes,
            {name: index for index, node in enumerate(graph.node) for name in node.output if name},
            {name: tuple(found) for name, found in readers.items()},
            frozenset({value.name for value in graph.output} | outer),
        )

    def node(self, index: int) -> NodeProto:
        node: NodeProto = self.file.proto.graph.node[index]
        return node

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.shapes.get(name).shape

    def constant(self, name: str) -> tuple[torch.Tensor, str] | None:
        """A constant, also behind operators that only spell it, and the name that it is stored under."""
        if any(value.name == name for value in self.file.inputs):
            return None
        index = self.producer.get(name)
        if index is None or self.node(index).op_type == "Constant":
            try:
                found = to_torch(self.file.array(name))
            except (SparseccError, KeyError):
                return None
            return None if found is None else (found, name)
        node = self.node(index)
        if node.op_type not in _SPELLED or node.domain not in ("", "ai.onnx", "com.microsoft"):
            return None
        given = [self.constant(name) if name else None for name in node.input]
        if given[0] is None or any(g is None for g, name in zip(given, node.input, strict=True) if name):
            return None
        operator = find(node.domain, node.op_type, self.file.opset if node.domain != "com.microsoft" else 1)
        try:
            (value,) = execute(operator, Ctx(node, self.file.opset), [g and g[0] for g in given])
        except (SparseccError, ValueError, IndexError, RuntimeError):
            return None  # nothing that can be computed
        return (value, given[0][1]) if isinstance(value, torch.Tensor) else None

    def only_reader(self, name: str) -> int | None:
        """The one node that reads a value that nothing else needs."""
        readers = self.readers.get(name, ())
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def find_layers(
    file: OnnxFile, shapes: Shapes, asked: str | None = None, *, supposed: bool = False
) -> list[Layer]:
    """Every product with a constant matrix, in the order of the graph.

    ``supposed``: as if every weight were 2:4; those that are not get such numbers, of no meaning.

    ``asked`` is the element type to multiply in.  With None, products whose operands are both quantised are
    multiplied in integers, the others in floats; ``int8`` leaves the others alone; ``fp16`` and ``bf16`` take
    the numbers that integers stand for.
    """
    graph = Graph.of(file, shapes)
    places = range(len(file.proto.graph.node))
    return [layer for index in places for layer in _layers_at(graph, index, asked, supposed)]


def _layers_at(graph: Graph, index: int, asked: str | None, supposed: bool) -> Iterator[Layer]:
    from sparsecc.targets.cuda.fuse import fused
    from sparsecc.targets.cuda.quantised import is_coded

    node = graph.node(index)
    operand = _weight_operand(node)
    constant = graph.constant(node.input[operand]) if 0 < operand < len(node.input) else None
    if constant is None:
        return
    weight, name = constant
    layer = Layer(
        name=describe(node, index),
        weight=name,
        nodes=(index,),
        x=node.input[0],
        output=node.output[0],
        product=node.output[0],
        matrix=torch.atleast_2d(weight).flatten(1),
        coded=is_coded(graph, node),
    )
    try:
        if not weight.numel():
            raise Refused("its weight has no elements")
        layer = _read(graph, node, layer, weight, asked)
        if layer.k % GROUP:
            raise Refused(f"its contraction has {layer.k} weights, not a multiple of {GROUP}")
        if not is_packable(layer.matrix):
            if not supposed:
                raise Refused(LACKING)
            layer = replace(layer, matrix=_halved(layer.matrix))
        yield fused(graph, layer)
    except Refused as reason:
        yield replace(layer, refusal=str(reason))


def _halved(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix whose first two of every four numbers in a row stay."""
    groups = matrix.reshape(len(matrix), -1, GROUP).clone()
    groups[..., KEPT:] = 0
    return groups.view(matrix.shape)


def _weight_operand(node: NodeProto) -> int:
    """Which input of a product holds its weight; 0 for operators that are no products."""
    from sparsecc.targets.cuda.quantised import OTHER_SPELLINGS

    if node.op_type in _PRODUCTS and node.domain in ("", "ai.onnx"):
        return 1
    return OTHER_SPELLINGS.get(node.op_type, 0)


def _read(graph: Graph, node: NodeProto, layer: Layer, weight: torch.Tensor, asked: str | None) -> Layer:
    """The layer with its matrix: integers where its operands are such, unless floats are asked for."""
    from sparsecc.targets.cuda.quantised import coded

    read = partial(_PRODUCTS.get(node.op_type, _matmul), graph, node, layer)
    if layer.coded and asked in (None, "int8"):
        return coded(graph, node, layer, read)
    if node.op_type not in _FLOAT_PRODUCTS:
        raise Refused(f"it is a product of integers, and {asked} was asked for")
    if asked == "int8":
        raise Refused("it is not quantised, weight and input, and int8 was asked for")
    if weight.dtype not in FLOATS:
        raise Refused(f"its weight is {str(weight.dtype).removeprefix('torch.')}")
    return read(weight)


def _rows(graph: Graph, layer: Layer, channel: int) -> int:
    """Tokens or pixels: the elements of the product's output over its channels."""
    shape = graph.shape(layer.output)
    if shape is None:
        raise Refused("the shape of its output is not known")
    return math.prod(shape) // max(1, shape[channel])


def _matmul(graph: Graph, node: NodeProto, layer: Layer, weight: torch.Tensor) -> Layer:
    """x[*,K] w[K,N] -> y[*,N]"""
    if weight.dim() != 2:
        raise Refused(f"its weight has {weight.dim()} axes")
    return replace(layer, matrix=weight.t(), rows=_rows(graph, layer, -1))


def _gemm(graph: Graph, node: NodeProto, layer: Layer, weight: torch.Tensor) -> Layer:
    """x[M,K] w[K,N] (transB: w[N,K]) c[N] -> y[M,N]"""
    given = attributes(node)
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise Refused("it transposes its first operand or scales its operands")
    layer = replace(layer, matrix=weight if given.get("transB") else weight.t(), rows=_rows(graph, layer, -1))
    if len(node.input) < 3 or not node.input[2]:
        return layer
    bias = graph.constant(node.input[2])
    if bias is None or bias[0].numel() not in (1, layer.out) or bias[0].shape[-1:].numel() != bias[0].numel():
        raise Refused("its bias is not one stored number for each output")
    return biased(layer, bias[0].reshape(-1).expand(layer.out))


def _conv(graph: Graph, node: NodeProto, layer: Layer, weight: torch.Tensor) -> Layer:
    """x[N,C,H,W] w[O,C,kH,kW] b[O] -> y[N,O,H',W'], as a product over kernel positions and channels"""
    given = attributes(node)
    if weight.dim() != 4:
        raise Refused(f"it has {weight.dim() - 2} spatial axes, and kernels have two")
    if given.get("group", 1) != 1:
        raise Refused(f"it has {given['group']} groups")
    pads = list(given.get("pads", [0, 0, 0, 0]))
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pads[:2] != pads[2:]:
        raise Refused("its padding differs between sides")
    high, wide = weight.shape[2:]
    conv = Conv(
        int(weight.shape[1]),
        (int(high), int(wide)),
        _pair(given.get("strides", [1, 1])),
        _pair(pads[:2] if given.get("auto_pad", "NOTSET") == "NOTSET" else [0, 0]),
        _pair(given.get("dilations", [1, 1])),
    )
    if conv.channels % GROUP:
        raise Refused(f"it has {conv.channels} input channels, not a multiple of {GROUP}")
    layer = replace(
        layer,
        matrix=weight.permute(0, 2, 3, 1).reshape(len(weight), -1),
        rows=_rows(graph, layer, 1),
        conv=conv,
    )
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and bias is None:
        raise Refused("its bias is not stored")
    return layer if bias is None else biased(layer, bias[0])


def _pair(values: list[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def biased(layer: Layer, bias: torch.Tensor) -> Layer:
    """The layer with a bias [out] added to its sums."""
    values = bias.double().numpy() + (0 if layer.bias is None else layer.bias)
    return replace(layer, bias=values.astype(np.float32), epilogue=replace(layer.epilogue, bias=True))


_PRODUCTS: Mapping[str, Callable[[Graph, NodeProto, Layer, torch.Tensor], Layer]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "MatMulInteger": _matmul,
}
_FLOAT_PRODUCTS = ("MatMul", "Gemm", "Conv")

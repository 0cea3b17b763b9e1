"""Puts ``SparseMatMul`` nodes with packed weights in the place of the layers that were chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsecc.errors import InvalidModel
from sparsecc.onnxfile.model import TORCH_DTYPES, OnnxFile, subgraphs
from sparsecc.onnxfile.structure import free_names
from sparsecc.targets.cuda.layers import Border, Dynamic, Layer
from sparsecc.targets.cuda.operator import DTYPES
from sparsecc.targets.cuda.pack import Packed, pack, unpack
from sparsecc.targets.cuda.plan_kernels import element_of
from sparsecc.targets.cuda.problem import Conv
from sparsecc.targets.cuda.reference import DOMAIN, KIND, VERSION


def packed(layer: Layer, dtype: str) -> Packed:
    """The layer's weight in the kernel's element type, packed; unpacked again it has the same bits.

    Raises ``InvalidModel`` where it would not: then packing is at fault, and nothing is written.
    """
    matrix = layer.matrix.to(DTYPES[dtype]).contiguous()
    found = pack(matrix)
    again = unpack(found)
    if not torch.equal(again.view(torch.uint8), matrix.view(torch.uint8)) and not torch.equal(
        again.nan_to_num(), matrix.nan_to_num()
    ):
        raise InvalidModel(
            f"{layer.name}: the packed weight {layer.weight!r} is not the weight; please report this"
        )
    return found


def rewritten(
    file: OnnxFile, layers: Sequence[Layer], kernels: Mapping[str, Sequence[str]], asked: str | None
) -> ModelProto:
    """A model whose ``layers`` are SparseMatMul nodes; ``kernels`` are keys by the layer's output.

    ``asked`` is the element type to multiply in, None for that of each weight.

    Weights that nothing reads any more are left out; those that several layers share are packed once.
    """
    proto = ModelProto()
    proto.CopyFrom(file.proto)
    graph = proto.graph
    at = {layer.nodes[-1]: layer for layer in layers}
    gone = {index for layer in layers for index in layer.nodes}
    stored: dict[bytes, tuple[str, str]] = {}
    nodes: list[NodeProto] = []
    for index, node in enumerate(file.proto.graph.node):
        if index in at:
            nodes += _nodes(graph, at[index], kernels, element_of(at[index], asked), stored)
        elif index not in gone:
            nodes.append(node)
    kept = _needed(nodes, graph)
    del graph.node[:]
    graph.node.extend(nodes[i] for i in kept)
    _drop_unread(graph)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return proto


def _nodes(
    graph: GraphProto,
    layer: Layer,
    kernels: Mapping[str, Sequence[str]],
    dtype: str,
    stored: dict[bytes, tuple[str, str]],
) -> list[NodeProto]:
    """The layer's node, with what computes its scale and bias before it, and a cast behind it."""
    extra = [
        "" if values is None else _store(graph, f"{layer.output}.{what}", values)
        for what, values in (("scale", layer.scale), ("bias", layer.bias))
    ]
    before: list[NodeProto] = []
    if layer.dynamic is not None:
        extra, before = _scaled(graph, layer, layer.dynamic, bias=extra[1])
    x = layer.x
    if layer.border is not None:
        x, pad = _bordered(graph, layer, layer.border)
        before.append(pad)
    inputs = [x, *_weights(graph, layer, dtype, stored), *extra, layer.residual]
    while not inputs[-1]:
        inputs.pop()
    given: dict[str, Any] = {
        "out": layer.out,
        "k": layer.k,
        "dtype": dtype,
        "activation": layer.epilogue.activation,
    }
    if layer.conv is not None:
        given["conv"] = conv_numbers(layer.conv)
    if kernels.get(layer.output):
        given["kernels"] = list(kernels[layer.output])
    narrow = layer.result not in (None, torch.float32)
    output = _fresh(graph, f"{layer.output}.wide") if narrow else layer.output
    node = helper.make_node(KIND, inputs, [output], name=f"{layer.output}.sparse", domain=DOMAIN, **given)
    if not narrow:
        return [*before, node]
    to = next(element for element, kind in TORCH_DTYPES.items() if kind == layer.result)
    return [*before, node, helper.make_node("Cast", [output], [layer.output], f"{layer.output}.cast", to=to)]


def _weights(
    graph: GraphProto, layer: Layer, dtype: str, stored: dict[bytes, tuple[str, str]]
) -> tuple[str, str]:
    """Names of the packed weight's values and metadata; what is the same is stored once."""
    found = packed(layer, dtype)
    size = repr((found.dtype, found.out, found.k)).encode()
    key = hashlib.sha256(size + found.values.tobytes() + found.metadata.tobytes()).digest()
    if key not in stored:
        stored[key] = (
            _store(graph, f"{layer.weight}.values.{len(stored)}", found.values),
            _store(graph, f"{layer.weight}.metadata.{len(stored)}", found.metadata),
        )
    return stored[key]


def _bordered(graph: GraphProto, layer: Layer, border: Border) -> tuple[str, NodeProto]:
    """The name of the input with its border, and the node that puts it there."""
    sides = np.array([0, 0, border.high, border.wide] * 2, np.int64)
    output = _fresh(graph, f"{layer.output}.bordered")
    inputs = [
        layer.x,
        _store(graph, f"{layer.output}.sides", sides),
        _store(graph, f"{layer.output}.zero", np.asarray(border.zero)),
    ]
    return output, helper.make_node("Pad", inputs, [output], output)


def _scaled(
    graph: GraphProto, layer: Layer, dynamic: Dynamic, *, bias: str
) -> tuple[list[str], list[NodeProto]]:
    """Names of a scale [out] and a bias [out] that the model computes, and the nodes that do.

    The bias is b - scale * (z - shift) * (W 1), of the stored bias b and the zero point z.
    """
    nodes: list[NodeProto] = []

    def add(kind: str, *inputs: str, **given: Any) -> str:
        output = _fresh(graph, f"{layer.output}.{kind.lower()}.{len(nodes)}")
        nodes.append(helper.make_node(kind, list(inputs), [output], output, **given))
        return output

    def store(what: str, values: Any) -> str:
        return _store(graph, f"{layer.output}.{what}", np.asarray(values, np.float32))

    scale = add("Mul", dynamic.scale, store("ones", np.ones(layer.out)))
    zero = add("Cast", dynamic.zero, to=TensorProto.FLOAT) if dynamic.zero else store("none", 0)
    moved = add("Sub", zero, store("shift", dynamic.shift))
    sums = store("sums", layer.matrix.sum(1, dtype=torch.int64).numpy())
    offset = add("Mul", add("Mul", moved, sums), scale)
    return [scale, add("Sub", bias or store("zeros", np.zeros(layer.out)), offset)], nodes


def conv_numbers(conv: Conv) -> list[int]:
    """A convolution as the operator takes it: channels, then kernel, stride, padding, dilation."""
    return [conv.channels, *conv.kernel, *conv.stride, *conv.padding, *conv.dilation]


def _store(graph: GraphProto, name: str, values: npt.NDArray[Any]) -> str:
    name = _fresh(graph, name)
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return name


def _fresh(graph: GraphProto, name: str) -> str:
    """``name``, or one like it that no value of the graph has."""
    taken = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    taken.update(output for node in graph.node for output in node.output)
    while name in taken:
        name += "_"
    return name


def _needed(nodes: Sequence[NodeProto], graph: GraphProto) -> list[int]:
    """Places of the nodes that the graph's outputs depend on, or that have no outputs to depend on."""
    wanted = {value.name for value in graph.output}
    kept: list[int] = []
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if not wanted.intersection(node.output):
            continue
        kept.append(index)
        wanted.update(_reads(node))
    return kept[::-1]


def _reads(node: NodeProto) -> Iterable[str]:
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        yield from free_names(body)


def _drop_unread(graph: GraphProto) -> None:
    """Remove initializers, and notes on values, that no node has to do with any more."""
    read = {name for node in graph.node for name in _reads(node)} | {value.name for value in graph.output}
    inputs = {value.name for value in graph.input}
    for entries, wanted in ((graph.initializer, read | inputs), (graph.value_info, read)):
        for index in reversed(range(len(entries))):
            if entries[index].name not in wanted:
                del entries[index]

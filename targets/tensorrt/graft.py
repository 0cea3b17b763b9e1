"""Puts the changes of an edited graph into the original proto: what was not edited keeps its bytes."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import GraphProto, ModelProto, NodeProto

from sparsecc.onnxfile.structure import uses


def grafted(original: ModelProto, edited: ModelProto) -> ModelProto:
    """The original with the nodes and the new initializers of ``edited``.

    Initializers, and notes on values, that only removed nodes had to do with are left out.
    """
    result = ModelProto()
    result.CopyFrom(original)
    graph = result.graph
    nodes = list(_nodes(original.graph, edited.graph))
    del graph.node[:]
    graph.node.extend(nodes)
    gone = _read(original.graph.node) - _read(nodes)
    kept = {value.name for value in (*graph.input, *graph.output)}
    for entries in (graph.initializer, graph.value_info, graph.quantization_annotation):
        for index in reversed(range(len(entries))):
            name = getattr(entries[index], "tensor_name", "") or getattr(entries[index], "name", "")
            if name in gone - kept:
                del entries[index]
    there = {tensor.name for tensor in original.graph.initializer}
    graph.initializer.extend(tensor for tensor in edited.graph.initializer if tensor.name not in there)
    return result


def _nodes(original: GraphProto, edited: GraphProto) -> Iterable[NodeProto]:
    """The edited nodes, each as it was where it is the same."""
    before = {_key(node): node for node in original.node}
    return (before.get(_key(node), node) for node in edited.node)


def _key(node: NodeProto) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    return node.op_type, node.domain, tuple(node.input), tuple(node.output)


def _read(nodes: Iterable[NodeProto]) -> set[str]:
    return {name for node in nodes for name in uses(node)}

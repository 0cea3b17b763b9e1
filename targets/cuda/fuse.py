"""What follows a product and can be done by its kernel: bias, batch norm, activation, residual.

Each step takes a layer and gives it back with one more node replaced, or None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from onnx import NodeProto

from sparsecc.reference.onnx_ops.registry import attributes
from sparsecc.targets.cuda.layers import Graph, Layer, biased


def fused(graph: Graph, layer: Layer) -> Layer:
    """The layer with all that its kernel can do, in the order in which kernels do it."""
    for step in _STEPS:
        found = step(graph, layer)
        layer = layer if found is None else found
    return layer


def _next(graph: Graph, layer: Layer, *kinds: str) -> tuple[int, NodeProto] | None:
    """The one reader of the layer's output, where it is an operator of these kinds."""
    index = graph.only_reader(layer.output)
    if index is None:
        return None
    node = graph.node(index)
    domains = ("", "ai.onnx", "com.microsoft")
    return (index, node) if node.op_type in kinds and node.domain in domains else None


def _with(layer: Layer, index: int, node: NodeProto) -> Layer:
    return replace(layer, nodes=(*layer.nodes, index), output=node.output[0])


def _bias(graph: Graph, layer: Layer) -> Layer | None:
    """y + b with one stored number for each output"""
    found = _next(graph, layer, "Add")
    if found is None:
        return None
    index, node = found
    other = node.input[1] if node.input[0] == layer.output else node.input[0]
    constant = graph.constant(other)
    shape = graph.shape(layer.output)
    if (
        constant is None
        or shape is None
        or constant[0].dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ):
        return None
    axis = 1 if layer.conv is not None else len(shape) - 1
    wanted = [1] * len(shape)
    wanted[axis] = layer.out
    given = [1] * (len(shape) - constant[0].dim()) + list(constant[0].shape)
    if given != wanted:
        return None
    return _with(biased(layer, constant[0].reshape(-1)), index, node)


def _batch_norm(graph: Graph, layer: Layer) -> Layer | None:
    """gamma * (y - mean) / sqrt(variance + epsilon) + beta, as a scale and a bias"""
    found = _next(graph, layer, "BatchNormalization") if layer.conv is not None else None
    if found is None:
        return None
    index, node = found
    constants = [graph.constant(name) for name in node.input[1:5]]
    if len(constants) != 4 or attributes(node).get("training_mode"):
        return None
    if any(constant is None or constant[0].numel() != layer.out for constant in constants):
        return None
    gamma, beta, mean, variance = (c[0].double().numpy().reshape(-1) for c in constants if c is not None)
    factor = gamma / np.sqrt(variance + attributes(node).get("epsilon", 1e-5))
    shift = beta + factor * ((0 if layer.bias is None else layer.bias.astype(np.float64)) - mean)
    scale = factor * (1 if layer.scale is None else layer.scale.astype(np.float64))
    return _with(
        replace(
            layer,
            scale=scale.astype(np.float32),
            bias=shift.astype(np.float32),
            epilogue=replace(layer.epilogue, scale=True, bias=True),
        ),
        index,
        node,
    )


_ACTIVATIONS: dict[tuple[str, str], str] = {
    ("Relu", ""): "relu",
    ("Gelu", ""): "gelu",
    ("Gelu", "none"): "gelu",
    ("Gelu", "tanh"): "gelu_tanh",
    ("FastGelu", ""): "gelu_tanh",
}


def _activation(graph: Graph, layer: Layer) -> Layer | None:
    """Relu, Gelu, or y * Sigmoid(y)"""
    found = _next(graph, layer, "Relu", "Gelu", "FastGelu")
    if found is not None:
        index, node = found
        name = _ACTIVATIONS.get((node.op_type, str(attributes(node).get("approximate", ""))))
        if name is None or len([i for i in node.input if i]) != 1:
            return None
        return _with(replace(layer, epilogue=replace(layer.epilogue, activation=name)), index, node)
    return _silu(graph, layer)


def _silu(graph: Graph, layer: Layer) -> Layer | None:
    readers = graph.readers.get(layer.output, ())
    if len(readers) != 2 or layer.output in graph.outputs:
        return None
    kinds = {graph.node(i).op_type: i for i in readers}
    if kinds.keys() != {"Sigmoid", "Mul"}:
        return None
    gate, product = graph.node(kinds["Sigmoid"]), graph.node(kinds["Mul"])
    if graph.only_reader(gate.output[0]) != kinds["Mul"]:
        return None
    if sorted(product.input) != sorted((layer.output, gate.output[0])):
        return None
    return replace(
        layer,
        nodes=(*layer.nodes, kinds["Sigmoid"], kinds["Mul"]),
        output=product.output[0],
        epilogue=replace(layer.epilogue, activation="silu"),
    )


def _residual(graph: Graph, layer: Layer) -> Layer | None:
    """y + r with a value of the same shape and type, known before"""
    found = _next(graph, layer, "Add")
    if found is None:
        return None
    index, node = found
    other = node.input[1] if node.input[0] == layer.output else node.input[0]
    same = graph.shape(other) is not None and graph.shape(other) == graph.shape(layer.output)
    dynamic = graph.shapes.get(other).dynamic == graph.shapes.get(layer.output).dynamic
    if other == layer.output or not same or not dynamic or graph.constant(other) is not None:
        return None
    return _with(replace(layer, residual=other, epilogue=replace(layer.epilogue, residual=True)), index, node)


_STEPS: tuple[Callable[[Graph, Layer], Layer | None], ...] = (_bias, _batch_norm, _activation, _residual)

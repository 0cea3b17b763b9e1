"""What follows a product that the same function can do: a bias, and one activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsecc.targets.relax.graph import Graph, sizes
from sparsecc.targets.relax.product import Array, Product

ACTIVATIONS = {
    "relax.nn.relu": "relu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
}


def fused(graph: Graph, product: Product) -> Product:
    """The product with the bias and activation that follow it, as far as nothing else reads its sums."""
    while (longer := _reshaped(graph, product) or _biased(graph, product)) is not None:
        product = longer
    return _activated(graph, product) or product


def _reader(graph: Graph, product: Product, *names: str) -> tuple[Any, Any] | None:
    """The only reader of the product's output and its call, where that is one of the operators ``names``."""
    readers = graph.readers.get(product.output, ())
    if len(readers) != 1 or readers[0] is None:
        return None
    call = graph.call(readers[0], *names)
    return None if call is None else (readers[0], call)


def _reshaped(graph: Graph, product: Product) -> Product | None:
    """Rows in another arrangement: what follows features by feature is the same."""
    found = _reader(graph, product, "relax.reshape")
    if found is None or product.window is not None:
        return None
    shape = sizes(found[0])
    follows = shape is not None and len(shape) > 1 and shape[-1] == product.out
    return replace(product, output=found[0]) if follows else None


def _biased(graph: Graph, product: Product) -> Product | None:
    """A stored number for each output feature, added."""
    found = _reader(graph, product, "relax.add")
    if found is None or product.bias is not None:
        return None
    var, call = found
    other = call.args[1] if call.args[0].same_as(product.output) else call.args[0]
    stored = graph.constant(other)
    shape, before = sizes(var), sizes(product.output)
    if stored is None or shape is None or before is None or len(shape) != len(before):
        return None
    bias = _per_feature(stored, product, len(shape))
    return None if bias is None else replace(product, output=var, bias=bias)


def _per_feature(stored: Array, product: Product, axes: int) -> Array | None:
    """A constant that is added to a tensor of ``axes`` axes as one number a feature, where it is that."""
    axis = 1 if product.window is not None and product.window.layout == "NCHW" else axes - 1
    shape = (1,) * (axes - stored.ndim) + stored.shape
    if len(shape) != axes or any(size != 1 for at, size in enumerate(shape) if at != axis):
        return None
    if shape[axis] not in (1, product.out):
        return None
    return stored.reshape(-1).repeat(product.out // shape[axis])


def _activated(graph: Graph, product: Product) -> Product | None:
    found = _reader(graph, product, *ACTIVATIONS)
    if found is not None:
        return replace(product, output=found[0], activation=ACTIVATIONS[found[1].op.name])
    return _silu(graph, product)


def _silu(graph: Graph, product: Product) -> Product | None:
    """y * sigmoid(y), as importers write it."""
    readers = graph.readers.get(product.output, ())
    for gate, last in (
        (readers, readers[::-1]) if len(readers) == 2 and all(var is not None for var in readers) else ()
    ):
        multiply = graph.call(last, "relax.multiply")
        if graph.call(gate, "relax.sigmoid") is None or multiply is None:
            continue
        operands = {hash(operand) for operand in multiply.args}
        if operands == {hash(product.output), hash(gate)} and len(graph.readers[gate]) == 1:
            return replace(product, output=last, activation="silu")
    return None

"""Finds the products with constant weights in a Relax function.

    matmul(x, permute_dims(w)) -> add(bias) -> gelu      becomes one Product

Nothing is decided here: a product that cannot be 2:4 is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sparsecc.targets.relax.fuse import fused
from sparsecc.targets.relax.graph import Graph, fixed, sizes
from sparsecc.targets.relax.product import FLOATS, GROUP, Array, Product, Window, is_two_of_four


class Refused(Exception):
    """Why a product cannot be 2:4."""


def find_products(function: Any, name: str) -> Iterator[Product]:
    """Every product with a constant matrix, in the order in which a ``relax.Function`` binds them."""
    graph = Graph.of(function)
    for var in graph.values:
        call = graph.call(var, *_READERS)
        weight = None if call is None else _weight(graph, var, call)
        if weight is not None and weight.size:
            yield _product(graph, var, call, weight, f"{name}/{var.name}")


def _weight(graph: Graph, var: Any, call: Any) -> Array | None:
    """The constant that a product reads, also where one matrix is repeated for every item of the batch."""
    weight = graph.constant(call.args[1])
    repeated = graph.call(call.args[1], "relax.broadcast_to")
    if weight is not None or repeated is None or call.op.name != "relax.matmul":
        return weight
    weight = graph.constant(repeated.args[0])
    if weight is None or weight.ndim < 2 or any(n != 1 for n in weight.shape[:-2]):
        return None
    given, result = (getattr(e.ty.shape, "values", None) for e in (call.args[0], var))
    alike = given is not None and result is not None and _alike(given[:-1], result[:-1])
    return weight.reshape(weight.shape[-2:]) if alike else None


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether sizes are the same numbers, or the same variables."""
    return len(ours) == len(theirs) and all(
        a.same_as(b) if fixed(a) is None else fixed(a) == fixed(b) for a, b in zip(ours, theirs, strict=True)
    )


def _product(graph: Graph, var: Any, call: Any, weight: Array, where: str) -> Product:
    flat = np.atleast_1d(weight).reshape(len(np.atleast_1d(weight)), -1)
    product = Product(where, call.args[0], var, flat)
    try:
        if weight.dtype.name not in FLOATS:
            raise Refused(f"its weight is {weight.dtype.name}")
        product = _READERS[call.op.name](product, call, weight)
        given = sizes(product.x)
        if given is None:
            raise Refused("the shape of its input is not known")
        if str(product.x.ty.dtype) != product.dtype:
            raise Refused(f"its input is {product.x.ty.dtype} and its weight {product.dtype}")
        contraction = product.k if product.window is None else product.window.channels
        if contraction % GROUP:
            raise Refused(f"it adds up {contraction} channels, not a multiple of {GROUP}")
        if not is_two_of_four(product.matrix):
            raise Refused("its weight is not 2:4 along the contraction")
    except Refused as reason:
        return replace(product, refusal=str(reason))
    return fused(graph, product)


def _matmul(product: Product, call: Any, weight: Array) -> Product:
    """x[*,K] w[K,N] -> y[*,N]"""
    if weight.ndim != 2:
        raise Refused(f"its weight has {weight.ndim} axes")
    if len(sizes(product.x) or ()) < 2:
        raise Refused("its input has fewer than two axes")
    return replace(product, matrix=weight.T)


def _conv2d(product: Product, call: Any, weight: Array) -> Product:
    """x[N,C,H,W] w[O,C,kH,kW] -> y[N,O,H',W'], and other orders of axes"""
    attrs = call.attrs
    data, kernel = str(attrs.data_layout), str(attrs.kernel_layout)
    if data not in ("NCHW", "NHWC") or sorted(kernel) != sorted("OIHW"):
        raise Refused(f"its layouts are {data} and {kernel}")
    if str(attrs.out_layout or data) != data:
        raise Refused(f"its input is {data} and its output {attrs.out_layout}")
    if attrs.groups != 1:
        raise Refused(f"it has {attrs.groups} groups")
    ordered = weight.transpose([kernel.index(axis) for axis in "OHWI"])
    out, high, wide, channels = ordered.shape
    top, left, bottom, right = (int(pad) for pad in attrs.padding)
    window = Window(
        channels,
        (high, wide),
        (int(attrs.strides[0]), int(attrs.strides[1])),
        (top, left, bottom, right),
        (int(attrs.dilation[0]), int(attrs.dilation[1])),
        data,
    )
    return replace(product, matrix=ordered.reshape(out, -1), window=window)


_READERS: Mapping[str, Callable[[Product, Any, Array], Product]] = {
    "relax.matmul": _matmul,
    "relax.nn.conv2d": _conv2d,
}

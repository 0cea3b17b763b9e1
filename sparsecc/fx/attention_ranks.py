"""Attention of any rank as attention of rank four, which is what ONNX has a translation of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

_aten = torch.ops.aten


def has_another_rank(node: Node) -> bool:
    """Whether a node is attention on tensors ``[*,L,E]`` that are not of rank four."""
    return node.target is _aten.scaled_dot_product_attention.default and _rank(node.args[0]) != 4


def make_rank_four(node: Node) -> None:
    """Let attention see its leading axes as one, or new ones of size one; what comes out is as before.

    Left alone where query, key and value have other leading axes: no model that was tried has that.
    """
    query, key, value, *rest = node.args
    rank, graph = _rank(query), node.graph
    assert isinstance(query, Node)
    assert isinstance(value, Node)
    lead = [_shape(x)[: max(rank - 3, 0)] for x in (query, key, value)]
    if any(tuple(other) != tuple(lead[0]) for other in lead):
        return
    with graph.inserting_before(node):
        operands = [_folded(graph, x, rank) for x in (query, key, value)]
        keywords = dict(node.kwargs)
        if rest:
            rest[0] = _mask(graph, query, rest[0])
        elif keywords.get("attn_mask") is not None:
            keywords["attn_mask"] = _mask(graph, query, keywords["attn_mask"])
        four = _call(graph, _aten.scaled_dot_product_attention.default, (*operands, *rest), keywords)
        sizes = [*_sizes(graph, query)[: rank - 1], _sizes(graph, value)[-1]]
    four.meta = {**node.meta, "val": four.meta["val"]}
    node.target, node.args, node.kwargs = _aten.reshape.default, (four, sizes), {}


def _folded(graph: Graph, tensor: Any, rank: int) -> Node:
    """``[*,H,L,E]`` as ``[N,H,L,E]``; ``[L,E]`` and ``[H,L,E]`` with axes of size one in front."""
    sizes = _sizes(graph, tensor)
    return _call(graph, _aten.reshape.default, (tensor, [*([1] * (4 - rank)), *_merged(sizes, rank)]))


def _merged(sizes: Sequence[Any], rank: int) -> list[Any]:
    return list(sizes) if rank <= 4 else [-1, *sizes[-3:]]


def _mask(graph: Graph, query: Node, mask: Any) -> Any:
    """A mask that has leading axes is repeated along them; others broadcast as they did."""
    rank = _rank(query)
    if mask is None or _rank(mask) <= 3 or rank <= 4:
        return mask
    sizes = [*_sizes(graph, query)[: rank - 3], *_sizes(graph, mask)[-3:]]
    return _folded(graph, _call(graph, _aten.expand.default, (mask, sizes)), rank)


def _sizes(graph: Graph, tensor: Any) -> list[Any]:
    """Sizes of a tensor: numbers, and nodes that compute those that vary."""
    found: list[Any] = []
    for dim, size in enumerate(_shape(tensor)):
        if not isinstance(size, int):
            varying, size = size, graph.call_function(_aten.sym_size.int, (tensor, dim))
            size.meta["val"] = varying
        found.append(size)
    return found


def _call(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A new node, and what it gives for fake tensors."""
    node = graph.call_function(target, args, kwargs)
    values = torch.fx.node.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _shape(tensor: Any) -> Sequence[Any]:
    shape: Sequence[Any] = tensor.meta["val"].shape
    return shape


def _rank(tensor: Any) -> int:
    return len(_shape(tensor))

"""Operators that some devices alone have, in terms of those that all have.

A model asks its device which way to go, and is captured without values, or on a GPU, for a run on the CPU.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node


def make_portable(graph: Graph) -> None:
    """Histograms of integers, by which experts count their tokens on a GPU, become histograms of floats."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.histc.default:
            counted = node.args[0]
            if isinstance(counted, Node) and not counted.meta["val"].is_floating_point():
                _count_floats(graph, node, counted)


def _count_floats(graph: Graph, node: Node, counted: Node) -> None:
    cast, numbers = torch.ops.aten._to_copy.default, counted.meta["val"]
    with graph.inserting_before(node):
        wide = graph.call_function(cast, (counted,), {"dtype": torch.float32})
    with graph.inserting_after(node):
        back = graph.call_function(cast, (node,), {"dtype": numbers.dtype})
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.args = (wide, *node.args[1:])
    wide.meta["val"] = numbers.to(torch.float32)
    back.meta["val"], node.meta["val"] = node.meta["val"], node.meta["val"].to(torch.float32)

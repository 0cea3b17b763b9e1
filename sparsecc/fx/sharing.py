"""Which values of an FX graph share memory, and which nodes change them in place."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from sparsecc.fx.ops import aten_name, bind

_MAY_RETURN_AN_OPERAND = frozenset({"type_as", "einsum", "cat", "concat", "concatenate"})
_RETURNS_NEW = frozenset({"batch_norm", "instance_norm"})


_aten = torch.ops.aten
#: changes what gradients see, and no number
_DETACHING = _aten.detach_.default
_COPIES = (
    _DETACHING, _aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
)  # fmt: skip


def is_list_copy(node: Node) -> bool:
    """Whether a node is how ``x[[2, 0, 1]]`` comes by its list: the integers of a constant once more."""
    return node.target in _COPIES and not node.meta["val"].is_floating_point()


def written(node: Node) -> list[Node]:
    """Operands that a node changes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or node.target is _DETACHING:
        return []
    bound = bind(node)
    found: list[Node] = []
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = bound.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else (value,)
            found.extend(v for v in values if isinstance(v, Node))
    return found


def sharing(nodes: Mapping[Node, int]) -> dict[Node, list[Node]]:
    """Node -> the nodes that may share memory with it, itself included."""
    groups: dict[Node, list[Node]] = {n: [n] for n in nodes}
    for node in nodes:
        if not may_alias(node):
            continue
        for source in node.all_input_nodes:
            ours, theirs = groups[node], groups[source]
            if ours is theirs:
                continue
            ours.extend(theirs)
            for member in theirs:
                groups[member] = ours
    return groups


def may_alias(node: Node) -> bool:
    """Whether a result may share memory with an operand."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_function"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    name = aten_name(node.target)
    if name in _RETURNS_NEW:
        return False
    tags = getattr(node.target, "tags", ())
    returns_view = any(r.alias_info is not None for r in schema.returns)
    tagged = torch.Tag.maybe_aliasing_or_mutating in tags or name in _MAY_RETURN_AN_OPERAND
    return returns_view or schema.is_mutable or tagged


def has_effect(node: Node) -> bool:
    """Nodes that change something in place stay although nobody reads their result."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def live(graph: Graph) -> set[Node]:
    """The nodes that the outputs, or something that is changed in place, depend on."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if has_effect(node) or any(user in found for user in node.users):
            found.add(node)
    return found

"""Applies a plan to a captured program: a new graph with new sizes, and the weights beside it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from sparsecc.errors import PlanConflict
from sparsecc.fx.capture import Program
from sparsecc.fx.ops import bind, parameters
from sparsecc.fx.sharing import has_effect, is_list_copy, may_alias, written
from sparsecc.fx.weights import WeightActions
from sparsecc.memory import without_collecting
from sparsecc.plan import Bypass, Fold, Plan, SetAttr, SetShape


@without_collecting()
def edit(program: Program, plan: Plan) -> Program:
    """A program with the plan applied; the original graph and weights are left as they were.

    Raises PlanConflict where the plan names a node that the program lacks.
    """
    actions = WeightActions(plan)
    graph = Graph()
    env: dict[Node, Node] = {}
    result = graph.graph_copy(program.graph, env)
    graph.output(result)
    for old, new in env.items():
        new.meta = old.meta
    nodes = {old.name: new for old, new in env.items()}
    weights = {
        n: actions.edit(n, t).requires_grad_(t.requires_grad) if actions.touches(n) else t
        for n, t in program.weights.items()
    }
    weight_of = {nodes[n].name: w for n, w in program.weight_of.items()}
    for use in actions.uses:
        own = actions.edit_use(use, program.weights[use[0]])
        _own_constant(graph, nodes, weights, weight_of, use, own)
    for action in plan.actions:
        if isinstance(action, (SetShape, SetAttr)):
            target = _node(nodes, action.node)
            if isinstance(action, SetShape):
                _set_shape(target, action)
            else:
                _set_attr(target, action)
    _bypass(nodes, list(plan.of(Bypass)))
    for fold in plan.of(Fold):
        _fold(graph, nodes, weights, weight_of, fold)
    graph.eliminate_dead_code(has_effect)
    for name in _dropped(program, graph, weight_of):
        weights.pop(name)
    owner = copy.copy(program.owner)
    return replace(
        program,
        graph=graph,
        owner=owner,
        weights=weights,
        weight_of={node: w for node, w in weight_of.items() if w in weights},
        parameters=(program.parameters | {f.parameter for f in plan.of(Fold)}) & weights.keys(),
        tied={alias: n for alias, n in program.tied.items() if n in weights},
        inputs=[nodes[n].name for n in program.inputs],
        module=None,
    )


def _node(nodes: dict[str, Node], name: str) -> Node:
    if name not in nodes:
        raise PlanConflict(
            f"the plan names node {name!r}, which the captured graph lacks; capture the same model"
        )
    return nodes[name]


# -- bypassed blocks --------------------------------------------------------------------------------


def _bypass(nodes: dict[str, Node], actions: list[Bypass]) -> None:
    """Let sources stand for outputs, and erase what only the bypassed branches needed."""
    stands: dict[Node, Node] = {}

    def source_of(action: Bypass) -> Node:
        node = _value(nodes, action.source)
        while node in stands:
            node = stands[node]
        return node

    for action in actions:
        output, source = _node(nodes, action.output), source_of(action)
        output.replace_all_uses_with(source)
        stands[output] = source
    for output in stands:
        _erase(output, sparing=set(stands.values()))


def _value(nodes: dict[str, Node], name: str) -> Node:
    """The node of a value; values of operators with several are called ``node.place``."""
    base, _, place = name.rpartition(".")
    if name in nodes or base not in nodes:
        return _node(nodes, name)
    for user in nodes[base].users:
        if user.target is operator.getitem and user.args[1] == int(place):
            return user
    return _node(nodes, name)


def _erase(output: Node, sparing: set[Node]) -> None:
    """Erase a node that nobody reads, and before it all nodes that only it needed.

    A node that changes a value in place goes with the value, unless the value is needed by others.
    """
    queue, gone = [output], set[Node]()
    while queue:
        node = queue.pop()
        if node in gone or node in sparing or node.op not in ("call_function", "get_attr"):
            continue
        idle = [u for u in node.users if not u.users and u.op == "call_function" and written(u) == [node]]
        if len(idle) != len(node.users) or (idle and may_alias(node)):
            continue
        if node is not output and not _private(node):
            continue
        for user in (*idle, node):
            queue.extend(user.all_input_nodes)
            gone.add(user)
            user.graph.erase_node(user)


def _fold(
    graph: Graph,
    nodes: dict[str, Node],
    weights: dict[str, torch.Tensor],
    weight_of: dict[str, str],
    action: Fold,
) -> None:
    """Let a new parameter stand for a value; what only the value needed is dead then.

    It can be trained if something behind it can.
    """
    output = _value(nodes, action.output)
    fake = output.meta["val"]
    hole = next((n for n in graph.nodes if weight_of.get(n.name) == action.parameter), None)
    if hole is None:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            hole = graph.placeholder(graph._graph_namespace.create_name(action.parameter, None))
        hole.meta = {"val": fake}
        stored = torch.from_numpy(action.values.copy()).to(fake.device, fake.dtype)
        trained = any(weights[w].requires_grad for w in _behind(output, weight_of) if w in weights)
        weights[action.parameter] = stored.requires_grad_(trained)
        weight_of[hole.name] = action.parameter
    for twin in [n for n in _same_value(output) if n is not hole]:
        twin.replace_all_uses_with(hole)


def _behind(node: Node, weight_of: dict[str, str]) -> set[str]:
    """The weights that a value is computed from."""
    queue, seen, found = [node], {node}, set[str]()
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
                found.update({weight_of[source.name]} if source.name in weight_of else ())
    return found


def _same_value(node: Node) -> list[Node]:
    """All nodes that take the same result of an operator with several."""
    if node.target is not operator.getitem:
        return [node]
    users = cast(Node, node.args[0]).users
    return [u for u in users if u.target is operator.getitem and u.args[1] == node.args[1]]


def _private(node: Node) -> bool:
    """Whether the values that a node changes in place are seen by nobody else."""
    queue = [(w, node) for w in written(node)]
    while queue:
        value, reader = queue.pop()
        if value.op != "call_function" or any(u is not reader for u in value.users):
            return False
        if may_alias(value):
            queue.extend((source, value) for source in value.all_input_nodes)
    return True


def _dropped(program: Program, graph: Graph, weight_of: dict[str, str]) -> set[str]:
    """Remove placeholders of weights that lost their last reader; returns the weights' names.

    A buffer that nobody ever read (a counter of batches) goes when its module's other weights go.
    """
    read = {w for n in program.graph.nodes if n.users and (w := program.weight_of.get(n.name)) is not None}
    holes: dict[str, list[Node]] = {}  # several where weights are tied
    for node in graph.nodes:
        if node.op == "placeholder" and (name := weight_of.get(node.name)) is not None:
            holes.setdefault(name, []).append(node)
    idle = {w for w, nodes in holes.items() if not any(n.users for n in nodes)}
    lost = {w for w in idle if w in read or w not in program.weights}
    owners = {w.rpartition(".")[0] for w in lost} - {w.rpartition(".")[0] for w in read - lost}
    lost |= {w for w in holes if w not in read and w in program.weights and w.rpartition(".")[0] in owners}
    for weight in lost:
        for node in holes[weight]:
            graph.erase_node(node)
    return lost


def _own_constant(
    graph: Graph,
    nodes: dict[str, Node],
    weights: dict[str, torch.Tensor],
    weight_of: dict[str, str],
    use: tuple[str, str, int],
    tensor: torch.Tensor,
) -> None:
    name, consumer, operand = use
    own = f"{name}@{consumer}.{operand}"
    weights[own] = tensor
    old = next(n for n in graph.nodes if n.op == "placeholder" and weight_of.get(n.name) == name)
    with graph.inserting_before(old):
        new = graph.placeholder(f"c_{consumer}_{operand}")
    new.meta = dict(old.meta)
    weight_of[new.name] = own
    reader = _node(nodes, consumer)
    for read in reader.all_input_nodes:
        if _stored_list(read) is old:
            reader.replace_input_with(read, new)


def _stored_list(node: Node) -> Node:
    """What a node is, or is a copy of."""
    while is_list_copy(node):
        (node,) = node.all_input_nodes
    return node


# -- sizes that are spelled out ---------------------------------------------------------------------

_SHAPE_ARGUMENTS = ("size", "shape", "sizes")


def _set_shape(node: Node, action: SetShape) -> None:
    bound = bind(node)
    name = next((n for n in _SHAPE_ARGUMENTS if isinstance(bound.get(n), (list, tuple))), None)
    if name is None:
        return  # flatten, expand_as: no size is spelled out
    spelled = list(bound[name])
    first = _first_spelled(node, bound, len(spelled), len(action.sizes))
    if -1 in action.sizes:
        _write_out(spelled, node.meta["val"].shape[first:], action.sizes[first:])
    for i, size in enumerate(action.sizes[first : first + len(spelled)]):
        if size is None or (isinstance(spelled[i], int) and spelled[i] == -1):
            continue
        if size == -1 and -1 in [s for s in spelled if isinstance(s, int)]:
            raise PlanConflict(
                f"{node.name}: two of its sizes would have to be inferred; exclude one of the groups",
                node=action.node,
            )
        spelled[i] = size
    if "stride" in bound:  # _reshape_alias: strides of the old sizes
        node.target, node.args, node.kwargs = torch.ops.aten.reshape.default, (bound["self"], spelled), {}
    else:
        assign(node, name, spelled)


def _write_out(spelled: list[Any], before: Sequence[Any], after: Sequence[int | None]) -> None:
    """Write a number for an inferred size that is fixed, where another one has to be inferred."""
    for i, entry in enumerate(spelled):
        new = before[i] if after[i] is None else after[i]
        if isinstance(entry, int) and entry == -1 and isinstance(new, int):
            spelled[i] = new


def _first_spelled(node: Node, bound: dict[str, Any], count: int, rank: int) -> int:
    if "dim" in bound and "sizes" in bound:  # unflatten
        return int(bound["dim"]) % (rank - count + 1)
    return rank - count


def _set_attr(node: Node, action: SetAttr) -> None:
    bound = bind(node)
    name, value = action.name, action.value
    for known, argument, convert in _ATTRIBUTES:
        if name == known and argument in bound:
            convert(node, bound, argument, value)
            return
    if name.startswith(("start", "stop")):
        _set_bound(node, bound, name.startswith("start"), value)
    elif name == "sizes":
        _set_split(node, bound, value)
    elif name == "squeezed":
        packet = torch.ops.aten.squeeze_copy if "copy" in str(node.target) else torch.ops.aten.squeeze
        node.target, node.args, node.kwargs = packet.dims, (bound["self"], list(value)), {}
    else:
        raise PlanConflict(f"{node.name}: {node.target} has no {name!r} to set", node=action.node)


def _replace(node: Node, bound: dict[str, Any], argument: str, value: Any) -> None:
    if isinstance(bound[argument], Node):  # a number that varies, of which the plan knows one example
        raise PlanConflict(
            f"{node.name}: {argument!r} is computed while the model runs; exclude the group", node=node.name
        )
    assign(node, argument, value)


def _groups(node: Node, bound: dict[str, Any], argument: str, value: Any) -> None:
    """The groups of a convolution, also where there are more for a larger batch (kernels of their own)."""
    x, w = bound.get("input"), bound.get("weight")
    known = not isinstance(bound[argument], Node)
    turned = bound.get("transposed", False) or "transpose" in str(node.target)
    if known or turned or not (isinstance(x, Node) and isinstance(w, Node)):
        _replace(node, bound, argument, value)
        return
    at = x.meta["val"].dim() - w.meta["val"].dim() + 1
    with node.graph.inserting_before(node):
        channels = node.graph.call_function(torch.ops.aten.sym_size.int, (x, at))
        each = node.graph.call_function(torch.ops.aten.sym_size.int, (w, 1))
        found = node.graph.call_function(operator.floordiv, (channels, each))
    channels.meta["val"], each.meta["val"] = x.meta["val"].shape[at], w.meta["val"].shape[1]
    found.meta["val"] = bound[argument].meta["val"]
    assign(node, argument, found)


def _last(node: Node, bound: dict[str, Any], argument: str, value: Any) -> None:
    assign(node, argument, value - 1)


_ATTRIBUTES: tuple[tuple[str, str, Callable[[Node, dict[str, Any], str, Any], None]], ...] = (
    ("groups", "groups", _groups),
    ("groups", "num_groups", _replace),
    ("groups", "group", _replace),
    ("channels", "C", _replace),
    ("normalized_shape", "normalized_shape", _replace),
    ("repeats", "repeats", _replace),
    ("output_size", "output_size", _replace),
    ("scale", "scale", _replace),
    ("shifts", "shifts", _replace),
    ("num_classes", "num_classes", _replace),
    ("bins", "bins", _replace),
    ("last_bin", "max", _last),
)


def _set_bound(node: Node, bound: dict[str, Any], start: bool, value: int) -> None:
    if "length" in bound:  # narrow
        if start:
            assign(node, "length", bound["length"] + bound["start"] - value)
            assign(node, "start", value)
        else:
            assign(node, "length", value - bind(node)["start"])
        return
    argument = "start" if start else "end"
    old = bound[argument]
    if start and not old:
        return
    if not start and (old is None or (isinstance(old, int) and old >= 2**62)):
        return
    assign(node, argument, value)


def _set_split(node: Node, bound: dict[str, Any], sizes: list[int]) -> None:
    if "chunks" in bound and _chunked(sum(sizes), bound["chunks"]) == sizes:
        return
    if isinstance(bound.get("split_size"), int) and _evenly(sum(sizes), bound["split_size"]) == sizes:
        return
    source, dim = bound["self"], bound["dim"]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (source, list(sizes), dim), {}


def _chunked(total: int, chunks: int) -> list[int]:
    return _evenly(total, -(-total // chunks))


def _evenly(total: int, size: int) -> list[int]:
    return [min(size, total - at) for at in range(0, total, size)] if size else []


def assign(node: Node, name: str, value: Any) -> None:
    """Set an argument by schema name, where it stands or as a keyword."""
    place = list(parameters(node.target)).index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)

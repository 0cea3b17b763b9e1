"""Gives a PyTorch user the same class back, with narrower parameters and updated width attributes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from sparsecc.axes.analysis import Keeps
from sparsecc.blocks import dropped
from sparsecc.errors import SparseccError
from sparsecc.fx.capture import Program, recapture
from sparsecc.fx.copying import copied
from sparsecc.fx.ops import aten_name, bind
from sparsecc.fx.reader import where
from sparsecc.fx.sharing import live
from sparsecc.fx.weights import WeightActions, renamed, under
from sparsecc.graph import Call, View
from sparsecc.memory import without_collecting
from sparsecc.plan import Bypass, Plan, Replace, SetAttr, SetModule, SetShape


@dataclass(eq=False)
class Diverged(Exception):
    """The edited class does not do what the plan says; ``where`` is the first place that shows it."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@without_collecting()
def narrowed(module: nn.Module, plan: Plan, tied: dict[str, str]) -> nn.Module:
    """A copy of ``module`` with the plan's weights and module attributes; only kept values are copied.

    Raises Diverged where the module cannot be copied or a constant would need several versions.
    """
    actions = WeightActions(plan)
    if actions.uses:
        name, node, _ = next(iter(actions.uses))
        raise Diverged(name, f"this constant is cut differently for several nodes (one is {node!r})")
    replaced = list(plan.of(Replace))
    memo: dict[int, Any] = {id(module.get_submodule(a.module)): _STAND_INS[a.by]() for a in replaced}
    for name, tensor in _tensors(module):
        if id(tensor) not in memo and not any(under(name, a.module) for a in replaced):
            memo[id(tensor)] = _edited(tensor, actions, tied.get(name, name))
    try:
        out: nn.Module = copied(module, memo)
    except Exception as error:  # copying may run the model's own code
        raise Diverged(type(module).__name__, f"the module cannot be copied: {error}") from error
    for path, changes in itertools.groupby(plan.of(SetModule), key=operator.attrgetter("module")):
        part = out.get_submodule(path)
        for change in changes:
            assign(part, change.name, change.value)
    shorter: dict[str, set[int]] = {}
    for action in replaced:
        if action.by == "nothing":
            parent, _, index = action.module.rpartition(".")
            shorter.setdefault(parent, set()).add(int(index))
    for parent, places in shorter.items():
        _shorten(out, parent, places)
    return out


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all of their names."""
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        yield from ((prefix + name, tensor) for name, tensor in _own_tensors(child))


_STAND_INS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "nothing": nn.Identity,
    "relu": nn.ReLU,
}


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PLACES = ("layer_idx", "layer_index", "layer_id")


def _shorten(module: nn.Module, parent: str, places: set[int]) -> None:
    """Take members out of a list, and renumber what Hugging Face's models number by layer."""
    layers: Any = module.get_submodule(parent)
    count = len(layers)
    left = [i for i in range(count) if i not in places]
    for index in sorted(places, reverse=True):
        del layers[index]
    for now, before in enumerate(left):
        for part in layers[now].modules():
            for name in _PLACES:
                if vars(part).get(name) == before:
                    setattr(part, name, now)
    config = getattr(module, "config", None)
    for name, value in dict(vars(config) if config is not None else {}).items():
        if name in _COUNTS and value == count:
            setattr(config, name, len(left))
        elif name == "layer_types" and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[i] for i in left])


def _edited(tensor: torch.Tensor, actions: WeightActions, name: str) -> torch.Tensor:
    data = actions.edit(name, tensor) if actions.touches(name) else tensor.detach()
    if data.data_ptr() == tensor.data_ptr():
        data = data.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def assign(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute, or one of an attribute (``config.hidden_size``); a list stays a list."""
    *outer, leaf = name.split(".")
    holder: Any = functools.reduce(getattr, outer, module)
    current = getattr(holder, leaf, None)
    setattr(holder, leaf, type(current)(value) if isinstance(current, (tuple, list)) else value)


# -- which attributes have to change -----------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]
Literals = dict[int, set[int]]


@without_collecting()
def module_actions(program: Program, view: View, plan: Plan, keeps: Keeps) -> list[SetModule]:
    """Width attributes that follow from a plan.

    Standard layers are told by a table.  Other modules: an integer attribute changes when every
    literal of that value in the nodes that the module's own code made changes to one new value.
    """
    module = program.module
    if module is None:
        return []
    actions = WeightActions(plan)
    shapes = {
        name: _new_shape(tensor, actions, program.tied.get(name, name)) for name, tensor in _tensors(module)
    }
    literals = _literals(view, plan)
    read = functools.cache(lambda: _inputs(view, keeps))
    out: list[SetModule] = []
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        own = {n: shapes[prefix + n] for n, _ in _own_tensors(child)}
        own |= _parametrized(child, prefix, shapes)
        known = literals.get(path, {})
        kind: Any = type(child)
        rule = _rule(kind)
        if rule is _features and own.keys().isdisjoint(("weight", "running_mean")) and path in read():
            own["input"] = read()[path]
        changed: dict[str, Any] = {}
        with contextlib.suppress(KeyError):  # a weight that a hook computes from others
            changed.update(rule(child, own, known))
        for name, value in changed.items():
            if getattr(child, name) != value:
                out.append(SetModule(path, name, value))
    return out


def _new_shape(tensor: torch.Tensor, actions: WeightActions, name: str) -> tuple[int, ...]:
    takes = actions.takes.get(name)
    if takes is None:
        return tuple(tensor.shape)
    shape = list(tensor.shape)
    for take in takes:
        shape[take.axis] = len(take.indices)
    return tuple(shape)


def _parametrized(module: nn.Module, prefix: str, shapes: Shapes) -> Shapes:
    """Shapes of tensors that parametrizations compute: that of the largest tensor behind them."""
    behind = module._modules.get("parametrizations")
    found: Shapes = {}
    for name in behind if isinstance(behind, nn.ModuleDict) else ():
        inner = f"{prefix}parametrizations.{name}."
        originals = [s for n, s in shapes.items() if n.startswith(f"{inner}original")]
        if originals:
            found[name] = max(originals, key=lambda s: (len(s), math.prod(s)))
    return found


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((n, t) for n, t in module._parameters.items() if t is not None)
    yield from ((n, t) for n, t in module._buffers.items() if t is not None)


def _conv(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    first, second = own["weight"][:2]
    groups = _only(literals, module.groups)
    outer, inner = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    yield from ((outer, first), (inner, second * groups), ("groups", groups))


def _linear(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    yield from (("out_features", own["weight"][0]), ("in_features", own["weight"][1]))


def _features(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    known = own.get("weight") or own.get("running_mean")
    yield "num_features", known[0] if known else own["input"][1]


def _normalized(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    shape = own.get("weight") or tuple(_only(literals, n) for n in module.normalized_shape)
    yield "normalized_shape", tuple(shape)


def _group_norm(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    groups = _only(literals, module.num_groups)
    yield "num_groups", groups
    if "weight" in own:
        yield "num_channels", own["weight"][0]


def _embedding(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    yield from (("num_embeddings", own["weight"][0]), ("embedding_dim", own["weight"][1]))


def _recurrent(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    yield from (("input_size", own["weight_ih_l0"][1]), ("hidden_size", own["weight_ih_l0"][0] // gates))
    if module.proj_size:
        yield "proj_size", own["weight_hr_l0"][0]


def _prelu(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    yield "num_parameters", own["weight"][0]


def _other(module: Any, own: Shapes, literals: Literals) -> Iterator[tuple[str, Any]]:
    """Hugging Face's Conv1D, and what literals tell."""
    if type(module).__name__ == "Conv1D" and "weight" in own and {"nx", "nf"} <= vars(module).keys():
        yield from (("nx", own["weight"][0]), ("nf", own["weight"][1]))
    for name, value in vars(module).items() if literals else ():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            new = _only(literals, value)
            if new != value:
                yield name, new


Rule = Callable[[Any, Shapes, Literals], Iterator[tuple[str, Any]]]

_STANDARD: tuple[tuple[Any, Rule], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _features),
    ((nn.LayerNorm, nn.RMSNorm), _normalized),
    (nn.GroupNorm, _group_norm),
    (nn.Embedding, _embedding),
    (nn.RNNBase, _recurrent),
    (nn.PReLU, _prelu),
)


@functools.cache
def _rule(kind: type[nn.Module]) -> Rule:
    """How the attributes of a class of modules follow."""
    return next((rule for standard, rule in _STANDARD if issubclass(kind, standard)), _other)


def _only(literals: Literals, old: int) -> int:
    """What ``old`` becomes: itself unless exactly one new value is known."""
    new = literals.get(old, set())
    return next(iter(new)) if len(new) == 1 else old


def _inputs(view: View, keeps: Keeps) -> Shapes:
    """Module path -> kept shape of what the first operator of the module's own code reads."""
    out: Shapes = {}
    for call in view.calls:
        path = _owner(call.raw)
        if path is not None and path not in out and call.inputs and call.inputs[0] is not None:
            out[path] = tuple(keeps.count(t) for t in keeps.analysis.solver.of(call, 0))
    return out


def _literals(view: View, plan: Plan) -> dict[str, Literals]:
    """Module path -> old literal -> new values, over the nodes that the module's own code made."""
    shaped = {a.node: a for a in plan.of(SetShape)}
    set_attrs: dict[str, dict[str, Any]] = {}
    for action in plan.of(SetAttr):
        set_attrs.setdefault(action.node, {})[action.name] = action.value
    out: dict[str, Literals] = {}
    for call in view.calls:
        attrs = set_attrs.get(call.name, {})
        path = _owner(call.raw) if attrs or call.op in _SPELLED else None
        if path is None:
            continue
        table = out.setdefault(path, {})
        for old, new in _changes(call, shaped.get(call.name), attrs):
            table.setdefault(old, set()).add(new)
    return out


#: operators that spell out the shape of what they make
_SPELLED = frozenset({"reshape", "expand", "create"})


def _paths(node: Node) -> list[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()]


def _owner(node: Node) -> str | None:
    """The module whose own code made a node."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else None


def _changes(call: Call, shape: SetShape | None, attrs: dict[str, Any]) -> Iterator[tuple[int, int]]:
    if call.op in _SPELLED:
        new = shape.sizes if shape is not None else (None,) * len(call.outputs[0].shape)
        source = call.inputs[0].shape if call.inputs and call.inputs[0] is not None else ()
        for dim, (old, size) in enumerate(zip(call.outputs[0].shape, new, strict=True)):
            if call.outputs[0].is_dynamic(dim):
                continue
            if size is not None or old not in source:
                yield old, old if size is None else size
    for name in ("groups", "repeats", "num_classes", "bins"):
        if name in attrs:
            old_value = bind(call.raw).get("num_groups" if call.op == "group_norm" else name)
            if isinstance(old_value, int):
                yield old_value, attrs[name]
    if "sizes" in attrs:
        dim = call.attrs["dim"]
        yield from ((v.shape[dim], n) for v, n in zip(call.outputs, attrs["sizes"], strict=True))
    if "normalized_shape" in attrs:
        dims = call.attrs["dims"]
        source = call.inputs[0].shape if call.inputs[0] is not None else ()
        yield from ((source[d], n) for d, n in zip(dims, attrs["normalized_shape"], strict=True))
    for name, value in attrs.items():
        if name.startswith(("start", "stop")):
            start, stop, _ = call.attrs["slices"][int(name.removeprefix("start").removeprefix("stop"))]
            yield (start if name.startswith("start") else stop), value


# -- which modules stand for bypassed blocks ----------------------------------------------------------


def replacements(program: Program, view: View, plan: Plan) -> list[list[Replace]]:
    """Ways to leave out the modules that hold bypassed blocks, the better ones first; [[]] without blocks.

    A module can go when everything that its code computes goes, or all but one ReLU at its end.
    Raises Diverged where a block is only a part of what a module computes.
    """
    outputs = {b.output: b.block for b in plan.of(Bypass)}
    if program.module is None or not outputs:
        return [[]]
    gone = dropped(view, plan.actions).calls
    inside: dict[str, list[Node]] = {}
    for node in _operators(program):
        for path in dict.fromkeys(p.partition("@")[0] for p in _paths(node)):
            inside.setdefault(path, []).append(node)
    found: list[Replace] = []
    for path in sorted(inside, key=lambda p: (p.count("."), p)):
        nodes = inside[path]
        if not path or any(under(path, a.module) for a in found) or not any(n.name in outputs for n in nodes):
            continue
        left = [n for n in nodes if _origin(n) not in gone]
        if not left:
            found.append(Replace(path, "identity"))
        elif [aten_name(n.target) for n in left] == ["relu"] and left[0] is nodes[-1]:
            found.append(Replace(path, "relu"))
    covered = {n.name for a in found for n in inside[a.module]}
    missed = next((b for o, b in outputs.items() if o not in covered), None)
    if missed is not None:
        raise Diverged(missed, "is bypassed, and is no module of its own")
    lists = [a for a in found if a.by == "identity" and _in_list(program.module, a.module)]
    shorter = [Replace(a.module, "nothing") if a in lists else a for a in found]
    return [shorter, found] if lists else [found]


def _in_list(module: nn.Module, path: str) -> bool:
    parent, _, index = path.rpartition(".")
    return index.isdigit() and isinstance(module.get_submodule(parent), nn.ModuleList)


# -- acceptance ---------------------------------------------------------------------------------------


def accepted(
    module: nn.Module, program: Program, slim: Program, view: View, keeps: Keeps, plan: Plan
) -> Program:
    """Export the narrowed module again; its program, if it is ``slim`` (the edited graph).

    Raises Diverged with the first node that differs from the plan in an operator, an axis, a
    literal that reaches data, or an operand.
    """
    again = recaptured(module, program)
    calls = {call.raw: call for call in view.calls}
    gone = dropped(view, plan.actions).calls
    ours, theirs = [n for n in _operators(program) if _origin(n) not in gone], _operators(again)
    edited = {n.name: n for n in _operators(slim)}  # without what nobody reads
    operands = _Operands(slim, again, renamed(plan, slim.weights))
    for old, new in zip(ours, theirs, strict=False):
        if aten_name(old.target) != aten_name(new.target):
            raise Diverged(where(new) or new.name, f"runs {new.target} where the original runs {old.target}")
        call = calls.get(old)
        if call is not None:
            _compare(call, keeps, new)
        twin = edited.get(old.name)
        if twin is not None:
            _compare_literals(twin, new)
            operands.compare(twin, new)
    if len(ours) != len(theirs):
        raise Diverged(type(module).__name__, f"exports {len(theirs)} operators instead of {len(ours)}")
    if again.out_spec != program.out_spec or not operands.same_outputs():
        raise Diverged(
            type(module).__name__, "returns other values than the original, or in another structure"
        )
    return again


def looks_up_for_nothing(program: Program) -> bool:
    """Whether anything that no output depends on reads integers, whose range export does not check."""
    needed = live(program.graph)
    return any(
        n.op == "call_function" and n not in needed and any(map(_is_index, n.all_input_nodes))
        for n in program.graph.nodes
    )


def _is_index(node: Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.dtype in (torch.int64, torch.int32)


def recaptured(module: nn.Module, program: Program) -> Program:
    """Another export like that of ``program``; raises Diverged where the module cannot be exported."""
    try:
        return recapture(module, program)
    except SparseccError as error:
        raise Diverged(type(module).__name__, f"cannot be exported again: {error}") from error
    except Exception as error:  # the model's own code runs
        raise Diverged(
            type(module).__name__, f"cannot be exported again: {type(error).__name__}: {error}"
        ) from error


def _operators(program: Program) -> list[Node]:
    needed = live(program.graph)
    nodes = (n for n in program.graph.nodes if n.op == "call_function" and n in needed)
    return [n for n in nodes if _is_tensor(n.meta.get("val"))]


def _origin(node: Node) -> str:
    """The node of the view's call that a node belongs to."""
    source = node.args[0] if node.target is operator.getitem else node
    return source.name if isinstance(source, Node) else node.name


def _is_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def _compare(call: Call, keeps: Keeps, new: Node) -> None:
    fake = new.meta["val"]
    results: Sequence[Any] = fake if isinstance(fake, (tuple, list)) else (fake,)
    results = [r for r in results if isinstance(r, torch.Tensor)]
    for value, result in zip(call.outputs, results, strict=False):
        axes = keeps.analysis.solver.axes[value]
        for dim, (term, size) in enumerate(zip(axes, result.shape, strict=False)):
            if value.is_dynamic(dim) or not isinstance(size, int):
                continue
            count = keeps.count(term)
            if size != count:
                raise Diverged(
                    where(new) or new.name,
                    f"{new.name} has {size} positions along dimension {dim} where the plan has {count}",
                )
        if len(axes) != len(result.shape):
            raise Diverged(where(new) or new.name, f"{new.name} has another number of axes")


#: Arguments that only spell out sizes, which are compared as axes.
_SIZES = frozenset(
    {"size", "shape", "sizes", "split_size", "split_sizes", "chunks", "end", "length", "repeats"}
)


def _compare_literals(plan: Node, new: Node) -> None:
    """A number that a class computes from a width must be what the plan has (a softmax scale, say)."""
    if plan.target is not new.target or getattr(new.target, "_schema", None) is None:
        return
    want, have = bind(plan), bind(new)
    for name in want.keys() - _SIZES:
        for ours, theirs in zip(_leaves(want[name]), _leaves(have[name]), strict=False):
            ours, theirs = _number(ours), _number(theirs)
            if ours is None or theirs is None:
                continue
            if name == "start" and ours != theirs:
                ours, theirs = _from_front(ours, want), _from_front(theirs, have)
            if ours != theirs and not isinstance(ours, torch.device):
                raise Diverged(
                    where(new) or new.name,
                    f"{new.name} has {name}={theirs}, which the class computes from a width, "
                    f"instead of {ours}",
                )


def _from_front(start: Any, arguments: dict[str, Any]) -> Any:
    """Where a slice starts, counted from the front of its axis."""
    if isinstance(start, int) and start < 0 and "self" in arguments:
        return start + arguments["self"].meta["val"].shape[arguments["dim"]]
    return start


_ABSENT = object()


def _number(value: Any) -> Any:
    """A literal, or the number that a node computes from sizes; None for tensors and unknown numbers."""
    if value is None:
        return _ABSENT
    if not isinstance(value, Node):
        return value
    computed = value.meta.get("val")
    if isinstance(computed, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return computed.node.hint if computed.node.has_hint() else None
    return computed if isinstance(computed, (int, float)) else None


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class _Operands:
    """Compares what the nodes of two programs read: the same results, and the same constants."""

    def __init__(self, slim: Program, again: Program, names: dict[str, str]) -> None:
        self.slim = slim
        self.names = names
        self.again = again
        self.constants = set(again.exported.graph_signature.inputs_to_lifted_tensor_constants.values())
        self.known: dict[Node, Node] = {}

    def compare(self, plan: Node, new: Node) -> None:
        """Raise Diverged where two nodes at the same place read different things."""
        ours, theirs = ([i for i in n.all_input_nodes if _is_tensor(i.meta.get("val"))] for n in (plan, new))
        same = len(ours) == len(theirs) and all(map(self._same, ours, theirs))
        if not same:
            raise Diverged(where(new) or new.name, f"{new.name} reads other values than the original")
        self.known[plan] = new

    def same_outputs(self) -> bool:
        """Whether the two programs put out the same results, in the same order."""
        ours, theirs = (_leaves(p.graph.output_node().args[0]) for p in (self.slim, self.again))
        return len(ours) == len(theirs) and all(
            self._same(a, b)
            for a, b in zip(ours, theirs, strict=True)
            if isinstance(a, Node) and isinstance(b, Node) and _is_tensor(a.meta.get("val"))
        )

    def _same(self, ours: Node, theirs: Node) -> bool:
        if ours.op != "placeholder":
            return self.known.setdefault(ours, theirs) is theirs
        mine, other = self.slim.weight_of.get(ours.name), self.again.weight_of.get(theirs.name)
        if other is not None and other in self.constants:
            return mine is not None and _equal(self.slim.weights[mine], self.again.weights[other])
        now = None if mine is None else self.names.get(mine, mine)
        return now == other and (now is not None or ours.name == theirs.name)


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two constants are the same; those without values are not known to be."""
    return not (ours.is_meta or theirs.is_meta) and torch.equal(ours, theirs)

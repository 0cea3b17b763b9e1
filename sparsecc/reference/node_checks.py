"""Checks every operator of a slimmed program, fed with the masked original's activations.

A bound carried through the depth of a network explodes, so each operator is checked alone: what it
reads is what the masked original computed at the kept positions.  Contractions of length K must
agree within ``4 gamma_K (|W| |x|)`` (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
section 3.1), with gamma_K = K u / (1 - K u); moved data exactly; the rest within a tabled number
of units in the last place of the largest output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg

from sparsecc.axes.analysis import Keeps
from sparsecc.axes.terms import resolve
from sparsecc.blocks import dropped
from sparsecc.fx.capture import Program
from sparsecc.fx.ops import aten_name
from sparsecc.fx.sharing import is_list_copy, live
from sparsecc.graph import Call, Value, View
from sparsecc.plan import Action, Bypass
from sparsecc.reference.masked import at_kept, renumbered
from sparsecc.reference.torch_run import Hook, ProgramRunner
from sparsecc.subject import NodeCheck, real

#: canonical operator -> allowed error in units in the last place of the largest output
ULPS: dict[str, float] = {
    "layout": 0, "reshape": 0, "expand": 0, "repeat_interleave": 0, "tile": 0, "concat": 0, "stack": 0,
    "split": 0, "unbind": 0, "select": 0, "slice": 0, "index": 0, "pad": 0, "create": 0, "positions": 0,
    "roll": 0, "flip": 0, "ordered": 0, "topk": 0, "one_hot": 0, "histogram": 0,
    "elementwise": 8, "prelu": 4, "mixed": 64, "batch_norm": 64, "softmax": 64,
}  # fmt: skip
_DEFAULT_ULPS = 256.0
CONTRACTIONS = frozenset(
    {"conv", "conv_transpose", "linear", "matmul", "addmm", "gemm", "grouped_matmul", "einsum"}
)
C = 4.0

Default = Callable[[Mapping[Node, Any]], Any]


#: operators whose results are arbitrary, until something is written into them
_ARBITRARY = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "empty_permuted"})


def check_nodes(
    runner: ProgramRunner,
    view: View,
    keeps: Keeps,
    hook: Hook,
    slim: Program,
    inputs: list[Any],
    actions: Sequence[Action] = (),
) -> list[NodeCheck]:
    """One check per operator; ``slim`` has the operators of the original in the same order.

    Operators that go with bypassed blocks, or whose results are stored, are left out.

    Operators are checked while the original runs, because some of them write into their operands.
    """
    calls = {c.raw: c for c in view.calls}
    pairs = _aligned(runner.program, slim, dropped(view, actions).calls)
    stands = _stands_for(runner.program, [a for a in actions if isinstance(a, Bypass)])
    own = _Own(slim, inputs)
    checks: list[NodeCheck] = []

    def checking(node: Node, default: Default, env: Mapping[Node, Any]) -> Any:
        call, new = calls.get(node), pairs.get(node)
        if call is None or new is None or not _repeatable(view, call):
            return hook(node, default, env)
        operands = {n: _copy(env[n]) for n in node.all_input_nodes}
        result = hook(node, default, env)
        checks.append(_checked(call, new, operands, result, keeps, own, stands))
        return result

    runner.run(inputs, hook=checking)
    return checks


def _repeatable(view: View, call: Call) -> bool:
    """Whether an operator gives the same again: memory that nobody wrote and random draws do not."""
    target = call.raw.target
    if not isinstance(target, torch._ops.OpOverload):
        return True  # a branch or a loop: its bodies are run as they are
    settled = view.semantics is None or view.semantics.deterministic(call)
    return settled and aten_name(target) not in _ARBITRARY


def _stands_for(original: Program, bypasses: Sequence[Bypass]) -> dict[Node, Node]:
    """Bypassed sums, and what is read in their place."""
    nodes = {n.name: n for n in original.graph.nodes}
    around = {nodes[b.output]: nodes.get(b.source) for b in bypasses}
    out: dict[Node, Node] = {}
    for output, source in around.items():
        while source in around:
            source = around[source]
        if source is not None:
            out[output] = source
    return out


def _aligned(original: Program, slim: Program, gone: Collection[str]) -> dict[Node, Node]:
    def operators(p: Program) -> list[Node]:
        needed = live(p.graph)
        return [n for n in p.graph.nodes if n.op == "call_function" and n in needed and _tensors(n)]

    ours, theirs = operators(original), operators(slim)
    if gone:
        ours = [n for n in ours if (_base(n) if n.target is operator.getitem else n.name) not in gone]
    if len(ours) == len(theirs):
        return dict(zip(ours, theirs, strict=True))
    by_name = {n.name: n for n in theirs}
    return {n: by_name[n.name] for n in ours if n.name in by_name}


def _base(node: Node) -> str:
    source = node.args[0]
    return source.name if isinstance(source, Node) else ""


def _tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value)
    )


class _Own:
    """What a slimmed program has of its own: its weights, its sizes, its subgraphs."""

    def __init__(self, program: Program, inputs: list[Any]) -> None:
        self._weight_of = program.weight_of
        self._runner = ProgramRunner(program)
        self._others: dict[Node, Any] = {}

        def note(node: Node, default: Default, env: Mapping[Node, Any]) -> Any:
            result = default({})
            if not _tensors(node):
                self._others[node] = result
            return result

        self._runner.run(inputs, hook=note)

    def get(self, node: Node) -> Any:
        """The value of a node that no other node computes from activations; None for the rest."""
        if node.op == "get_attr":
            return getattr(self._runner.program.owner, str(node.target))
        if is_list_copy(node):
            return self.get(node.all_input_nodes[0])
        name = self._weight_of.get(node.name)
        if name is None or node.name in self._runner.written:
            return self._others.get(node)
        return self._runner.weight(name).clone()


def _checked(
    call: Call,
    new: Node,
    operands: Mapping[Node, Any],
    result: Any,
    keeps: Keeps,
    own: _Own,
    stands: Mapping[Node, Node],
) -> NodeCheck:
    masks = {
        ref: keeps.operand_places(call, i, operands[ref].shape)
        for i, ref in enumerate(call.refs)
        if ref is not None and isinstance(operands[ref], torch.Tensor)
    }
    operands = dict(operands)
    for ref, value in zip(call.refs, call.inputs, strict=True):
        if ref is not None and value is not None and isinstance(operands[ref], torch.Tensor):
            operands[ref] = renumbered(keeps, value, operands[ref])
    forced = {n: own.get(n) for n in new.all_input_nodes}
    once: dict[Node, Node] = {}
    for node in operands:
        if _tensors(node):
            once.setdefault(stands.get(node, node), node)
    sources = list(once.values())
    targets = [n for n in forced if _tensors(n)]
    if len(sources) != len(targets):
        return NodeCheck(call.describe(), float("inf"), 0.0)
    for source, target in zip(sources, targets, strict=True):
        if forced[target] is None:
            forced[target] = _kept(operands[source], masks.get(source))
    try:
        magnitude = _magnitude(new, call, forced)
        got = _run(new, forced)
    except (RuntimeError, ValueError, IndexError):  # its own sizes do not fit what it should read
        return NodeCheck(call.describe(), float("inf"), 0.0)
    want = _kept_outputs(result, call, keeps)
    scales = [largest(y) for y in got] if magnitude is None else magnitude
    return compared(call, keeps, list(zip(got, want, strict=True)), scales)


def _copy(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(v) for v in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def compared(
    call: Call,
    keeps: Keeps,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scales: Sequence[torch.Tensor],
) -> NodeCheck:
    """The check of one operator: its outputs beside what they should be, and what errors are relative to."""
    error, bound = 0.0, 0.0
    values = call.outputs if len(call.outputs) == len(pairs) else (None,) * len(pairs)
    for (ours, theirs), scale, value in zip(pairs, scales, values, strict=True):
        if ours.shape != theirs.shape:
            return NodeCheck(call.describe(), float("inf"), 0.0)
        if ours.is_complex():
            ours, theirs, scale = real(ours), real(theirs), scale.abs().reshape(*scale.shape, 1)
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs) and _matters(keeps, value):
                return NodeCheck(call.describe(), float("inf"), 0.0)
            continue
        tolerance = _tolerance(call, keeps, ours.dtype)
        worst, allowed = _worst(_countable(ours), _countable(theirs), scale, tolerance)
        if worst * bound >= error * allowed:  # the larger share of its bound
            error, bound = worst, allowed
    return NodeCheck(call.describe(), error, bound)


def _countable(y: torch.Tensor) -> torch.Tensor:
    """Numbers that torch can compute with: it only stores floats of 8 bits."""
    return y.float() if y.is_floating_point() and y.dtype.itemsize == 1 else y


def _matters(keeps: Keeps, value: Value | None) -> bool:
    """Whether integers must be equal: where positions come in another order, unread ones need not."""
    return not keeps.orders or value is None or value in keeps.analysis.read


def _kept(value: Any, masks: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return at_kept(value, masks).clone() if masks else value.clone()
    return value


def _kept_outputs(value: Any, call: Call, keeps: Keeps) -> list[torch.Tensor]:
    found = [value] if isinstance(value, torch.Tensor) else [v for v in value if isinstance(v, torch.Tensor)]
    return [
        renumbered(keeps, o, at_kept(v, keeps.value_places(o, v.shape)))
        for v, o in zip(found, call.outputs, strict=True)
    ]


def _run(node: Node, env: Mapping[Node, Any]) -> list[torch.Tensor]:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    return (
        [result] if isinstance(result, torch.Tensor) else [r for r in result if isinstance(r, torch.Tensor)]
    )


def _magnitude(node: Node, call: Call, env: Mapping[Node, Any]) -> list[torch.Tensor] | None:
    """|W| |x|, which errors of contractions are relative to; None for other operators."""
    if call.op not in CONTRACTIONS:
        return None
    return _run(node, {n: _absolute(v) for n, v in env.items()})


def _absolute(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.abs().to(value.dtype)


def largest(y: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude, which errors of operators without contractions are relative to."""
    y = _countable(real(y))
    if not y.is_floating_point() or not y.numel():
        return torch.zeros(())
    finite = torch.where(torch.isfinite(y), y, torch.zeros((), dtype=y.dtype))
    return finite.abs().max()


def _tolerance(call: Call, keeps: Keeps, dtype: torch.dtype) -> float:
    unit = torch.finfo(dtype).eps / 2
    if call.op in CONTRACTIONS:
        length = _length(call, keeps)
        return C * length * unit / (1 - length * unit) if length * unit < 1 else float("inf")
    facts = keeps.analysis.solver.facts.get(call)
    reduced = 0
    if (
        facts is not None
        and facts.reductions
        and call.op in ("reduce", "layer_norm", "group_norm", "instance_norm")
    ):
        reduced = _reduced(call, keeps)
    return unit * (2 * ULPS.get(call.op, _DEFAULT_ULPS) + C * reduced)


def _length(call: Call, keeps: Keeps) -> int:
    """Number of products in a sum."""
    if call.op in ("conv", "conv_transpose") and call.inputs[1] is not None:
        shape = call.inputs[1].shape
        length = 1
        for n in shape[1:] if call.op == "conv" else (shape[0], *shape[2:]):
            length *= n
        return length + 1
    length = 1
    facts = keeps.analysis.solver.facts.get(call)
    for index, dim in facts.contractions if facts is not None else ():
        axes = keeps.analysis.solver.of(call, index)
        length *= resolve(axes[dim % len(axes)]).size
    return length + 2


def _reduced(call: Call, keeps: Keeps) -> int:
    total = 1
    for index, dim in keeps.analysis.solver.facts[call].reductions:
        axes = keeps.analysis.solver.of(call, index)
        total *= resolve(axes[dim % len(axes)]).size
    return total


def _worst(
    ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor, tolerance: float
) -> tuple[float, float]:
    """Error and bound at the entry that exceeds its bound most (equal infinities and NaNs agree)."""
    if not ours.numel():
        return 0.0, 0.0
    same = (ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs))
    error = torch.where(same, torch.zeros((), dtype=torch.float64), (ours.double() - theirs.double()).abs())
    error = torch.nan_to_num(error, nan=float("inf"), posinf=float("inf"))
    tiny = torch.finfo(ours.dtype).tiny
    bound = (scale.double() * tolerance + tiny).expand(error.shape)
    at = int((error / bound).argmax())
    return float(error.reshape(-1)[at]), float(bound.reshape(-1)[at])

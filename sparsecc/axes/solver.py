"""Runs the axis rules over a view and keeps what they state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sparsecc.axes.positions import Positions, Route
from sparsecc.axes.registry import RULES
from sparsecc.axes.terms import Reason, Term, atom, concat, product, resolve
from sparsecc.axes.unify import freeze, split_concat, split_product, unify, varies, vary
from sparsecc.errors import UnsupportedModel, summary
from sparsecc.graph import Call, Value, View

_INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8"})

#: operators that treat a table of parameters as features (relative positions), and do not make weights of it
_FEATURES = frozenset({"linear", "layer_norm"})

_FOLD = " (sparsecc.fold makes a parameter of what comes of it)"

Axes = tuple[Term, ...]


@dataclass(slots=True)
class Facts:
    """What a rule stated about one call, for masked semantics and for the editors.

    ``contractions`` and ``reductions`` are (operand, dim) pairs.  ``matched`` holds, for contractions of two
    operands, the axes that are multiplied and summed along each other.  ``sizes`` maps an attribute to
    the terms whose kept counts give its new value: a list gives a list, a tuple inside a list is
    summed.  ``pins`` are values that must stay what they were although the size that they derive
    from changes: attribute -> (value, term).  ``indices`` maps an operand that holds known positions of
    an axis to that axis: where it shrinks, the numbers have to follow.  ``distinct`` are axes whose sizes
    must not become equal.
    """

    contractions: list[tuple[int, int]] = field(default_factory=list)
    matched: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    reductions: list[tuple[int, int]] = field(default_factory=list)
    sizes: dict[str, list[tuple[Term, ...]] | tuple[Term, ...]] = field(default_factory=dict)
    pins: dict[str, tuple[object, Term]] = field(default_factory=dict)
    indices: dict[int, Term] = field(default_factory=dict)
    distinct: list[tuple[Term, Term]] = field(default_factory=list)


@dataclass(slots=True)
class Attention:
    """A product of two activations: batch axes (heads), contracted axis, carried value axis."""

    batch: tuple[Term, ...]
    contracted: Term
    carried: Term


class Solver:
    """Axes of every value of a view, found by running each call's rule once, in order."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.axes: dict[Value, Axes] = {}
        self.facts: dict[Call, Facts] = {}
        self.operands: dict[tuple[Call, int], Axes] = {}
        self.attentions: list[Attention] = []
        self.several: list[Term] = []
        self.multiples: list[tuple[Term, int, Call]] = []
        self.places = Positions()
        self.derived: dict[Call, None] = {}
        self._static: set[Value] = set()
        self._trained: set[Value] = set()
        self._call: Call | None = None
        self._solve()

    # -- what rules use ---------------------------------------------------------------------

    def of(self, call: Call, index: int) -> Axes:
        """Axes of an operand; constants get fresh ones for every use."""
        value = call.inputs[index]
        if value is None:
            raise ValueError(f"operand {index} of {call.name} is absent")
        if value.kind != "const":
            return self.axes[value]
        axes = self.operands.get((call, index))
        if axes is None:
            axes = self._fresh(value)
            if value.weight is None:
                for term in axes:
                    freeze(
                        term,
                        Reason("computed constant", f"{value.name!r} is computed from sizes and constants"),
                    )
            self.operands[call, index] = axes
        return axes

    def has(self, call: Call, index: int) -> bool:
        """Whether an operand is present."""
        return index < len(call.inputs) and call.inputs[index] is not None

    def equal(self, left: Term, right: Term) -> Term:
        """State that two axes are the same; freezes what has no common form."""

        def why() -> Reason:
            return self.reason("no common refinement", f"joins axes {resolve(left)!r} and {resolve(right)!r}")

        if not unify(left, right, why):
            reason = why()
            freeze(left, reason)
            freeze(right, reason)
        return left

    def freeze(self, term: Term, kind: str, text: str) -> None:
        """Forbid removal along an axis, with the current call in the message."""
        freeze(term, self.reason(kind, text))

    def frozen(self, size: int, kind: str, text: str) -> Term:
        """A fresh axis along which nothing may be removed."""
        term = atom(size)
        freeze(term, self.reason(kind, text))
        return term

    def reason(self, kind: str, text: str) -> Reason:
        """A reason that names the call being analysed."""
        where = self._call.describe() if self._call is not None else "graph"
        return Reason(kind, f"{where} {text}")

    def factors(self, term: Term, sizes: Sequence[int]) -> list[Term]:
        """``term`` as a product of the given sizes; freezes what does not fit."""

        def why() -> Reason:
            shape = " x ".join(map(str, sizes))
            return self.reason("no common refinement", f"splits axis {resolve(term)!r} into {shape}")

        parts = split_product(term, sizes, why)
        if parts is None:
            freeze(term, why())
            parts = [self.frozen(size, "no common refinement", "split a frozen axis") for size in sizes]
        return parts

    def pieces(self, term: Term, sizes: Sequence[int]) -> list[Term]:
        """``term`` as a concatenation of the given sizes; freezes what does not fit."""

        def why() -> Reason:
            shape = " + ".join(map(str, sizes))
            return self.reason("no common refinement", f"cuts axis {resolve(term)!r} into {shape}")

        parts = split_concat(term, sizes, why)
        if parts is None:
            freeze(term, why())
            parts = [self.frozen(size, "no common refinement", "cut a frozen axis") for size in sizes]
        return parts

    def varies(self, term: Term) -> bool:
        """Whether the size of an axis depends on the sizes of the graph's inputs."""
        return varies(term)

    def static(self, value: Value) -> bool:
        """Whether a value is a weight or a constant, or computed from nothing else, not even sizes."""
        return value.kind in ("const", "weight") or value in self._static

    def contract(self, call: Call, index: int, dim: int, against: tuple[int, int] | None = None) -> None:
        """The call sums products over ``dim`` of operand ``index``, and ``against`` of another one."""
        axes = self.of(call, index)
        dim %= len(axes)
        if call.op not in _FEATURES and self._is_static(call):
            self.derive(call, axes[dim], "contracts over an axis of parameters alone")
        self._facts(call).contractions.append((index, dim))
        if against is not None:
            other, axis = against
            self._facts(call).matched.append(((index, dim), (other, axis % len(self.of(call, other)))))

    def derive(self, call: Call, term: Term, text: str) -> None:
        """The call computes with all of ``term``, and reads parameters alone: what it gives can be stored."""
        self.derived[call] = None
        self.freeze(term, "parameters only", f"{text}{_FOLD}")

    def order(self, call: Call, term: Term) -> None:
        """The call reads positions along ``term``: in what it makes of parameters alone they are settled."""
        text = "reads positions along this axis"
        if self._is_static(call) and self._reads_weights(call):
            self.derive(call, term, text)
        else:
            self.freeze(term, "order matters", text)

    def reduce(self, call: Call, index: int, dim: int) -> None:
        """The call reduces over ``dim`` of operand ``index`` (mean, norm, softmax, ...)."""
        axes = self.of(call, index)
        dim %= len(axes)
        if call.op not in _FEATURES and self._is_static(call):
            self.derive(call, axes[dim], "reduces over an axis of parameters alone")
        self._facts(call).reductions.append((index, dim))

    def size(self, call: Call, name: str, terms: list[tuple[Term, ...]] | tuple[Term, ...]) -> None:
        """Attribute ``name`` of the call is the kept count of ``terms``."""
        self._facts(call).sizes[name] = terms

    def pin(self, call: Call, name: str, value: object, term: Term) -> None:
        """Attribute ``name`` must be written out as ``value`` once ``term`` is pruned."""
        self._facts(call).pins[name] = (value, term)

    def known(self, call: Call, index: int) -> npt.NDArray[np.int64] | None:
        """The integers of a stored constant, or None where they are computed."""
        value = call.inputs[index]
        if value is None or value.kind != "const" or value.weight is None or value.dtype not in _INTEGERS:
            return None
        return known_integers(self.view, value)

    def positions(self, call: Call, index: int, term: Term) -> None:
        """The known numbers of operand ``index`` are positions of the axis ``term``."""
        self._facts(call).indices[index] = term

    def route(self, call: Call, index: int, dim: int, count: int, found: Value) -> None:
        """The call picks ``count`` positions along ``dim`` of an operand; ``found`` will hold them."""
        term = self.of(call, index)[dim]
        self.reduce(call, index, dim)
        reason = self.reason("order matters", "reads positions along this axis")
        self.places.routes.append(Route(term, count, reason))
        self.places.holds[found] = term

    def differ(self, call: Call, left: Term, right: Term) -> None:
        """The call tells two axes apart by their sizes, which must not become equal."""
        self._facts(call).distinct.append((left, right))

    def broadcast(self, call: Call, operands: Sequence[Axes], shape: Sequence[int]) -> list[Term]:
        """Axes of the broadcast of ``operands``; axes of size 1 are free."""
        out: list[Term] = []
        rank = len(shape)
        for dim, size in enumerate(shape):
            found: Term | None = None
            for axes in operands:
                k = dim - rank + len(axes)
                if size == 1 or k < 0 or axes[k].size != size:
                    continue
                found = axes[k] if found is None else self.equal(found, axes[k])
            out.append(found if found is not None else atom(size))
        return out

    # -- the run ----------------------------------------------------------------------------

    def _facts(self, call: Call) -> Facts:
        found = self.facts.get(call)
        if found is None:
            found = self.facts[call] = Facts()
        return found

    def _is_static(self, call: Call) -> bool:
        return all(v is None or self.static(v) for v in call.inputs)

    def _reads_weights(self, call: Call) -> bool:
        return any(v is not None and (v.kind == "weight" or v in self._trained) for v in call.inputs)

    def _fresh(self, value: Value) -> Axes:
        label = value.weight or value.name
        axes = tuple(atom(n, f"{label}[{i}]") for i, n in enumerate(value.shape))
        for dim, term in enumerate(axes):
            if value.is_dynamic(dim):
                vary(term)
                freeze(term, Reason("dynamic", f"dimension {dim} of {label!r} is dynamic"))
        return axes

    def _solve(self) -> None:
        self._run(self.view)
        if self.view.beside:
            self._freeze_outputs(self.view)
        for view in self.view.beside:
            self._run_beside(view)
        self._call = None
        self._freeze_unread()
        self.places.settle(self.view, self.axes)
        self._freeze_outputs(self.view)

    def _run(self, view: View) -> None:
        for value in view.inputs:
            self.axes[value] = self._fresh(value)
            for dim, term in enumerate(self.axes[value]):
                freeze(term, Reason("graph input", f"dimension {dim} of graph input {value.name!r}"))
        for value in view.weights.values():
            self.axes.setdefault(value, self._fresh(value))
        for call in view.calls:
            self._visit(call)

    def _run_beside(self, view: View) -> None:
        """Couple and freeze; facts are about calls that are edited and checked."""
        facts, operands, attentions = dict(self.facts), dict(self.operands), list(self.attentions)
        several = list(self.several)
        derived, routes, shares = dict(self.derived), list(self.places.routes), list(self.places.shares)
        self._run(view)
        self._freeze_outputs(view, "training output")
        self.facts, self.operands, self.attentions, self.derived = facts, operands, attentions, derived
        self.several = several
        for route in self.places.routes[len(routes) :]:
            freeze(route.term, route.reason)
        self.places.routes, self.places.shares = routes, shares

    def _freeze_outputs(self, view: View, kind: str = "graph output") -> None:
        for value in view.outputs:
            for axes in self._all_axes(value):
                for dim, term in enumerate(axes):
                    freeze(term, Reason(kind, f"dimension {dim} of {kind} {value.name!r}"))

    def _freeze_unread(self) -> None:
        """Weights of branches that the example did not take: what they must fit is not known."""
        views = (self.view, *self.view.beside)
        read = {value for view in views for call in view.calls for value in call.inputs}
        for name, value in self.view.weights.items():
            if value not in read:
                for term in self.axes[value]:
                    freeze(term, Reason("unread", f"no operator of the captured graph reads {name!r}"))

    def _all_axes(self, value: Value) -> list[Axes]:
        """Axes of a value, for a constant those of every use."""
        if value.kind != "const":
            return [self.axes[value]] if value in self.axes else []
        return [axes for (call, index), axes in self.operands.items() if call.inputs[index] is value]

    def _visit(self, call: Call) -> None:
        self._call = call
        function = RULES.get(call.op)
        outputs: Sequence[Sequence[Term]] | None = None
        if function is None:
            kind = "frozen operator" if "why" in call.attrs else "unknown operator"
            self.give_up(call, kind, unknown_operator(call))
        else:
            try:
                result = function(self, call)
                outputs = [result] if len(call.outputs) == 1 and _is_axes(result) else result
                outputs = self._checked(call, outputs)
            except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError) as error:
                outputs = None
                self.give_up(
                    call, "rule failed", f"is used in a way that its rule does not cover: {summary(error)}"
                )
        if outputs is not None:
            for value, axes in zip(call.outputs, outputs, strict=True):
                self.axes[value] = tuple(axes)
        self.places.after(call, self.view, failed=outputs is None)
        for value in call.outputs:
            for term, dynamic in zip(self.axes[value], value.dynamic, strict=False):
                if dynamic and (root := resolve(term)).kind == "atom":
                    root.varies = True
        sized = any(any(value.dynamic) for value in call.outputs)
        if call.inputs and self._is_static(call) and not sized:
            self._static.update(call.outputs)
            if self._reads_weights(call):
                self._trained.update(call.outputs)

    def _checked(self, call: Call, outputs: Sequence[Sequence[Term]]) -> Sequence[Sequence[Term]]:
        """A rule must describe the shapes that the graph has."""
        if len(outputs) != len(call.outputs):
            raise ValueError(f"{len(outputs)} results for {len(call.outputs)} outputs")
        for value, axes in zip(call.outputs, outputs, strict=True):
            sizes = tuple([t.size for t in axes])
            if sizes != tuple(value.shape):
                raise ValueError(f"axes {sizes} for {value.name!r} of shape {tuple(value.shape)}")
        return outputs

    def give_up(self, call: Call, kind: str, text: str) -> None:
        """Freeze every axis that the call touches; its outputs get fresh frozen axes."""
        self.facts.pop(call, None)
        if call.inputs and self._is_static(call):
            self.derived[call] = None
            text += _FOLD
        for index, value in enumerate(call.inputs):
            if value is not None and (value.kind == "const" or value in self.axes):
                for term in self.of(call, index):
                    self.freeze(term, kind, text)
        for value in call.outputs:
            self.axes[value] = tuple(self.frozen(n, kind, text) for n in value.shape)


def known_integers(view: View, value: Value) -> npt.NDArray[np.int64] | None:
    """The integers that a constant holds; None where only a run tells."""
    if value.data is not None:
        return np.asarray(value.data, np.int64)
    if view.semantics is None:
        return None
    try:
        tensor = view.semantics.constant(value)
    except UnsupportedModel:  # on the meta device
        return None
    return None if tensor is None else tensor.numpy().astype(np.int64)


def unknown_operator(call: Call) -> str:
    """The message for an operator without a rule: why, or how to add one."""
    if "why" in call.attrs:
        return f"{call.attrs['why']}, so every axis that it touches stays whole"
    return (
        "has no axis rule, so every axis that it touches stays whole; "
        f"add one with @sparsecc.axes.rule({call.op!r})"
    )


def _is_axes(result: object) -> bool:
    return isinstance(result, (list, tuple)) and (not result or isinstance(result[0], Term))


__all__ = ["Attention", "Axes", "Facts", "Solver", "concat", "product"]

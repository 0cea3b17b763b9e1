"""What a model computes from its parameters alone, over and over, and what its results are.

Standardised, normalised and generated weights (weight normalisation, Salimans & Kingma, 2016; weight
standardisation, Qiao et al., 2019; position biases that a small network makes of a table) depend on whole
axes of the parameters behind them, which therefore stay.  Stored, the results are weights like any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.graph import Call, Value, View
from sparsecc.patterns.layers import FLOATS
from sparsecc.plan import Fold, Skip

#: what PyTorch calls the parts of a weight that it computes
_PARTS = re.compile(r"parametrizations\.(\w+)\.original\d*$|(?<=\bweight)_v$")
#: a result may have this many times the entries of what it is computed from
GROWTH = 4
#: ... and any result may have this many
SMALL = 2**20
#: what only gives a value another form
_FORMS = frozenset({"layout", "reshape", "expand", "select", "slice"})

#: values that parameters and constants alone decide, with the call that makes them, in order
Made = dict[Value, Call]


@dataclass
class Folding:
    """Values to store, and those left alone with the reason."""

    folds: list[Fold] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def folding(analysis: Analysis) -> Folding:
    """Every value that is computed over whole axes of parameters, where computing with parameters ends.

    Raises UnsupportedModel where the model has no values (meta device).
    """
    view, derived = analysis.view, set(analysis.solver.derived)
    found = Folding()
    if view.semantics is None or not derived:
        return found
    results = _Results(view)
    while True:
        made = _made(view, results.failed)
        ends = _ends(view, made, _reached(made, derived))
        if all(results.computed(made, value) for value in ends):
            break  # what cannot be computed alone is left to the model; what it reads can be stored
    taken = {*view.names(), *view.weights, *view.tied, *(v.name for c in view.calls for v in c.outputs)}
    names: dict[tuple[object, ...], str] = {}
    for value in ends:
        sources = _sources(made, value)
        reason = _reason(view, made, value, sources)
        if reason:
            found.skips.append(Skip(value.name, reason))
            continue
        stored, exact = results.of(value)
        key = (stored.dtype, tuple(stored.shape), stored.numpy().tobytes(), *sources)
        if key not in names:  # a shared module computes its weight at every call
            names[key] = _name(sources, taken)
        found.folds.append(Fold(value.name, names[key], stored.numpy(), exact.numpy()))
    why = "what computes it cannot be run on its own"
    found.skips += [Skip(call.outputs[0].name, why) for call in results.failed]
    return found


def _made(view: View, failed: dict[Call, None]) -> Made:
    """What parameters and stored constants decide, and no size that is computed while the model runs."""
    semantics = view.semantics
    assert semantics is not None
    changed = semantics.overwritten(read_later=False)
    made: Made = {}

    def fixed(value: Value | None) -> bool:
        return value is None or (value not in changed and (value in made or value.weight is not None))

    for call in view.calls:
        operands = (*call.inputs, *call.attrs.get("unlisted", ()))
        sized = not any(any(v.dynamic) or v.unranked or v in changed for v in call.outputs)
        alone = call not in failed and semantics.settled(call) and semantics.deterministic(call)
        if sized and call.outputs and all(map(fixed, operands)) and alone:
            made.update(dict.fromkeys(call.outputs, call))
    return made


def _reached(made: Made, derived: set[Call]) -> set[Value]:
    """Values that are computed over whole axes of parameters, and what follows from them."""
    reached: set[Value] = set()
    for call in made.values():
        if call in derived or any(v in reached for v in call.inputs):
            reached.update(call.outputs)
    return reached


def _ends(view: View, made: Made, reached: set[Value]) -> list[Value]:
    """Floats among the reached values that something else reads; of several forms of one the first."""
    inside = set(made.values())
    read = {v for c in view.calls if c not in inside for v in (*c.inputs, *c.attrs.get("unlisted", ()))}
    read.update(view.outputs)
    ends = [v for v in made if v in read and v in reached and v.dtype in FLOATS]
    cores = {v: _core(made, reached, v) for v in ends}
    often = {c for c in cores.values() if sum(other is c for other in cores.values()) > 1}
    return list(dict.fromkeys(cores[v] if cores[v] in often else v for v in ends))


def _core(made: Made, reached: set[Value], value: Value) -> Value:
    """The value that this one is another form of."""
    while made[value].op in _FORMS:
        source = made[value].inputs[0]
        if source is None or source not in reached or source.dtype not in FLOATS:
            break
        value = source
    return value


def _sources(made: Made, value: Value) -> list[Value]:
    """The stored tensors that a value is computed from, in the order in which they are met."""
    found: dict[Value, None] = {}
    stack, seen = [value], set[Value]()
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at not in made:
            found[at] = None
        else:
            stack.extend(v for v in reversed(made[at].inputs) if v is not None)
    return list(found)


def _reason(view: View, made: Made, value: Value, sources: list[Value]) -> str:
    """Why a value that could be stored is not; '' where it is."""
    behind = sum(_entries(v) for v in sources)
    if _entries(value) > max(SMALL, GROWTH * behind):
        return f"storing it would take {_entries(value) / max(behind, 1):.0f} times the parameters"
    if len(made[value].outputs) > 1:
        captured = (v for c in view.calls for v, ref in zip(c.inputs, c.refs, strict=False) if ref is None)
        if value in view.outputs or any(v is value for v in captured):
            return "it is one of several results of its operator, and put out or read inside another one"
    return ""


def _name(sources: list[Value], taken: set[str]) -> str:
    """A name after the largest parameter behind a value."""
    stored = [v for v in sources if v.weight is not None]
    base = str(max(stored, key=_entries).weight) if stored else "folded"
    whole = _PARTS.sub(r"\1", base)
    own = whole if whole != base else f"{base}_folded"
    others = (f"{own}{number}" for number in itertools.count(2))
    name = next(n for n in itertools.chain([own], others) if n not in taken)
    taken.add(name)
    return name


def _entries(value: Value) -> int:
    return torch.Size(value.shape).numel()


@dataclass
class _Results:
    """Computes values as the model does and in float64, each call once; ``failed`` cannot be."""

    view: View
    failed: dict[Call, None] = field(default_factory=dict)
    _known: dict[tuple[Value, bool], torch.Tensor] = field(default_factory=dict)

    def computed(self, made: Made, value: Value) -> bool:
        """Whether a value could be computed."""
        for call in self._needed(made, value):
            for promoted in (False, True):
                results = self._run(call, promoted)
                if results is None:
                    self.failed[call] = None
                    return False
                self._known.update({(v, promoted): r for v, r in zip(call.outputs, results, strict=True)})
        return True

    def of(self, value: Value) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model computes (bfloat16 as float32), and what it would in float64."""
        stored, exact = self._known[value, False].contiguous(), self._known[value, True].contiguous()
        return stored.float() if stored.dtype == torch.bfloat16 else stored, exact.double()

    def _needed(self, made: Made, value: Value) -> Iterator[Call]:
        """Calls that have not run yet, in order."""
        needed: set[Call] = set()
        stack = [value]
        while stack:
            call = made.get(stack.pop())
            if call is not None and call not in needed and (call.outputs[0], True) not in self._known:
                needed.add(call)
                stack.extend(v for v in call.inputs if v is not None)
        return (c for c in dict.fromkeys(made.values()) if c in needed)

    def _run(self, call: Call, promoted: bool) -> tuple[torch.Tensor, ...] | None:
        semantics = self.view.semantics
        assert semantics is not None
        operands = [
            None if v is None else self._known.get((v, promoted), semantics.constant(v)) for v in call.inputs
        ]
        if any(v is not None and t is None for v, t in zip(call.inputs, operands, strict=True)):
            return None
        results = semantics.evaluate(call, operands, promoted=promoted)
        if results is None or [tuple(r.shape) for r in results] != [tuple(v.shape) for v in call.outputs]:
            return None
        return results

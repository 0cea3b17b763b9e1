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


@dataclass
class Folding:
    """Values to store, and those left alone with the reason."""

    folds: list[Fold] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def folding(analysis: Analysis) -> Folding:
    """Every value that is computed over whole axes of parameters, where computing with parameters ends.

    Raises UnsupportedModel where the model has no values (meta device).
    """
    view = analysis.view
    found = Folding()
    derived = set(analysis.solver.derived)
    if view.semantics is None or not derived:
        return found
    made = _made(view)
    reached: set[Value] = set()
    for call in made.values():
        if call in derived or any(v in reached for v in call.inputs):
            reached.update(call.outputs)
    results = _Results(view, made)
    taken = set(view.weights) | {v.name for c in view.calls for v in c.outputs}
    for value in _ends(view, made):
        if value not in reached:
            continue
        reason, values = results.storable(value)
        if values is None:
            found.skips.append(Skip(value.name, reason))
        else:
            name = _name(_sources(made, value), taken)
            found.folds.append(Fold(value.name, name, values.double().numpy()))
    return found


def _made(view: View) -> dict[Value, Call]:
    """Values that parameters and constants alone decide, with the call that makes them, in order."""
    assert view.semantics is not None
    changed = view.semantics.overwritten(read_later=False)
    made: dict[Value, Call] = {}

    def fixed(value: Value | None) -> bool:
        return value is None or (
            value not in changed and (value in made or value.kind in ("const", "weight"))
        )

    for call in view.calls:
        operands = (*call.inputs, *call.attrs.get("unlisted", ()))
        sized = not any(any(v.dynamic) or v.unranked or v in changed for v in call.outputs)
        if sized and call.outputs and all(map(fixed, operands)) and view.semantics.deterministic(call):
            made.update(dict.fromkeys(call.outputs, call))
    return made


def _ends(view: View, made: dict[Value, Call]) -> Iterator[Value]:
    """Floats among these values that something else reads."""
    inside = set(made.values())
    read = {
        v
        for c in view.calls
        if c not in inside
        for v in (*c.inputs, *c.attrs.get("unlisted", ()))
        if v in made
    }
    read.update(v for v in view.outputs if v in made)
    return (v for v in made if v in read and v.dtype in FLOATS)


def _sources(made: dict[Value, Call], value: Value) -> list[Value]:
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
    """Computes values in float64, each call once."""

    view: View
    made: dict[Value, Call]
    _known: dict[Value, torch.Tensor | None] = field(default_factory=dict)

    def storable(self, value: Value) -> tuple[str, torch.Tensor | None]:
        """What a value holds, or why it is not stored."""
        behind = sum(_entries(v) for v in _sources(self.made, value))
        if _entries(value) > max(SMALL, GROWTH * behind):
            return f"storing it would take {_entries(value) / max(behind, 1):.0f} times the parameters", None
        found = self._value(value)
        if found is None:
            return "what computes it cannot be run on its own", None
        return "", found

    def _value(self, value: Value) -> torch.Tensor | None:
        for call in self._needed(value):
            for output, result in zip(call.outputs, self._run(call), strict=True):
                self._known[output] = result
        return self._known[value]

    def _needed(self, value: Value) -> list[Call]:
        """Calls that have not run yet, in order."""
        needed: set[Call] = set()
        stack = [value]
        while stack:
            call = self.made.get(stack.pop())
            if call is not None and call not in needed and call.outputs[0] not in self._known:
                needed.add(call)
                stack.extend(v for v in call.inputs if v is not None)
        return [c for c in dict.fromkeys(self.made.values()) if c in needed]

    def _run(self, call: Call) -> list[torch.Tensor | None]:
        assert self.view.semantics is not None
        operands = [None if v is None else self._operand(v) for v in call.inputs]
        nothing: list[torch.Tensor | None] = [None] * len(call.outputs)
        if any(v is not None and t is None for v, t in zip(call.inputs, operands, strict=True)):
            return nothing
        results = self.view.semantics.evaluate(call, operands)
        if results is None or [tuple(r.shape) for r in results] != [tuple(v.shape) for v in call.outputs]:
            return nothing
        return list(results)

    def _operand(self, value: Value) -> torch.Tensor | None:
        if value in self._known:
            return self._known[value]
        assert self.view.semantics is not None
        return self.view.semantics.constant(value)

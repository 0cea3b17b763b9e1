"""Which positions of which axes hold the same number for every input.

A forward dataflow over a view.  It starts at the weights: a filter of zeros puts out its bias, a
BatchNorm with gamma 0 its beta, and what operators make of known numbers is computed by running
them in float64.  What is not certain is not known.  Inputs with infinite or undefined entries are
not considered (0 * inf is NaN), as everywhere in pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.constants.known import MAX_ENTRIES, Known, fits
from sparsecc.constants.products import PRODUCTS, Product, well_formed
from sparsecc.constants.rules import MOVES, RULES
from sparsecc.graph import Call, Value


class Constants:
    """Known entries of every value of a view."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.view = analysis.view
        self.semantics = analysis.view.semantics
        self._found: dict[Value, Known | None] = {}
        self._products: dict[Call, Product | None] = {}
        self._static: set[Value] = set()
        if self.semantics is not None:
            self._run()

    def of(self, value: Value | None) -> Known | None:
        """What is known of a value; None where nothing is."""
        if value is None:
            return None
        if value not in self._found:
            self._found[value] = self._constant(value)
        return self._found[value]

    def vector(self, value: Value | None, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Known positions along ``dim``, alike along all other axes, and their values in float64."""
        assert value is not None
        dim %= len(value.shape)
        size = value.shape[dim]
        found = self.of(value)
        if found is None:
            return torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64)
        for other in range(len(value.shape)):
            if other != dim:
                found = found.alike(other)
        known, numbers = found.pair()
        known, numbers = known.reshape(-1).expand(size), numbers.reshape(-1).double().expand(size)
        return known, torch.where(known, numbers, torch.zeros((), dtype=torch.float64))

    def full(self, value: Value | None) -> torch.Tensor | None:
        """All numbers of a value that does not depend on the inputs; weights in their own dtype."""
        found = self.of(value)
        if value is None or found is None or any(value.dynamic) or not bool(found.known.all()):
            return None
        return found.value.expand(value.shape)

    def product(self, call: Call) -> Product | None:
        """The call as a product with known weights, if it is one."""
        if call not in self._products:
            rule = PRODUCTS.get(call.op)
            found = None if rule is None else _attempted(rule, self, call)
            self._products[call] = found if found is None or well_formed(found, call) else None
        return self._products[call]

    # -- the run ------------------------------------------------------------------------------------

    def _constant(self, value: Value) -> Known | None:
        if self.semantics is None or value.kind not in ("weight", "const"):
            return None
        numbers = self.semantics.constant(value)
        if numbers is None or tuple(numbers.shape) != tuple(value.shape):
            return None
        self._static.add(value)
        return Known(torch.ones([1] * numbers.dim(), dtype=torch.bool), numbers)

    def _run(self) -> None:
        assert self.semantics is not None
        overwritten = self.semantics.overwritten()
        for call in self.view.calls:
            found = self._outputs(call)
            for place, value in enumerate(call.outputs):
                known = found[place] if place < len(found) and value not in overwritten else None
                self._found[value] = known if known is None or fits(known, value) else None

    def _outputs(self, call: Call) -> Sequence[Known | None]:
        for value in call.inputs:
            self.of(value)
        if all(v in self._static for v in call.inputs if v is not None):
            self._static.update(call.outputs)
            folded = None if call.op in MOVES else self._folded(call)
            if folded is not None:
                return folded
        rule = RULES.get(call.op)
        if rule is None:
            return ()
        found = _attempted(rule, self, call)
        return found if isinstance(found, list) else [found]

    def _folded(self, call: Call) -> list[Known] | None:
        """A call on constants alone, run as it is."""
        assert self.semantics is not None
        if not call.inputs or sum(math.prod(v.shape) for v in call.inputs if v is not None) > MAX_ENTRIES:
            return None
        operands = [self.full(v) for v in call.inputs]
        if any(v is not None and t is None for v, t in zip(call.inputs, operands, strict=True)):
            return None
        results = self.semantics.evaluate(call, operands)
        if results is None or [tuple(r.shape) for r in results] != [tuple(v.shape) for v in call.outputs]:
            return None
        return [Known(torch.ones([1] * r.dim(), dtype=torch.bool), r) for r in results]


def _attempted(rule: Callable[[Constants, Call], Any], c: Constants, call: Call) -> Any:
    """What a rule finds; nothing where the operands of a damaged model have other ranks and sizes."""
    try:
        return rule(c, call)
    except (LookupError, ValueError, ArithmeticError, RuntimeError):
        return None

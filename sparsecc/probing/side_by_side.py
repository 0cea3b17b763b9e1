"""Masked runs beside the model that they differ from: what does not differ is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparsecc.axes.analysis import Keeps
from sparsecc.calibration.lockstep import lockstep
from sparsecc.graph import Call
from sparsecc.plan import Plan
from sparsecc.subject import Inputs, Step, Subject


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan that is run under masked semantics, with the positions that it keeps."""

    plan: Plan
    keeps: Keeps

    @cached_property
    def masked(self) -> frozenset[Call]:
        """Calls that sum or reduce over an axis that loses positions: only there masks do anything."""
        analysis = self.keeps.analysis
        return frozenset(
            call
            for call, facts in analysis.solver.facts.items()
            if any(self._cut(call, i, d) for i, d in (*facts.contractions, *facts.reductions))
        )

    def _cut(self, call: Call, index: int, dim: int) -> bool:
        masks = self.keeps.operand(call, index)
        return bool(masks) and masks[dim] is not None


def outputs_beside(
    subject: Subject, inputs: Inputs, base: Plan | None, candidates: Sequence[Candidate]
) -> tuple[list[Any], list[list[Any]]]:
    """Flat outputs of the model under ``base`` (None: as it is), and of every candidate.

    A candidate's call is taken from the base where nothing is masked and its operands are equal: all layers
    before the one that loses positions.  Not in models that change values in place.
    """
    semantics = subject.view.semantics
    shared = semantics is not None and not semantics.overwritten(read_later=False)

    def visit(call: Call, steps: Sequence[Step]) -> list[tuple[Any, ...]]:
        first = steps[0]
        found = first.run(first.operands)
        return [
            found,
            *(
                found
                if shared and call not in candidate.masked and _equal(first.operands, step.operands)
                else step.run(step.operands)
                for candidate, step in zip(candidates, steps[1:], strict=True)
            ),
        ]

    runs = [subject.stepping(inputs, plan=base), *(subject.stepping(inputs, plan=c.plan) for c in candidates)]
    before, *after = lockstep(runs, visit)
    return before, after


def _equal(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(a: Any, b: Any) -> bool:
    """Whether two operands hold the same; False where that cannot be told."""
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.device == b.device
    return (same_memory and a.layout == torch.strided) or torch.equal(a, b)

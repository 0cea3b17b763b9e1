"""Layer by layer: what a layer reads in the pruned model is known before the layer itself is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.calibration import Statistics
from sparsecc.calibration.lockstep import lockstep
from sparsecc.calibration.moments import MOMENTS, add_
from sparsecc.calibration.readings import Reading
from sparsecc.calibration.statistics import blaming
from sparsecc.graph import Call
from sparsecc.lowering import lower
from sparsecc.plan import Action, Mask, Plan, Write
from sparsecc.subject import Step


@dataclass(frozen=True)
class Moment:
    """A call before it runs, on all batches: in the original model, where asked for, and the pruned."""

    call: Call
    original: Sequence[Step]
    pruned: Sequence[Step]


#: gives new values of weights, by name, in their stored shapes
Update = Callable[[Moment], Mapping[str, torch.Tensor]]

#: gives the outputs of a call in the original model and in the pruned, for every batch
Visit = Callable[[Moment], tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]


@dataclass
class Recovery:
    """The pruned model so far, run on calibration data, with updates that take effect at once.

    ``beside``: the original model runs in step with it.  ``held``: new values are kept to the end, and not
    only until their last reader has run.
    """

    statistics: Statistics
    analysis: Analysis
    beside: bool = False
    held: bool = True
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """What earlier passes decided."""
        given = self.analysis.given
        return lower(self.analysis, given.kept, extra=given.actions)

    @property
    def keeps(self) -> Keeps:
        """Positions that earlier passes keep."""
        return self.analysis.keeps(self.analysis.given.kept)

    def run(self, update: Update, what: str, last: Call | None = None) -> dict[str, torch.Tensor]:
        """Let ``update`` see every call, up to ``last``; all new values by weight."""

        def visit(moment: Moment) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
            self.values.update(update(moment))
            originals = [s.run(s.operands) for s in moment.original]
            pruned = [s.run(self.changed(s)) for s in moment.pruned]
            for name in () if self.held else self._last.get(moment.call, ()):
                self.values.pop(name, None)
            return originals, pruned

        return self.visited(visit, what, last)

    def visited(self, visit: Visit, what: str, last: Call | None = None) -> dict[str, torch.Tensor]:
        """Let ``visit`` compute every call, up to ``last``; all new values by weight."""
        subject, plan = self.statistics.subject, self.plan
        inputs = [self.statistics.inputs(batch) for batch in self.statistics.batches(what)]
        originals = [subject.stepping(i) for i in inputs] if self.beside else []
        pruned = [subject.stepping(i, plan=plan) for i in inputs]

        def call(call: Call, steps: Sequence[Step]) -> list[tuple[Any, ...]]:
            outputs = visit(Moment(call, steps[: len(originals)], steps[len(originals) :]))
            return [*outputs[0], *outputs[1]]

        with torch.no_grad(), blaming():
            lockstep([*originals, *pruned], call, last=last)
        return self.values

    @cached_property
    def _last(self) -> dict[Call, list[str]]:
        """Weights by the last call that reads them."""
        place = {call: i for i, call in enumerate(self.analysis.view.calls)}
        last: dict[str, Call] = {}
        readers = [(r.weight, r.call) for rs in self.statistics.readings.of.values() for r in rs]
        for call in self.analysis.view.calls:
            readers += [(v.weight, call) for v in call.inputs if v is not None and v.weight is not None]
        for name, call in readers:
            if name not in last or place[call] > place[last[name]]:
                last[name] = call
        out: dict[Call, list[str]] = {}
        for name, call in last.items():
            out.setdefault(call, []).append(name)
        return out

    def last_reader(self, weights: Collection[str]) -> Call | None:
        """The last product that reads one of these weights."""
        calls = {r.call for w in weights for r in self.statistics.readings.of.get(w, ())}
        return next((c for c in reversed(self.analysis.view.calls) if c in calls), None)

    def changed(self, step: Step) -> list[Any]:
        """The operands of a call, with new values of the weights among them."""
        operands = list(step.operands)
        for reading in self.statistics.readings.at.get(step.call, ()):
            if reading.weight in self.values:
                new = self.values[reading.weight].to(operands[reading.operand].dtype)
                operands[reading.operand] = reading.seen(new)
        for place, value in enumerate(step.call.inputs):
            if value is not None and value.weight in self.values:
                operands[place] = self.values[value.weight].to(operands[place].dtype)
        return operands

    def current(self, weight: str) -> torch.Tensor:
        """A weight as earlier passes and updates leave it, not masked; float32 at least."""
        value = self.values.get(weight)
        if value is None:
            written = [a for a in self.analysis.given.actions if isinstance(a, Write) and a.weight == weight]
            view = self.analysis.view
            value = torch.from_numpy(written[-1].values.copy()) if written else view.weight(weight).detach()
        return value.double() if value.dtype == torch.float64 else value.float()

    def kept(self, weight: str) -> list[torch.Tensor | None]:
        """Kept positions of every axis of a weight, in their new order; None where all stay in place."""
        axes = self.analysis.solver.axes[self.analysis.view.weights[weight]]
        found = [self.keeps.indices(t) for t in axes]
        return [
            None if places is None else torch.from_numpy(np.ascontiguousarray(places)) for places in found
        ]


def summed(reading: Reading, steps: Sequence[Step], name: str) -> torch.Tensor:
    """A moment of the rows that a reading has, over all batches, as ``MOMENTS`` names them."""
    total = MOMENTS[name](reading, steps[0])
    for step in steps[1:]:
        add_(total, name, reading, step)
    return total


def written(values: Mapping[str, torch.Tensor], analysis: Analysis) -> Iterator[Action]:
    """Actions that put values in the place of weights."""
    for name, value in values.items():
        stored = value.to(analysis.view.weight(name).dtype)
        wide = stored if stored.dtype in (torch.float32, torch.float64) else stored.float()
        yield Write(name, np.ascontiguousarray(wide.cpu().numpy()))


def masked_where(keeps: Mapping[str, torch.Tensor]) -> Iterator[Action]:
    """Actions that zero what is not kept."""
    for name, keep in keeps.items():
        yield Mask(name, np.ascontiguousarray(keep.cpu().numpy()))

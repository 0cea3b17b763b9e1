"""Training of what is left, one part of the graph after the other, towards what the original computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.calibration import Statistics
from sparsecc.errors import summary
from sparsecc.graph import Call, Value
from sparsecc.memory import out_of_memory
from sparsecc.patterns.layers import FLOATS
from sparsecc.plan import Action, Bypass, Skip
from sparsecc.recovery.regions import Region, regions
from sparsecc.recovery.sequential import Moment, Recovery, written
from sparsecc.recovery.sums import wide
from sparsecc.reference.masked import at_kept
from sparsecc.selection import selected
from sparsecc.subject import Step

Named = dict[str, torch.Tensor]

#: root mean square of a weight that a first step is measured by at least: biases may be zero
_SMALL = 1e-3


class Unfit(Exception):
    """Why a region keeps the values that it has."""


@dataclass
class Distilled:
    """New values, and parts left alone with the reason."""

    actions: list[Action] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """How a part is trained: passes over the batches, and the first step of Adam.

    ``rate`` is a share of the root mean square of each weight; it falls to zero along a half cosine.
    ``rows``: whether all count alike, or relative to what is wanted of them.
    """

    epochs: int
    rate: float
    rows: Literal["equal", "relative"]


def distill(
    analysis: Analysis,
    statistics: Statistics,
    schedule: Schedule,
    *,
    everything: bool = False,
    own: bool = False,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Distilled:
    """Train the regions in the order in which they run, on what they read in the pruned model.

    ``everything``: also those that lost nothing.  ``own``: a region aims at what it would give in the pruned
    model, had it lost nothing, instead of at what it gives in the original one.
    """
    out = Distilled()
    recovery = Recovery(statistics, analysis, beside=True)
    chosen = selected(analysis, include, exclude)
    bypassed = {a.output for a in analysis.given.actions if isinstance(a, Bypass)}
    found = list(regions(analysis, statistics.readings, recovery.keeps))
    where = {call: region for region in found for call in region.calls}
    training: dict[Region, Training] = {}
    for region in found:
        reason, part = _training(recovery, region, chosen, everything, bypassed)
        if reason:
            out.skips.append(Skip(region.weights[0], reason))
        elif part is not None:
            training[region] = part
    current: list[tuple[Region, list[Run]]] = []
    done: list[Region] = []

    def visit(moment: Moment) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        region = where[moment.call]
        if not current or current[0][0] is not region:
            current[:] = [(region, [Run() for _ in moment.pruned])]
        runs = current[0][1]
        originals = [s.run(s.operands) for s in moment.original]
        pruned = [s.run(recovery.changed(s)) for s in moment.pruned]
        part = training.get(region)
        if part is not None and moment.call in region.dependent:
            for run, step, results, wanted in zip(runs, moment.pruned, pruned, originals, strict=True):
                run.record(step, results, wanted, region.targets)
            if moment.call is region.last:
                try:
                    recovery.values.update(part.fit(recovery, runs, schedule))
                    pruned = [run.last(recovery) for run in runs]
                except Unfit as reason:
                    out.skips.append(Skip(region.weights[0], str(reason)))
                runs.clear()
                done.append(region)
                statistics.advance(len(done), len(training), "distillation, part by part")
        if own and moment.call is region.last:
            originals = pruned
        return originals, pruned

    if training:
        last = [region for region in found if region in training][-1].last
        out.actions += written(recovery.visited(visit, "distillation, part by part", last), analysis)
    return out


@dataclass
class Run:
    """What one batch computes in a region: the calls to repeat, and what the targets should be."""

    steps: list[Step] = field(default_factory=list)
    #: operands of every step that earlier steps compute
    linked: list[dict[int, Value]] = field(default_factory=list)
    wanted: dict[Value, torch.Tensor] = field(default_factory=dict)
    _made: dict[int, Value] = field(default_factory=dict)
    _alive: list[tuple[Any, ...]] = field(default_factory=list)

    def record(
        self, step: Step, results: tuple[Any, ...], wanted: tuple[Any, ...], targets: Collection[Value]
    ) -> None:
        """Remember a call; its operands are traced by what they are, as a bypassed branch is another."""
        self.linked.append({p: self._made[id(x)] for p, x in enumerate(step.operands) if id(x) in self._made})
        self.steps.append(step)
        self._alive.append(results)  # else another tensor could come by the same id
        for place, value in placed(step.call):
            self._made[id(results[place])] = value
            if value in targets:
                self.wanted[value] = wanted[place]

    def computed(self, recovery: Recovery) -> Iterator[tuple[Step, tuple[Any, ...]]]:
        """The steps again, with the present values of weights, and what they give."""
        have: dict[Value, Any] = {}
        for step, linked in zip(self.steps, self.linked, strict=True):
            operands = recovery.changed(step)
            for place, value in linked.items():
                operands[place] = have[value]
            results = step.run(operands)
            have.update((value, results[place]) for place, value in placed(step.call))
            yield step, results

    def last(self, recovery: Recovery) -> tuple[Any, ...]:
        """What the last step gives."""
        results: tuple[Any, ...] = ()
        for _, results in self.computed(recovery):  # noqa: B007
            pass
        return results

    def loss(self, recovery: Recovery, keeps: Keeps, axis: int | None) -> torch.Tensor:
        """How far the targets are from what is wanted."""
        losses = [
            _distance(keeps, value, results[place], self.wanted[value], axis)
            for step, results in self.computed(recovery)
            for place, value in placed(step.call)
            if value in self.wanted and self.wanted[value].is_floating_point()
        ]
        return torch.stack(losses).mean()


def placed(call: Call) -> list[tuple[int, Value]]:
    """The outputs of a call with their places among its results."""
    return list(zip(call.attrs.get("outputs", range(len(call.outputs))), call.outputs, strict=True))


def _distance(
    keeps: Keeps, value: Value, got: torch.Tensor, wanted: torch.Tensor, axis: int | None
) -> torch.Tensor:
    """Mean squared difference at the positions that are left, as a share of the mean square.

    With ``axis``, that of channels, rows count by what is usual over their own mean square.
    """
    masks = keeps.value(value, got.shape)
    got, wanted = (wide(at_kept(x, masks)) for x in (got, wanted))
    error, size = (got - wanted).square(), wanted.square()
    if axis is not None and got.dim() >= -axis:
        error, size = error.mean(axis), size.mean(axis)
        size = size + size.median()
        return (error / torch.where(size > 0, size, torch.ones_like(size))).mean()
    scale = size.mean()
    return error.mean() / torch.where(scale > 0, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class Training:
    """Weights of a region that may change, and the masks that they have."""

    region: Region
    names: tuple[str, ...]
    masks: Mapping[str, torch.Tensor]

    def fit(self, recovery: Recovery, runs: Sequence[Run], schedule: Schedule) -> Named:
        """Values that bring the targets nearer on batches that are not trained on; Unfit without any."""
        leaves = {n: recovery.current(n).clone().requires_grad_() for n in self.names}
        keeps = recovery.keeps
        axis = self._channels(recovery) if schedule.rows == "relative" else None
        held = -(-len(runs) // 8) if len(runs) > 1 else 0
        train, test = runs[: len(runs) - held], runs[len(runs) - held :] if held else runs
        groups = [{"params": [t], "lr": schedule.rate * max(_size(t), _SMALL)} for t in leaves.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs * len(train))
        generator = torch.Generator().manual_seed(0)

        def scored() -> float:
            with torch.no_grad(), self._with(recovery, leaves):
                return float(torch.stack([run.loss(recovery, keeps, axis) for run in test]).mean())

        best = scored()
        found: Named = {}
        for _ in range(schedule.epochs):
            for index in torch.randperm(len(train), generator=generator).tolist():
                optimizer.zero_grad()
                with torch.enable_grad(), self._with(recovery, leaves):
                    _derive(train[index].loss(recovery, keeps, axis))
                optimizer.step()
                decay.step()
            score = scored()
            if score < best:
                best = score
                found = {n: t.detach().clone() for n, t in self._masked(leaves).items()}
        if not found:
            raise Unfit("training it made it no better")
        return found

    def _channels(self, recovery: Recovery) -> int:
        """The axis of channels behind the last product, from the end."""
        at = recovery.statistics.readings.at
        products = [r for call in self.region.calls for r in at.get(call, ())]
        return -(len(products[-1].dims) - 1) if products and products[-1].is_conv else -1

    @contextmanager
    def _with(self, recovery: Recovery, leaves: Named) -> Iterator[None]:
        """The weights in training as those that calls read, zeros in their places."""
        before = dict(recovery.values)
        recovery.values.update(self._masked(leaves))
        try:
            yield
        finally:
            recovery.values.clear()
            recovery.values.update(before)

    def _masked(self, leaves: Named) -> Named:
        return {n: leaf * self.masks[n] if n in self.masks else leaf for n, leaf in leaves.items()}


def _derive(loss: torch.Tensor) -> None:
    """Gradients of the leaves; Unfit where an operator has none."""
    if not loss.requires_grad:
        raise Unfit("no gradient reaches its weights")
    try:
        loss.backward()
    except RuntimeError as error:  # NotImplementedError is one
        if out_of_memory(error):
            raise
        raise Unfit(f"gradients do not pass it: {summary(error)}") from error


def _size(weight: torch.Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())


def _training(
    recovery: Recovery,
    region: Region,
    chosen: Callable[[str], str],
    everything: bool,
    bypassed: Collection[str],
) -> tuple[str, Training | None]:
    """What is trained in a region, or why nothing is where something could be."""
    analysis, given = recovery.analysis, recovery.analysis.given
    here = [n for n in (*region.weights, *region.shared) if n not in given.lost]
    if not here or not any(v.dtype in FLOATS for v in region.targets):
        return "", None
    if not everything and not any(_lost_something(recovery, n) for n in here):
        return "", None
    names = tuple(n for n in region.weights if n not in given.lost and not chosen(n))
    if not names:
        return "", None
    semantics = analysis.view.semantics
    if any(v.name in bypassed for c in region.calls for v in c.outputs):
        return "a branch that a pass took out joins it", None
    if semantics is not None:
        changed = semantics.overwritten(read_later=False)
        if any(v in changed for c in region.calls for v in (*c.inputs, *c.outputs)):
            return "it changes values in place", None
        unsure = [c for c in region.dependent if not semantics.deterministic(c)]
        if unsure:
            return f"{unsure[0].describe()} is random", None
    masks = {n: torch.from_numpy(given.masks[n].copy()) for n in names if n in given.masks}
    return "", Training(region, names, masks)


def _lost_something(recovery: Recovery, name: str) -> bool:
    given = recovery.analysis.given
    return name in given.masks or any(kept is not None for kept in recovery.kept(name))

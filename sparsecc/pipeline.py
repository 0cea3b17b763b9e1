"""Capture, decide, edit, verify: what every public entry point and every pass runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsecc.axes.analysis import Analysis, Given, Group
from sparsecc.axes.terms import Kept, Reason, Term, atoms
from sparsecc.blocks import dropped, lost
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.lowering import lower
from sparsecc.memory import without_collecting
from sparsecc.plan import Action, Mask, Pattern, Plan, Skip
from sparsecc.report import Report
from sparsecc.saliency import Saliency
from sparsecc.subject import Applied, Subject
from sparsecc.transform import Choice, Pass
from sparsecc.verification import Certificate, certify

#: told the name of each stage as it begins
Progress = Callable[[str], None]

#: makes the saliency of a captured model
Ranking = Callable[[Subject], Saliency]


def silent(stage: str) -> None:
    """The ``Progress`` that tells nobody."""


@dataclass(repr=False)
class Pruned:
    """A smaller model with the plan that made it and the certificate that it is right.

    ``model`` is of the kind that was given.  ``save(path)`` writes the model's file for ONNX and a
    state dict with the plan for PyTorch.
    """

    model: Any
    plan: Plan
    certificate: Certificate
    report: Report
    subject: Subject = field(repr=False)
    applied: Applied = field(repr=False)

    def __repr__(self) -> str:
        return f"<Pruned {type(self.model).__name__}: {self.report.summary(self.certificate)}>"

    def __str__(self) -> str:
        """The report; the certificate is part of it."""
        return f"{self!r}\n\n{self.report}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result atomically: ``.onnx`` for ONNX models, a weights-and-plan file for PyTorch."""
        from sparsecc.apply import save_pruned

        save_pruned(self, Path(path))


def open_subject(model: Any, example_inputs: Any = None, *, dynamic_shapes: Any = None) -> Subject:
    """Capture a model of any kind.

    Raises InvalidModel, UnsupportedModel or InvalidOption with the fix.
    """
    import torch
    from torch.export import ExportedProgram

    if isinstance(model, (torch.nn.Module, ExportedProgram)):
        from sparsecc.fx.subject import TorchSubject

        return TorchSubject(model, example_inputs, dynamic_shapes=dynamic_shapes)
    from sparsecc.onnxfile.subject import OnnxSubject

    return OnnxSubject(model, example_inputs)


@without_collecting()
def decide(analysis: Analysis, passes: Sequence[Pass], saliency: Saliency | None = None) -> Plan:
    """The joint plan of several passes: a later pass sees only what earlier ones left alone.

    Groups that are only in blocks that some pass bypasses are not decided on.  Passes that choose single
    elements come after those that remove positions, because the axes of those elements have to be as long as
    they will be, and passes that make up for what went come last.
    """
    kept: dict[str, Kept] = {}
    by: dict[str, str] = {}
    actions: list[Action] = []
    skips: list[Skip] = []
    patterns: list[Pattern] = []
    saliency = saliency or Saliency(analysis)  # one for all passes, so that weights are read once
    modes = {p.mode for p in passes}
    if len(modes) > 1:
        raise InvalidOption(
            "a recipe cannot mix lossless passes with pruning passes; run slim() first, then prune()"
        )
    for step in sorted(passes, key=lambda p: p.turn):
        left = _without(analysis, actions)
        kept = _still_there(left, kept)
        choice: Choice = step.choose(left.after(given(analysis, kept, actions)), saliency)
        fresh = {n: m for n, m in choice.kept.items() if n not in kept or step.turn > 0}
        kept.update(fresh)
        by.update({n: type(step).__name__ for n in fresh if n not in by})
        actions.extend(choice.actions)
        skips.extend(choice.skips)
        patterns.extend(choice.patterns)
    return lower(
        analysis,
        _still_there(_without(analysis, actions), kept),
        by=by,
        extra=actions,
        skips=_unclaimed(skips, kept),
        patterns=patterns,
        recipe="; ".join(str(p) for p in passes),
        mode=modes.pop() if modes else "prune",
    )


def _still_there(left: Analysis, kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """The choice for groups that are left, with positions put back where an axis would lose all."""
    names = {g.name for g in left.groups}
    return left.feasible({n: m for n, m in kept.items() if n in names})


def given(analysis: Analysis, kept: Mapping[str, Kept], actions: Sequence[Action]) -> Given:
    """What was decided so far."""
    masks: dict[str, Any] = {}
    for action in actions:
        if isinstance(action, Mask):
            masks[action.weight] = masks.get(action.weight, True) & action.keep
    gone = dropped(analysis.view, actions)
    return Given(kept, masks, gone.weights, tuple(actions))


def _without(analysis: Analysis, actions: Sequence[Action]) -> Analysis:
    """The analysis without groups that go with bypassed blocks."""
    gone = dropped(analysis.view, actions)
    return analysis.restricted(g for g in analysis.groups if not lost(g, gone)) if gone.weights else analysis


def _unclaimed(skips: Iterable[Skip], kept: Mapping[str, Kept]) -> list[Skip]:
    return [s for s in dict.fromkeys(skips) if s.where not in kept]


def run(
    model: Any,
    example_inputs: Any,
    passes: Sequence[Pass],
    *,
    verify: bool = True,
    saliency: Ranking | None = None,
    dynamic_shapes: Any = None,
    latency: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """Capture ``model``, let ``passes`` decide, apply the joint plan to a copy and verify it.

    Raises VerificationFailed where the result does not compute what it should.
    """
    progress("capture")
    subject = open_subject(model, example_inputs, dynamic_shapes=dynamic_shapes)
    return settle(subject, passes, verify=verify, saliency=saliency, latency=latency, progress=progress)


def settle(
    subject: Subject,
    passes: Sequence[Pass],
    *,
    verify: bool = True,
    saliency: Ranking | None = None,
    latency: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """Let ``passes`` decide, apply the joint plan and verify it.

    Groups that only then turn out to have no graph without them (a size that nothing can compute) are
    frozen, with the reason, and the rest is planned again: every round freezes at least one more.
    """
    progress("analyse")
    analysis = subject.analysis
    scores = saliency(subject) if saliency is not None else Saliency(analysis)
    while True:
        progress("plan")
        plan = None
        try:
            plan = decide(analysis, passes, scores)
            return finish(subject, plan, verify=verify, latency=latency, progress=progress)
        except PlanConflict as error:
            groups = _at_fault(analysis, plan, error)
            if not groups:
                raise
            analysis.freeze(groups, Reason("no such graph", str(error)))


def _at_fault(analysis: Analysis, plan: Plan | None, error: PlanConflict) -> list[Group]:
    """Groups that the axes of a conflict are made of, and that the plan cuts where there is one."""
    axes: list[Term] = list(error.axes)
    for call in analysis.view.calls:
        if call.name == error.node:
            axes += [
                t for i, v in enumerate(call.inputs) if v is not None for t in analysis.solver.of(call, i)
            ]
            axes += [t for v in call.outputs for t in analysis.solver.axes[v]]
    found = {a for t in axes for a in atoms(t)}
    cut = {g.name for g in analysis.groups} if plan is None else {d.group for d in plan.decisions}
    return [g for g in analysis.groups if g.name in cut and found.intersection(atoms(g.term))]


def finish(
    subject: Subject,
    plan: Plan,
    *,
    verify: bool = True,
    latency: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """Apply a plan to a captured model and verify the result.

    Raises PlanConflict where no graph expresses the plan, VerificationFailed where the result is wrong.
    """
    progress("edit")
    kept = subject.kept(plan)
    applied = subject.apply(plan, kept)
    if verify:
        progress("verify")
        certificate = certify(subject, applied, kept)
        certificate.require()
    else:
        claim = "slim(x) = original(x)" if plan.mode == "slim" else "pruned(x) = masked(x)"
        certificate = Certificate("UNCHECKED", claim, why="verify=False", plan=applied.plan.fingerprint())
    if latency:
        progress("time")
    report = Report.of(subject, applied, kept, certificate, latency=latency)
    return Pruned(applied.model, replace(applied.plan), certificate, report, subject, applied)

"""The public functions; the only place that joins the core with passes and targets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import sparsecc.targets  # noqa: F401  (fills the table of targets)
from sparsecc.apply import check_fits
from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.compiled import Built, Compiled, load
from sparsecc.errors import InvalidOption
from sparsecc.lowered import certify_artifact, check_lowered, example_sizes, lowered
from sparsecc.memory import within_memory
from sparsecc.passes import (
    ChannelPruning,
    DeadChannelElimination,
    HeadPruning,
    NMPattern,
    ParameterFolding,
    SparseGPT,
    known,
)
from sparsecc.patterns.lacking import excluded, lacking_note, spared, without_gain
from sparsecc.pipeline import Progress, Pruned, Ranking, open_subject, run, settle, silent
from sparsecc.plan import Plan
from sparsecc.probing import SHARES, Probe, Sensitivity, measured
from sparsecc.recipe import Recipe, steps
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Criterion, Saliency, criterion
from sparsecc.selection import KINDS, select
from sparsecc.subject import Arguments, Subject
from sparsecc.target import Executor, Target, TargetSpec, TargetTable, require_accepted, resolve
from sparsecc.target import targets as _targets
from sparsecc.transform import Pass, check_share
from sparsecc.verification import Certificate, certify

if TYPE_CHECKING:
    from sparsecc.onnxfile.model import OnnxFile

__all__ = [
    "Compiled",
    "Pruned",
    "Sensitivity",
    "analyze",
    "compile",
    "fold",
    "load",
    "prune",
    "sensitivity",
    "slim",
    "targets",
    "verify",
]


@within_memory()
def prune(
    model: Any,
    example_inputs: Any = None,
    *,
    recipe: Recipe | None = None,
    sparsity: float | None = None,
    saliency: str = "l2",
    reduction: str = "sum",
    normaliser: str = "none",
    allocation: str | Mapping[str, float] = "uniform",
    include: Iterable[Any] = (),
    exclude: Iterable[Any] = (),
    multiple_of: int = 1,
    min_keep: int = 1,
    calibration: Any = None,
    seed: int = 0,
    dynamic_shapes: Any = None,
    latency: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Pruned:
    """A smaller copy of a model, verified to compute what the masked original computes.

    ``model``: an nn.Module (with ``example_inputs``: a tuple of positional or a dict of keyword
    inputs), GraphModule, ExportedProgram, or an ONNX path, bytes, ModelProto, onnx_ir.Model or
    graphsurgeon Graph.  ``sparsity`` alone removes that share of the positions of every prunable
    group: channels, neurons, residual widths, heads and head dimensions.  ``recipe`` (passes or
    their text form) says more; ``allocation`` is that of ``ChannelPruning``: ``uniform``, ``global``,
    ``isomorphic``, measured (``sensitivity``), or shares by group, as ``Sensitivity.shares`` gives them.
    ``include`` and ``exclude`` take name patterns, modules and module
    types.  ``saliency`` names a criterion; ``calibration``, batches of inputs or ``CalibrationData``, is what
    those that need data and passes such as ``SparseGPT`` run the model on.  ``seed`` makes random saliency
    reproducible.  ``latency`` measures both models on this
    machine.  ``progress`` is told the name of each stage as it begins.

    Raises InvalidOption, InvalidModel, UnsupportedModel, and VerificationFailed where the result
    is not what it should be; the model given is never changed.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> result = prune(net, (torch.randn(2, 8),), sparsity=0.5)
    >>> result.model[0].weight.shape, result.certificate.status
    (torch.Size([8, 8]), 'VERIFIED')
    """
    names = partial(_patterns, model)
    chosen = criterion(saliency, seed=seed)
    if recipe is None:
        share = 0.5 if sparsity is None else sparsity
        check_share("sparsity", share)
        common: dict[str, Any] = {
            "sparsity": share,
            "allocation": allocation,
            "include": names(include),
            "exclude": names(exclude),
            "multiple_of": multiple_of,
            "min_keep": min_keep,
        }
        passes: list[Pass] = [ChannelPruning(**common), HeadPruning(**common, head_dims=True)]
    else:
        given = {
            "sparsity": sparsity is not None,
            "include": bool(include),
            "exclude": bool(exclude),
            "allocation": allocation != "uniform",
            "multiple_of": multiple_of != 1,
            "min_keep": min_keep != 1,
        }
        if double := [name for name, there in given.items() if there]:
            raise InvalidOption(
                f"give either a recipe or {', '.join(double)}: with a recipe, these are options of its passes"
            )
        passes = steps(recipe, known())

    return run(
        model,
        example_inputs,
        passes,
        verify=verify,
        saliency=partial(
            _ranked,
            criterion=chosen,
            calibration=calibration,
            progress=progress,
            reduction=reduction,
            normaliser=normaliser,
        ),
        dynamic_shapes=dynamic_shapes,
        latency=latency,
        progress=progress,
    )


@within_memory()
def slim(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    latency: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Pruned:
    """Remove what never matters (channels that are zero or constant); the result equals the original.

    Takes and raises what ``prune`` does; needs no criterion and no data.
    """
    return run(
        model,
        example_inputs,
        [DeadChannelElimination()],
        verify=verify,
        dynamic_shapes=dynamic_shapes,
        latency=latency,
        progress=progress,
    )


@within_memory()
def fold(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    latency: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Pruned:
    """Store what a model computes from its parameters alone, so that it can be pruned like a weight.

    Weight normalisation and standardisation, and tables that a small network makes, keep whole axes from
    being pruned (frozen as "parameters only").  The result equals the original; a PyTorch model comes back as
    a graph module.  Takes and raises what ``prune`` does; needs no criterion and no data.

    >>> import torch
    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), weight_norm(torch.nn.Linear(16, 4)))
    >>> folded = fold(net, (torch.randn(2, 8),))
    >>> folded.certificate.status, len(prune(folded.model, (torch.randn(2, 8),)).report.groups)
    ('VERIFIED', 1)
    """
    return run(
        model,
        example_inputs,
        [ParameterFolding()],
        verify=verify,
        dynamic_shapes=dynamic_shapes,
        latency=latency,
        progress=progress,
    )


@within_memory()
def analyze(model: Any, example_inputs: Any = None, *, dynamic_shapes: Any = None) -> Analysis:
    """Coupled groups and frozen axes (with reasons) of a model; also of one on the meta device.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> [str(group) for group in analyze(net, (torch.randn(2, 8),)).groups]
    ['0.weight[0]: 16 channel positions in 0.weight[0], 0.bias[0], 2.weight[1]']
    """
    return open_subject(model, example_inputs, dynamic_shapes=dynamic_shapes).analysis


@within_memory()
def sensitivity(
    model: Any,
    example_inputs: Any = None,
    *,
    calibration: Any,
    loss: str | Callable[[Any, Any], Any] = "error",
    shares: Sequence[float] = SHARES,
    trials: Any = None,
    batches: int = 8,
    updates: bool = False,
    kinds: Sequence[str] = ("channel",),
    residual: bool = True,
    saliency: str = "l2",
    reduction: str = "sum",
    normaliser: str = "none",
    include: Iterable[Any] = (),
    exclude: Iterable[Any] = (),
    seed: int = 0,
    dynamic_shapes: Any = None,
    progress: Progress = silent,
) -> Sensitivity:
    """By how much a loss rises when one group alone loses ``shares`` of its positions, for every group.

    ``loss``: ``error`` (squared error of the outputs over their squares), ``kl`` (divergence of the
    distributions that the first output is logits of), ``loss`` (that of the data), or a function of (outputs,
    batch); on the first ``batches`` of ``trials``, or else of ``calibration``, from which ``saliency`` is
    known.  ``updates``: layers that read what is left are updated by least squares first.
    ``kinds`` of groups: ``channel``, ``head``, ``head_dim``, ``expert``.  The other options are those of
    ``prune`` and of ``ChannelPruning``.  The positions that matter least are masked in the original model;
    nothing is edited.  What comes back can be printed, saved, and turned into an allocation.

    Raises InvalidOption, InvalidModel and UnsupportedModel; PlanConflict where masks have no meaning.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> found = sensitivity(net, (torch.randn(2, 8),), calibration=[(torch.randn(32, 8),)])
    >>> [line.removed for line in found.lines], found.shares(0.25)
    ([(2, 4, 8, 12)], {'0.weight[0]': 0.25})
    """
    names = partial(_patterns, model)
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
        raise InvalidOption(f"kinds={kinds!r}: give a tuple of {', '.join(KINDS)}")
    data = None if trials is None else CalibrationData.of(trials)
    probe = Probe(loss, tuple(shares), batches, data, updates)
    chosen = criterion(saliency, seed=seed)
    progress("capture")
    subject = open_subject(model, example_inputs, dynamic_shapes=dynamic_shapes)
    progress("analyse")
    options = {"reduction": reduction, "normaliser": normaliser}
    ranking = _ranked(subject, criterion=chosen, calibration=calibration, progress=progress, **options)
    found = select(subject.analysis, kinds, include=names(include), exclude=names(exclude), residual=residual)
    groups, _ = ranking.rankable(found.groups)
    return measured(needed(ranking, "sensitivity"), subject.analysis, ranking, groups, probe)


@within_memory()
def verify(
    original: Any,
    result: Any,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    progress: Progress = silent,
) -> Certificate:
    """Check a result against the model that it was made from, independently of how it was made.

    ``result`` is a ``Pruned``, a ``Compiled``, or a model with the ``plan`` that made it; without a plan
    the two models must compute the same.  Does not raise for a difference: see ``Certificate.require``.
    Raises PlanConflict where the plan is for another model.
    """
    if isinstance(result, (Pruned, Compiled)):
        plan = result.plan
    progress("capture")
    subject = open_subject(original, example_inputs)
    if plan is None:
        plan = Plan(dialect=subject.dialect, mode="slim")
    check_fits(plan, subject)
    progress("verify")
    if isinstance(result, Compiled):
        return certify_artifact(subject, plan, result.artifact, result.start())
    adopted = subject.adopt(result.model if isinstance(result, Pruned) else result, plan)
    return certify(subject, adopted, subject.kept(plan), blame=_ELSEWHERE)


_ELSEWHERE = "give what was made from this very model, and the plan that made it"


@within_memory()
def compile(
    model: Any,
    example_inputs: Any = None,
    *,
    target: str = "cpu",
    recipe: Recipe | None = None,
    options: Mapping[str, Any] | None = None,
    saliency: str = "l2",
    calibration: Any = None,
    dynamic_shapes: Any = None,
    latency: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Compiled:
    """Compile a model for a target; ``recipe`` says what to prune first, ``options`` are the target's own.

    Without a recipe only channels that never matter are removed; a pattern in the target (``onnx-2:4``)
    is put into layers that lack it, by magnitude, or with ``calibration`` data by SparseGPT, and a note on
    standard error says how much that kept.  A target that knows which layers gain by it (``sm90-2:4``) leaves
    the others as they are.
    With a recipe nothing is added to it, and the note names the layers that lack the pattern.  A bare
    nn.Module without example inputs is compiled at its first call.  ``saliency`` and ``calibration`` are
    those of ``prune``.  ``latency`` measures the original against the artifact.  Raises what ``prune``
    raises, TargetUnavailable and TargetRefused.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> compiled = compile(net, (torch.randn(2, 8),), target="cpu", recipe="ChannelPruning(sparsity=0.5)")
    >>> compiled(torch.randn(3, 8)).shape
    torch.Size([3, 4])
    """
    import torch

    _, spec = resolve(target, options)  # an unknown target is an error before anything is captured
    passes = None if recipe is None else steps(recipe, known())
    if passes is None and spec.pattern is not None:
        NMPattern(pattern=spec.pattern)  # and so is a pattern that is none
    chosen = criterion(saliency)
    build = partial(
        _build,
        model,
        target=target,
        options=options,
        passes=passes,
        has_data=calibration is not None,
        ranking=partial(_ranked, criterion=chosen, calibration=calibration, progress=progress),
        dynamic_shapes=dynamic_shapes,
        latency=latency,
        verify=verify,
        progress=progress,
    )
    if isinstance(model, torch.nn.Module) and example_inputs is None:

        def first_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
            if args and kwargs:
                raise InvalidOption("give all inputs of the first call by position, or all by keyword")
            return build(kwargs if kwargs else args)

        return Compiled(None, first_call, options=options)
    return Compiled(build(example_inputs), options=options)


def targets() -> TargetTable:
    """Every known target, what it offers, and whether it can be used here."""
    return _targets()


def _settled(
    back_end: Target,
    spec: TargetSpec,
    subject: Subject,
    passes: Sequence[Pass] | None,
    *,
    has_data: bool,
    **how: Any,
) -> Pruned:
    """The model after ``passes``; without them a target's pattern goes where the target would use it."""
    if passes is None and spec.pattern is None:
        passes = [DeadChannelElimination()]
    if passes is not None or spec.pattern is None:
        result = settle(subject, passes or (), **how)
        notes = lacking_note(subject, result.plan, spec.pattern)
        result.report = replace(result.report, notes=(*result.report.notes, *notes))
        return result
    gaining = back_end.gaining(partial(_as_it_is, subject), spec)
    without = {} if gaining is None else without_gain(subject, gaining)
    kind = SparseGPT if has_data else NMPattern
    left = excluded(without, subject.analysis.view.weights)
    result = settle(subject, [kind(pattern=spec.pattern, exclude=left)], **how)
    result.report = spared(result.report, without, spec.pattern)
    return result


def _as_it_is(subject: Subject) -> tuple[OnnxFile, dict[str, tuple[int, ...]]]:
    """A model as the targets take it, before anything is pruned, and sizes of its inputs."""
    found = settle(subject, [], verify=False)
    file, _ = lowered(found.subject, found.applied)
    return file, example_sizes(subject, file)


def _build(
    model: Any,
    example_inputs: Any,
    *,
    target: str,
    options: Mapping[str, Any] | None,
    passes: Sequence[Pass] | None,
    has_data: bool,
    ranking: Ranking,
    dynamic_shapes: Any,
    latency: bool,
    verify: bool,
    progress: Progress,
) -> Built:
    back_end, spec = resolve(target, options)
    progress("capture")
    subject: Subject = open_subject(model, example_inputs, dynamic_shapes=dynamic_shapes)
    require_accepted(back_end, spec, subject.view)
    how = {"verify": verify, "saliency": ranking, "progress": progress}
    result = _settled(back_end, spec, subject, passes, has_data=has_data, **how)
    progress("lower")
    model_file, signature = lowered(result.subject, result.applied)
    progress("build")
    artifact = back_end.build(
        model_file,
        spec,
        signature=signature,
        recipe=result.plan.recipe,
        report=result.report.to_json(),
        certificate=result.certificate.to_json(),
        members=result.plan.members(),
        sizes=example_sizes(subject, model_file),
    )
    certificate = result.certificate
    report = replace(result.report, notes=(*result.report.notes, *back_end.notes(artifact)))
    executor = back_end.executor(artifact)
    if verify:
        progress("check")
        certificate = check_lowered(result, model_file, executor)
        certificate.require()
    if latency and executor.stand_in:
        words = f"latency was not measured: what runs here is {executor.stand_in}"
        report = replace(report, notes=(*report.notes, words))
    elif latency:
        progress("time")
        report = report.timed(subject, partial(_call, executor))
    manifest = {**artifact.manifest, "certificate": certificate.to_json(), "report": report.to_json()}
    for note in report.notes:
        print(f"sparsecc: {note}", file=sys.stderr)
    return Built(replace(artifact, manifest=manifest), result.plan, certificate, report)


def _ranked(
    subject: Subject, *, criterion: Criterion, calibration: Any, progress: Progress, **options: str
) -> Saliency:
    """The saliency of a model, with statistics where there are data."""
    found = None if calibration is None else _statistics(subject, calibration, progress)
    return Saliency(subject.analysis, criterion, statistics=found, **options)


def _statistics(subject: Subject, calibration: Any, progress: Progress) -> Statistics:
    def advance(done: int, count: int | None, what: str) -> None:
        progress(f"calibrate: {what}, batch {done}" + ("" if count is None else f" of {count}"))

    return Statistics(subject, CalibrationData.of(calibration), advance)


def _call(executor: Executor, arguments: Arguments) -> AbstractContextManager[Callable[[], object]]:
    args, kwargs = arguments
    return nullcontext(partial(executor, *args, **kwargs))


def _patterns(model: Any, items: Iterable[Any]) -> tuple[str, ...]:
    """Name patterns from patterns, modules and module types."""
    import torch

    from sparsecc.fx.capture import unwrap

    found: list[str] = []
    for item in (items,) if isinstance(items, (str, type, torch.nn.Module)) else items:
        if isinstance(item, str):
            found.append(item)
            continue
        if not isinstance(model, torch.nn.Module):
            raise InvalidOption(f"{item!r} selects in an nn.Module; give name patterns here")
        modules: dict[str, torch.nn.Module] = dict(unwrap(model)[0].named_modules())
        kind = item if isinstance(item, type) else ()
        hits = {n: m for n, m in modules.items() if m is item or isinstance(m, kind)}
        weighty = [n for n, m in hits.items() if next(m.parameters(), None) is not None]
        if not weighty:
            lack = "there without parameters" if hits else "not part of the model"
            raise InvalidOption(f"{item!r} selects nothing: it is {lack}")
        found.extend(n or "*" for n in weighty)
    return tuple(found)

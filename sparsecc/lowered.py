"""Lowers a verified result to ONNX for the targets, and checks what the lowering did."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsecc.artifact import MODEL, WEIGHTS, Artifact
from sparsecc.errors import TargetRefused, UnsupportedModel
from sparsecc.onnxfile.model import TORCH_DTYPES, OnnxFile
from sparsecc.signature import Signature, onnx_signature
from sparsecc.verification.certificate import Certificate, Check
from sparsecc.verification.check import certify, distance, nudged_errors, worst_nodes

if TYPE_CHECKING:
    from sparsecc.pipeline import Pruned
    from sparsecc.plan import Plan
    from sparsecc.subject import Applied, Subject

#: an exporter rounds constants to the model's dtype: relative error of the lowered graph in float64
LOWERING_ULPS = 1024.0
#: onnxruntime approximates (sigmoid, erf): absolute error in units of max(1, largest output)
RUNTIME_ULPS = 4096.0
#: types of 16 bits
HALVES = frozenset({torch.float16, torch.bfloat16})
_SINGLE = torch.finfo(torch.float32).eps / 2


def lowered(subject: Subject, applied: Applied) -> tuple[OnnxFile, Signature]:
    """A result as an ONNX model, and how it is called."""
    from sparsecc.onnxfile.subject import AppliedOnnx

    if isinstance(applied, AppliedOnnx):
        assert applied.file is not None
        return applied.file, onnx_signature(applied.file.proto)
    from torch.export import ExportedProgram

    from sparsecc.fx.capture import recapture
    from sparsecc.fx.subject import AppliedTorch, TorchSubject
    from sparsecc.fx.to_onnx import to_onnx, torch_signature

    assert isinstance(applied, AppliedTorch)
    assert isinstance(subject, TorchSubject)
    program = applied.program
    assert program is not None
    exported = applied.model  # where an exported program was given, one came back
    if not isinstance(exported, ExportedProgram):
        if program.module is None:
            program = recapture(applied.model, subject.program)
        exported = program.exported
    proto = to_onnx(exported)
    return OnnxFile.load(proto), torch_signature(subject.program.exported, proto)


def example_sizes(subject: Subject, file: OnnxFile) -> dict[str, tuple[int, ...]]:
    """The sizes of the example inputs (or of some that can be made), by the lowered model's names."""
    try:
        inputs = subject.example()
    except UnsupportedModel:  # on the meta device
        return {}
    values = _tensors(inputs)
    if len(values) != len(file.inputs):
        return {}
    return {info.name: tuple(v.shape) for info, v in zip(file.inputs, values, strict=True)}


def _tensors(inputs: Any) -> list[torch.Tensor]:
    """Inputs of a subject in order, without numbers that the program has as constants."""
    flat = list(inputs.values()) if isinstance(inputs, dict) else inputs
    return [v for v in flat if isinstance(v, torch.Tensor)]


def certify_artifact(subject: Subject, plan: Plan, artifact: Artifact, executor: Any) -> Certificate:
    """Check an artifact against the model that it was made from, by way of its plan.

    Raises UnsupportedModel where the artifact holds no ONNX model.
    """
    kept = subject.kept(plan)
    applied = subject.apply(plan, kept)
    certificate = certify(subject, applied, kept)
    if MODEL not in artifact.members:
        raise UnsupportedModel(f"artifacts for {artifact.target!r} hold no ONNX model that could be checked")
    if executor.rounds or executor.watched:
        file, _ = lowered(subject, applied)
        return _with_lowered(subject, applied, certificate, file, executor)
    with tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        artifact.extract(folder, *(name for name in (MODEL, WEIGHTS) if name in artifact.members))
        file = OnnxFile.load(Path(folder, MODEL))
        return _with_lowered(subject, applied, certificate, file, executor)


def check_lowered(result: Pruned, file: OnnxFile, executor: Any) -> Certificate:
    """The certificate with checks of the lowered graph (float64 reference) and of the running artifact."""
    return _with_lowered(result.subject, result.applied, result.certificate, file, executor)


def _with_lowered(
    subject: Subject, applied: Applied, certificate: Certificate, file: OnnxFile, executor: Any
) -> Certificate:
    from sparsecc.reference.onnx_run import Runner

    checks: list[Check] = []
    exact = Runner(file, dtype=torch.float64, cache=False)
    dense = Runner(file, cache=False) if executor.rounds or _mentions_halves(file) else None
    names = [v.name for v in file.inputs]
    for seed, variant in ((0, 0), (1, 1)):
        inputs, words, feeds, ran = _ran(subject, executor, names, seed, variant)
        outputs = zip(subject.output_names, applied.run(inputs, torch.float64), strict=True)
        want = [(name, y) for name, y in outputs if isinstance(y, torch.Tensor)]
        seen: dict[str, torch.Tensor] = {}
        found = exact.run(feeds, hook=partial(_watching, executor.watched, seen))
        wide = [found[v.name] for v in file.proto.graph.output]
        halves: set[torch.dtype] = set()
        hook = partial(_rounding, executor.rounds, halves)
        rounded = {} if dense is None else dense.run(feeds, hook=hook)
        for info, ours, (_, reference) in zip(file.proto.graph.output, wide, want, strict=True):
            mine, step, runtime, lowering = ran[info.name], subject.step, _unit(ran[info.name]), 0.0
            shorter = halves.union(executor.rounds.values())
            if shorter and reference.is_floating_point() and mine.shape == ours.shape == reference.shape:
                short, own = rounded[info.name], not executor.rounds
                there = _in_range(info.name, short, ours, shorter, own, words)
                ours, mine, reference, short = (y[there] for y in (ours, mine, reference, short))
                step += _rounding_step(info.name, short, ours, shorter, own)
                runtime = min(runtime, _SINGLE)  # the shorter type's own rounding is in the step
                lowering = step if halves else 0.0
            allowed = LOWERING_ULPS * runtime + lowering, RUNTIME_ULPS * runtime + step
            checks += _checks(info.name, ours, mine, reference, words, allowed)
        checks += [
            Check("each product in integers", "absolute error", alone.error, alone.bound, words, alone.node)
            for alone in worst_nodes(executor.alone(feeds, seen))
        ]
    if subject.step and not all(c.passed for c in checks if c.what == "artifact"):
        labels = {v.name: name for v, (name, _) in zip(file.proto.graph.output, want, strict=True)}
        checks = _allowing(subject, applied.plan, labels, checks)
    status = certificate.status if all(c.passed for c in checks) else "FAILED"
    return replace(certificate, status=status, checks=(*certificate.checks, *checks))


def _allowing(subject: Subject, plan: Plan, labels: Mapping[str, str], checks: list[Check]) -> list[Check]:
    """The checks, where a quantised model's own rounding is allowed for: four times what it errs when nudged.

    One quantiser that rounds to the other side may move what all behind it do; ``labels`` are the subject's
    names for the outputs of the lowered model.
    """
    errors: dict[str, float] = {}
    for own in nudged_errors(subject, plan, subject.kept(plan)):
        errors[own.name] = max(own.error, errors.get(own.name, 0.0))
    return [
        replace(c, bound=c.bound + 4 * errors[labels[c.where]])
        if c.what == "artifact" and labels[c.where] in errors
        else c
        for c in checks
    ]


def _ran(
    subject: Subject, executor: Any, names: list[str], seed: int, variant: int
) -> tuple[Any, str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs, words on them, the inputs by name, and what the artifact makes of them.

    Where a runtime takes no other sizes than those of the examples, these it is.
    """
    inputs, words = subject.inputs(seed, variant)
    values = _tensors(inputs)
    if len(values) != len(names):
        raise UnsupportedModel(f"the lowered model takes {len(names)} inputs, the program {len(values)}")
    feeds = dict(zip(names, values, strict=True))
    try:
        return inputs, words, feeds, executor.run_named(feeds)
    except TargetRefused as error:
        if variant:
            return _ran(subject, executor, names, seed, 0)
        said = str(error).rstrip(".")
        raise TargetRefused(
            f"{said}. Give example inputs that the model takes; these were: {words}"
        ) from error


def _unit(y: torch.Tensor) -> float:
    """The unit roundoff of an output's type; float32's for numbers that are no floats."""
    return torch.finfo(y.dtype if y.is_floating_point() else torch.float32).eps / 2


def _watching(
    names: frozenset[str],
    seen: dict[str, torch.Tensor],
    node: Any,
    index: int,
    values: list[Any],
    default: Any,
) -> tuple[Any, ...]:
    """A hook that remembers values by name, of those that nodes read and give."""
    found: tuple[Any, ...] = default(values)
    pairs = (*zip(node.input, values, strict=True), *zip(node.output, found, strict=False))
    seen.update((name, value) for name, value in pairs if name in names)
    return found


def _mentions_halves(file: OnnxFile) -> bool:
    """Whether a model may compute in a type of 16 bits: one takes, holds or casts to such."""
    graph = file.proto.graph
    held = {t.data_type for t in file.initializers.values()}
    held.update(v.type.tensor_type.elem_type for v in graph.input)
    for attribute in (a for node in graph.node for a in node.attribute):
        held.add(attribute.i if attribute.name == "to" else attribute.t.data_type)
    return any(TORCH_DTYPES.get(number) in HALVES for number in held)


def _rounding(
    rounds: Mapping[str, torch.dtype],
    halves: set[torch.dtype],
    node: Any,
    index: int,
    values: list[Any],
    default: Any,
) -> tuple[Any, ...]:
    """A hook that rounds both operands of products that the artifact computes in a shorter type.

    ``halves`` collects the types of 16 bits that the model computes in by itself.
    """
    dtype = rounds.get(node.output[0])
    if dtype is not None:
        _require_room(node, values[:2], dtype)
        values = [*(value.to(dtype).to(value.dtype) for value in values[:2]), *values[2:]]
    result: tuple[Any, ...] = default(values)
    halves.update(y.dtype for y in result if isinstance(y, torch.Tensor) and y.dtype in HALVES)
    return result


def _require_room(node: Any, values: list[Any], dtype: torch.dtype) -> None:
    """Raise TargetRefused where a product's operands are finite, and no longer so in the shorter type."""
    largest = max((float(v[v.isfinite()].abs().amax()) for v in values if v.isfinite().any()), default=0.0)
    if largest > torch.finfo(dtype).max:
        raise TargetRefused(
            f"{node.op_type} {node.name or node.output[0]!r} reads numbers up to {largest:.3g} in its weight "
            f"or on the inputs that were tried, and {_named(dtype)} ends at {torch.finfo(dtype).max:.5g}: "
            f"{_wider([dtype])}"
        )


def _in_range(
    name: str,
    rounded: torch.Tensor,
    exact: torch.Tensor,
    shorter: Collection[torch.dtype],
    own: bool,
    words: str,
) -> torch.Tensor:
    """Where an output does not leave the range of the types that it is computed in: what can be compared.

    Raises TargetRefused where that is the target's doing, and where nothing is left (every bound would be
    infinite); ``own``: the model itself is of these types.
    """
    lost = exact.isfinite() & ~rounded.isfinite()
    if bool(lost.any()) and not (own and bool((exact.isfinite() & ~lost).any())):
        raise TargetRefused(
            f"output {name!r} leaves the range of {_types(shorter)} in {int(lost.sum())} of "
            f"{lost.numel()} places on inputs that were tried ({words}), so that nothing can be proved: "
            f"{_wider(shorter)}, or give example inputs such as the model is used with"
        )
    return ~lost


def _types(dtypes: Collection[torch.dtype]) -> str:
    return " and ".join(sorted(map(_named, dtypes)))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wider(shorter: Collection[torch.dtype]) -> str:
    """What to do where a type of 16 bits does not hold a model's numbers."""
    if torch.bfloat16 in shorter:
        return "compile for a target that computes in the model's own type (cpu, onnx)"
    return "ask for bfloat16 (such as target='sm80-2:4-bf16'), whose range is that of float32"


def _rounding_step(
    name: str, dense: torch.Tensor, exact: torch.Tensor, shorter: Collection[torch.dtype], own: bool
) -> float:
    """What an artifact in a shorter type may differ by, in units of max(1, largest output).

    Four times what the dense model differs by in these types (with the same operands rounded), and eight
    units of the type: the end-to-end bound of a result in its target's own type.  Raises TargetRefused where
    that would be infinite, or would allow as much as the largest output and it is the target that rounds.
    """
    error, scale = distance(dense, exact)
    if math.isinf(error) or (not own and 4 * error > scale):
        raise TargetRefused(
            f"output {name!r} moves by {error:.3g} of {scale:.3g} when operands of products are rounded to "
            f"{_types(shorter)}, so that nothing can be proved: {_wider(shorter)}"
        )
    unit = max(torch.finfo(dtype).eps for dtype in shorter) / 2
    return (4 * error + 8 * unit * scale) / max(1.0, scale)


def _checks(
    name: str,
    exact: torch.Tensor,
    ran: torch.Tensor,
    reference: torch.Tensor,
    words: str,
    allowed: tuple[float, float],
) -> list[Check]:
    """``allowed``: relative for the lowered graph, in units of max(1, largest output) for the artifact."""
    if not reference.is_floating_point():
        return [
            Check("lowered graph", "differs", float(not torch.equal(exact, reference)), 0.0, words, name),
            Check("artifact", "differs", float(not torch.equal(ran, reference)), 0.0, words, name),
        ]
    error, scale = distance(exact, reference)
    runtime = distance(ran, exact)[0]
    return [
        Check(
            "lowered graph",
            "relative error",
            error / scale if scale else error,
            allowed[0],
            words,
            name,
        ),
        Check("artifact", "absolute error", runtime, allowed[1] * max(1.0, scale), words, name),
    ]

"""Runs the checks of a result against its reference, on several seeds and sizes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsecc import __version__
from sparsecc.axes.terms import Kept
from sparsecc.errors import InvalidModel, InvalidOption, UnsupportedModel, VerificationFailed
from sparsecc.plan import Bypass, Mask, Plan
from sparsecc.subject import Applied, Outputs, Subject, real
from sparsecc.verification.certificate import Certificate, Check

#: largest |a - b| / max |b| of any output, both computed in float64
FLOAT64_BOUND = 1e-12
#: the same where the model itself amplifies the rounding of its sums so far
FLOAT64_CEILING = 1e-8
#: how often the masked original is run on nudged inputs where a bound was missed
_NUDGES = 4
RUNS: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 0))


#: of a result that does not run, where it was made here
_OURS = (
    "nothing was written. This is a defect of sparsecc or of a rule that was added: report it with the model"
)


def certify(
    subject: Subject,
    applied: Applied,
    kept: Mapping[str, Kept],
    *,
    runs: Sequence[tuple[int, int]] = RUNS,
    blame: str = _OURS,
) -> Certificate:
    """Check a result against masked semantics (or, for lossless slimming, the original).

    ``runs`` are (seed, variant of the dynamic sizes).  Where the model itself fails on integers that are
    drawn at random, those of the example are taken.  Does not raise for a difference: see
    ``Certificate.require``; VerificationFailed, with ``blame``, where the result does not run.
    """
    try:
        return _certify(subject, applied, kept, runs, blame)
    except (InvalidOption, InvalidModel):
        if not subject.hold_integers():
            raise
    return _certify(subject, applied, kept, runs, blame)


def _certify(
    subject: Subject,
    applied: Applied,
    kept: Mapping[str, Kept],
    runs: Sequence[tuple[int, int]],
    blame: str,
) -> Certificate:
    plan = applied.plan
    claim = "slim(x) = original(x)" if plan.mode == "slim" else "pruned(x) = masked(x)"
    checks: list[Check] = []
    own: list[_Own] = []
    told_apart = False
    constant: set[int] | None = None
    for seed, variant in runs:
        inputs, words = subject.inputs(seed, variant)
        wide = _reference(subject, plan, kept, inputs, torch.float64)
        checks += _compare64(subject, _ran(applied, inputs, torch.float64, blame), wide, words)
        narrow = _reference(subject, plan, kept, inputs, None)
        own += _compare_own(subject, _ran(applied, inputs, None, blame), narrow, wide, words)
        flat = {i for i, y in enumerate(wide) if _is_constant(y)}
        constant = flat if constant is None else constant & flat
        if plan.mode == "prune" and not told_apart:
            told_apart = _differ([real(y) for y in subject.original(inputs, torch.float64)], wide)
    if not all(c.passed for c in checks):
        _require_deterministic(subject, subject.inputs(*runs[-1])[0])
        checks = amplified(checks, subject, plan, kept, runs)
    found = _own_checks(own, subject.step)
    if not all(c.passed for c in found):
        found = _own_checks(own, subject.step, list(nudged_errors(subject, plan, kept, runs)))
    checks += found
    inputs, words = subject.inputs(*runs[-1])
    if plan.mode == "prune":
        checks += [
            Check("each operator alone", "absolute error", n.error, n.bound, words, n.node)
            for n in worst_nodes(subject.node_checks(applied, kept, inputs))
        ]
    if not all(c.passed for c in checks):
        _require_deterministic(subject, inputs)
    status, why = _status(checks, plan, told_apart, constant or set(), subject.output_names)
    return Certificate(
        status=status,
        claim=claim,
        checks=tuple(checks),
        why=why,
        model=subject.fingerprint(),
        plan=plan.fingerprint(),
        versions=_versions(),
    )


def _ran(applied: Applied, inputs: Any, dtype: torch.dtype | None, blame: str) -> Outputs:
    """The result's outputs; a result that does not run has failed."""
    try:
        return [real(y) for y in applied.run(inputs, dtype)]
    except (RuntimeError, ValueError, IndexError) as error:
        first = str(error).strip().split("\n")[0]
        raise VerificationFailed(
            f"the result does not run: {type(error).__name__}: {first}; {blame}"
        ) from error


def _require_deterministic(subject: Subject, inputs: Any) -> None:
    if _differ(subject.original(inputs), subject.original(inputs)):
        raise UnsupportedModel(
            "the model gives another output every time that it runs on the same inputs (dropout that is "
            "always on, or other random draws), so no result can be verified; switch that off, or pass "
            "verify=False"
        )


def _reference(
    subject: Subject,
    plan: Plan,
    kept: Mapping[str, Kept],
    inputs: Any,
    dtype: torch.dtype | None,
    nudge: int | None = None,
) -> Outputs:
    if plan.mode == "slim" and nudge is None:
        return [real(y) for y in subject.original(inputs, dtype)]
    if plan.mode == "slim":
        plan, kept = Plan(plan.dialect), {}
    return [real(y) for y in subject.masked(plan, kept, inputs, dtype, nudge=nudge)]


def _status(
    checks: Sequence[Check], plan: Plan, told_apart: bool, constant: set[int], names: Sequence[str]
) -> tuple[Any, str]:
    if not all(c.passed for c in checks):
        return "FAILED", ""
    if plan.mode == "prune" and _removes(plan) and not told_apart:
        return "VACUOUS", "the masked and the original model agree exactly on every input that was tried"
    if constant:
        return "VACUOUS", f"constant outputs: {', '.join(names[i] for i in sorted(constant))}"
    return "VERIFIED", ""


def _removes(plan: Plan) -> bool:
    """Whether anything is taken away; another order of positions alone changes no result."""
    fewer = any(len(d.kept) < d.size for d in plan.decisions)
    return fewer or any(plan.of(Bypass)) or any(plan.of(Mask))


def worst_nodes(nodes: Iterator[Any]) -> list[Any]:
    """All operators that fail, and the one nearest to its bound."""
    failed: list[Any] = []
    nearest: Any = None
    for node in nodes:
        if not node.passed:
            failed.append(node)
        elif nearest is None or (_ratio(node), node.bound) > (_ratio(nearest), nearest.bound):
            nearest = node
    return failed + ([nearest] if nearest is not None else [])


def _ratio(node: Any) -> float:
    return node.error / node.bound if node.bound else 0.0


def _floating(y: Any) -> bool:
    return isinstance(y, torch.Tensor) and (y.is_floating_point() or y.is_complex())


def _pairs(subject: Subject, ours: Outputs, theirs: Outputs) -> Iterator[tuple[str, Any, Any]]:
    if len(ours) != len(theirs):
        raise UnsupportedModel(f"the result has {len(ours)} outputs, the original {len(theirs)}")
    for name, a, b in zip(subject.output_names, ours, theirs, strict=True):
        yield from _items(name, a, b)


def _items(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """An output, or the items of one that is a sequence."""
    lists = isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple))
    if not lists or len(ours) != len(theirs):
        yield name, ours, theirs
        return
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        yield from _items(f"{name}[{place}]", a, b)


def _exact(name: str, ours: Any, theirs: Any, inputs: str) -> Check:
    return Check(
        "outputs that are no floats", "differs", 0.0 if _same(ours, theirs) else 1.0, 0.0, inputs, name
    )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor):
        return type(ours) is type(theirs) and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and bool(np.all(ours == theirs))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """max |a - b| and max |b| over finite entries; infinite where shapes or non-finite entries differ."""
    if ours.shape != theirs.shape:
        return float("inf"), 1.0
    a, b = _double(ours), _double(theirs)
    finite = torch.isfinite(b)
    odd = ~finite
    if bool((torch.isfinite(a) != finite).any()) or not torch.equal(
        torch.nan_to_num(a[odd], nan=0.5), torch.nan_to_num(b[odd], nan=0.5)
    ):
        return float("inf"), 1.0
    if not bool(finite.any()):
        return 0.0, 0.0
    return float((a - b)[finite].abs().max()), float(b[finite].abs().max())


def _double(y: torch.Tensor) -> torch.Tensor:
    """In float64; a complex tensor as its real and imaginary parts."""
    return torch.view_as_real(y.resolve_conj()).double() if y.is_complex() else y.double()


def _compare64(subject: Subject, ours: Outputs, theirs: Outputs, inputs: str) -> list[Check]:
    checks = []
    for name, a, b in _pairs(subject, ours, theirs):
        if not _floating(b):
            checks.append(_exact(name, a, b, inputs))
            continue
        error, scale = distance(a, b)
        relative = error / scale if scale else error
        checks.append(Check("float64", "relative error", relative, FLOAT64_BOUND, inputs, name))
    return checks


def amplified(
    checks: Sequence[Check],
    subject: Subject,
    plan: Plan,
    kept: Mapping[str, Kept],
    runs: Sequence[tuple[int, int]] = RUNS,
) -> list[Check]:
    """The checks with the bounds in float64 of a model that amplifies rounding.

    A slim graph adds up in another order.  How far that moves an output is measured: the masked original
    with every sum off by one unit in the last place; four times as much is allowed, and at most
    ``FLOAT64_CEILING``.  Raises UnsupportedModel where a difference is no larger than what the model itself
    makes of rounding, and beyond that.
    """
    worst: dict[str, float] = {}
    for seed, variant in runs:
        inputs, _ = subject.inputs(seed, variant)
        wide = _reference(subject, plan, kept, inputs, torch.float64)
        for nudge in range(_NUDGES):
            moved = _reference(subject, plan, kept, inputs, torch.float64, nudge)
            for check in _compare64(subject, moved, wide, ""):
                worst[check.where] = max(worst.get(check.where, 0.0), check.error)
    wild = [c for c in checks if not c.passed and FLOAT64_CEILING < c.error <= 4 * worst.get(c.where, 0.0)]
    if wild:
        raise UnsupportedModel(
            "the model amplifies rounding: where every sum is off by one unit in the last place, "
            f"{wild[0].where} moves by {worst[wild[0].where]:.1e} of its largest number in float64, so no "
            "result can be compared with it; give example inputs on which it is steadier, or use verify=False"
        )
    bounds = {where: min(max(FLOAT64_BOUND, 4 * error), FLOAT64_CEILING) for where, error in worst.items()}
    return [replace(c, bound=bounds.get(c.where, c.bound)) if c.what == "float64" else c for c in checks]


@dataclass(frozen=True)
class _Own:
    """One output of one run in the model's own dtype, beside the float64 reference."""

    dtype: torch.dtype
    name: str
    error: float
    inherent: float
    scale: float
    inputs: str


def _compare_own(subject: Subject, ours: Outputs, theirs: Outputs, wide: Outputs, inputs: str) -> list[_Own]:
    """Errors of the result and of the masked original, both against the float64 reference."""
    found = []
    for name, a, b, reference in zip(subject.output_names, ours, theirs, wide, strict=True):
        if _floating(b):
            error, scale = distance(a, reference)
            found.append(_Own(b.dtype, name, error, distance(b, reference)[0], scale, inputs))
    return found


def nudged_errors(
    subject: Subject, plan: Plan, kept: Mapping[str, Kept], runs: Sequence[tuple[int, int]] = RUNS
) -> Iterator[_Own]:
    """How the masked original rounds where what it reads is off by at most one unit in the last place.

    Its inputs are, and what each of its quantisers reads.  It is compared with the reference on the very
    inputs: a result may err as much as that.
    """
    for seed, variant in runs:
        inputs, words = subject.inputs(seed, variant)
        wide = _reference(subject, plan, kept, inputs, torch.float64)
        for nudge in range(_NUDGES):
            narrow = _reference(subject, plan, kept, _nudged(inputs, nudge), None, nudge)
            yield from _compare_own(subject, narrow, narrow, wide, words)


def _nudged(inputs: Any, seed: int) -> Any:
    """Inputs with floats moved by one unit in the last place, up or down or not at all, at random."""
    if isinstance(inputs, Mapping):
        return dict(zip(inputs, _nudged(list(inputs.values()), seed), strict=True))
    random = torch.Generator().manual_seed(seed)
    moved: list[Any] = []
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            unit = torch.finfo(value.dtype).eps
            steps = torch.randint(-1, 2, value.shape, generator=random).to(value)
            value = value + value * steps * unit
        moved.append(value)
    return moved


def _own_checks(found: Sequence[_Own], step: float, more: Sequence[_Own] = ()) -> list[Check]:
    """err(result) <= 4 err(masked) + (8 u + step) scale, with the largest err(masked) and scale of all runs.

    One run alone says little about how an output rounds: where terms cancel it may be exact by chance.
    ``more`` are errors of the masked original alone, for where that was not enough.  And a quantiser that
    sums of another order push over the middle between two steps errs by a whole one.
    """
    checks = []
    for own in found:
        alike = [o for o in (*found, *more) if o.name == own.name]
        unit = torch.finfo(own.dtype).eps / 2
        bound = 4 * max(o.inherent for o in alike) + (8 * unit + step) * max(o.scale for o in alike)
        checks.append(Check(str(own.dtype)[6:], "absolute error", own.error, bound, own.inputs, own.name))
    return checks


def _is_constant(y: Any) -> bool:
    return _floating(y) and y.numel() > 1 and bool((y == y.reshape(-1)[0]).all())


def _differ(ours: Outputs, theirs: Outputs) -> bool:
    items = (item for a, b in zip(ours, theirs, strict=True) for item in _items("", a, b))
    return any(isinstance(a, torch.Tensor) and not _same(a, b) for _, a, b in items)


def _versions() -> dict[str, str]:
    found = {"sparsecc": __version__}
    for name in ("torch", "numpy", "onnx"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

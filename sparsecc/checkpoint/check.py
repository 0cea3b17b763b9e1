"""Compares what a pruned checkpoint computes with the masked original, both read from disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsecc.axes.terms import Kept
from sparsecc.checkpoint.meta import MetaSubject
from sparsecc.fx.capture import Program
from sparsecc.fx.weights import exact_weights
from sparsecc.plan import Plan
from sparsecc.reference.torch_run import ProgramRunner
from sparsecc.verification.certificate import Certificate, Check, Status
from sparsecc.verification.check import FLOAT64_BOUND, RUNS, amplified, distance


def compared(subject: MetaSubject, plan: Plan, kept: Mapping[str, Kept], again: Program) -> Certificate:
    """``again``, which reads what was written, against the masked ``subject`` in float64.

    One weight of each is in memory at a time.
    """
    checks: list[Check] = []
    told_apart = plan.mode == "slim"
    for seed, variant in RUNS:
        inputs, words = subject.inputs(seed, variant)
        before = subject.original(inputs, torch.float64) if plan.mode == "slim" or not told_apart else []
        wanted = before if plan.mode == "slim" else subject.masked(plan, kept, inputs, torch.float64)
        exact = exact_weights(plan, again.weights)
        found, _ = ProgramRunner(again, dtype=torch.float64, overrides=exact).run(inputs)
        told_apart = told_apart or any(_error(a, b) > 0 for a, b in zip(before, wanted, strict=True))
        checks += [
            Check("float64", "relative error", _error(a, b), FLOAT64_BOUND, words, name)
            for name, a, b in zip(subject.output_names, found, wanted, strict=True)
        ]
    if not all(c.passed for c in checks):
        checks = amplified(checks, subject, plan, kept)
    claim = "slim(x) = original(x)" if plan.mode == "slim" else "pruned(x) = masked(x)"
    status: Status = "VERIFIED" if told_apart else "VACUOUS"
    if not all(c.passed for c in checks):
        status = "FAILED"
    why = "the masked and the original model agree exactly on every input that was tried"
    return Certificate(
        status, claim, tuple(checks), why if status == "VACUOUS" else "", plan=plan.fingerprint()
    )


def _error(ours: Any, theirs: Any) -> float:
    if not isinstance(theirs, torch.Tensor):
        return float(ours != theirs)
    error, scale = distance(ours, theirs)
    return error / scale if scale else error

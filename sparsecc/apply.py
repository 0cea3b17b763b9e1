"""Applies a stored plan to a fresh model, and writes results to disk."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecc.atomic import StrPath, atomic_write
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.plan import Plan

if TYPE_CHECKING:
    from sparsecc.pipeline import Pruned
    from sparsecc.subject import Subject


def apply_plan(plan: Plan, model: Any, example_inputs: Any = None) -> Any:
    """See ``Plan.apply``."""
    import torch

    from sparsecc.pipeline import finish, open_subject

    if isinstance(model, torch.nn.Module) and example_inputs is None:
        return _to_module(plan, model)
    if isinstance(model, Mapping):
        return plan.apply_state_dict(model)
    subject = open_subject(model, example_inputs)
    check_fits(plan, subject)
    return finish(subject, plan, verify=False).model


def check_fits(plan: Plan, subject: Subject) -> None:
    """Raise PlanConflict where a plan was made for another model than the captured one."""
    if subject.dialect != plan.dialect:
        raise PlanConflict(
            f"this plan is for a {plan.dialect} model, and the model given is {subject.dialect}"
        )
    named = {n: v.shape for n, v in subject.view.weights.items() if n in plan.shapes}
    used = [v for c in subject.view.calls for v in c.inputs if v is not None and v.weight is not None]
    plan.check_shapes(named | {str(v.weight): v.shape for v in used})


def _to_module(plan: Plan, model: Any) -> Any:
    from sparsecc.fx.capture import find_ties, unwrap
    from sparsecc.fx.module import Diverged, narrowed

    if plan.form == "graph":
        raise PlanConflict(
            "this plan ended in a graph module, because the class could not express it; give example_inputs, "
            "so that the graph can be captured again"
        )
    inner, _ = unwrap(model)
    state = inner.state_dict(keep_vars=True) | dict(inner.named_buffers(remove_duplicate=False))
    plan.check_shapes({n: tuple(t.shape) for n, t in state.items()})
    ties = find_ties(state)
    named = set(plan.shapes)
    try:
        return narrowed(inner, plan, {a: (a if a in named else n) for a, n in ties.items()})
    except Diverged as error:
        raise PlanConflict(str(error)) from error


def save_pruned(pruned: Pruned, path: Path) -> None:
    """See ``Pruned.save``."""
    from sparsecc.onnxfile.subject import AppliedOnnx

    if isinstance(pruned.applied, AppliedOnnx):
        assert pruned.applied.file is not None
        pruned.applied.file.save(path)
        return
    check_ending(path)
    from safetensors.torch import save

    weights = save(_weights(pruned.model))
    with atomic_write(path) as stream:
        if path.suffix == ".safetensors":
            stream.write(weights)
        else:
            _write_bundle(stream, pruned.plan, weights)


def check_ending(path: StrPath) -> None:
    """Raise InvalidOption for a name under which nobody would look for a pruned PyTorch model."""
    if os.fspath(path).endswith(".onnx"):
        raise InvalidOption(
            f"cannot write {path}: a pruned PyTorch model is saved as weights with its plan; for an ONNX "
            "file, compile it with target onnx (sparsecc.compile, or `sparsecc compile --target onnx`)"
        )


def _weights(model: Any) -> dict[str, Any]:
    """Every weight once, contiguous: tied ones are tied again when the plan is applied."""
    from sparsecc.fx.capture import find_ties

    state = model.state_dict()
    ties = find_ties(state)
    return {n: t.detach().cpu().contiguous() for n, t in state.items() if n not in ties}


def _write_bundle(stream: Any, plan: Plan, weights: bytes) -> None:
    members = {**plan.members(), "weights.safetensors": weights}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name), members[name])

"""Single operators by brute force: run on the kept positions alone, as if nothing else had ever been there.

What masked semantics say of an operator at the positions that stay must be what the very same operator
computes of operands that were cut down to them; only operators that spell out sizes or positions cannot be
run so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.axes.terms import Keep, Term
from sparsecc.fx.subject import TorchSubject
from sparsecc.graph import Call
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.reference.masked import Masked, at_kept
from sparsecc.reference.onnx_run import Runner
from sparsecc.reference.torch_run import ProgramRunner, masked_hook

Errors = dict[str, float]


def torch_errors(subject: TorchSubject, kept: Mapping[str, Keep], inputs: list[Any]) -> Errors:
    """The error of every operator of a program that some pruned axis reaches, by ``op name``."""
    keeps = subject.analysis.keeps(kept)
    inner = masked_hook(subject.view, Masked(keeps))
    calls = {call.raw: call for call in subject.view.calls}
    semantics = subject.view.semantics
    assert semantics is not None
    errors: Errors = {}

    def hook(node: Any, default: Callable[[Mapping[Any, Any]], Any], env: Mapping[Any, Any]) -> Any:
        call = calls.get(node)
        if (
            call is None
            or not semantics.deterministic(call)
            or not _comparable(subject.analysis, call, keeps)
        ):
            return inner(node, default, env)
        operands = [env[ref].clone() if isinstance(env[ref], Tensor) else None for ref in call.refs if ref]
        refs = [ref for ref in call.refs if ref]
        places = [i for i, ref in enumerate(call.refs) if ref]
        outputs = inner(node, default, env)
        cut = _cut(call, keeps, places, operands)
        if cut is not None:
            direct = default(dict(zip(refs, cut, strict=True)))
            _note(errors, call, keeps, outputs, direct)
        return outputs

    ProgramRunner(subject.program, dtype=torch.float64).run(inputs, hook=hook)
    return errors


def onnx_errors(
    subject: OnnxSubject, plan: Any, kept: Mapping[str, Keep], feeds: Mapping[str, Any]
) -> Errors:
    """The same for a model of the other dialect."""
    keeps = subject.analysis.keeps(kept)
    inner = subject._hook(plan, subject.semantics(kept))
    calls = {call.raw: call for call in subject.view.calls}
    errors: Errors = {}

    def hook(node: Any, index: int, inputs: list[Any], default: Any) -> Any:
        outputs = inner(node, index, inputs, default)
        call = calls.get(index)
        if call is None or not _comparable(subject.analysis, call, keeps):
            return outputs
        places = [i for i, ref in enumerate(call.refs) if ref is not None]
        refs = [ref for ref in call.refs if ref is not None]
        cut = _cut(call, keeps, places, [inputs[ref] for ref in refs])
        if cut is not None:
            substituted = list(inputs)
            for ref, tensor in zip(refs, cut, strict=True):
                substituted[ref] = tensor
            named = [o for o, name in zip(default(substituted), node.output, strict=False) if name]
            shown = [o for o, name in zip(outputs, node.output, strict=False) if name]
            _note(errors, call, keeps, shown, named)
        return outputs

    Runner(subject.file, dtype=torch.float64, cache=False).run(dict(feeds), hook=hook)
    return errors


def _comparable(analysis: Analysis, call: Call, keeps: Keeps) -> bool:
    """Whether the operator spells out no size, and no position of an axis, that changes.

    Nor may it drop an axis for what is left of it.
    """
    if any(keeps.count(analysis.solver.of(call, 0)[d]) == 1 for d in call.attrs.get("spared", ())):
        return False
    facts = analysis.solver.facts.get(call)
    if facts is None:
        return True
    terms: list[Term] = [*facts.indices.values(), *(term for _, term in facts.pins.values())]
    for name, size in facts.sizes.items():
        if name.startswith(("start", "stop")):  # may be counted from the end
            terms.append(analysis.solver.of(call, 0)[int(name.removeprefix("start").removeprefix("stop"))])
        terms += [t for item in size for t in (item if isinstance(item, tuple) else (item,))]
    return all(keeps.mask(term) is None for term in terms)


def _cut(
    call: Call, keeps: Keeps, places: Sequence[int], operands: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """Operands at their kept positions; None where all of them are whole."""
    cut: list[Tensor | None] = []
    whole = True
    for place, tensor in zip(places, operands, strict=True):
        if not isinstance(tensor, Tensor):
            cut.append(tensor)
            continue
        masks = keeps.operand(call, place, tensor.shape)
        whole = whole and all(mask is None for mask in masks)
        cut.append(at_kept(tensor, masks))
    return None if whole else cut


def _note(errors: Errors, call: Call, keeps: Keeps, outputs: Any, direct: Any) -> None:
    masked = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    made = list(direct) if isinstance(direct, (tuple, list)) else [direct]
    for value, ours, theirs in zip(call.outputs, masked, made, strict=True):
        ours = at_kept(ours, keeps.value(value, ours.shape))
        worst = _error(ours, theirs)
        errors[f"{call.op} {call.name}"] = max(worst, errors.get(f"{call.op} {call.name}", 0.0))


def _error(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.is_complex() and theirs.is_complex():
        return _error(*(torch.view_as_real(y.resolve_conj()) for y in (ours, theirs)))
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))

"""Every graph pattern: analysed as the golden files say, pruned to a half, and right by four oracles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from sparsecc.axes import Analysis
from sparsecc.fx.capture import capture
from sparsecc.fx.program_module import ProgramModule
from sparsecc.fx.subject import TorchSubject
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import Pruned, run, settle
from tests.exported import example
from tests.oracles import call, error, fingerprint, forward64, leaves, masked64, nested, poisoned, zeroed
from tests.patterns import CASES, Case
from tests.sampling import every

EXACT = 1e-12
PASSES = (ChannelPruning(sparsity=0.5), HeadPruning(sparsity=0.5, head_dims=True))


@dataclass
class Done:
    """A pruned pattern."""

    model: nn.Module
    inputs: Any
    before: str
    pruned: Pruned
    subject: TorchSubject


@cache
def done(name: str) -> Done:
    made = example(name)
    pruned = settle(made.subject, PASSES)
    return Done(made.model, made.inputs, made.before, pruned, made.subject)


def groups_text(analysis: Analysis) -> str:
    """Groups and frozen axes, without source lines."""
    lines = [str(group) for group in analysis.groups]
    lines += [f"frozen {f.weight}[{f.axis}] ({f.size}): {f.reason.kind}" for f in analysis.frozen]
    return "\n".join(lines) + "\n"


every_pattern = pytest.mark.parametrize("name", CASES)


@every_pattern
def test_groups_are_the_golden_ones(name: str, golden: Callable[[str, str], None]) -> None:
    analysis = done(name).subject.analysis
    assert [f for f in analysis.frozen if f.reason.kind == "rule failed"] == []
    golden(f"groups/{name}.txt", groups_text(analysis))


@every_pattern
def test_pruned_to_a_half_is_verified(name: str) -> None:
    pruned = done(name).pruned
    assert pruned.certificate.status == "VERIFIED", str(pruned.certificate)
    assert pruned.report.after["parameters"] < pruned.report.before["parameters"]


@every_pattern
def test_forward_equals_masked_semantics_whatever_was_removed(name: str) -> None:
    """Garbage in every removed entry of the original must not be seen, at two sizes of the batch."""
    d = done(name)
    kept = d.subject.kept(d.pruned.plan)
    for seed, variant in ((0, 0), (3, 1)):
        flat, _ = d.subject.inputs(seed, variant)
        reference = masked64(d.subject, kept, flat, poisoned(d.subject, d.pruned.plan))
        ours = forward64(d.pruned.model, nested(d.subject, flat))
        assert error(ours, reference) <= EXACT


@every_pattern
def test_unpruned_semantics_are_those_of_the_module(name: str) -> None:
    d = done(name)
    flat, _ = d.subject.inputs(0, 0)
    assert error(masked64(d.subject, {}, flat), forward64(d.model, nested(d.subject, flat))) <= EXACT


@pytest.mark.parametrize("name", [c.name for c in CASES.values() if c.zeroing])
def test_forward_equals_original_with_zeroed_consumers(name: str) -> None:
    d = done(name)
    flat, _ = d.subject.inputs(1, 0)
    inputs = nested(d.subject, flat)
    assert (
        error(forward64(d.pruned.model, inputs), forward64(zeroed(d.model, d.pruned.plan), inputs)) <= EXACT
    )


@every_pattern
def test_input_model_is_untouched(name: str) -> None:
    d = done(name)
    assert fingerprint(d.model) == d.before


@every_pattern
def test_class_is_kept_where_it_can_express_the_plan(name: str) -> None:
    d = done(name)
    if CASES[name].kept_class:
        assert type(d.pruned.model) is type(d.model), d.pruned.report.notes
        kinds = [type(m) for m in d.model.modules()]
        assert [type(m) for m in d.pruned.model.modules()] == kinds
    else:
        assert isinstance(d.pruned.model, ProgramModule)
        assert any("returned as a graph module" in n for n in d.pruned.report.notes)


@pytest.mark.parametrize("name", every(2, CASES))
def test_result_trains_copies_stores_and_exports(name: str) -> None:
    d = done(name)
    model = copy.deepcopy(d.pruned.model)
    assert not model.training
    flags = {n: p.requires_grad for n, p in d.model.named_parameters()}
    used = {n: p.requires_grad for n, p in model.named_parameters()}
    assert used.items() <= flags.items()
    assert with_gradients(model, d.inputs) == with_gradients(copy.deepcopy(d.model), d.inputs)
    fresh = copy.deepcopy(d.pruned.model)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(d.pruned.model.state_dict())
    assert error(call(fresh, d.inputs), call(d.pruned.model, d.inputs)) == 0
    assert capture(d.pruned.model, d.inputs).graph is not None


def with_gradients(model: nn.Module, inputs: Any) -> set[str]:
    """Names of parameters that a backward pass in training mode reaches."""
    model.train()
    outputs = leaves(model(**inputs) if isinstance(inputs, dict) else model(*inputs))
    floats = [y for y in outputs if y.is_floating_point() and y.requires_grad]
    torch.stack([(y * y).sum() for y in floats]).sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", every(9, CASES))
def test_a_second_capture_gives_the_same_plan(name: str) -> None:
    case: Case = CASES[name]
    again = run(*case.make(), PASSES, verify=False)
    assert again.plan.fingerprint() == done(name).pruned.plan.fingerprint()

"""Random networks, random plans: the pruned program and the returned module compute masked semantics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

from sparsecc.axes.terms import Keep
from sparsecc.fx.editor import edit
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.plan import Plan
from sparsecc.reference.torch_run import ProgramRunner
from tests.oracles import error, fingerprint, forward64, forward_error, leaves, masked64, nested, poisoned
from tests.random_nets import OPERATORS, Net, Step

BOUND = 1e-12

numbers = st.integers(0, 5)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    kind = draw(st.sampled_from(sorted(OPERATORS)))
    step = st.tuples(st.sampled_from(sorted(OPERATORS[kind])), numbers, numbers, numbers)
    first: Step = ("conv" if kind == "image" else "linear", 0, draw(numbers), 1)
    return Net([first, *draw(st.lists(step, min_size=1, max_size=11))], kind, 0)


def random_keeps(subject: TorchSubject, seed: int) -> dict[str, Keep]:
    """A random choice of at least one position for about three groups in four."""
    generator = np.random.default_rng(seed)
    kept: dict[str, Keep] = {}
    for group in subject.analysis.groups:
        mask = generator.random(group.size) < generator.choice([0.3, 0.6, 0.9])
        mask[generator.integers(group.size)] = True
        if generator.random() < 0.75:
            kept[group.name] = mask
    return subject.analysis.feasible(kept)


def check(subject: TorchSubject, plan: Plan, kept: Mapping[str, Keep]) -> None:
    applied = subject.apply(plan, kept)
    slim = edit(subject.program, plan)
    garbage = poisoned(subject, plan)
    for seed, variant in ((0, 0), (1, 1)):
        flat, _ = subject.inputs(seed, variant)
        reference = masked64(subject, kept, flat, garbage)
        program = leaves(ProgramRunner(slim, dtype=torch.float64).run(flat)[0])
        assert error(program, reference) <= BOUND
        worst, bound = forward_error(applied.model, nested(subject, flat), reference)
        assert worst <= bound
    for check_ in subject.node_checks(applied, kept, subject.inputs(2, 0)[0]):
        assert check_.passed, check_


@given(nets(), st.integers(0, 99))
def test_any_plan_of_any_network_computes_masked_semantics(net: Net, seed: int) -> None:
    note(f"Net({net.steps}, {net.kind!r}, 0)")
    before = fingerprint(net)
    subject = TorchSubject(net, (net.example,))
    assert [f for f in subject.analysis.frozen if f.reason.kind == "rule failed"] == []
    kept = random_keeps(subject, seed)
    event("groups" if kept else "nothing to remove")
    plan = lower(subject.analysis, kept)
    check(subject, plan, kept)
    assert fingerprint(net) == before


@settings(max_examples=max(settings().max_examples // 6, 1))
@given(nets())
def test_an_empty_plan_changes_nothing(net: Net) -> None:
    subject = TorchSubject(net, (net.example,))
    applied = subject.apply(lower(subject.analysis, {}), {})
    flat, _ = subject.inputs(1, 0)
    assert type(applied.model) is Net
    assert error(forward64(applied.model, nested(subject, flat)), forward64(net, nested(subject, flat))) == 0

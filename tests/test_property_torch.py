"""Random networks, random plans: the pruned program and the returned module compute masked semantics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

from sparsecc.axes.terms import Keep
from sparsecc.fx.editor import edit
from sparsecc.fx.ops import TABLE, aten_name
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.plan import Plan
from sparsecc.reference.torch_run import ProgramRunner
from tests.aten_calls import APART
from tests.kept_alone import torch_errors
from tests.oracles import error, fingerprint, forward64, forward_error, leaves, masked64, nested, poisoned
from tests.random_nets import CALLS, EXAMPLES, FORMS, LAYERS, OPERATORS, Net, Step

BOUND = 1e-12
NIGHTLY = settings().max_examples > 500
DEEPEST = 30 if NIGHTLY else 12

numbers = st.integers(0, 5)

#: what torch.export does not leave in a graph
LEFT_OUT = {"lift_fresh"}


@st.composite
def nets(draw: st.DrawFn) -> Net:
    kind = draw(st.sampled_from(sorted(OPERATORS)))
    names = st.one_of(st.sampled_from(sorted(LAYERS[kind])), st.sampled_from(sorted(CALLS[kind])))
    step = st.tuples(names, numbers, numbers, numbers)
    first: Step = ("project", 0, draw(numbers), 1)
    steps = draw(st.lists(step, min_size=1, max_size=DEEPEST - 1))
    return Net([first, *steps], kind, 0, draw(st.integers(0, 2 * FORMS - 1)))


def random_keeps(subject: TorchSubject, seed: int, least: int = 1) -> dict[str, Keep]:
    """A random choice of at least ``least`` positions for about three groups in four."""
    generator = np.random.default_rng(seed)
    kept: dict[str, Keep] = {}
    for group in subject.analysis.groups:
        mask = generator.random(group.size) < generator.choice([0.3, 0.6, 0.9])
        mask[generator.permutation(group.size)[:least]] = True
        if generator.random() < 0.75:
            kept[group.name] = mask
    return subject.analysis.feasible(kept)


def least(net: Net) -> int:
    """Positions that have to stay: an unbiased variance of one number is not defined."""
    return (
        2
        if any(name.split(".")[0] in ("var", "std", "var_mean", "std_mean") for name, *_ in net.steps)
        else 1
    )


def check_program(subject: TorchSubject, plan: Plan, kept: Mapping[str, Keep]) -> None:
    """The edited program, and every operator on the kept positions alone."""
    slim = edit(subject.program, plan)
    garbage = poisoned(subject, plan)
    for seed, variant in ((0, 0), (1, 1)):
        flat, _ = subject.inputs(seed, variant)
        program = leaves(ProgramRunner(slim, dtype=torch.float64).run(flat)[0])
        assert error(program, masked64(subject, kept, flat, garbage)) <= BOUND
    wrong = {name: e for name, e in torch_errors(subject, kept, flat).items() if not e <= BOUND}
    assert wrong == {}


def check_model(subject: TorchSubject, plan: Plan, kept: Mapping[str, Keep]) -> None:
    """What the user gets, as a whole and operator by operator."""
    applied = subject.apply(plan, kept)
    garbage = poisoned(subject, plan)
    for seed, variant in ((0, 0), (1, 1)):
        flat, _ = subject.inputs(seed, variant)
        reference = masked64(subject, kept, flat, garbage)
        worst, bound = forward_error(applied.model, nested(subject, flat), reference)
        assert worst <= bound
    for check_ in subject.node_checks(applied, kept, subject.inputs(2, 0)[0]):
        assert check_.passed, check_


def checked(net: Net, seed: int, whole: bool = True) -> TorchSubject:
    """A network after a random plan was checked on it."""
    before = fingerprint(net)
    subject = TorchSubject(net, net.examples)
    assert [f for f in subject.analysis.frozen if f.reason.kind == "rule failed"] == []
    kept = random_keeps(subject, seed, least(net))
    plan = lower(subject.analysis, kept)
    check_program(subject, plan, kept)
    if whole:
        check_model(subject, plan, kept)
    assert fingerprint(net) == before
    return subject


@settings(max_examples=settings().max_examples if NIGHTLY else 20)
@given(nets(), st.integers(0, 99))
def test_any_plan_of_any_network_computes_masked_semantics(net: Net, seed: int) -> None:
    note(f"Net({net.steps}, {net.kind!r}, 0, {net.form})")
    event("groups" if checked(net, seed).analysis.groups else "nothing to remove")


@settings(max_examples=max(settings().max_examples // 6, 1))
@given(nets())
def test_an_empty_plan_changes_nothing(net: Net) -> None:
    subject = TorchSubject(net, net.examples)
    applied = subject.apply(lower(subject.analysis, {}), {})
    flat, _ = subject.inputs(1, 0)
    assert type(applied.model) is Net
    assert error(forward64(applied.model, nested(subject, flat)), forward64(net, nested(subject, flat))) == 0


# -- every entry of the table ------------------------------------------------------------------------


def _dealt(count: int) -> list[tuple[str, list[str]]]:
    """Every call once, a few to a network, spread over the kinds of networks that can hold it."""
    hands: dict[str, list[str]] = {kind: [] for kind in EXAMPLES}
    for place, name in enumerate(sorted({name for kind in CALLS for name in CALLS[kind]})):
        fits = [kind for kind in hands if name in CALLS[kind]]
        hands[fits[place % len(fits)]].append(name)
    return [(k, h[i : i + count]) for k, h in hands.items() for i in range(0, len(h), count)]


def _net(kind: str, names: Sequence[str], number: int) -> Net:
    steps: list[Step] = [("project", 0, 5, 1)]
    for place, name in enumerate(names):
        steps += [(name, 0, number % 6, (number + place) % 6), ("project", 0, 2 + place % 4, 0)]
    return Net(steps, kind, number)


@pytest.mark.parametrize(("kind", "names"), _dealt(12), ids=lambda v: v if isinstance(v, str) else v[0])
def test_every_entry_of_the_table_computes_masked_semantics(kind: str, names: list[str]) -> None:
    for number in range(12 if NIGHTLY else 1):
        net = _net(kind, names, number)
        subject = checked(net, number, whole=NIGHTLY)
        called = {aten_name(n.target) for n in subject.program.graph.nodes if n.op == "call_function"}
        called |= {name.removesuffix("_with_indices") for name in called if name is not None}  # export's form
        assert {name.split(".")[0] for name in names} - LEFT_OUT <= called
        unknown = {c.op for c in subject.view.calls if "unusual" in c.op}
        assert unknown == set()


def test_every_entry_of_the_table_has_a_generator() -> None:
    made = {name.split(".")[0] for kind in CALLS for name in CALLS[kind]}
    missing = sorted(set(TABLE) - made - APART)
    assert missing == [], f"no random network calls {', '.join(missing)}: add a recipe to tests/aten_calls.py"


def fuzzed_rules() -> set[str]:
    """Canonical operators that the networks of this file hold."""
    found: set[str] = set()
    for kind, names in _dealt(16):
        net = _net(kind, names, 0)
        found |= {call.op for call in TorchSubject(net, net.examples).view.calls}
    return found

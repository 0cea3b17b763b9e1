"""Random networks, random plans: the pruned program and the returned module compute masked semantics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, event, given, note, settings
from hypothesis import strategies as st

from sparsecc.axes.terms import Keep
from sparsecc.fx.editor import edit
from sparsecc.fx.ops import TABLE, aten_name
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.passes import NMPattern
from sparsecc.pipeline import decide, finish
from sparsecc.plan import Plan
from sparsecc.reference.torch_run import ProgramRunner
from tests.aten_calls import APART
from tests.kept_alone import torch_errors
from tests.oracles import call, error, fingerprint, forward64, leaves, masked64, nested, poisoned
from tests.random_nets import CALLS, EXAMPLES, FORMS, LAYERS, OPERATORS, Net, Step
from tests.test_nm_pattern import has_pattern
from tests.test_permutation import program_error, shuffled

BOUND = 1e-12
#: making an example smaller takes minutes: `HYPOTHESIS_PROFILE=nightly` does it
PHASES = (Phase.explicit, Phase.generate)
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
        assert error(forward64(applied.model, nested(subject, flat)), reference) <= BOUND
    for check_ in subject.node_checks(applied, kept, subject.inputs(2, 0)[0]):
        assert check_.passed, check_


def check(net: Net, subject: TorchSubject, seed: int, whole: bool = True) -> None:
    """A random plan of a captured network."""
    before = fingerprint(net)
    assert [f for f in subject.analysis.frozen if f.reason.kind == "rule failed"] == []
    kept = random_keeps(subject, seed, least(net))
    plan = lower(subject.analysis, kept)
    check_program(subject, plan, kept)
    if whole:
        check_model(subject, plan, kept)
    assert fingerprint(net) == before


def check_order(subject: TorchSubject, seed: int) -> None:
    """A random order of every group, which masked semantics know nothing of."""
    plan = lower(subject.analysis, shuffled(subject, seed))
    assert program_error(subject, plan) <= BOUND


def check_pattern(subject: TorchSubject, pattern: str, permute: bool) -> None:
    """What the N:M pass makes is verified, and has the pattern."""
    result = finish(subject, decide(subject.analysis, [NMPattern(pattern=pattern, permute=permute)]))
    n, m = (int(part) for part in pattern.split(":"))
    weights = result.applied.program.weights  # type: ignore[attr-defined]
    for p in result.plan.patterns:
        if p.state != "dense":
            assert has_pattern(weights[p.weight], p.axis, n, m)


def check_empty(net: Net, subject: TorchSubject) -> None:
    """A plan without actions gives the class back, and every bit of its outputs."""
    applied = subject.apply(lower(subject.analysis, {}), {})
    flat, _ = subject.inputs(1, 0)
    assert type(applied.model) is Net
    inputs = nested(subject, flat)
    assert error(call(applied.model, inputs), call(net, inputs)) == 0


def test_numbers_that_are_made_without_a_type_are_as_wide_as_the_reference_has_them() -> None:
    net = Net([("project", 0, 0, 1), ("buffered", 1, 0, 0), ("linspace", 0, 0, 0)], "table", 0, 0)
    check(net, TorchSubject(net, net.examples), 0)


@settings(settings() if NIGHTLY else settings(max_examples=20, phases=PHASES))
@given(nets(), st.integers(0, 99), st.sampled_from(["2:4", "1:2", "1:3", None]), st.booleans())
def test_any_network_computes_masked_semantics(
    net: Net, seed: int, pattern: str | None, permute: bool
) -> None:
    """Nearly all of the time goes into captures, so that everything that needs none is tried on one."""
    note(f"Net({net.steps}, {net.kind!r}, 0, {net.form})")
    subject = TorchSubject(net, net.examples)
    for number in range(3):
        check(net, subject, seed + 100 * number, whole=number == 0)
    check_order(subject, seed)
    if pattern is None:
        check_empty(net, subject)
    else:
        check_pattern(subject, pattern, permute)
    event("groups" if subject.analysis.groups else "nothing to remove")


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


HANDS = _dealt(12)


def _captured(place: int, number: int) -> tuple[Net, TorchSubject]:
    net = _net(*HANDS[place], number)
    return net, TorchSubject(net, net.examples)


#: the first network of every hand, captured once a process
_first = cache(partial(_captured, number=0))


@pytest.mark.parametrize(
    "place", range(len(HANDS)), ids=lambda place: f"{HANDS[place][0]}-{HANDS[place][1][0]}"
)
def test_every_entry_of_the_table_computes_masked_semantics(place: int) -> None:
    names = HANDS[place][1]
    for number in range(12 if NIGHTLY else 1):
        net, subject = _captured(place, number) if number else _first(place)
        check(net, subject, number, whole=NIGHTLY)
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
    return {call.op for place in range(len(HANDS)) for call in _first(place)[1].view.calls}

"""Damaged ONNX models: a verified result or one clear refusal, in bounded memory and time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

from tests.onnx_mutations import BYTES, MODELS, MUTATIONS, mutated
from tests.onnx_seeds import SEEDS
from tests.sandbox import Sandbox

NIGHTLY = settings().max_examples > 500


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One worker for the whole module."""
    made = Sandbox()
    yield made
    made.close()


steps = st.lists(
    st.tuples(st.sampled_from([f.__name__ for f in (*MODELS, *BYTES)]), st.integers(0, 9999)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=settings().max_examples if NIGHTLY else 15)
@given(seed=st.sampled_from(list(SEEDS)), steps=steps)
def test_damaged_models_are_refused_or_verified(
    sandbox: Sandbox, seed: str, steps: list[tuple[str, int]]
) -> None:
    note(f"mutated(({seed!r}, {steps}))")
    outcome, problems = sandbox.run(mutated((seed, steps)))
    event(outcome)
    assert problems == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation(sandbox: Sandbox, name: str) -> None:
    """Each one on seeds that it changes: all of them in the nightly suite, else one."""
    order = sorted(SEEDS)
    start = sorted(MUTATIONS).index(name)
    seeds = [order[(start + k) % len(order)] for k in range(len(order))]
    whole = {seed: SEEDS[seed]().SerializeToString() for seed in seeds}
    cases = [(seed, number) for number in range(5 if NIGHTLY else 2) for seed in seeds]
    changed = [(s, n) for s, n in cases if mutated((s, [(name, n)])) != whole[s]]
    assert changed, "a mutation that changes nothing tests nothing"
    for seed, number in changed if NIGHTLY else changed[:1]:
        _, problems = sandbox.run(mutated((seed, [(name, number)])))
        assert problems == [], (seed, number)


@pytest.mark.parametrize("seed", SEEDS)
def test_undamaged_models_are_verified(sandbox: Sandbox, seed: str) -> None:
    """The test of the test: a sandbox that refuses everything would find nothing."""
    assert sandbox.run(SEEDS[seed]().SerializeToString()) == ("verified", [])


def test_what_is_no_model_is_refused(sandbox: Sandbox) -> None:
    """A file that is no model at all is refused with a message that names it."""
    assert sandbox.run(b"no model") == ("InvalidModel", [])

"""Schedules against the closed formulas of the papers, and densities against their equations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.densities import er, erk, uniform
from sparsecc.errors import InvalidOption
from sparsecc.train import Constant, Cubic, Exponential, Iterative, OneShot, Schedule


def test_cubic_is_equation_1() -> None:
    schedule = Cubic(sparsity=0.9, initial=0.1, start=20, end=120, every=10)
    for k in range(11):  # t in {t_0, t_0 + Δt, ..., t_0 + n Δt}
        t = 20 + 10 * k
        want = 0.9 + (0.1 - 0.9) * (1 - (t - 20) / (10 * 10)) ** 3
        assert math.isclose(schedule.at(t), want)
        assert schedule.updates(t)
        if k < 10:
            assert all(math.isclose(schedule.at(t + d), want) for d in range(10)), "it holds between updates"
            assert not any(schedule.updates(t + d) for d in range(1, 10))
    assert schedule.at(19) == 0
    assert schedule.at(20) == pytest.approx(0.1)
    assert schedule.at(10**9) == 0.9
    assert not schedule.updates(19)
    assert not schedule.updates(130)


def test_one_shot_happens_once() -> None:
    schedule = OneShot(sparsity=0.5, start=7)
    assert [t for t in range(30) if schedule.updates(t)] == [7]
    assert [schedule.at(t) for t in (0, 6, 7, 8)] == [0, 0, 0.5, 0.5]
    assert OneShot(sparsity=0.5).updates(0)
    with pytest.raises(InvalidOption, match="use Constant"):
        OneShot(sparsity=0.5, start=2, end=9)


def test_rounds_leave_equal_shares_of_what_was_left() -> None:
    schedule = Iterative(sparsity=0.9, start=5, end=25, every=5)
    rounds = [t for t in range(40) if schedule.updates(t)]
    assert rounds == [5, 10, 15, 20, 25]
    left = [1.0, *(1 - schedule.at(t) for t in rounds)]
    shares = [b / a for a, b in itertools.pairwise(left)]
    assert shares == pytest.approx([0.1 ** (1 / 5)] * 5)
    assert left[-1] == pytest.approx(0.1)


def test_the_last_round_is_at_the_end_also_off_the_grid() -> None:
    for kind in (Iterative, Cubic, Exponential):
        schedule = kind(sparsity=0.8, start=0, end=7, every=3)
        assert [t for t in range(20) if schedule.updates(t)] == [0, 3, 6, 7]
        assert schedule.at(7) == pytest.approx(0.8)
        assert schedule.at(6) < 0.8


def test_exponential_decay_of_density() -> None:
    schedule = Exponential(sparsity=0.99, initial=0.5, start=10, end=110)
    for t in (10, 35, 60, 110):
        rate = math.log(0.01 / 0.5) / 100
        assert 1 - schedule.at(t) == pytest.approx(0.5 * math.exp(rate * (t - 10)))


def test_constant() -> None:
    schedule = Constant(sparsity=0.7, start=2, end=12, every=5)
    assert [t for t in range(30) if schedule.updates(t)] == [2, 7, 12]
    assert [schedule.at(t) for t in (1, 2, 11, 99)] == [0, 0.7, 0.7, 0.7]


@given(
    st.sampled_from([OneShot, Constant, Iterative, Cubic, Exponential]),
    st.floats(0, 0.99),
    st.integers(0, 20),
    st.integers(0, 40),
    st.integers(1, 9),
)
def test_targets_never_fall_and_change_only_at_updates(
    kind: type[Schedule], sparsity: float, start: int, length: int, every: int
) -> None:
    end = start if kind is OneShot else start + length
    schedule = kind(sparsity=sparsity, start=start, end=end, every=every)
    targets = [schedule.at(t) for t in range(end + 5)]
    assert all(0 <= s <= sparsity + 1e-12 for s in targets)
    assert math.isclose(targets[-1], sparsity)
    for t in range(1, end + 5):
        assert targets[t] >= targets[t - 1] - 1e-12
        assert targets[t] == targets[t - 1] or schedule.updates(t)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Constant, {"sparsity": 1.0}),
        (Constant, {"sparsity": 0.5, "start": -1}),
        (Constant, {"sparsity": 0.5, "start": 5, "end": 4}),
        (Constant, {"sparsity": 0.5, "end": 4, "every": 0}),
        (Cubic, {"sparsity": 0.5, "initial": 0.6, "end": 4}),
        (Cubic, {"sparsity": 0.5, "end": 4.5}),
    ],
)
def test_bad_options(kind: type[Schedule], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="give"):
        kind(**options)


# -- densities -----------------------------------------------------------------------------------------

RESNET = {
    "conv1": (64, 3, 7, 7),
    "a": (64, 64, 3, 3),
    "b": (512, 256, 3, 3),
    "c": (2048, 512, 1, 1),
    "fc": (1000, 2048),
}


def test_erk_is_proportional_to_its_formula_and_meets_the_budget() -> None:
    for density in (0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0):
        found = erk(RESNET, density)
        sizes = {n: math.prod(s) for n, s in RESNET.items()}
        assert sum(found[n] * sizes[n] for n in RESNET) == pytest.approx(density * sum(sizes.values()))
        assert all(0 <= d <= 1 for d in found.values())
        ratios = [found[n] * sizes[n] / sum(RESNET[n]) for n in RESNET if found[n] < 1]
        assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else density == 1
        scale = ratios[0] if ratios else 0
        for n in RESNET:  # what is whole would be denser than whole
            assert found[n] < 1 or not ratios or scale * sum(RESNET[n]) / sizes[n] >= 1
    assert 0.5 < erk(RESNET, 0.1)["conv1"] < erk(RESNET, 0.3)["conv1"] == 1


def test_er_does_not_count_kernels() -> None:
    found = er({"a": (8, 8, 3, 3), "b": (8, 8)}, 0.1)
    assert found["a"] == pytest.approx(found["b"])
    assert er({"a": (10, 20), "b": (40, 40)}, 0.05)["a"] / er({"a": (10, 20), "b": (40, 40)}, 0.05)[
        "b"
    ] == pytest.approx((30 / 200) / (80 / 1600))


def test_uniform_and_bad_densities() -> None:
    assert uniform(RESNET, 0.3) == dict.fromkeys(RESNET, 0.3)
    assert erk({}, 0.3) == {}
    for kind in (uniform, er, erk):
        with pytest.raises(InvalidOption, match="density"):
            kind(RESNET, 1.5)

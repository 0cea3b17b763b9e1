"""Dynamic sparse training: what is dropped and what grows, against weights and gradients seen outside."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.densities import er, erk
from sparsecc.errors import InvalidOption
from sparsecc.train import SET, Constant, Cubic, OneShot, RigL, Sparsifier, Unstructured
from tests.train_nets import OPTIMIZERS, batch, mlp, train

WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def steps_by_hand(method: Any, name: str = "sgd", **schedule: Any) -> Any:
    """Trains step by step; yields the sparsifier around every choice of masks."""
    model = mlp(torch.float64)
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=Constant(sparsity=0.8, **schedule),
        method=method,
        pattern="erk",
        weights=WEIGHTS,
    )
    for step in range(schedule["end"] + 4):
        x, y = batch(step, model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = {n: model.get_parameter(n).grad.clone() for n in WEIGHTS}  # type: ignore[union-attr]
        before = sparsifier.masks
        optimizer.step()
        moved = {n: model.get_parameter(n).detach().clone() * before[n] for n in WEIGHTS}
        chosen = sparsifier.step()
        yield step + 1, sparsifier, optimizer, chosen, before, moved, gradients


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rigl(name: str) -> None:
    end, every, alpha = 20, 4, 0.4
    updates = 0
    for step, sparsifier, optimizer, chosen, before, moved, gradients in steps_by_hand(
        RigL(fraction=alpha), name, end=end, every=every
    ):
        masks = sparsifier.masks
        if step % every or step > end:
            assert not chosen
            assert all(torch.equal(before[n], masks[n]) for n in WEIGHTS)
            continue
        updates += 1
        for n in WEIGHTS:
            live = int(before[n].sum())
            assert int(masks[n].sum()) == live, "the number of weights stays"
            share = alpha / 2 * (1 + math.cos(math.pi * step / end))
            count = int(share * live + 1e-9)
            order = moved[n].abs().masked_fill(~before[n], math.inf).flatten().argsort(stable=True)
            dropped = torch.zeros_like(before[n]).flatten()
            dropped[order[:count]] = True
            kept = before[n] & ~dropped.reshape(before[n].shape)
            assert (masks[n] | ~kept).all(), "what is not dropped stays"
            grown = masks[n] & ~kept
            rest = ~masks[n]
            dense = gradients[n].abs()
            if grown.any():
                assert dense[grown].min() >= dense[rest].max(), "the largest gradients grow"
            new = masks[n] & ~before[n]
            parameter = sparsifier.model.get_parameter(n)
            assert (parameter[new] == 0).all(), "new weights start at zero"
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert (value[new] == 0).all(), "without momentum"
            assert torch.equal(parameter.detach()[kept], moved[n][kept])
    assert updates == end // every


def test_new_weights_get_gradients_and_move() -> None:
    grown: dict[str, Tensor] = {}
    for step, sparsifier, _, chosen, before, _, _ in steps_by_hand(RigL(), end=8, every=4):
        if step == 4:
            assert chosen
            grown = {n: sparsifier.masks[n] & ~before[n] for n in WEIGHTS}
        if step == 5:
            found = [sparsifier.model.get_parameter(n)[grown[n]] for n in WEIGHTS]
            assert (torch.cat(found) != 0).all()
            return


def test_the_first_masks_are_random_or_by_score() -> None:
    for method in (SET(), RigL(), RigL(initial="scores")):
        model = mlp()
        before = model[2].weight.detach().abs().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(
            model,
            optimizer,
            schedule=Constant(sparsity=0.8, end=8, every=4),
            method=method,
            pattern="erk",
            weights=WEIGHTS,
            seed=3,
        )
        want = erk({n: model.get_parameter(n).shape for n in WEIGHTS}, 0.2)
        for n, mask in sparsifier.masks.items():
            assert abs(int(mask.sum()) - want[n] * mask.numel()) <= 1
        mask = sparsifier.masks["2.weight"]
        assert (before[mask].min() >= before[~mask].max()) == (method.initial == "scores")


def test_set_drops_the_smallest_and_grows_at_random() -> None:
    seen: list[Tensor] = []
    for step, sparsifier, _, chosen, before, moved, _ in steps_by_hand(SET(fraction=0.25), end=20, every=5):
        if not chosen:
            continue
        assert step % 5 == 0
        for n in WEIGHTS:
            masks = sparsifier.masks
            live = int(before[n].sum())
            assert int(masks[n].sum()) == live
            count = int(0.25 * live + 1e-9)
            gone = before[n] & ~masks[n]
            assert int(gone.sum()) <= count, "some may grow again where they were dropped"
            if gone.any():
                smallest = moved[n].abs()[before[n]].sort().values[:count]
                assert moved[n].abs()[gone].max() <= smallest[-1]
        seen.append(sparsifier.masks["2.weight"])
    assert len(seen) == 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_seeds() -> None:
    found = []
    for seed in (1, 1, 2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(
            model,
            optimizer,
            schedule=Constant(sparsity=0.8, end=9, every=3),
            method=SET(),
            weights=WEIGHTS,
            pattern="er",
            seed=seed,
        )
        train(model, optimizer, sparsifier, 7)
        found.append(sparsifier.masks["2.weight"])
        want = er({n: model.get_parameter(n).shape for n in WEIGHTS}, 0.2)["2.weight"]
        assert abs(float(found[-1].float().mean()) - want) < 0.01
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_growing_while_getting_sparser() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Cubic(sparsity=0.9, initial=0.5, end=20, every=4)
    sparsifier = Sparsifier(model, optimizer, schedule=schedule, method=RigL(), weights=WEIGHTS)
    for step in range(22):
        want = sum(p.numel() - int(p.numel() * schedule.at(step) + 1e-9) for p in
                   (model.get_parameter(n) for n in WEIGHTS))  # fmt: skip
        assert sum(int(m.sum()) for m in sparsifier.masks.values()) == want
        train(model, optimizer, sparsifier, 1, first=step)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": RigL(), "pattern": "global"}, "uniform, erk or er"),
        ({"method": SET(), "pattern": "2:4"}, "Unstructured"),
        ({"method": RigL(), "schedule": OneShot(sparsity=0.5)}, "give end and every"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidOption, match=match):
        Sparsifier(
            model, optimizer, **{"schedule": Constant(sparsity=0.5, end=9), "weights": WEIGHTS, **options}
        )
    with pytest.raises(InvalidOption):
        RigL(fraction=1.5)
    with pytest.raises(InvalidOption):
        SET(initial="magnitude")
    assert Unstructured().allocation == "uniform"

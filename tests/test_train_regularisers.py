"""Penalties against autograd of their formulas, written down here once more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import InvalidOption
from sparsecc.train import L1, Constant, GroupLasso, Growing, OneShot, Sparsifier
from tests.train_nets import Residual, batch, mlp, residual, train

WEIGHTS = ["0.weight", "2.weight", "4.weight"]
IMAGES = (torch.randn(2, 3, 6, 6, dtype=torch.float64),)
NEVER = OneShot(sparsity=0.5, start=10**6)


def plain(model: torch.nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate)


def group_norms(model: Residual) -> Tensor:
    """Norms of all positions of both coupled groups, by hand."""
    outer = [(model.stem, "weight", 0), (model.conv1, "weight", 1), (model.conv2, "weight", 0),
             (model.stem, "bias", 0), (model.conv2, "bias", 0), (model.head, "weight", 1)]  # fmt: skip
    inner = [(model.conv1, "weight", 0), (model.conv1, "bias", 0), (model.conv2, "weight", 1)]
    norms = []
    for members in (outer, inner):
        parts = [
            getattr(m, n).movedim(axis, 0).reshape(getattr(m, n).shape[axis], -1) for m, n, axis in members
        ]
        norms.append(torch.cat(parts, 1).norm(dim=1))
    return torch.cat(norms)


def test_l1_is_added_to_gradients() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    ours, theirs = plain(model), plain(twin)
    sparsifier = Sparsifier(model, ours, schedule=NEVER, weights=WEIGHTS, regularisers=[L1(0.01)])
    for step in range(4):
        train(model, ours, sparsifier, 1, first=step)
        x, y = batch(step, twin)
        theirs.zero_grad()
        penalty = sum(twin.get_parameter(n).abs().sum() for n in WEIGHTS)
        (F.cross_entropy(twin(x), y) + 0.01 * penalty).backward()
        theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_group_lasso_is_the_sum_of_norms_of_coupled_positions() -> None:
    model, twin = residual(torch.float64, norms=False), residual(torch.float64, norms=False)
    ours, theirs = plain(model), plain(twin)
    sparsifier = Sparsifier(
        model,
        ours,
        schedule=NEVER,
        pattern="channels",
        example_inputs=IMAGES,
        regularisers=[GroupLasso(0.02)],
    )
    assert torch.allclose(sparsifier.penalty(), 0.02 * group_norms(model).sum())
    for step in range(3):
        train(model, ours, sparsifier, 1, first=step)
        x, y = batch(step, twin)
        theirs.zero_grad()
        (F.cross_entropy(twin(x), y) + 0.02 * group_norms(twin).sum()).backward()
        theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_zero_positions_have_zero_gradients() -> None:
    model = residual(torch.float64, norms=False)
    optimizer = plain(model)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=OneShot(sparsity=0.5),
        pattern="channels",
        example_inputs=IMAGES,
        regularisers=[GroupLasso(0.02)],
    )
    penalty = sparsifier.penalty()
    assert torch.allclose(penalty, 0.02 * group_norms(model).sum())
    penalty.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    train(model, optimizer, sparsifier, 2)


def test_in_the_loss_it_is_the_same_and_not_added_twice() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    ours, theirs = plain(model), plain(twin)
    options: dict[str, Any] = {"schedule": NEVER, "weights": WEIGHTS, "regularisers": [L1(0.01)]}
    first = Sparsifier(model, ours, **options)
    second = Sparsifier(twin, theirs, penalties="loss", **options)
    train(model, ours, first, 3)
    for step in range(3):
        x, y = batch(step, twin)
        theirs.zero_grad()
        (F.cross_entropy(twin(x), y) + second.penalty()).backward()
        theirs.step()
        second.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_proximal_steps() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    ours, theirs = plain(model, 0.2), plain(twin, 0.2)
    sparsifier = Sparsifier(
        model, ours, schedule=NEVER, weights=WEIGHTS, regularisers=[L1(0.3, proximal=True)]
    )
    train(model, ours, sparsifier, 1)
    train(twin, theirs, None, 1)
    for n, p in twin.named_parameters():
        want = torch.nn.functional.softshrink(p, 0.2 * 0.3) if n in WEIGHTS else p
        assert torch.allclose(model.get_parameter(n), want, rtol=1e-12)
    assert (model[0].weight == 0).any()


def test_proximal_group_steps_scale_positions() -> None:
    model, twin = residual(torch.float64, norms=False), residual(torch.float64, norms=False)
    ours, theirs = plain(model), plain(twin)
    strength = 3.0
    sparsifier = Sparsifier(
        model,
        ours,
        schedule=NEVER,
        pattern="channels",
        example_inputs=IMAGES,
        regularisers=[GroupLasso(strength, proximal=True)],
        exclude=["stem", "conv2.bias"],
    )
    assert set(sparsifier.groups) == {"conv1.weight[0]"}
    train(model, ours, sparsifier, 1)
    train(twin, theirs, None, 1)
    norms = group_norms(twin)[8:]
    factors = (1 - 0.1 * strength / norms).clamp_min(0)
    assert torch.allclose(group_norms(model)[8:], norms * factors, rtol=1e-10)
    assert torch.allclose(model.conv1.weight, twin.conv1.weight * factors[:, None, None, None], rtol=1e-10)
    assert torch.equal(model.stem.weight, twin.stem.weight)


def test_growing_decay_of_what_is_to_go() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    ours, theirs = plain(model), plain(twin)
    growing = Growing(delta=0.1, every=2, ceiling=0.25, start=1)
    sparsifier = Sparsifier(
        model, ours, schedule=OneShot(sparsity=0.5, start=8), weights=WEIGHTS, regularisers=[growing]
    )
    candidates: dict[str, Tensor] = {}
    for step in range(7):
        if step == 1:
            for n in WEIGHTS:
                p = twin.get_parameter(n).detach().abs()
                candidates[n] = p < p.flatten().sort().values[p.numel() // 2]
        train(model, ours, sparsifier, 1, first=step)
        x, y = batch(step, twin)
        theirs.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        factor = [0, 0.1, 0.1, 0.2, 0.2, 0.25, 0.25][step]
        with torch.no_grad():
            for n, chosen in candidates.items():
                p = twin.get_parameter(n)
                assert p.grad is not None
                p.grad += factor * p * chosen
        theirs.step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-10)
    assert [growing.factor(t) for t in (0, 1, 2, 3, 5, 9)] == pytest.approx([0, 0.1, 0.1, 0.2, 0.25, 0.25])


def test_growing_positions_shrink_until_they_are_cut() -> None:
    model = residual(torch.float64)
    optimizer = plain(model)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=OneShot(sparsity=0.5, start=40),
        pattern="channels",
        example_inputs=IMAGES,
        regularisers=[Growing(delta=0.05, every=2, ceiling=1.0)],
    )
    train(model, optimizer, sparsifier, 39)
    stored = sparsifier.state_dict()
    stays = stored["candidate.conv1.weight"].flatten(1).any(1)
    norms = model.conv1.weight.detach().flatten(1).norm(dim=1)
    assert int(stays.sum()) == 6
    assert norms[~stays].max() < 0.3 * norms[stays].min()
    train(model, optimizer, sparsifier, 1, first=39)
    assert sparsifier.groups["conv1.weight[0]"].tolist() == stays.tolist()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: L1(0), "positive"),
        (lambda: GroupLasso(-1), "positive"),
        (lambda: Growing(delta=2, ceiling=1), "delta <= ceiling"),
    ],
)
def test_bad_options(make: Any, match: str) -> None:
    with pytest.raises(InvalidOption, match=match):
        make()


def test_group_lasso_needs_groups_and_one_learning_rate() -> None:
    model = mlp()
    with pytest.raises(InvalidOption, match="give example_inputs"):
        Sparsifier(model, plain(model), schedule=NEVER, weights=WEIGHTS, regularisers=[GroupLasso()])
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2:].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=Constant(sparsity=0.5, start=9, end=9),
        example_inputs=(torch.randn(2, 8),),
        regularisers=[GroupLasso(proximal=True)],
    )
    with pytest.raises(InvalidOption, match="learning rates"):
        train(model, optimizer, sparsifier, 1)

"""Rewinding: lottery tickets are the weights of an early step under later masks."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsecc.errors import InvalidOption
from sparsecc.train import SRSTE, Constant, Iterative, OneShot, Sparsifier
from tests.train_nets import OPTIMIZERS, mlp, residual, train

WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def test_weight_rewinding() -> None:
    model = residual()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=OneShot(sparsity=0.5, start=8),
        example_inputs=(torch.randn(2, 3, 6, 6),),
    )
    train(model, optimizer, sparsifier, 3, after=lambda _: scheduler.step())
    sparsifier.snapshot(scheduler)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    rate = optimizer.param_groups[0]["lr"]
    train(model, optimizer, sparsifier, 5, first=3, after=lambda _: scheduler.step())
    masks = sparsifier.masks
    assert sparsifier.sparsity > 0.4
    sparsifier.rewind(scheduler=scheduler)
    assert all(torch.equal(m, sparsifier.masks[n]) for n, m in masks.items())
    for n, tensor in model.state_dict().items():
        want = torch.where(masks[n], weights[n], 0) if n in masks else weights[n]
        assert torch.equal(tensor, want), n
    assert optimizer.param_groups[0]["lr"] == rate
    assert scheduler.last_epoch == 3
    named = dict(model.named_parameters())
    for i, (n, p) in enumerate(named.items()):
        want = state["state"][i]["exp_avg"]
        want = torch.where(masks[n], want, 0) if n in masks else want
        assert torch.equal(optimizer.state[p]["exp_avg"], want)
        assert optimizer.state[p]["step"] == 3
    again = train(model, optimizer, sparsifier, 3, first=3)
    sparsifier.rewind()
    assert again == train(model, optimizer, sparsifier, 3, first=3), "buffers are rewound, too"


def test_learning_rate_rewinding_keeps_weights() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5, start=4), weights=WEIGHTS)
    sparsifier.snapshot(scheduler)
    train(model, optimizer, sparsifier, 4, after=lambda _: scheduler.step())
    before = copy.deepcopy(model.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 16)
    sparsifier.rewind("learning_rate", scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_iterative_magnitude_pruning_with_rewinding() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = Iterative(sparsity=0.875, start=4, end=12, every=4)
    sparsifier = Sparsifier(model, optimizer, schedule=schedule, weights=WEIGHTS)
    sparsifier.snapshot()
    first = {n: model.get_parameter(n).detach().clone() for n in WEIGHTS}
    shares = []
    for step in range(13):
        train(model, optimizer, None, 1, first=step)
        if sparsifier.step():
            sparsifier.rewind()
            shares.append(sparsifier.sparsity)
            for n in WEIGHTS:
                assert torch.equal(model.get_parameter(n), first[n] * sparsifier.masks[n])
    assert shares == pytest.approx([0.5, 0.75, 0.875], abs=0.01)


def test_latent_weights_are_rewound() -> None:
    model = mlp(torch.float64)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=Constant(sparsity=0.5, end=99),
        method=SRSTE(),
        pattern="2:4",
        weights=WEIGHTS,
    )
    train(model, optimizer, sparsifier, 2)
    sparsifier.snapshot()
    stored = sparsifier.state_dict()
    train(model, optimizer, sparsifier, 3, first=2)
    sparsifier.rewind()
    for n in WEIGHTS:
        assert torch.equal(sparsifier.state_dict()[f"latent.{n}"], stored[f"latent.{n}"])


def test_what_is_refused() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)
    with pytest.raises(InvalidOption, match="call snapshot"):
        sparsifier.rewind()
    sparsifier.snapshot()
    with pytest.raises(InvalidOption, match="holds no scheduler"):
        sparsifier.rewind(scheduler=scheduler)
    with pytest.raises(InvalidOption, match="learning_rate"):
        sparsifier.rewind("rates")  # type: ignore[arg-type]

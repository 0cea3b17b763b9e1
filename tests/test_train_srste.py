"""SR-STE against autograd of its formula: W <- W - lr (dL/dW' + decay (1 - mask) W), W' = mask W."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM as Ratio
from sparsecc.train import NM, SRSTE, Constant, Sparsifier
from tests.train_nets import OPTIMIZERS, batch, mlp, train

WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def masked(weight: Tensor) -> Tensor:
    """The two largest of every four, straight through: the gradient of the result is that of the weight."""
    groups = weight.detach().abs().reshape(-1, 4)
    ranks = groups.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    mask = (ranks < 2).reshape(weight.shape)
    return weight + (weight * mask - weight).detach()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_it_is_the_formula(name: str, decay: float) -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    ours, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    sparsifier = Sparsifier(
        model,
        ours,
        schedule=Constant(sparsity=0.5, end=50),
        method=SRSTE(decay=decay),
        pattern=NM("2:4"),
        weights=WEIGHTS,
    )
    changed = 0
    for step in range(25):
        before = sparsifier.masks
        train(model, ours, sparsifier, 1, first=step)
        x, y = batch(step, twin)
        theirs.zero_grad()
        named = dict(twin.named_parameters())
        sparse = {n: masked(p) if n in WEIGHTS else p for n, p in named.items()}
        F.cross_entropy(functional_call(twin, sparse, (x,)), y).backward()
        with torch.no_grad():
            for n in WEIGHTS:
                gradient = named[n].grad
                assert gradient is not None
                gradient += decay * (named[n] - masked(named[n]))
        theirs.step()
        for n, p in twin.named_parameters():
            want = masked(p) if n in WEIGHTS else p
            assert torch.allclose(model.get_parameter(n), want, rtol=1e-12, atol=1e-15)
            assert not torch.isnan(p).any()
        changed += any(not torch.equal(before[n], sparsifier.masks[n]) for n in WEIGHTS)
    assert changed > 2, "masks move"


def test_the_model_always_has_the_pattern() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=Constant(sparsity=0.5, end=20),
        method=SRSTE(),
        pattern="2:4",
        example_inputs=(torch.randn(2, 8),),
    )

    def check(step: int) -> None:
        for n in WEIGHTS:
            assert Ratio(2, 4).holds(np.asarray(model.state_dict()[n]), 1)

    check(0)
    train(model, optimizer, sparsifier, 8, after=check)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(torch.randn(2, 8)).float()).all()
    assert torch.export.export(model, (torch.randn(2, 8),)).state_dict.keys() == model.state_dict().keys()
    before = model.state_dict()["2.weight"].clone()
    sparsifier.finish()
    check(9)
    assert torch.equal(model.state_dict()["2.weight"], before)
    assert not optimizer._optimizer_step_pre_hooks


def test_without_updates_the_mask_is_frozen() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=Constant(sparsity=0.5, end=5),
        method=SRSTE(),
        pattern="2:4",
        weights=WEIGHTS,
    )
    train(model, optimizer, sparsifier, 5)
    masks = sparsifier.masks
    train(model, optimizer, sparsifier, 5, first=5)
    assert all(torch.equal(m, sparsifier.masks[n]) for n, m in masks.items())


def test_bad_options() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(InvalidOption, match="N:M"):
        Sparsifier(model, optimizer, schedule=Constant(sparsity=0.5), method=SRSTE(), weights=WEIGHTS)
    with pytest.raises(InvalidOption, match="decay"):
        SRSTE(decay=-1)

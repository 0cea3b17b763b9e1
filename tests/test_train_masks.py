"""Masks in an ordinary loop, against masks that are computed here by sorting weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecc
from sparsecc.densities import erk
from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM as Ratio
from sparsecc.train import (
    L1,
    NM,
    Constant,
    Cubic,
    Iterative,
    OneShot,
    Sparsifier,
    Unstructured,
)
from sparsecc.train.choosing import top
from tests.train_nets import OPTIMIZERS, batch, mlp, residual, train

EXAMPLE = (torch.randn(2, 8),)
WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def by_hand(weight: Tensor, live: Tensor, sparsity: float) -> Tensor:
    """The smallest magnitudes go, what is gone already first; of equal ones the last."""
    values = torch.where(live, weight.abs(), torch.tensor(-1.0)).flatten().tolist()
    gone = sorted(range(len(values)), key=lambda i: (values[i], -i))[: int(len(values) * sparsity + 1e-9)]
    mask = torch.ones(len(values), dtype=torch.bool)
    mask[gone] = False
    return mask.reshape(weight.shape)


def test_the_worked_example() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = Cubic(sparsity=0.75, end=20, every=5)
    sparsifier = Sparsifier(model, optimizer, schedule=schedule, example_inputs=EXAMPLE)
    assert [s.name for s in sparsifier.sites] == WEIGHTS
    losses = train(model, optimizer, sparsifier, 25)
    assert sparsifier.finish() is model
    assert sparsifier.sparsity == pytest.approx(0.75)
    assert all(np.isfinite(losses))
    assert (model[0].weight == 0).float().mean() == 0.75


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_masked_weights_and_their_state_are_exactly_zero(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = Cubic(sparsity=0.8, start=2, end=12, every=2)
    sparsifier = Sparsifier(model, optimizer, schedule=schedule, example_inputs=EXAMPLE)

    def check(step: int) -> None:
        for site in sparsifier.sites:
            gone = ~sparsifier.masks[site.name]
            assert (site.parameter[gone] == 0).all()
            for value in optimizer.state[site.parameter].values():
                if isinstance(value, Tensor) and value.shape == site.shape:
                    assert (value[gone] == 0).all()
            assert not torch.signbit(site.parameter[gone]).any()

    train(model, optimizer, sparsifier, 16, after=check)
    assert all((p != 0).all() for n, p in model.named_parameters() if n.endswith("bias"))


def test_uniform_masks_are_those_computed_by_hand_at_every_step() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, twin)]
    schedule = Iterative(sparsity=0.9, start=1, end=9, every=4)
    sparsifier = Sparsifier(model, optimizers[0], schedule=schedule, example_inputs=EXAMPLE)
    named = {n: p for n, p in twin.named_parameters() if n in WEIGHTS}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in named.items()}
    for step in range(12):
        train(model, optimizers[0], sparsifier, 1, first=step)
        x, y = batch(step, twin)
        optimizers[1].zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizers[1].step()
        with torch.no_grad():
            for n, p in named.items():
                p.mul_(masks[n])
                if step + 1 in (1, 5, 9):
                    share = 1 - 0.1 ** ({1: 1, 5: 2, 9: 3}[step + 1] / 3)
                    masks[n] = by_hand(p, masks[n], share)
                p.mul_(masks[n])
                optimizers[1].state[p]["momentum_buffer"].mul_(masks[n])
        for n, p in named.items():
            assert torch.equal(sparsifier.masks[n], masks[n])
            assert torch.equal(model.get_parameter(n), p), "a mask comes after the momentum's step"


def test_without_momentum_it_is_training_with_masked_gradients() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(
        model, optimizer, schedule=OneShot(sparsity=0.5), example_inputs=EXAMPLE, pattern="erk"
    )
    twin.load_state_dict(model.state_dict())
    masks = sparsifier.masks
    for step in range(5):
        train(model, optimizer, sparsifier, 1, first=step)
        x, y = batch(step, twin)
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for n, p in twin.named_parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad * masks.get(n, torch.ones_like(p))
        for n, p in twin.named_parameters():
            assert torch.allclose(p, model.get_parameter(n), rtol=1e-13, atol=0)


def test_global_ranking_with_ties() -> None:
    model = mlp()
    with torch.no_grad():
        for n in WEIGHTS:
            p = model.get_parameter(n)
            p.copy_((p.abs() * 20).round() / 20)  # nearly everything is tied
    values = torch.cat([model.get_parameter(n).abs().flatten() for n in WEIGHTS])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for sparsity in (0.1, 0.37, 0.5, 0.8):
        copy = mlp()
        copy.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
        sparsifier = Sparsifier(
            copy, optimizer, schedule=OneShot(sparsity=sparsity), pattern="global", weights=WEIGHTS
        )
        kept = torch.cat([m.flatten() for m in sparsifier.masks.values()])
        gone = int(len(values) * sparsity + 1e-9)
        assert int((~kept).sum()) == gone, "exactly the share, ties or not"
        assert values[kept].min() >= values[~kept].max()
        tied = kept[values == values[~kept].max()]
        assert tied.tolist() == sorted(tied.tolist(), reverse=True), "the first ones stay"


def test_no_layer_dies_in_a_global_ranking() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(
        model, optimizer, schedule=OneShot(sparsity=0.9), pattern="global", example_inputs=EXAMPLE
    )
    assert [int(m.sum()) for m in sparsifier.masks.values()][1] == 1


def test_top_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40):
        for count in range(size + 1):
            scores = torch.randint(0, 4, (size,), generator=generator).float()
            mask = top(scores, count)
            order = sorted(range(size), key=lambda i: (-float(scores[i]), i))[:count]
            assert sorted(order) == mask.nonzero().flatten().tolist()


def test_erk_gives_each_layer_its_density() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=OneShot(sparsity=0.7),
        pattern="erk",
        example_inputs=(torch.randn(2, 3, 6, 6),),
    )
    want = erk({s.name: s.shape for s in sparsifier.sites}, 0.3)
    for name, mask in sparsifier.masks.items():
        assert abs(int(mask.sum()) - want[name] * mask.numel()) <= 1
    assert sparsifier.sparsity == pytest.approx(0.7, abs=0.005)


# -- N:M -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("2:8", 0.75)])
def test_nm_masks_keep_the_largest_of_every_group(pattern: str, sparsity: float) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = [model[i].weight.detach().abs().clone() for i in (0, 2)]
    sparsifier = Sparsifier(
        model, optimizer, schedule=OneShot(sparsity=sparsity), pattern=pattern, example_inputs=EXAMPLE_64
    )
    n, m = map(int, pattern.split(":"))
    for weight, mask in zip(before, sparsifier.masks.values(), strict=True):
        for values, kept in zip(weight.reshape(-1, m), mask.reshape(-1, m), strict=True):
            assert sorted(values[kept].tolist()) == sorted(values.tolist())[-n:]
    train(model, optimizer, sparsifier, 5)
    sparsifier.finish()
    for i in (0, 2):
        assert Ratio(n, m).holds(model[i].weight.detach().numpy(), 1)
    if pattern == "2:4":
        result = sparsecc.prune(model, EXAMPLE_64, recipe="NMPattern()", verify=False)
        assert [p.state for p in result.plan.patterns] == ["there", "there"]


EXAMPLE_64 = (torch.randn(2, 8, dtype=torch.float64),)


def test_a_gradual_schedule_goes_through_the_patterns_between() -> None:
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Cubic(sparsity=0.75, end=12, every=1)
    sparsifier = Sparsifier(model, optimizer, schedule=schedule, pattern="2:8", weights=["weight"])
    counts = []
    for step in range(13):
        kept = sparsifier.masks["weight"].reshape(-1, 8).sum(1)
        assert kept.min() == kept.max() == max(2, 8 - int(8 * schedule.at(step) + 1e-9))
        counts.append(int(kept[0]))
        optimizer.zero_grad()
        model(torch.randn(3, 16)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    assert counts[0] == 8
    assert counts[-1] == 2
    assert counts == sorted(counts, reverse=True)


def test_convolutions_are_patterned_along_input_channels() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=OneShot(sparsity=0.5),
        pattern="2:4",
        example_inputs=(torch.randn(2, 3, 6, 6),),
        exclude=["stem"],
    )
    assert {s.where: s.reason for s in sparsifier.skips} == {"stem.weight": "excluded"}
    for mask in (sparsifier.masks["conv1.weight"], sparsifier.masks["conv2.weight"]):
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


# -- loops ---------------------------------------------------------------------------------------------


def test_gradient_accumulation() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    runs = []
    for net, every_micro_batch in ((model, True), (twin, False)):
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        schedule = Cubic(sparsity=0.8, start=1, end=4)
        sparsifier = Sparsifier(net, optimizer, schedule=schedule, example_inputs=EXAMPLE_64)
        for step in range(12):
            x, y = batch(step, net)
            F.cross_entropy(net(x), y).backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            if every_micro_batch or step % 3 == 2:
                sparsifier.step()
        runs.append(sparsifier)
    assert [s.count for s in runs] == [4, 4], "what counts are the optimizer's steps"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_autocast_to_bfloat16() -> None:
    model = residual()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = Cubic(sparsity=0.75, end=8, every=2)
    sparsifier = Sparsifier(
        model, optimizer, schedule=schedule, pattern="global", example_inputs=(torch.randn(2, 3, 6, 6),)
    )
    for step in range(10):
        x, y = batch(step, model)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        sparsifier.step()
        for site in sparsifier.sites:
            assert (site.parameter[~sparsifier.masks[site.name]] == 0).all()
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)
    assert model.conv1.weight.dtype == torch.float32


def test_models_in_bfloat16() -> None:
    model = mlp(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for pattern in ("unstructured", "2:4"):
        sparsifier = Sparsifier(
            model, optimizer, schedule=OneShot(sparsity=0.5), pattern=pattern, weights=WEIGHTS
        )
        train(model, optimizer, sparsifier, 3)
        assert sparsifier.sparsity == 0.5
        sparsifier.close()


def test_gradient_scalers() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, schedule=Cubic(sparsity=0.5, end=2), weights=WEIGHTS)
    scaler = torch.amp.GradScaler("cpu")
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        x, y = batch(step, model)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.unscale_(optimizer)
        sparsifier.before_step()
        for n in WEIGHTS:
            gradient = model.get_parameter(n).grad
            assert gradient is not None
            assert (gradient[~sparsifier.masks[n]] == 0).all()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()
        assert sparsifier.count == [1, 1, 2][step], "a step that the scaler leaves out does not count"
    assert sparsifier.sparsity == 0.5
    sparsifier.close()
    fused = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    sparsifier = Sparsifier(
        model, fused, schedule=OneShot(sparsity=0.5), weights=WEIGHTS, regularisers=[L1(0.1)]
    )
    for unscaled in (True, False):
        x, y = batch(0, model)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if unscaled:
            scaler.unscale_(fused)
            scaler.step(fused)
            assert sparsifier.step() is False
            assert sparsifier.count == 1
            scaler.update()
        else:
            with pytest.raises(InvalidOption, match="unscale_"):
                scaler.step(fused)


def test_gradient_clipping_sees_masked_gradients() -> None:
    model = mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)
    x, y = batch(0, model)
    F.cross_entropy(model(x), y).backward()
    sparsifier.before_step()
    for name, mask in sparsifier.masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].abs().sum() > 0


def test_closures() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    schedule = Cubic(sparsity=0.8, end=5)
    ours = Sparsifier(model, first, schedule=schedule, weights=WEIGHTS)
    theirs = Sparsifier(twin, second, schedule=schedule, weights=WEIGHTS)
    train(twin, second, theirs, 6)
    for step in range(6):

        def closure(step: int = step) -> Tensor:
            x, y = batch(step, model)
            first.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ours.before_step()
            return loss

        first.step(closure)
        ours.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    first.step(lambda: model(batch(0, model)[0]).sum())
    with pytest.raises(InvalidOption, match="at the end of it"):
        ours.step()


def test_optimizers_that_move_weights_without_gradients() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(torch.randn_like(p), alpha=0.1)

    model = mlp()
    optimizer = Noisy(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)

    def check(step: int) -> None:
        for n in WEIGHTS:
            assert (model.get_parameter(n)[~sparsifier.masks[n]] == 0).all()

    train(model, optimizer, sparsifier, 4, after=check)


def test_a_forgotten_step_is_told() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)
    x, y = batch(0, model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(InvalidOption, match="call the latter first"):
        sparsifier.state_dict()
    with pytest.raises(InvalidOption, match="after every"):
        optimizer.step()
    sparsifier.close()
    optimizer.step()


def test_frozen_weights_stay_masked_and_other_optimizers_are_refused() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)
    train(model, optimizer, sparsifier, 2)
    assert (model[0].weight == 0).float().mean() == 0.5
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(InvalidOption, match=r"does not hold 4\.weight"):
        Sparsifier(model, other, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)


def test_random_and_own_saliency() -> None:
    for saliency, lowest in (("random", None), (lambda name, w: -w.abs(), True)):
        model = mlp()
        weight = model[0].weight.detach().abs().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(
            model,
            optimizer,
            schedule=OneShot(sparsity=0.5),
            weights=["0.weight"],
            saliency=saliency,  # type: ignore[arg-type]
        )
        mask = sparsifier.masks["0.weight"]
        assert int(mask.sum()) == 64
        if lowest:
            assert weight[mask].max() <= weight[~mask].min()
    with pytest.raises(InvalidOption, match="shape"):
        Sparsifier(
            model,
            optimizer,
            schedule=OneShot(sparsity=0.5),
            weights=["0.weight"],
            saliency=lambda name, w: w.sum(0),
        )


@pytest.mark.parametrize("pattern", ["unstructured", "global", "2:8"])
@pytest.mark.parametrize("saliency", ["random", "movement", lambda name, w: -w.abs()])
def test_what_is_gone_stays_gone(pattern: str, saliency: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = Cubic(sparsity=0.75, end=12, every=2)
    names = ["0.weight", "2.weight"]
    sparsifier = Sparsifier(
        model, optimizer, schedule=schedule, weights=names, pattern=pattern, saliency=saliency
    )
    for step in range(12):
        before = sparsifier.masks
        train(model, optimizer, sparsifier, 1, first=step)
        assert all((before[n] | ~sparsifier.masks[n]).all() for n in names)
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)


def test_the_graph_knows_the_axis_of_layers_that_are_not_standard() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel

    model = Turned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"schedule": OneShot(sparsity=0.5), "pattern": "2:4", "weights": ["kernel"]}
    with pytest.raises(InvalidOption, match="not known without a graph"):
        Sparsifier(model, optimizer, **options)
    sparsifier = Sparsifier(model, optimizer, example_inputs=EXAMPLE, **options)
    assert (sparsifier.masks["kernel"].T.reshape(-1, 4).sum(1) == 2).all()


def test_movement_adds_minus_weight_times_gradient() -> None:
    model, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(
        model, optimizer, schedule=OneShot(sparsity=0.4, start=5), weights=WEIGHTS, saliency="movement"
    )
    totals = {n: torch.zeros_like(twin.get_parameter(n), dtype=torch.float32) for n in WEIGHTS}
    for step in range(5):
        twin.load_state_dict(model.state_dict())
        x, y = batch(step, twin)
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for n in WEIGHTS:
            p = twin.get_parameter(n)
            assert p.grad is not None
            totals[n] += -(p.detach().float() * p.grad.float())
        train(model, optimizer, sparsifier, 1, first=step)
    for n in WEIGHTS:
        mask, total = sparsifier.masks[n], totals[n]
        assert int((~mask).sum()) == int(mask.numel() * 0.4)
        assert total[mask].min() >= total[~mask].max(), "the lowest scores go, not the smallest"
        assert (total[mask] < 0).any() or (total[~mask] < 0).all()


def test_weights_of_the_graph_that_cannot_have_a_pattern_are_left_alone() -> None:
    """The first of these convolutions sums over one channel; a name that was given is an error instead."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"schedule": Constant(sparsity=0.5), "pattern": "2:4"}
    sparsifier = Sparsifier(model, optimizer, example_inputs=(torch.randn(2, 1, 6, 6),), **options)
    assert [s.where for s in sparsifier.skips] == ["0.weight"]
    assert "no multiple of 4" in sparsifier.skips[0].reason
    assert list(sparsifier.masks) == ["2.weight"]


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "which weights"),
        ({"weights": ["0.wieght"]}, r"did you mean '0\.weight'"),
        ({"weights": "0.weight"}, "give a list"),
        ({"weights": []}, "no weight can be made sparse"),
        ({"weights": ["0.weight"], "exclude": ["2"]}, "without include and exclude"),
        ({"weights": ["0.weight"], "pattern": "channels"}, "not for structured"),
        ({"example_inputs": EXAMPLE, "pattern": "3-4"}, "N:M"),
        ({"example_inputs": EXAMPLE, "pattern": "1:4"}, r"sparsity=0\.75"),
        ({"weights": ["0.bias"], "pattern": "2:4"}, "not known without a graph"),
        ({"weights": ["0.weight"], "pattern": NM("3:6")}, "no multiple of 6"),
        ({"example_inputs": EXAMPLE, "exclude": ["nothing"]}, "no parameter of the model matches"),
        ({"example_inputs": EXAMPLE, "saliency": "taylor"}, "magnitude, movement"),
        ({"example_inputs": EXAMPLE, "penalties": "both"}, "gradient"),
        ({"weights": ["0.weight"], "regularisers": ["l1"]}, "is none"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidOption, match=match):
        Sparsifier(model, optimizer, schedule=Constant(sparsity=0.5), **options)
    assert not optimizer._optimizer_step_pre_hooks, "nothing is left behind"


def test_optimizers_that_cannot_be_masked() -> None:
    model = mlp()
    for optimizer, match in ((torch.optim.LBFGS(model.parameters()), "LBFGS"), (3, "torch.optim")):
        with pytest.raises(InvalidOption, match=match):
            Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=WEIGHTS)
    with pytest.raises(InvalidOption, match="allocation"):
        Unstructured("lamp")


def test_training_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, sparsecc; assert not any(m.startswith('sparsecc.train') for m in sys.modules); "
        "assert sparsecc.train.Cubic; assert 'sparsecc.train.sparsifier' not in sys.modules; "
        "assert 'Sparsifier' in dir(sparsecc.train)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        sparsecc.train.nothing  # noqa: B018

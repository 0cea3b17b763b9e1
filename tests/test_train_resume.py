"""Checkpoints: going on from one is bit by bit what would have come without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.train import (
    L1,
    SET,
    SRSTE,
    Constant,
    Cubic,
    Growing,
    OneShot,
    RigL,
    Sparsifier,
    Structured,
)
from tests.train_nets import OPTIMIZERS, mlp, residual, train

WEIGHTS = ["0.weight", "2.weight", "4.weight"]
GRADUAL = Cubic(sparsity=0.8, end=14, every=3)
CASES: dict[str, dict[str, Any]] = {
    "gradual": {"schedule": GRADUAL, "weights": WEIGHTS},
    "global": {"schedule": GRADUAL, "weights": WEIGHTS, "pattern": "global", "regularisers": [L1(1e-3)]},
    "random": {"schedule": GRADUAL, "weights": WEIGHTS, "saliency": "random", "seed": 4},
    "movement": {"schedule": GRADUAL, "weights": WEIGHTS, "saliency": "movement"},
    "set": {"schedule": Constant(sparsity=0.7, end=16, every=3), "weights": WEIGHTS, "method": SET()},
    "rigl": {"schedule": Constant(sparsity=0.7, end=16, every=4), "weights": WEIGHTS, "method": RigL()},
    "srste": {
        "schedule": Constant(sparsity=0.5, end=99),
        "weights": WEIGHTS,
        "method": SRSTE(),
        "pattern": "2:4",
    },
    "growing": {
        "schedule": OneShot(sparsity=0.5, start=15),
        "weights": WEIGHTS,
        "regularisers": [Growing(delta=0.1, every=3)],
    },
    "channels": {
        "schedule": Cubic(sparsity=0.5, end=14, every=3),
        "pattern": Structured(allocation="global"),
        "example_inputs": (torch.randn(2, 8),),
    },
}


def start(case: str, name: str, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    return model, optimizer, Sparsifier(model, optimizer, **{**CASES[case], **more})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("order", ["sparsifier last", "sparsifier first", "state="])
@pytest.mark.parametrize("case", sorted(CASES))
def test_two_halves_are_the_whole(case: str, order: str, tmp_path: Path) -> None:
    name = "adamw" if case in ("rigl", "channels", "gradual") else "sgd"
    model, optimizer, sparsifier = start(case, name)
    whole = train(model, optimizer, sparsifier, 20)
    first, first_optimizer, half = start(case, name)
    losses = train(first, first_optimizer, half, 10)
    torch.save({"model": first.state_dict(), "optimizer": first_optimizer.state_dict()}, tmp_path / "m.pt")
    save_file(half.state_dict(), tmp_path / "s.safetensors")
    torch.save(half.state_dict(), tmp_path / "s.pt")
    state = load_file(tmp_path / "s.safetensors")
    assert same(state, torch.load(tmp_path / "s.pt", weights_only=True))
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    if order == "state=":
        fresh = mlp(seed=9)
        fresh.load_state_dict(saved["model"])
        fresh_optimizer = OPTIMIZERS[name](fresh.parameters())
        fresh_optimizer.load_state_dict(saved["optimizer"])
        again = Sparsifier(fresh, fresh_optimizer, **{**CASES[case], "state": state})
    else:
        fresh = mlp(seed=9)
        fresh_optimizer = OPTIMIZERS[name](fresh.parameters())
        again = Sparsifier(fresh, fresh_optimizer, **{**CASES[case], "seed": 77})
        if order == "sparsifier first":
            again.load_state_dict(state)
        fresh.load_state_dict(saved["model"])
        fresh_optimizer.load_state_dict(saved["optimizer"])
        if order == "sparsifier last":
            again.load_state_dict(state)
    assert again.count == 10
    assert same(again.masks, half.masks)
    losses += train(fresh, fresh_optimizer, again, 10, first=10)
    assert losses == whole
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(again.state_dict(), sparsifier.state_dict())


def test_a_snapshot_is_part_of_the_state(tmp_path: Path) -> None:
    model = residual()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    options: dict[str, Any] = {
        "schedule": OneShot(sparsity=0.5, start=4),
        "example_inputs": (torch.randn(2, 3, 6, 6),),
    }
    sparsifier = Sparsifier(model, optimizer, **options)
    train(model, optimizer, sparsifier, 2, after=lambda _: scheduler.step())
    sparsifier.snapshot(scheduler)
    train(model, optimizer, sparsifier, 3, first=2, after=lambda _: scheduler.step())
    save_file(sparsifier.state_dict(), tmp_path / "s.safetensors")
    other = residual(seed=3)
    other_optimizer = OPTIMIZERS["adamw"](other.parameters())
    other_scheduler = torch.optim.lr_scheduler.ExponentialLR(other_optimizer, 0.9)
    again = Sparsifier(other, other_optimizer, state=load_file(tmp_path / "s.safetensors"), **options)
    sparsifier.rewind(scheduler=scheduler)
    again.rewind(scheduler=other_scheduler)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert scheduler.state_dict() == other_scheduler.state_dict()
    assert train(model, optimizer, sparsifier, 3) == train(other, other_optimizer, again, 3)


def test_a_fresh_process(tmp_path: Path) -> None:
    model, optimizer, sparsifier = start("rigl", "adamw")
    losses = train(model, optimizer, sparsifier, 9)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sparsifier": sparsifier.state_dict(),
    }
    torch.save(state, tmp_path / "all.pt")
    rest = train(model, optimizer, sparsifier, 6, first=9)
    code = (
        "import torch; from tests.train_nets import OPTIMIZERS, mlp, train\n"
        "from sparsecc.train import Constant, RigL, Sparsifier\n"
        "torch.set_num_threads(1)\n"
        f"state = torch.load({str(tmp_path / 'all.pt')!r}, weights_only=True)\n"
        "model = mlp(); optimizer = OPTIMIZERS['adamw'](model.parameters())\n"
        f"schedule, weights = {CASES['rigl']['schedule']!r}, {WEIGHTS!r}\n"
        "sparsifier = Sparsifier(model, optimizer, schedule=schedule, weights=weights, method=RigL())\n"
        "model.load_state_dict(state['model']); optimizer.load_state_dict(state['optimizer'])\n"
        "sparsifier.load_state_dict(state['sparsifier'])\n"
        "print(train(model, optimizer, sparsifier, 6, first=9))"
    )
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert out.stdout.strip() == str(rest)
    assert len(losses) == 9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": WEIGHTS[:2]}, r"mask of '4\.weight'"),
        ({"pattern": "global"}, "saved with pattern"),
        ({"method": SET()}, "saved with method"),
        ({"saliency": "random"}, "saved with saliency"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change: dict[str, Any], match: str) -> None:
    state = start("gradual", "sgd")[2].state_dict()
    model, optimizer, sparsifier = start("gradual", "sgd", **change)
    train(model, optimizer, sparsifier, 3)
    before, weights = sparsifier.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InvalidOption, match=match):
        sparsifier.load_state_dict(state)
    assert same(before, sparsifier.state_dict())
    assert same(weights, dict(model.state_dict()))
    with pytest.raises(InvalidModel, match="no state of a Sparsifier"):
        sparsifier.load_state_dict({})


def test_the_schedule_may_change() -> None:
    state = start("gradual", "sgd")[2].state_dict()
    model, optimizer, sparsifier = start("gradual", "sgd", schedule=Cubic(sparsity=0.9, end=30))
    sparsifier.load_state_dict(state)
    train(model, optimizer, sparsifier, 30)
    assert sparsifier.sparsity == pytest.approx(0.9, abs=0.01)

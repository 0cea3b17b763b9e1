"""What processes of the tests of distributed training run; results go to files, one a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import sparsecc
from sparsecc.train import SET, SRSTE, Constant, Cubic, RigL, Sparsifier, Structured
from tests.train_nets import OPTIMIZERS, batch, mlp

WEIGHTS = ["0.weight", "2.weight", "4.weight"]
EXAMPLE = (torch.randn(2, 8),)
STEPS = 10
REPLICATED = ("rigl", "set", "channels")
SHARDED = ("global", "rigl", "srste", "channels")
CASES: dict[str, dict[str, Any]] = {
    "global": {"schedule": Cubic(sparsity=0.8, end=9, every=3), "pattern": "global", "weights": WEIGHTS},
    "rigl": {"schedule": Constant(sparsity=0.7, end=12, every=3), "method": RigL(), "weights": WEIGHTS},
    "set": {"schedule": Constant(sparsity=0.7, end=12, every=3), "method": SET(), "weights": WEIGHTS},
    "srste": {
        "schedule": Constant(sparsity=0.5, end=99),
        "method": SRSTE(),
        "pattern": "2:4",
        "weights": WEIGHTS,
    },
    "channels": {
        "schedule": Cubic(sparsity=0.5, end=9, every=3),
        "pattern": Structured(),
        "example_inputs": EXAMPLE,
    },
}


def _steps(model: nn.Module, optimizer: Any, sparsifier: Sparsifier, rank: int, world: int) -> None:
    """Each process takes its part of a batch of twelve."""
    for step in range(STEPS):
        x, y = batch(step, mlp(torch.float64), 12)
        part = slice(rank * 12 // world, (rank + 1) * 12 // world)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        sparsifier.step()


def alone(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and masks of training in one process with the whole batch."""
    model = mlp(torch.float64)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, **_options(case))
    _steps(model, optimizer, sparsifier, 0, 1)
    return dict(model.state_dict()), sparsifier.masks


def _options(case: str) -> dict[str, Any]:
    options = dict(CASES[case])
    if "example_inputs" in options:
        options["example_inputs"] = (EXAMPLE[0].double(),)
    return options


def main(rank: int, folder: str, world: int) -> None:
    """A process: both ways to train together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    replicated(rank, folder, world)
    sharded(rank, folder, world)
    dist.destroy_process_group()


def replicated(rank: int, folder: str, world: int) -> None:
    """DistributedDataParallel."""
    for case in REPLICATED:
        model = mlp(torch.float64)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = OPTIMIZERS["sgd"](wrapped.parameters())
        options = {**_options(case), "seed": rank}  # random masks are those of the first process
        if case != "set":
            options["seed"] = 0
        sparsifier = Sparsifier(wrapped, optimizer, **options)
        _steps(wrapped, optimizer, sparsifier, rank, world)
        out = {"masks": sparsifier.masks, "weights": model.state_dict(), "state": sparsifier.state_dict()}
        torch.save(out, Path(folder) / f"replicated.{case}.{rank}.pt")


def sharded(rank: int, folder: str, world: int) -> None:
    """``fully_shard``, and a checkpoint that is loaded again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for case in SHARDED:
        model = mlp(torch.float64)
        options = _options(case)
        example = options.pop("example_inputs", None)
        if example is not None:
            options["analysis"] = sparsecc.analyze(model, example)
        fully_shard(model, mesh=mesh)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        sparsifier = Sparsifier(model, optimizer, **options)
        _steps(model, optimizer, sparsifier, rank, world)
        masks, state = sparsifier.masks, sparsifier.state_dict()
        for site in sparsifier.sites:
            local = site.parameter.to_local()  # type: ignore[attr-defined]
            assert local.numel() < masks[site.name].numel()
        if rank == 0:  # no process may have to wait for another one to print this
            assert f"sparsity {sparsifier.sparsity:.4f}" in repr(sparsifier)
        gone = sum(int((~m).sum()) for m in masks.values())
        assert abs(sparsifier.sparsity - gone / sum(m.numel() for m in masks.values())) < 1e-12
        again = mlp(torch.float64, seed=5)
        fully_shard(again, mesh=mesh)
        other = Sparsifier(again, OPTIMIZERS["sgd"](again.parameters()), state=state, **options)
        assert all(torch.equal(m, masks[n]) for n, m in other.masks.items())
        weights = {n: t.full_tensor() for n, t in model.state_dict().items()}
        out = {"masks": masks, "weights": weights, "state": state}
        torch.save(out, Path(folder) / f"sharded.{case}.{rank}.pt")

"""Two processes (gloo) against one with the whole batch: the same masks and weights on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

import sparsecc
from sparsecc.errors import InvalidOption
from sparsecc.train import L1, GroupLasso, OneShot, Sparsifier, slim
from tests import train_ranks
from tests.train_nets import mlp
from tests.train_ranks import REPLICATED, SHARDED, WEIGHTS, alone

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def test_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    processes.spawn(train_ranks.main, (str(tmp_path), 2), nprocs=2)  # type: ignore[no-untyped-call]
    kinds = {"replicated": REPLICATED, "sharded": SHARDED}
    for kind, case in [(k, case) for k, cases in kinds.items() for case in cases]:
        files = [tmp_path / f"{kind}.{case}.{rank}.pt" for rank in (0, 1)]
        first, second = (torch.load(file, weights_only=True) for file in files)
        weights, masks = alone(case)
        for n, mask in masks.items():
            assert torch.equal(first["masks"][n], second["masks"][n]), case
            assert torch.equal(first["masks"][n], mask), case
        for n, tensor in weights.items():
            assert torch.equal(first["weights"][n], second["weights"][n]), case
            assert torch.allclose(first["weights"][n], tensor, rtol=1e-9, atol=1e-12), case
            assert n not in masks or (first["weights"][n][~masks[n]] == 0).all()
        if kind == "sharded" or case != "set":  # the second process of the other draws other numbers
            for n, tensor in first["state"].items():
                assert torch.equal(tensor, second["state"][n]), n


@pytest.fixture
def sharded_model(tmp_path: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = mlp()
        yield fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_what_sharded_models_cannot_do_is_told(sharded_model: nn.Module) -> None:
    optimizer = torch.optim.SGD(sharded_model.parameters(), lr=0.1)
    options: dict[str, Any] = {"schedule": OneShot(sparsity=0.5)}
    with pytest.raises(InvalidOption, match="before fully_shard"):
        Sparsifier(sharded_model, optimizer, example_inputs=(torch.randn(2, 8),), **options)
    plain = mlp()
    analysis = sparsecc.analyze(plain, (torch.randn(2, 8),))
    with pytest.raises(InvalidOption, match="sharded"):
        Sparsifier(sharded_model, optimizer, analysis=analysis, regularisers=[GroupLasso()], **options)
    sparsifier = Sparsifier(sharded_model, optimizer, analysis=analysis, regularisers=[L1()], **options)
    for step in range(2):
        optimizer.zero_grad()
        sharded_model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        assert sparsifier.sparsity == 0.5, step
    sparsifier.snapshot()
    sparsifier.rewind()
    with pytest.raises(InvalidOption, match="snapshot of sharded"):
        sparsifier.state_dict()
    plan = sparsecc.prune(plain, (torch.randn(2, 8),), sparsity=0.5, verify=False).plan
    with pytest.raises(InvalidOption, match="shard"):
        slim(sharded_model, optimizer, plan)
    assert [s.name for s in sparsifier.sites] == WEIGHTS


def test_flat_parameters_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = FullyShardedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidOption, match="fully_shard"):
        Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=["module.0.weight"])

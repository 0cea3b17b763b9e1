"""What a caller gave is bit for bit what it was, whatever was done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sparsecc

RECIPES = (
    "SparseGPT(sparsity=0.5)",
    "SparseGPT(pattern='2:4')",
    "Wanda(sparsity=0.5)",
    "NMPattern(permute=True)",
    "ElementPruning(sparsity=0.5)",
    "ChannelPruning(sparsity=0.5); Reconstruction()",
    "ChannelPruning(sparsity=0.5); Distillation(epochs=1)",
    "ChannelPruning(sparsity=0.5, allocation='sensitivity'); BiasCorrection()",
)


class Stored(nn.Module):
    """Weights as ``x @ w`` has them, in a stack of one, and of one row and one column."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(8, 16))
        self.stack = nn.Parameter(torch.randn(1, 16, 12))
        self.row = nn.Linear(12, 1, bias=False)
        self.column = nn.Linear(1, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.addmm(torch.ones(16), x, self.turned).relu()
        y: torch.Tensor = self.column(self.row((x @ self.stack)[0].relu()))
        return y


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


@pytest.mark.parametrize("made", [Stored, linear])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_that_was_given_keeps_its_bits(made: Callable[[], nn.Module], recipe: str) -> None:
    torch.manual_seed(0)
    model: Any = made().eval()
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(9, 8),) for _ in range(3)]
    given = [batch[0].clone() for batch in batches]
    result = sparsecc.prune(model, batches[0], recipe=recipe, calibration=batches)
    assert result.certificate.status in ("VERIFIED", "VACUOUS")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(batch[0], old) for batch, old in zip(batches, given, strict=True))

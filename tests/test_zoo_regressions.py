"""What the zoo found, each as the smallest model that shows it."""

from __future__ import annotations

import torch
from torch import nn

import sparsecc


def pruned(model: nn.Module, *inputs: torch.Tensor) -> sparsecc.Pruned:
    """The verified result of pruning a half, with positions, norms and scales at random."""
    result = sparsecc.prune(model.eval(), inputs, sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    return result


class NegativeRange(nn.Module):
    """ALiBi counts distances from ``1 - length`` (MPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(1 - x.shape[1], 1).to(x.dtype)
        return self.second(self.first(x).relu()) * distance[:, None]


def test_a_range_with_a_negative_start() -> None:
    result = pruned(NegativeRange(), torch.randn(2, 5, 4))
    assert isinstance(result.model, NegativeRange)
    assert result.model.first.weight.shape == (4, 4)


class SpelledRepeat(nn.Module):
    """Groups of states repeated to heads, with the size of the result said in advance (Mamba-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        repeated = self.first(x).repeat_interleave(2, dim=1, output_size=16)
        return self.second(repeated.relu())


def test_a_repeat_that_spells_its_size() -> None:
    result = pruned(SpelledRepeat(), torch.randn(2, 4))
    assert result.model(torch.randn(3, 4)).shape == (3, 3)
    assert result.report.after["parameters"] < result.report.before["parameters"] / 1.5

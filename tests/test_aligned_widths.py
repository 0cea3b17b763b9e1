"""Widths that an operator takes only in multiples: grouped products in 16 bits want rows at 16 bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsecc
from sparsecc.errors import InvalidOption
from sparsecc.lowering import lower

DTYPE = torch.bfloat16


class Experts(nn.Module):
    """Rows that a router deals to four experts, by grouped products; gates beside values, or none."""

    def __init__(self, inner: int = 24, *, gated: bool = False, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gated = gated
        self.first = nn.Linear(8, width)
        self.router = nn.Linear(width, 4)
        self.up = nn.Parameter(torch.randn(4, width, inner * (1 + gated)) / 4)
        self.down = nn.Parameter(torch.randn(4, inner, width) / 4)
        self.last = nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        weight, chosen = torch.softmax(self.router(x), -1).max(-1)
        order = torch.argsort(chosen)
        ends = nn.functional.one_hot(chosen, 4).sum(0).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(x[order], self.up, offs=ends)
        if self.gated:
            gate, value = hidden.chunk(2, -1)
            hidden = torch.sigmoid(gate) * value
        found = torch._grouped_mm(torch.relu(hidden), self.down, offs=ends) * weight[order, None]
        return self.last(found[torch.argsort(order)] + x)


def kept(result: sparsecc.Pruned) -> dict[str, int]:
    return {line.group: line.kept for line in result.report.groups}


@given(
    share=st.floats(0.05, 0.95),
    gated=st.booleans(),
    multiple=st.sampled_from((1, 3, 16)),
    allocation=st.sampled_from(("uniform", "global", "isomorphic")),
)
def test_whatever_share_is_asked_the_result_runs(
    share: float, gated: bool, multiple: int, allocation: str
) -> None:
    model, x = Experts(48, gated=gated, width=32).to(DTYPE).eval(), torch.randn(16, 8, dtype=DTYPE)
    options = {"multiple_of": multiple, "allocation": allocation}
    result = sparsecc.prune(model, (x,), sparsity=share, **options)  # type: ignore[arg-type]
    assert result.certificate.status in ("VERIFIED", "VACUOUS")
    assert all(count % 8 == 0 for count in kept(result).values())
    result.model(x)


def test_the_most_salient_positions_stay() -> None:
    """What is rounded up to is by saliency, not by place."""
    model = Experts().to(DTYPE).eval()
    with torch.no_grad():
        model.up[:, :, :8] *= 0.01
        model.down[:, :8] *= 0.01
    result = sparsecc.prune(model, (torch.randn(16, 8, dtype=DTYPE),), sparsity=0.4)
    (decision,) = (d for d in result.plan.decisions if d.group == "up[2]")
    assert decision.kept.tolist() == list(range(8, 24))


@pytest.mark.parametrize(("dead", "left"), [(7, 24), (8, 16), (13, 16), (17, 8)])
def test_dead_positions_go_in_multiples(dead: int, left: int) -> None:
    model = Experts().to(DTYPE).eval()
    with torch.no_grad():
        model.down[:, :dead] = 0
    result = sparsecc.slim(model, (torch.randn(16, 8, dtype=DTYPE),))
    assert result.certificate.status == "VERIFIED"
    assert result.model.up.shape[-1] == left


def test_a_choice_by_hand_is_told() -> None:
    analysis = sparsecc.analyze(Experts().to(DTYPE).eval(), (torch.randn(16, 8, dtype=DTYPE),))
    (group,) = (g for g in analysis.groups if g.name == "up[2]")
    assert group.multiple == 8
    with pytest.raises(InvalidOption, match="has to be a multiple of 8 positions, and 20 would"):
        lower(analysis, {group.name: np.arange(24) >= 4})


def test_measured_shares_are_multiples() -> None:
    """What shares are found from is what widths may be: not rounded back to nothing."""
    model, x = Experts().to(DTYPE).eval(), torch.randn(16, 8, dtype=DTYPE)
    data = sparsecc.CalibrationData([(x,)], inputs=lambda batch: batch)
    found = sparsecc.sensitivity(model, (x,), calibration=data)
    assert {line.multiple for line in found.lines} == {8}
    assert found.shares(0.3)["up[2]"] == pytest.approx(1 / 3)
    result = sparsecc.prune(model, (x,), sparsity=0.3, allocation="sensitivity", calibration=data)
    assert kept(result)["up[2]"] == 16
    assert type(found).from_json(found.to_json()) == found

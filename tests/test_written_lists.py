"""Lists of positions that the code writes down: followed where they pick, left alone where they do more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsecc


class Listed(nn.Module):
    """Two layers of eight, and what a function makes of them and of a list."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.use = use
        self.a, self.b, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.use(self.a(x).relu(), self.b(x).tanh()))  # type: ignore[no-any-return]


def _both(a: Tensor, b: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 7, 6])
    return torch.cat([a[:, order], b[:, order]], 1)


def _data(a: Tensor, b: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 7, 6])
    return a[:, order] * order + b[:, :6]


def _negative_and_twice(a: Tensor, b: Tensor) -> Tensor:
    return a[:, [-1, 3, 3, 0, -8, 5]] + b[:, [0, 1, 2, 3, 4, 5]]


def _added_to(a: Tensor, b: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 4, 6])
    order += 1
    return a[:, order] + b[:, :6]


def _added_to_in_a_list(a: Tensor, b: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 4, 6])
    torch._foreach_add_([order], 1)
    return a[:, order] + b[:, :6]


def _written_by_out(a: Tensor, b: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 4, 6])
    torch.add(torch.tensor([7, 1, 3]), 0, out=order[:3])
    return a[:, order] + b[:, :6]


def _gathered(a: Tensor, b: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 4, 6])
    return a[:, order] + b.gather(1, order.expand(b.shape[0], -1))


CASES = {
    "both": (_both, 12),
    "data": (_data, 6),
    "negative and twice": (_negative_and_twice, 6),
    "added to": (_added_to, 6),
    "added to in a list": (_added_to_in_a_list, 6),
    "written by out": (_written_by_out, 6),
    "gathered": (_gathered, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_lists_pick_what_they_picked(name: str) -> None:
    torch.manual_seed(0)
    use, width = CASES[name]
    model, x = Listed(use, width).eval(), torch.randn(3, 12)
    result = sparsecc.prune(model, (x,), sparsity=0.5, saliency="random")
    result.certificate.require()
    assert result.report.groups
    for batch in (1, 7):
        assert result.model(torch.randn(batch, 12)).shape == (batch, 5)


class Returned(nn.Module):
    """A list that picks, and that the caller gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(12, 8), nn.Linear(3, 5)
        self.register_buffer("order", torch.tensor([7, 2, 4]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(self.a(x).relu()[:, self.order]), self.order  # type: ignore[return-value]


def test_a_list_that_is_returned_stays_what_it_is() -> None:
    torch.manual_seed(0)
    model, x = Returned().eval(), torch.randn(3, 12)
    result = sparsecc.prune(model, (x,), sparsity=0.5, saliency="random")
    assert result.certificate.status in ("VERIFIED", "VACUOUS")  # one output is constant
    assert torch.equal(result.model(x)[1], torch.tensor([7, 2, 4]))

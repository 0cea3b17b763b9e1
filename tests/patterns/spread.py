"""Tensors that are made as large as what they meet, and written into piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.patterns.base import Built, case, tokens


class Scan(nn.Module):
    """A recurrence written out: every step puts its state into a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tail = nn.Linear(12, 8), nn.Linear(8, 5)
        self.decay = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        states, state = torch.zeros_like(y), torch.zeros_like(y[:, 0])
        for step in range(y.shape[1]):
            state = state * self.decay.sigmoid() + y[:, step]
            states[:, step] = state
        return self.tail(states)  # type: ignore[no-any-return]


@case(zeroing=True)
def states_written_one_by_one() -> Built:
    return Scan(), (tokens(),)


class Halves(nn.Module):
    """Two results written into the halves of one tensor, as rotary embeddings on a part of a head are."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.tail = nn.Linear(12, 6), nn.Linear(12, 10), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], 16)
        y[..., :6] = self.left(x).relu()
        y[..., 6:] = self.right(x)
        return self.tail(y)  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def halves_written() -> Built:
    return Halves(), (tokens(),)


class Headed(nn.Module):
    """Splits features into heads."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


class Decoder(Headed):
    """Queries that are parameters meet each other before any data, once for every sample."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__(heads)
        self.queries = nn.Parameter(torch.randn(4, 12))
        self.own, self.mixed, self.crossed = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 24)
        self.tail = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.queries.expand(x.shape[0], -1, -1)
        q, k, v = (self._split(part) for part in self.own(y).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        y = y + self.mixed((scores @ v).transpose(1, 2).flatten(2))
        k, v = (self._split(part) for part in self.crossed(x).chunk(2, -1))
        scores = (self._split(y) @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.tail((scores @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@case()
def queries_before_data() -> Built:
    return Decoder(), (tokens(),)


class Disentangled(Headed):
    """Scores of relative places are looked up by a table that is repeated for samples and heads."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__(heads)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.places = nn.Parameter(torch.randn(9, 4))
        self.tail = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        order = torch.arange(x.shape[1])
        apart = (order[:, None] - order[None, :] + 4).clamp(0, 8)
        apart = apart.expand(q.shape[0], q.shape[1], -1, -1)
        scores = q @ k.transpose(-1, -2) + (q @ self.places.T).gather(-1, apart)
        return self.tail(self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


@case()
def places_looked_up_for_every_head() -> Built:
    return Disentangled(), (tokens(),)


class Decomposed(nn.Module):
    """Heads folded into the samples, then new axes beside them, as windowed image attention has it."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.o, self.tail = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 5)
        self.rows = nn.Parameter(torch.randn(2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        samples, places, _ = x.shape
        qkv = self.qkv(x).reshape(samples, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, samples * self.heads, places, -1).unbind(0)
        scores = q @ k.transpose(-1, -2)
        rows = torch.einsum("bhwc,hkc->bhwk", q.reshape(q.shape[0], 2, 2, -1), self.rows)
        scores = scores.view(-1, 2, 2, 2, 2) + rows[:, :, :, :, None]
        mixed = scores.view(q.shape[0], places, places).softmax(-1) @ v
        mixed = mixed.view(samples, self.heads, places, -1).permute(0, 2, 1, 3)
        return self.tail(self.o(mixed.reshape(samples, places, -1)))  # type: ignore[no-any-return]


@case(kept_class=False)
def axes_added_beside_heads_and_samples() -> Built:
    return Decomposed(), (tokens(length=4),)

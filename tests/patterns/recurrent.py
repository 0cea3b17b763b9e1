"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.patterns.base import Built, case, tokens


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.cell = kind(8, 6, batch_first=True, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.tail = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(self.inner(x))
        return self.tail(y)  # type: ignore[no-any-return]


@case(zeroing=True)
def lstm() -> Built:
    return Recurrent(nn.LSTM), (tokens(6),)


@case(zeroing=True)
def lstm_two_layers_bidirectional() -> Built:
    return Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (tokens(6),)


@case(zeroing=True)
def lstm_projection() -> Built:
    return Recurrent(nn.LSTM, num_layers=2, proj_size=4), (tokens(6),)


@case(zeroing=True)
def gru_two_layers() -> Built:
    return Recurrent(nn.GRU, num_layers=2, bias=False), (tokens(6),)


@case(zeroing=True)
def rnn_bidirectional() -> Built:
    return Recurrent(nn.RNN, bidirectional=True), (tokens(6),)


class LearnedState(nn.Module):
    """Initial states are parameters, final states are read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.h = nn.Parameter(torch.randn(2, 1, 8))
        self.c = nn.Parameter(torch.randn(2, 1, 8))
        self.tail = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [s.expand(-1, x.shape[0], -1).contiguous() for s in (self.h, self.c)]
        _, (h, c) = self.cell(x, tuple(states))
        return self.tail(torch.cat([h[-1], c[-1]], -1))  # type: ignore[no-any-return]


@case(zeroing=True)
def lstm_learned_state() -> Built:
    return LearnedState(), (tokens(6),)


class Cells(nn.Module):
    """An unrolled LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 8)
        self.tail = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 8)
        for t in range(3):
            h, c = self.cell(x[:, t], (h, c))
        return self.tail(h)  # type: ignore[no-any-return]


@case(kept_class=False)
def lstm_cell() -> Built:
    return Cells(), (tokens(6, 3),)

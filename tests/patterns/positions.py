"""Positions that are picked and put into another order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.patterns.base import Built, case, head, image


class UnalignedShuffle(nn.Module):
    """A group convolution after a shuffle whose blocks do not align with its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=4)
        self.tail = head(24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = y.unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2)
        return self.tail(self.grouped(y).relu())  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def shuffle_across_groups() -> Built:
    return UnalignedShuffle(), (image(),)


class UnalignedCut(nn.Module):
    """Cuts the channels of a shuffle where no block ends, as ShuffleNet does with odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.left, self.right = nn.Conv2d(5, 8, 1), nn.Conv2d(7, 8, 1)
        self.tail = head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
        left, right = y.split((5, 7), 1)
        return self.tail(self.left(left).relu() + self.right(right))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def cut_through_a_shuffle() -> Built:
    return UnalignedCut(), (image(),)


class Reordered(nn.Module):
    """Channels taken by a buffer of positions, some twice; rolled and reversed channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 10, 1), nn.Conv2d(9, 6, 1)
        self.register_buffer("order", torch.tensor([3, 9, 0, 3, -1, 5, 8, 1, 2]))
        self.tail = head(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.stem(x).relu()[:, self.order]).relu()
        return self.tail(torch.cat([torch.roll(y, 4, 1), y.flip(1)], 1))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def reordered_channels() -> Built:
    return Reordered(), (image(),)


class OneOrder(nn.Module):
    """A learned order of channels, used once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 10, 1), nn.Conv2d(8, 6, 1)
        self.register_buffer("order", torch.tensor([7, 2, 9, 0, 5, 4, 8, 1]))
        self.tail = head(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu().index_select(1, self.order)
        return self.tail(self.inner(y).relu())  # type: ignore[no-any-return]


@case(zeroing=True)
def channels_by_index() -> Built:
    return OneOrder(), (image(),)


class WrittenOrders(nn.Module):
    """Orders of channels as the code writes them down: a list, and a tensor that is made on the spot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 9, 1)
        self.tail = head(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.stem(x).relu()[:, [0, 3, 1, 5, 7, 2]]).relu()
        return self.tail(y[:, torch.tensor([8, 1, 4, 2])])  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def orders_in_the_code() -> Built:
    return WrittenOrders(), (image(),)

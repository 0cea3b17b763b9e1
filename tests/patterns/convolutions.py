"""Convolutions, cuts, shuffles and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Add, Built, Cat, case, conv, head, image


@case(zeroing=True)
def conv_bn_relu() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 12), head(12)), (image(),)


@case(zeroing=True)
def residual_identity() -> Built:
    return nn.Sequential(conv(3, 8), Add(nn.Identity(), conv(8, 8)), nn.ReLU(), head(8)), (image(),)


@case(zeroing=True)
def residual_projection() -> Built:
    block = Add(nn.Conv2d(8, 12, 1, stride=2), nn.Sequential(conv(8, 6), nn.Conv2d(6, 12, 3, 2, 1)))
    return nn.Sequential(conv(3, 8), block, head(12)), (image(),)


@case(zeroing=True)
def dense_concat() -> Built:
    layers: list[nn.Module] = [conv(3, 8)]
    for i in range(3):
        layers.append(Cat(nn.Identity(), conv(8 + 4 * i, 4)))
    return nn.Sequential(*layers, head(20)), (image(),)


@case(zeroing=True)
def concat_of_different_widths() -> Built:
    return nn.Sequential(Cat(conv(3, 4), conv(3, 7, 1), conv(3, 2, 5)), conv(13, 6), head(6)), (image(),)


class Chunked(nn.Module):
    """Parts of the channels take different paths; the last of them skips."""

    def __init__(
        self, sizes: tuple[int, ...], order: tuple[int, ...], split: Callable[[Tensor], Any]
    ) -> None:
        super().__init__()
        self.stem = conv(3, sum(sizes))
        self.paths = nn.ModuleList(conv(n, n) for n in sizes[:-1])
        self.tail = nn.Conv2d(sum(sizes), 6, 1)
        self.order = order
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(self.stem(x)))
        parts = [*(p(y) for p, y in zip(self.paths, parts, strict=False)), parts[-1]]
        return self.tail(torch.cat([parts[i] for i in self.order], 1))  # type: ignore[no-any-return]


@case(zeroing=True)
def chunk_equal() -> Built:
    return Chunked((4, 4), (0, 1), lambda y: y.chunk(2, 1)), (image(),)


@case(zeroing=True)
def chunk_uneven() -> Built:
    return Chunked((4, 4, 3), (0, 1, 2), lambda y: y.chunk(3, 1)), (image(),)


@case(kept_class=False, zeroing=True)
def split_uneven() -> Built:
    return Chunked((4, 6, 2), (0, 1, 2), lambda y: y.split((4, 6, 2), 1)), (image(),)


@case(kept_class=False, zeroing=True)
def split_then_concat_in_another_order() -> Built:
    return Chunked((4, 4, 4), (2, 0, 1), lambda y: y.split(4, 1)), (image(),)


@case(zeroing=True)
def tensor_split_sections() -> Built:
    return Chunked((4, 3, 3), (0, 2, 1), lambda y: y.tensor_split(3, 1)), (image(),)


class Sliced(nn.Module):
    """Slices, one of which overlaps the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.tail = nn.Conv2d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(torch.cat([y[:, 8:], y[:, :4] * 2, y[:, 5:-1]], 1))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def slices() -> Built:
    return Sliced(), (image(),)


class Indexed(nn.Module):
    """Channels picked by a buffer."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.register_buffer("order", torch.tensor([6, 1, 3, 3, 0, 5, 4]))
        self.tail = nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.stem(x)[:, self.order])  # type: ignore[no-any-return]


@case()
def index_with_buffer() -> Built:
    return Indexed(), (image(),)


@case(zeroing=True)
def flatten_spatial() -> Built:
    return nn.Sequential(
        conv(3, 6), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3)
    ), (image(),)


class LiteralView(nn.Module):
    """Sizes spelled out in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.tail = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(y.view(y.shape[0], 6 * 8 * 8))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def literal_view() -> Built:
    return LiteralView(), (image(),)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.up = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(s))))


@case(zeroing=True)
def squeeze_excitation() -> Built:
    return nn.Sequential(conv(3, 8), Gate(8, 4), conv(8, 6), head(6)), (image(),)


class SpatialGate(nn.Module):
    """A map of one channel from the mean and the maximum over channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.mix(pooled))


@case()
def spatial_gate() -> Built:
    return nn.Sequential(conv(3, 8), SpatialGate(), conv(8, 6), head(6)), (image(),)


class SpatialGateMax(nn.Module):
    """The same gate with the maximum as a pair of values and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = torch.max(x, 1, keepdim=True)
        return x * torch.sigmoid(self.mix(torch.cat([x.mean(1, keepdim=True), values], 1)))


@case()
def spatial_gate_max() -> Built:
    return nn.Sequential(conv(3, 8), SpatialGateMax(), conv(8, 6), head(6)), (image(),)


@case(zeroing=True)
def grouped_conv() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 12, groups=2), conv(12, 12, groups=4), head(12)), (image(),)


@case(zeroing=True)
def depthwise() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 6, 1), head(6)), (image(),)


@case(zeroing=True)
def depthwise_multiplier() -> Built:
    return nn.Sequential(conv(3, 4), conv(4, 12, groups=4), conv(12, 6, 1), head(6)), (image(),)


@case(zeroing=True)
def conv_transpose() -> Built:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)), (
        image(),
    )


@case(zeroing=True)
def grouped_conv_transpose() -> Built:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.Conv2d(12, 2, 1)), (
        image(),
    )


@case(zeroing=True)
def conv1d_and_conv3d() -> Built:
    line = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1))
    lift = nn.Sequential(
        nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6), nn.Conv3d(6, 2, 2)
    )
    return nn.Sequential(line, lift), (torch.randn(2, 3, 10),)


class Shuffle(nn.Module):
    """Channel shuffle with its number of groups as an attribute."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@case(zeroing=True)
def channel_shuffle() -> Built:
    return nn.Sequential(conv(3, 12), conv(12, 12, groups=2), Shuffle(2), conv(12, 12, groups=2), head(12)), (
        image(),
    )


@case()
def channel_shuffle_indivisible() -> Built:
    """Three groups of four do not shuffle into three groups again: frozen, with the reason."""
    return nn.Sequential(conv(3, 12), conv(12, 12, groups=3), Shuffle(3), conv(12, 12, groups=3), head(12)), (
        image(),
    )


@case(zeroing=True)
def shuffle_operator() -> Built:
    return nn.Sequential(conv(3, 12), nn.ChannelShuffle(3), conv(12, 6, 1), head(6)), (image(),)


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels pass, the other half is worked on, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.work = nn.Sequential(
            conv(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = x.chunk(2, dim=1)
        y = torch.cat((passed, self.work(worked)), 1)
        b, c, h, w = y.shape
        return y.reshape(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


@case(zeroing=True)
def shufflenet_units() -> Built:
    return nn.Sequential(conv(3, 8), ShuffleUnit(8), ShuffleUnit(8), head(8)), (image(),)


@case(zeroing=True)
def pixel_shuffle() -> Built:
    return nn.Sequential(conv(3, 8), nn.Conv2d(8, 12, 3, 1, 1), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1)), (
        image(),
    )


@case(zeroing=True)
def pixel_unshuffle() -> Built:
    return nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 6, 1), head(6)), (image(),)


class Focus(nn.Module):
    """Space to depth by strided slices."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return torch.cat(parts, 1)


@case(zeroing=True)
def focus() -> Built:
    return nn.Sequential(conv(3, 4), Focus(), conv(16, 6, 1), head(6)), (image(),)

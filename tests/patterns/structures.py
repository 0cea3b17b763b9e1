"""Larger convolutional structures, and weights that are shared or computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Built, Cat, case, conv, head, image


class UNet(nn.Module):
    """Two levels with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 6), conv(6, 8)
        self.middle = conv(8, 10)
        self.up1, self.mix1 = nn.ConvTranspose2d(10, 8, 2, 2), conv(16, 8)
        self.up2, self.mix2 = nn.Upsample(scale_factor=2), conv(14, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = self.mix1(torch.cat([self.up1(c), b], 1))
        return self.last(self.mix2(torch.cat([self.up2(c), a], 1)))  # type: ignore[no-any-return]


@case(zeroing=True)
def unet() -> Built:
    return UNet(), (image(),)


class Exchange(nn.Module):
    """HRNet: two resolutions that feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = conv(3, 6), conv(3, 8, stride=2)
        self.down, self.up = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 6, 1)
        self.out_high, self.out_low = head(6), head(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high, low = self.high(x), self.low(x)
        lifted = F.interpolate(self.up(low), size=high.shape[-2:], mode="bilinear")
        return self.out_high(F.relu(high + lifted)), self.out_low(F.relu(low + self.down(high)))


@case(zeroing=True)
def hrnet_exchange() -> Built:
    return Exchange(), (image(),)


@case(zeroing=True)
def inception() -> Built:
    pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(6, 4, 1))
    block = Cat(conv(6, 4, 1), nn.Sequential(conv(6, 3, 1), conv(3, 5)), pooled)
    return nn.Sequential(conv(3, 6), block, head(13)), (image(),)


class Twice(nn.Module):
    """One module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.tail = conv(3, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(self.shared(F.max_pool2d(self.shared(y), 2)))  # type: ignore[no-any-return]


@case(zeroing=True)
def shared_module() -> Built:
    return Twice(), (image(),)


class TiedConvs(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.b.weight = self.a.weight
        self.tail = head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(F.relu(self.a(y)) + self.b(y))  # type: ignore[no-any-return]


@case(zeroing=True)
def tied_convs() -> Built:
    return TiedConvs(), (image(),)


class LayerScale(nn.Module):
    """A residual branch scaled by a raw parameter, and a raw bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.tail = conv(3, 8), conv(8, 8), head(8)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))
        self.beta = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(y + self.gamma * self.branch(y) + self.beta)  # type: ignore[no-any-return]


@case(zeroing=True)
def layer_scale() -> Built:
    return LayerScale(), (image(),)


class Raw(nn.Module):
    """Functional operators on raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.shift = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(6, 8) * 0.3)
        self.last = nn.Parameter(torch.randn(6, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.kernel, self.shift, padding=1)).mean((2, 3))
        return F.relu(F.linear(y, self.matrix)) @ self.last


@case()
def raw_parameters() -> Built:
    return Raw(), (image(),)


@case()
def weight_normalised() -> Built:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
    second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3, padding=1))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head(6)), (image(),)


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


@case(zeroing=True)
def weight_standardised() -> Built:
    return nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), head(6)), (
        image(),
    )

"""Inputs, outputs, and what is not computed or not in order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Built, case, conv, head, image, tokens


class TwoInputs(nn.Module):
    """An image and a vector; a dictionary with a nested list comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = conv(3, 8), nn.Linear(4, 8)
        self.a, self.b = nn.Linear(8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, *, v: Tensor) -> dict[str, Any]:
        y = self.image(x) * self.vector(v)[:, :, None, None]
        return {"class": self.a(y.mean((2, 3))), "maps": [self.b(y), {"input": v}]}


@case(zeroing=True)
def keywords_and_nested_outputs() -> Built:
    return TwoInputs(), {"v": torch.randn(2, 4), "x": image()}


class Untaken(nn.Module):
    """Some of the parameters are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spare, self.tail = conv(3, 8), conv(8, 8), head(8)
        self.deep = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(self.spare(y) if self.deep else y)  # type: ignore[no-any-return]


@case(zeroing=True)
def branch_not_taken() -> Built:
    return Untaken(), (image(),)


@case(zeroing=True)
def frozen_parameters() -> Built:
    model = nn.Sequential(conv(3, 8), conv(8, 6), head(6))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model, (image(),)


@case(zeroing=True)
def conv_classifier() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 6), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (
        image(),
    )


class Bilinear(nn.Module):
    """Products of features with features: an outer product and a sum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.tail = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        both = torch.einsum("bcn,bdn->bcd", a, b) / a.shape[-1]
        return self.tail(both.flatten(1)) + a.sum((1, 2), keepdim=False)[:, None]  # type: ignore[no-any-return]


@case()
def bilinear_pooling() -> Built:
    return Bilinear(), (image(size=4),)


class InPlace(nn.Module):
    """Writes through a view of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 8, 3), head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y[:, 2:5] *= 2
        y[:, 6:] = 1
        y.add_(0.5).mul_(2)
        return self.tail(y)  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def writes_through_views() -> Built:
    return InPlace(), (image(),)


class Ordered(nn.Module):
    """Operators that read positions: sorting, a running sum, positions of maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tail = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).cumsum(-1)
        z = self.b(y).sort(-1).values
        return self.tail(F.relu(self.c(z))), y.argmax(-1)


@case(zeroing=True)
def order_matters() -> Built:
    return Ordered(), (tokens(6),)

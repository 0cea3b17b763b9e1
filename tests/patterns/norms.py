"""Normalisations and activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Add, Apply, Built, case, conv, head, image, tokens


@case()
def layer_norm_over_images() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm([8, 8, 8]), nn.ReLU(), conv(8, 6), head(6)), (
        image(),
    )


@case()
def layer_norm_channels_last() -> Built:
    last, first = Apply(lambda x: x.permute(0, 2, 3, 1)), Apply(lambda x: x.permute(0, 3, 1, 2))
    mlp = nn.Sequential(last, nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), first)
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), Add(nn.Identity(), mlp), head(8)), (image(),)


@case()
def group_norm() -> Built:
    block = Add(nn.Identity(), nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)))
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.GroupNorm(2, 8), head(8)), (image(),)


@case(zeroing=True)
def instance_norm() -> Built:
    norm = nn.InstanceNorm2d(8, affine=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.InstanceNorm2d(8), conv(8, 6), head(6)), (
        image(),
    )


@case()
def rms_norm() -> Built:
    return nn.Sequential(nn.Linear(12, 16), nn.RMSNorm(16), nn.SiLU(), nn.Linear(16, 4)), (tokens(),)


class HandMadeRMSNorm(nn.Module):
    """Root mean square in float32, as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


@case()
def hand_made_rms_norm() -> Built:
    return nn.Sequential(nn.Linear(12, 16), HandMadeRMSNorm(16), nn.SiLU(), nn.Linear(16, 4)), (tokens(),)


@case(zeroing=True)
def prelu() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 1), nn.PReLU(), head(6)), (image(),)


@case()
def softmax_over_channels() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 6, 1), nn.LogSoftmax(1), head(6)), (
        image(),
    )


@case()
def l2_normalised() -> Built:
    return nn.Sequential(nn.Linear(12, 16), Apply(lambda x: F.normalize(x, dim=-1)), nn.Linear(16, 4)), (
        tokens(),
    )


@case(zeroing=True)
def padding_modes() -> Built:
    layers = (nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.ReplicationPad2d(1), nn.ZeroPad2d((1, 0, 2, 1)))
    circular = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv(3, 8), *layers, circular, head(6)), (image(),)


@case(zeroing=True)
def channel_padding() -> Built:
    """The parameter-free shortcut of CIFAR ResNets."""
    short = Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    block = Add(short, nn.Sequential(conv(8, 6), nn.Conv2d(6, 12, 3, 2, 1)))
    return nn.Sequential(conv(3, 8), block, head(12)), (image(),)

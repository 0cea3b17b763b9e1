"""EfficientNet-Lite0 (Liu et al., 2020): EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

Written so that its state lists the same tensors in the same order as the published checkpoint,
which is therefore loaded by position.  Stride-2 convolutions pad as TensorFlow does ("same"), so
the sides of the image must be divisible by 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE_PX = 224
CLASSES = 1000


class Stage(NamedTuple):
    """``repeats`` blocks; the first one has the stride and changes the width."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    outputs: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """The normalisation that the checkpoint was trained with."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded so that an even side is divided by the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        total = kernel - stride
        even = total % 2 == 0
        super().__init__(
            inputs, outputs, kernel, stride, total // 2 if even else 0, groups=groups, bias=False
        )
        before, after = total // 2, total - total // 2
        self.border = () if even else (before, after, before, after)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.border) if self.border else input)


class InvertedResidual(nn.Module):
    """``x[N,I,H,W] -> y[N,O,H/stride,W/stride]``: expand, depthwise, project, add where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(SameConv2d(inputs, hidden, 1), batch_norm(hidden), nn.ReLU6())
        self.depthwise = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self.bn1 = batch_norm(hidden)
        self.project = SameConv2d(hidden, outputs, 1)
        self.bn2 = batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.bn1(self.depthwise(self.expand(x))))
        y: Tensor = self.bn2(self.project(hidden))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """``x[N,3,224,224] -> logits[N,1000]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, STEM, 3, 2)
        self.bn0 = batch_norm(STEM)
        blocks: list[nn.Module] = []
        inputs = STEM
        for stage in STAGES:
            for index in range(stage.repeats):
                stride = 1 if index else stage.stride
                blocks.append(InvertedResidual(inputs, stage.outputs, stage.kernel, stride, stage.expansion))
                inputs = stage.outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv2d(inputs, HEAD, 1)
        self.bn1 = batch_norm(HEAD)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn0(self.stem(x))))
        x = F.relu6(self.bn1(self.head(x)))
        logits: Tensor = self.fc(self.dropout(x.mean((2, 3))))
        return logits


def load_efficientnet_lite0(checkpoint: Path) -> EfficientNetLite0:
    """The network with published weights, in evaluation mode; ``ValueError`` if they do not fit."""
    published = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    own = model.state_dict()
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in published.values()]:
        raise ValueError(f"{checkpoint} does not hold the weights of EfficientNet-Lite0")
    model.load_state_dict(dict(zip(own, published.values(), strict=True)))
    return model.eval()

"""ResNet-20 for 28x28 grey images, trained by ``python -m benchmarks.train_fashion resnet20``.

The CIFAR variant of He et al., "Deep Residual Learning for Image Recognition", section 4.2, with a
1x1 convolution on the shortcut wherever the shape changes: 272,186 parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).parent / "weights" / "resnet20_fmnist.safetensors"


class BasicBlock(nn.Module):
    """``x[N,I,H,W] -> y[N,O,H/stride,W/stride]``, two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """``x[N,1,28,28] -> logits[N,classes]``: three stages of three blocks."""

    def __init__(self, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width << stage
            for index in range(3):
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def load_resnet20(weights: Path = WEIGHTS) -> ResNet20:
    """The trained network, in evaluation mode."""
    from safetensors.torch import load_file

    model = ResNet20()
    model.load_state_dict(load_file(str(weights)))
    return model.eval()


@torch.inference_mode()
def count_correct(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> int:
    """How many images get their label as the largest logit."""
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)

"""Networks of the speed benchmark, in plain PyTorch, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut."""

    def __init__(self, inner: int, outer: int, before: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x[N,C,H,W] -> y[N,outer,H/stride,W/stride]"""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet with bottlenecks (He et al., 2016, table 1); ``(3, 8, 36, 3)`` is ResNet-152."""

    def __init__(self, depths: tuple[int, ...] = (3, 8, 36, 3), classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        before = 64
        for stage, depth in enumerate(depths):
            inner = 64 * 2**stage
            for i in range(depth):
                blocks.append(Bottleneck(inner, 4 * inner, before, 2 if stage and not i else 1))
                before = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> logits[N,classes]"""
        y: Tensor = self.blocks(self.stem(x))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


class TransformerBlock(nn.Module):
    """Pre-norm attention with fused q, k, v, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,L,width] -> y[N,L,width]"""
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Transformer(nn.Module):
    """``layers`` blocks between two linear layers."""

    def __init__(self, layers: int = 48, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,L,64] -> y[N,L,64]"""
        y: Tensor = self.head(self.blocks(self.embed(x)))
        return y


class DenseNet(nn.Module):
    """Dense blocks of 1x1 and 3x3 convolutions (Huang et al., 2017); ``(6, 12, 24, 16)`` is DenseNet-121."""

    def __init__(self, depths: tuple[int, ...] = (6, 12, 24, 16), growth: int = 32) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        stages: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            for _ in range(depth):
                stages.append(DenseLayer(width, growth))
                width += growth
            if stage < len(depths) - 1:
                stages.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)
                    )
                )
                width //= 2
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> logits[N,1000]"""
        logits: Tensor = self.fc(self.stages(self.stem(x)).mean((2, 3)))
        return logits


class DenseLayer(nn.Module):
    """Concatenates its input with ``growth`` new channels."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x[N,C,H,W] -> y[N,C+growth,H,W]"""
        return torch.cat([x, self.body(x)], 1)


#: name -> (module, example input, limit in CPU-seconds or None)
NETS: dict[str, tuple[Any, tuple[int, ...], float | None]] = {
    "transformer, 48 layers, d=256": (Transformer, (2, 8, 64), 0.3),
    "ResNet-152": (ResNet, (2, 3, 64, 64), 0.2),
    "DenseNet-121": (DenseNet, (2, 3, 64, 64), None),
    "transformer, 192 layers, d=64": (lambda: Transformer(192, 64, 2), (2, 8, 64), None),
}

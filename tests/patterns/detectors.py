"""Blocks and heads of detectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.patterns.base import Add, Built, case, conv, head, image


class C2f(nn.Module):
    """YOLOv8's block: split in two, and every step is kept for the end."""

    def __init__(self, i: int, o: int, n: int = 2) -> None:
        super().__init__()
        self.c = o // 2
        self.first = conv(i, 2 * self.c, 1)
        self.steps = nn.ModuleList(Add(nn.Identity(), conv(self.c, self.c)) for _ in range(n))
        self.last = conv((2 + n) * self.c, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(step(parts[-1]) for step in self.steps)
        return self.last(torch.cat(parts, 1))  # type: ignore[no-any-return]


@case(zeroing=True)
def c2f() -> Built:
    return nn.Sequential(conv(3, 8), C2f(8, 8), head(8)), (image(),)


class C3(nn.Module):
    """YOLOv5's block."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        half = o // 2
        self.a, self.b, self.last = conv(i, half, 1), conv(i, half, 1), conv(2 * half, o, 1)
        self.inner = Add(nn.Identity(), nn.Sequential(conv(half, half, 1), conv(half, half)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat((self.inner(self.a(x)), self.b(x)), 1))  # type: ignore[no-any-return]


class SPPF(nn.Module):
    """Pools of pools, side by side."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first, self.last = conv(i, i // 2, 1), conv(i * 2, o, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))  # type: ignore[no-any-return]


@case(zeroing=True)
def c3_and_sppf() -> Built:
    return nn.Sequential(conv(3, 8), C3(8, 8), SPPF(8, 8), head(8)), (image(),)


class Detect(nn.Module):
    """A head over two scales: box distributions and class scores, boxes by an expectation."""

    bins: Tensor

    def __init__(self, channels: tuple[int, int] = (8, 6), classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.bins_count, self.classes = bins, classes
        self.stem, self.down = conv(3, channels[0]), conv(channels[0], channels[1], stride=2)
        self.boxes = nn.ModuleList(nn.Sequential(conv(c, 6), nn.Conv2d(6, 4 * bins, 1)) for c in channels)
        self.scores = nn.ModuleList(nn.Sequential(conv(c, 5), nn.Conv2d(5, classes, 1)) for c in channels)
        self.register_buffer("bins", torch.arange(bins).float())

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        outputs = []
        for y, box, score in zip((high, self.down(high)), self.boxes, self.scores, strict=True):
            outputs.append(torch.cat([box(y), score(y)], 1).flatten(2))
        joined = torch.cat(outputs, 2)
        box, score = joined.split((4 * self.bins_count, self.classes), 1)
        b, _, n = box.shape
        spread = box.view(b, 4, self.bins_count, n).softmax(2)
        return torch.cat([(spread * self.bins[:, None]).sum(2), score.sigmoid()], 1)


@case(kept_class=False)
def detect_head() -> Built:
    return Detect(), (image(),)

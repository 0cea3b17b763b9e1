"""What the zoo holds: entries that build a model with example inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Suite = Literal["torchvision", "timm", "hf"]
Path = Literal["torch", "onnx"]

SUITES: tuple[Suite, ...] = ("torchvision", "timm", "hf")
PATHS: tuple[Path, ...] = ("torch", "onnx")


@dataclass(frozen=True)
class Built:
    """A model with inputs for it: a tuple (positional) or a dict (by keyword)."""

    module: torch.nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One architecture.  ``build`` makes it with random weights; nothing is imported before.

    ``tiny`` models are built without asking first how large they are.
    """

    suite: Suite
    name: str
    build: Callable[[], Built]
    tiny: bool = False

    @property
    def key(self) -> str:
        """``timm/resnet18``."""
        return f"{self.suite}/{self.name}"


def image(*sizes: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """A normal input [batch, channels, *sizes]; one size stands for a square."""
    shape = sizes if len(sizes) > 1 else sizes * 2
    return torch.randn(batch, channels, *shape)

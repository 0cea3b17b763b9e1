"""What patterns are registered as, and the parts that many of them have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Case:
    """A pattern.

    ``kept_class``: the pruned model is of the class that was given.  ``zeroing``: zeroing what the
    consumers of removed channels read is an exact mask (no reduction runs over pruned positions).
    """

    name: str
    build: Callable[[], Built]
    kept_class: bool = True
    zeroing: bool = False

    def make(self) -> Built:
        """The model with random weights, statistics and affine parameters; the same ones every time."""
        torch.manual_seed(0)
        model, inputs = self.build()
        _randomise(model)
        return model.eval(), inputs


CASES: dict[str, Case] = {}


def case(
    *, kept_class: bool = True, zeroing: bool = False
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder under its function's name."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        CASES[build.__name__] = Case(build.__name__, build, kept_class, zeroing)
        return build

    return register


def _randomise(model: nn.Module) -> None:
    """Statistics of one and zero would hide errors."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, norms):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + (name == "weight"))
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 2)


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    """A random batch of images."""
    return torch.randn(batch, channels, size, size)


def tokens(width: int = 12, length: int = 5, batch: int = 2) -> Tensor:
    """A random batch of sequences."""
    return torch.randn(batch, length, width)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Add(nn.Module):
    """The sum of branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum((b(x) for b in self.branches[1:]), self.branches[0](x))  # type: ignore[no-any-return]


class Cat(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, **options), nn.BatchNorm2d(o), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

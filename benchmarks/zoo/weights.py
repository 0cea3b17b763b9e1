"""Weights under which an error would show.

A fresh model hides errors: gammas and biases of zero or one, running statistics of a standard normal,
layer scales of 1e-6, heads that are zero.  Here nothing is zero and nothing is all alike.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

_BIASES = re.compile(
    r"(bias|beta|token|embed|pos|prompt|quer|\bb\b|shift|mean|table|memory|anchor)", re.IGNORECASE
)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw weights anew in place: matrices keep variance, norms and scales lie around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        matrices = {id(p) for m in model.modules() for p in _matrices(m)}
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and weight.numel():
                _draw(name, weight, id(weight) in matrices, generator)
        for name, buffer in model.named_buffers():
            _statistics(name.rpartition(".")[2], buffer, generator)


def _matrices(module: nn.Module) -> list[torch.Tensor]:
    """Weights that mix channels, with the input channels after the first axis."""
    mixes = isinstance(module, nn.Linear) or type(module).__name__.startswith(
        ("Conv", "StdConv", "ScaledStdConv")
    )
    weight = getattr(module, "weight", None)
    return [weight] if mixes and isinstance(weight, torch.Tensor) and weight.dim() > 1 else []


def _draw(name: str, weight: torch.Tensor, matrix: bool, generator: torch.Generator) -> None:
    normal = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    if matrix:
        weight.copy_(normal * math.sqrt(2 / max(weight[0].numel(), 1)))
    elif bool((weight == weight.reshape(-1)[0]).all()):
        around = 0.0 if _BIASES.search(name.rpartition(".")[2]) else 1.0
        weight.copy_(around + (0.2 * normal).clamp(-0.5, 0.5))
    else:
        spread = float(weight.std()) or 0.1
        weight.copy_(torch.where(weight == 0, normal * spread, weight))


def _statistics(name: str, buffer: torch.Tensor, generator: torch.Generator) -> None:
    if name == "running_mean":
        buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    elif name == "running_var":
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))

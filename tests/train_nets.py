"""Small networks and an ordinary training loop for the tests of sparse training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecc.train import Sparsifier


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """``x[N,8] -> y[N,4]``."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    return net.to(dtype)


class Residual(nn.Module):
    """``x[N,3,6,6] -> y[N,4]``: convolutions with a residual sum, with batch norms or without."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=not norms)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=not norms)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1, bias=not norms)
        kinds = [nn.BatchNorm2d(n) if norms else nn.Identity() for n in (8, 12, 8)]
        self.n0, self.n1, self.n2 = kinds
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        y = F.relu(self.n1(self.conv1(x)))
        x = F.relu(x + self.n2(self.conv2(y)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def residual(dtype: torch.dtype = torch.float32, norms: bool = True, seed: int = 0) -> Residual:
    """The network with weights of a seed."""
    torch.manual_seed(seed)
    return Residual(norms).to(dtype)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def batch(step: int, model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step, of the model's dtype; those of a step are always the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (count, 3, 6, 6) if isinstance(model, Residual) or hasattr(model, "stem") else (count, 8)
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (count,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier | None,
    steps: int,
    *,
    first: int = 0,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """An ordinary loop; ``after`` is called with the number of steps done."""
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step, model)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        losses.append(loss.item())
        if after is not None:
            after(step + 1)
    return losses

"""A trained network becomes sparse while it trains on: ``python -m examples.train_sparse`` (under a minute).

ResNet-20, trained on Fashion-MNIST, loses half of its channels little by little in an ordinary loop (soft
masks, cubic schedule).  Half way they are taken out, and training goes on with the smaller model and the same
optimizer.  A second copy gets 80 % sparse layers by RigL.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.resnet20 import load_resnet20
from examples.demo import accuracy, images
from sparsecc.train import Constant, Cubic, RigL, Sparsifier, Structured, Unstructured

STEPS, BATCH, RATE = 32, 48, 0.02


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier | None, steps: int
) -> None:
    """An ordinary training loop with one line more."""
    x, y = images("train")
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
    model.eval()


def main() -> None:
    """Channels and single elements."""
    torch.manual_seed(0)
    x, y = (part[:500] for part in images("test"))
    example: tuple[Tensor, ...] = (x[:2],)
    model: nn.Module = load_resnet20()
    print(f"before              accuracy {accuracy(model, x, y):.3f}, {_count(model):,} parameters")

    start = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedule = Cubic(sparsity=0.5, end=STEPS, every=4)
    sparsifier = Sparsifier(
        model, optimizer, schedule=schedule, pattern=Structured(residual=False), example_inputs=example
    )
    train(model, optimizer, sparsifier, STEPS)
    print(f"half of it masked   accuracy {accuracy(model, x, y):.3f}")
    slimmed = sparsifier.slim()
    small = slimmed.model
    print(
        f"taken out           accuracy {accuracy(small, x, y):.3f}, {_count(small):,} parameters, "
        f"{slimmed.certificate.status}"
    )
    train(small, slimmed.optimizer, None, STEPS // 2)
    print(f"trained on          accuracy {accuracy(small, x, y):.3f}, {time.perf_counter() - start:.0f} s")

    start = time.perf_counter()
    model = load_resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=Constant(sparsity=0.8, end=STEPS, every=4),
        pattern=Unstructured("erk"),
        method=RigL(initial="scores"),
        example_inputs=example,
    )
    train(model, optimizer, sparsifier, STEPS)
    model = sparsifier.finish()
    print(
        f"RigL                accuracy {accuracy(model, x, y):.3f}, {sparsifier.sparsity:.0%} of the weights "
        f"are zero, {time.perf_counter() - start:.0f} s"
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()

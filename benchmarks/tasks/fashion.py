"""ResNet-20 on Fashion-MNIST: accuracy on the 10,000 test images."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from benchmarks.datasets import fashion_mnist
from benchmarks.resnet20 import load_resnet20
from benchmarks.tasks.common import Loaded, Predict, Scores, batched

BATCH = 500


@cache
def test_set() -> tuple[torch.Tensor, torch.Tensor]:
    """The official test images and labels."""
    images, labels = fashion_mnist("test")
    return torch.from_numpy(images), torch.from_numpy(labels)


def load() -> Loaded:
    """ResNet-20, whose weights lie in this repository; needs no data."""
    return loaded(load_resnet20())


def loaded(model: nn.Module) -> Loaded:
    """A network with an example of two images of noise."""
    generator = torch.Generator().manual_seed(0)
    return Loaded(model, (torch.randn(2, 1, 28, 28, generator=generator),))


def score(predict: Predict) -> Scores:
    """``accuracy`` on the test set."""
    images, labels = test_set()
    chosen = batched(predict, images, BATCH).argmax(1)
    return {"accuracy": float((chosen == labels.numpy()).mean())}

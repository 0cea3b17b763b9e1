"""The VGG on Fashion-MNIST, scored as ResNet-20 is."""

from __future__ import annotations

from benchmarks.tasks.common import Loaded
from benchmarks.tasks.fashion import loaded, score
from benchmarks.vgg import load_vgg

__all__ = ["load", "score"]


def load() -> Loaded:
    """The network whose weights lie in this repository; needs no data."""
    return loaded(load_vgg())

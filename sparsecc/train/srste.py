"""Straight-through training of patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsecc.errors import InvalidOption
from sparsecc.train.choosing import Method, Pattern
from sparsecc.train.elements import NM
from sparsecc.train.schedules import Schedule


@dataclass(frozen=True)
class SRSTE(Method):
    """Sparse-refined straight-through estimator: W <- W - lr (g(W') + decay (1 - mask) W), with W' = mask W.

    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (2021),
    eq. 9 and 10.  The model always holds W'; W is kept beside it, and is put into the parameters only
    while the optimizer steps, so that state dicts, exports and evaluation see the pattern.  Masks come
    from W: give the schedule ``every=1``, as in the paper.
    """

    decay: float = 2e-4
    latent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.decay >= 0:
            raise InvalidOption(f"decay={self.decay!r}: give a number that is not negative")

    def check(self, pattern: Pattern, schedule: Schedule) -> None:
        """Masks are those of an N:M pattern."""
        if not isinstance(pattern, NM):
            raise InvalidOption("SRSTE trains N:M patterns; give pattern=NM('2:4') or '2:4'")

    def correct(self, gradient: torch.Tensor, mask: torch.Tensor, latent: torch.Tensor | None) -> None:
        """The gradient passes straight through the mask; masked weights decay."""
        if latent is not None:
            gradient.add_(latent.masked_fill(mask, 0), alpha=self.decay)

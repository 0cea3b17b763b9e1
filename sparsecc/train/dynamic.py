"""Dynamic sparse training: weights are dropped and others grow, at the same number of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsecc.errors import InvalidOption
from sparsecc.train.choosing import Chosen, Method, Pattern, Update, top
from sparsecc.train.elements import Unstructured
from sparsecc.train.schedules import Schedule

INITIAL = ("random", "scores")


@dataclass(frozen=True)
class _Dynamic(Method):
    """Drops by score and grows by something else; the schedule says when, and how many weights there are.

    ``fraction``: share of a layer's weights that is replaced.  ``initial``: the first masks are random,
    or those of the highest ``scores``.  New weights are zero, and so is what the optimizer remembers of
    them.
    """

    fraction: float = 0.3
    initial: str = "random"

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InvalidOption(f"fraction={self.fraction!r}: give a share, 0 < fraction < 1")
        if self.initial not in INITIAL:
            raise InvalidOption(f"initial={self.initial!r} is not known; there are {', '.join(INITIAL)}")

    def check(self, pattern: Pattern, schedule: Schedule) -> None:
        """Dynamic training moves single elements at a density by layer."""
        if not isinstance(pattern, Unstructured) or pattern.allocation == "global":
            raise InvalidOption(
                f"{type(self).__name__} needs pattern=Unstructured with allocation uniform, erk or er"
            )

    def replaced(self, update: Update) -> float:
        """The share of a layer's weights that is replaced now."""
        return self.fraction

    def growth(self, update: Update, name: str) -> torch.Tensor:
        """Scores of elements that are not there, by which they grow."""
        raise NotImplementedError(f"{type(self).__name__} does not define growth()")

    def choose(self, pattern: Pattern, update: Update) -> Chosen:
        """Of each layer the weights with the lowest scores are dropped, and as many as are missing grow."""
        counts = pattern.counts(update)
        return Chosen({name: self._layer(update, name, counts.get(name, 0)) for name in update.scores})

    def _layer(self, update: Update, name: str, count: int) -> torch.Tensor:
        live = update.live[name]
        if bool(live.all()):
            first = _random(live, update.generator) if self.initial == "random" else update.scores[name]
            return top(first, count)
        share = self.replaced(update)
        kept = top(update.ranked(name), min(int(live.sum()), count) - int(share * count + 1e-9)) & live
        candidates = self.growth(update, name).masked_fill(kept, -torch.inf)
        return kept | (top(candidates, count - int(kept.sum())) & ~kept)


@dataclass(frozen=True)
class SET(_Dynamic):
    """Random growth (Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity Inspired by Network Science", 2018, algorithm 1)."""

    def growth(self, update: Update, name: str) -> torch.Tensor:
        """Uniform random numbers."""
        return _random(update.live[name], update.generator)


@dataclass(frozen=True)
class RigL(_Dynamic):
    """Growth by the magnitude of the dense gradient (Evci et al., "Rigging the Lottery", 2020, algorithm 1).

    The share that is replaced decays as a cosine from ``fraction`` at the schedule's start to 0 at its end.
    The gradient is that of the optimizer step just done, which is not left out.
    """

    gradients: ClassVar[bool] = True

    def check(self, pattern: Pattern, schedule: Schedule) -> None:
        """The decay needs an end."""
        super().check(pattern, schedule)
        if schedule.end == schedule.start:
            raise InvalidOption(
                f"end={schedule.end}: RigL updates masks until the schedule's end; give end and every, as in "
                "Constant(sparsity=0.9, end=1000, every=100)"
            )

    def replaced(self, update: Update) -> float:
        """alpha / 2 (1 + cos(pi t / T_end))."""
        return self.fraction / 2 * (1 + math.cos(math.pi * update.schedule.share(update.step)))

    def growth(self, update: Update, name: str) -> torch.Tensor:
        """Absolute gradients."""
        if name not in update.gradients:
            raise InvalidOption(f"{name}: RigL needs its gradient, and the last backward pass gave none")
        return update.gradients[name].abs()


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(like.shape, generator=generator).to(like.device)

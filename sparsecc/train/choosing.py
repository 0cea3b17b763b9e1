"""What is known when masks are chosen, and what a choice consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.terms import Keep
from sparsecc.train.schedules import Schedule
from sparsecc.train.sites import Site


@dataclass(frozen=True, eq=False)
class Update:
    """Whole tensors by name of the parameter, in the same order on every process.

    ``scores``: higher ones are kept; ``signed`` tells that they may be negative, and add up.  ``live``:
    present masks.  ``gradients``: of the loss with respect to every element, masked ones too, where the
    method asks for them.  ``groups``: present masks of coupled groups, which are those of ``analysis``.
    """

    sites: Sequence[Site]
    scores: Mapping[str, torch.Tensor]
    live: Mapping[str, torch.Tensor]
    sparsity: float
    step: int
    schedule: Schedule
    generator: torch.Generator
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    groups: Mapping[str, Keep] = field(default_factory=dict)
    analysis: Analysis | None = None
    signed: bool = False

    def ranked(self, name: str) -> torch.Tensor:
        """Scores of a parameter with what is masked behind everything that is live."""
        return self.scores[name].masked_fill(~self.live[name], -torch.inf)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Whole masks by name of the parameter, and those of coupled groups by the group's name."""

    masks: Mapping[str, torch.Tensor]
    groups: Mapping[str, Keep] = field(default_factory=dict)


class Pattern:
    """What masks look like; subclasses are frozen dataclasses whose fields are their options."""

    structured: ClassVar[bool] = False

    def check(self, schedule: Schedule, sites: Sequence[Site]) -> None:
        """Raise InvalidOption where the pattern does not fit the schedule or a weight."""

    def why_not(self, site: Site) -> str:
        """Why a weight that the graph names cannot have the pattern, or ''."""
        return ""

    def choose(self, update: Update) -> Chosen:
        """New masks."""
        raise NotImplementedError(f"{type(self).__name__} does not define choose()")

    def counts(self, update: Update) -> dict[str, int]:
        """How many elements of each parameter stay, whatever the scores are."""
        raise NotImplementedError(f"{type(self).__name__} does not define counts()")


@dataclass(frozen=True)
class Method:
    """How masks change: the base keeps what scores highest, and what is gone stays gone.

    ``latent``: masked weights have values of their own, which the optimizer moves.  ``gradients``: the
    method reads gradients of masked weights.
    """

    latent: ClassVar[bool] = False
    gradients: ClassVar[bool] = False

    def check(self, pattern: Pattern, schedule: Schedule) -> None:
        """Raise InvalidOption where the method does not fit the pattern or the schedule."""

    def choose(self, pattern: Pattern, update: Update) -> Chosen:
        """New masks."""
        return pattern.choose(update)

    def correct(self, gradient: torch.Tensor, mask: torch.Tensor, latent: torch.Tensor | None) -> None:
        """Change a gradient, in place, before the optimizer reads it: that of masked weights is zero."""
        gradient.masked_fill_(~mask, 0)


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of exactly ``count`` elements with the highest scores; among equals the first ones.

    >>> top(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    flat = scores.reshape(-1)
    if count >= flat.numel():
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above, equal = flat > threshold, flat == threshold
    first = equal & (equal.cumsum(0) <= count - above.sum())
    return (above | first).reshape(scores.shape)


def staying(size: int, sparsity: float) -> int:
    """How many of ``size`` elements stay: the share that goes is rounded down."""
    return size - int(size * sparsity + 1e-9)

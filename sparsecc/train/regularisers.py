"""Penalties that drive weights, or whole positions of coupled groups, towards zero before they are cut.

They are added to gradients before the optimizer steps, or to the loss (``Sparsifier.penalty``); with
``proximal`` their proximal step follows the optimizer's instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sparsecc.errors import InvalidOption
from sparsecc.train.structured import GroupMap


@dataclass(frozen=True, eq=False)
class Scope:
    """What penalties see: this process's tensors by name, and which elements are to go in the end.

    ``tensors``: parameters with masks.  ``every``: all parameters of the model.  ``candidates``: masks of
    what will stay, once ``Growing`` has begun.  ``rates``: learning rates by name.
    """

    tensors: Mapping[str, torch.Tensor]
    every: Mapping[str, torch.Tensor]
    step: int
    groups: Sequence[GroupMap] = ()
    candidates: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Regulariser:
    """Base; ``grouped`` needs coupled groups, and so a captured graph."""

    grouped: ClassVar[bool] = False

    @property
    def by_gradient(self) -> bool:
        """Whether the penalty's gradient is to be added (its proximal step is not taken)."""
        return True

    def begins(self, step: int) -> bool:
        """Whether it has to be known after ``step`` optimizer steps which elements will go in the end."""
        return False

    def penalty(self, scope: Scope) -> torch.Tensor | None:
        """The penalty, differentiable; None where there is none yet."""
        raise NotImplementedError(f"{type(self).__name__} does not define penalty()")

    def shrink(self, scope: Scope) -> None:
        """The proximal step, in place."""


@dataclass(frozen=True)
class _Norm(Regulariser):
    strength: float = 1e-4
    proximal: bool = False

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise InvalidOption(f"strength={self.strength!r}: give a positive number")

    @property
    def by_gradient(self) -> bool:
        """Not where the proximal step is taken."""
        return not self.proximal


@dataclass(frozen=True)
class L1(_Norm):
    """strength * sum |w| over the weights that have masks (Han et al., 2015, section 3.1)."""

    def penalty(self, scope: Scope) -> torch.Tensor | None:
        """The sum of absolute values."""
        return self.strength * _total([t.abs().sum() for t in scope.tensors.values()])

    def shrink(self, scope: Scope) -> None:
        """Soft thresholding: sign(w) max(|w| - lr * strength, 0)."""
        for name, tensor in scope.tensors.items():
            limit = scope.rates.get(name, 0.0) * self.strength
            tensor.copy_(tensor.sign() * (tensor.abs() - limit).clamp_min(0))


@dataclass(frozen=True)
class GroupLasso(_Norm):
    """strength * the sum of the L2 norms of all positions of all coupled groups.

    Wen et al., "Learning Structured Sparsity in Deep Neural Networks" (2016), eq. 2, where a position has
    all its elements in all parameters that hold it: they can only go together.
    """

    grouped: ClassVar[bool] = True

    def penalty(self, scope: Scope) -> torch.Tensor | None:
        """The sum of norms; its gradient at zero is zero."""
        squares = {n: t.square() for n, t in scope.every.items()}
        norms = []
        for group in scope.groups:
            sums = group.sums(squares)
            norms.append(torch.where(sums > 0, sums, 1).sqrt().where(sums > 0, 0).sum())
        return self.strength * _total(norms)

    def shrink(self, scope: Scope) -> None:
        """Positions of norm n are scaled by max(1 - lr * strength / n, 0), group after group."""
        for group in scope.groups:
            found = {scope.rates[weight] for weight, _, _ in group.members if weight in scope.rates}
            if len(found) > 1:
                raise InvalidOption(
                    f"{group.name}: its parameters have learning rates {sorted(found)}; a proximal step "
                    "needs one, so give them the same or use proximal=False"
                )
            limit = max(found, default=0.0) * self.strength
            norms = group.sums({n: scope.every[n].square() for n, _, _ in group.members}).sqrt()
            tiny = torch.finfo(norms.dtype).tiny
            group.scale(scope.every, (1 - limit / norms.clamp_min(tiny)).clamp_min(0))


@dataclass(frozen=True)
class Growing(Regulariser):
    """L2 decay that grows on what is to go: gradient lambda w; lambda is delta, 2 delta, ... ``ceiling``.

    Wang et al., "Neural Pruning via Growing Regularization" (2021), section 3.2 (GReg-1).  After ``start``
    steps the pattern picks what will go at the schedule's final sparsity; lambda grows by ``delta`` every
    ``every`` steps.  Cut with OneShot, once lambda is at its ceiling.
    """

    delta: float = 1e-4
    every: int = 10
    ceiling: float = 1.0
    start: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.delta <= self.ceiling and self.every >= 1 and self.start >= 0):
            raise InvalidOption(
                f"{self}: give 0 < delta <= ceiling, every >= 1 and start >= 0 (in optimizer steps)"
            )

    def begins(self, step: int) -> bool:
        """From ``start`` on."""
        return step >= self.start

    def factor(self, step: int) -> float:
        """Lambda after ``step`` optimizer steps."""
        if step < self.start:
            return 0.0
        return min(self.ceiling, self.delta * ((step - self.start) // self.every + 1))

    def penalty(self, scope: Scope) -> torch.Tensor | None:
        """lambda / 2 * the sum of squares of what is to go."""
        if scope.step < self.start or not scope.candidates:
            return None
        parts = [
            t.masked_fill(scope.candidates[n], 0).square().sum()
            for n, t in scope.tensors.items()
            if n in scope.candidates
        ]
        return 0.5 * self.factor(scope.step) * _total(parts)


def _total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if not parts:
        raise InvalidOption("there is nothing to regularise: no weight has a mask, or no group was found")
    return torch.stack([p.to(parts[0]) for p in parts]).sum()

"""Criteria that score single elements of weights, and add them up along axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsecc.errors import InvalidOption
from sparsecc.saliency.magnitude import Criterion, Scores, Unscored

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


@dataclass(frozen=True)
class Elementwise(Criterion):
    """Scores of elements, ``values``; a position of an axis has the sum of those that go with it."""

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """Score of every element, in the weight's shape; None where the criterion says nothing about it."""
        raise NotImplementedError(f"{type(self).__name__} does not define values()")

    def axes(self, name: str, weight: torch.Tensor, statistics: Any) -> frozenset[int]:
        """Axes whose positions the criterion scores: all."""
        return frozenset(range(weight.dim()))

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores | None]:
        """Sums of the scores of elements over all other axes."""
        scored = self.axes(name, weight, statistics)
        found = self.values(name, weight, statistics) if scored.intersection(axes) else None
        if found is None:
            return [None] * len(axes)
        if not all_finite(found):
            raise InvalidOption(
                f"{type(self).__name__}: scores of {name!r} are not finite; check weights and data for "
                "NaN and overflow, or give another saliency"
            )
        return [_summed(found, axis) if axis in scored else None for axis in axes]

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> npt.NDArray[Any]:
        """Scores of elements; raises Unscored for weights that the criterion says nothing about."""
        found = self.values(name, weight, statistics)
        if found is None:
            why = statistics.readings.why.get(name, "no product reads it as a matrix")
            raise Unscored(f"{type(self).__name__} says nothing about {name!r}: {why}")
        return np.asarray(found.detach().cpu().numpy())


def all_finite(values: torch.Tensor) -> bool:
    """Whether all elements are: extremes of NaN are NaN."""
    import torch

    return not values.numel() or all(bool(torch.isfinite(v)) for v in torch.aminmax(values))


def _summed(values: torch.Tensor, axis: int) -> Scores:
    other = [d for d in range(values.dim()) if d != axis]
    total = values.double().sum(other) if other else values.double()
    return total.detach().cpu().numpy().astype(np.float64)

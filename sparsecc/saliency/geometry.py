"""How far filters are from each other.

He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (2019),
section 3.3, eq. 4: the filter whose distances to all others add up to least can be replaced by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsecc.errors import InvalidOption
from sparsecc.saliency.magnitude import Criterion, Scores

if TYPE_CHECKING:
    import torch

#: distances that are worked on at a time
_CHUNK = 1 << 21


@dataclass(frozen=True)
class FPGM(Criterion):
    """Sum of the Euclidean distances of a slice of a weight to all other slices along the same axis.

    As for magnitude, all weights of a group count, those that write its positions and those that read them;
    where a group's position has several slices of one weight (a head), their scores add up.
    """

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores]:
        """Sums of distances between slices along each axis, in float64."""
        wide = weight.detach().double()
        return [_distances(wide.movedim(axis, 0).reshape(wide.shape[axis], -1)) for axis in axes]

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> npt.NDArray[Any]:
        """Raises InvalidOption: single weights have no geometry."""
        raise InvalidOption(
            "saliency 'fpgm' ranks whole filters, not single weights; use l1, l2 or another magnitude there"
        )


def _distances(rows: torch.Tensor) -> Scores:
    """Sum of distances of every row to all others, from their products: |a - b|^2 = a.a + b.b - 2 a.b."""
    centred = rows - rows.mean(0)  # distances stay, and less is lost where rows have much in common
    squares = centred.square().sum(1)
    sums = []
    step = max(1, _CHUNK // max(1, len(rows)))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        apart = squares[part, None] + squares - 2 * (centred[part] @ centred.T)
        apart.diagonal(start).zero_()
        sums.append(apart.clamp_(min=0).sqrt_().sum(1).cpu().numpy())
    return np.concatenate(sums) if sums else np.zeros(0)

"""Criteria that read what layers are fed with.

Those that score whole positions look at the layers that sum over them, since that is where a removed
position is missed; layers that only produce a position say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsecc.saliency.elementwise import Elementwise
from sparsecc.saliency.magnitude import Scores

if TYPE_CHECKING:
    import torch


def _per_element(statistics: Any, name: str, moment: str) -> torch.Tensor | None:
    found: torch.Tensor | None = statistics.per_element(name, moment)
    return found


@dataclass(frozen=True)
class _Read(Elementwise):
    """Scores along the axes that products sum over."""

    needs_data: ClassVar[bool] = True

    def axes(self, name: str, weight: torch.Tensor, statistics: Any) -> frozenset[int]:
        """The axis that is summed over; in a depthwise convolution no channel meets another one."""
        if name not in statistics.readings:
            return frozenset()
        reading = statistics.readings.of[name][0]
        depthwise = reading.is_conv and weight.shape[1] == 1 < reading.groups
        return frozenset() if depthwise else frozenset({reading.axis})


@dataclass(frozen=True)
class Wanda(_Read):
    """|w_ok| ||x_k|| (Sun et al., "A Simple and Effective Pruning Approach for LLMs", 2024, eq. 1).

    A whole position has sqrt(sum over o of w_ok^2) ||x_k||: by how much the outputs of the layers that read
    it change, on the data, as if positions were uncorrelated.
    """

    moments: ClassVar[tuple[str, ...]] = ("square",)

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """w^2 times the mean of x^2."""
        squares = statistics.per_element(name, "square")
        return None if squares is None else weight.detach().double().square() * squares

    def finish(self, total: Scores) -> Scores:
        """Root of the sum of squares."""
        return np.sqrt(total)


@dataclass(frozen=True)
class Activation(_Read):
    """Mean magnitude of what is read from a position (Molchanov et al., 2017, section 2.2)."""

    moments: ClassVar[tuple[str, ...]] = ("absolute",)

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """The mean of |x|, alike for all outputs."""
        return _per_element(statistics, name, "absolute")


@dataclass(frozen=True)
class APoZ(_Read):
    """Share of what is read from a position that is not zero.

    One minus the average percentage of zeros (Hu et al., "Network Trimming", 2016, eq. 1).
    """

    moments: ClassVar[tuple[str, ...]] = ("nonzero",)

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """The mean of x != 0, alike for all outputs."""
        return _per_element(statistics, name, "nonzero")


@dataclass(frozen=True)
class OBS(_Read):
    """w_k^2 / [H^-1]_kk, H the second moment of what is read (Hassibi and Stork, 1993, eq. 5).

    The error in the layer's outputs that is left when the other weights of the row are updated best.  H is
    dampened by ``damping`` times its mean diagonal.  A whole position has the sum over outputs: then all
    other positions of the layer are updated (Kurtic et al., "ZipLM", 2023, eq. 2, for single columns).
    """

    damping: float = 0.01
    moments: ClassVar[tuple[str, ...]] = ("hessian",)

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """w^2 / [H^-1]_kk."""
        from sparsecc.recovery.obs import inverse_diagonal

        found = statistics.moments(name, "hessian")
        if found is None:
            return None
        reading = statistics.readings.of[name][0]
        matrix = reading.matrix(weight.detach()).double()
        second = reading.completed(found.average("hessian").double())
        diagonal = inverse_diagonal(second, self.damping)
        return reading.stored(matrix.square() / diagonal[:, None], weight.shape)  # type: ignore[no-any-return]

    def finish(self, total: Scores) -> Scores:
        """Root of the sum of squared errors."""
        return np.sqrt(total)


__all__ = ["OBS", "APoZ", "Activation", "Wanda"]

"""Criteria that read gradients of a loss on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsecc.saliency.elementwise import Elementwise
from sparsecc.saliency.magnitude import Scores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Derived(Elementwise):
    """Scores made of a weight and what ``GRADIENTS`` calls ``gradient``."""

    needs_data: ClassVar[bool] = True
    gradient: ClassVar[str] = "gradient"

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """The score of every element."""
        return self.score(weight.detach().double(), statistics.gradient(name, self.gradient).double())

    def score(self, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """The score, element by element."""
        raise NotImplementedError(f"{type(self).__name__} does not define score()")


@dataclass(frozen=True)
class Taylor(_Derived):
    """|sum of g w| over everything that goes with a position, in all of its weights.

    The first-order estimate of how the loss changes (Molchanov et al., "Importance Estimation for Neural
    Network Pruning", 2019, eq. 8, on whole coupled groups); single elements have |g w|.
    """

    joint: ClassVar[bool] = True

    def score(self, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """g w, with its sign."""
        return found * weight

    def finish(self, total: Scores) -> Scores:
        """Magnitude of the sum."""
        return np.abs(total)

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> Any:
        """|g w|."""
        return np.abs(super().elements(name, weight, statistics))


@dataclass(frozen=True)
class SNIP(_Derived):
    """Sum of |g w| (Lee et al., "SNIP", 2019, eq. 5; without the normalisation, which changes no order)."""

    def score(self, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """|g w|."""
        return (found * weight).abs()


@dataclass(frozen=True)
class Fisher(_Derived):
    """Sum of g^2 w^2 / 2, g^2 averaged over batches (Theis et al., 2018, eq. 6).

    Batches of one sample give the empirical Fisher information; larger ones the square of mean gradients.
    """

    gradient: ClassVar[str] = "gradient_square"

    def score(self, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """g^2 w^2 / 2."""
        return found * weight.square() / 2


@dataclass(frozen=True)
class OBD(_Derived):
    """Sum of |h| w^2 / 2, h the diagonal of the Hessian (LeCun et al., "Optimal Brain Damage", 1990, eq. 4).

    The diagonal is Hutchinson's estimate from eight random probes a batch; its magnitude is taken because
    the loss of a trained model need not be at a minimum on every batch.
    """

    gradient: ClassVar[str] = "curvature"

    def score(self, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """|h| w^2 / 2."""
        return found.abs() * weight.square() / 2


@dataclass(frozen=True)
class GraSP(_Derived):
    """Sum of w (Hg): what stays is what the gradient flows through (Wang et al., "GraSP", 2020, eq. 8).

    The paper removes the largest -w (Hg); here larger scores are kept.
    """

    gradient: ClassVar[str] = "hessian_gradient"
    joint: ClassVar[bool] = True

    def score(self, weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """w (Hg)."""
        return found * weight


@dataclass(frozen=True)
class SynFlow(Elementwise):
    """Sum of |w| dR/d|w| (Tanaka et al., "Pruning neural networks without any data", 2020, eq. 1).

    R is the sum of the outputs of the model with the magnitudes of its weights, for an input of ones.  No
    data is read; the paper removes in many rounds, between which this has to be asked again.
    """

    needs_data: ClassVar[bool] = True

    def values(self, name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor | None:
        """|w| dR/d|w|."""
        found: torch.Tensor | None = statistics.flow.get(name)
        return found


__all__ = ["OBD", "SNIP", "Fisher", "GraSP", "SynFlow", "Taylor"]

"""Means and deviations of activations, as they are in the pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsecc.axes.analysis import Analysis
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass

if TYPE_CHECKING:
    from sparsecc.calibration import Statistics
    from sparsecc.recovery.norms import Estimated


@dataclass(frozen=True, kw_only=True)
class EstimatingPass(Pass):
    """New values of vectors, from what the model does on calibration data once all else is decided.

    ``include`` and ``exclude``: name patterns of weights or modules.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_names(self.include, self.exclude)

    def estimate(self, analysis: Analysis, statistics: Statistics) -> Estimated:
        """The new values."""
        raise NotImplementedError(f"{type(self).__name__} does not define estimate()")

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Actions that write the new values."""
        found = self.estimate(analysis, needed(saliency, type(self).__name__))
        return Choice({}, found.actions, found.skips)


@dataclass(frozen=True, kw_only=True)
class BatchNormReestimation(EstimatingPass):
    """Gives batch norms the mean and variance of what they read in the pruned model.

    Before: ``running_mean`` and ``running_var`` of the dense model.  After: those of all calibration batches
    together, layer by layer (Li et al., "EagleEye", 2020, section 3.3, without momentum).  Needs calibration
    data.
    """

    def estimate(self, analysis: Analysis, statistics: Statistics) -> Estimated:
        """New means and variances."""
        from sparsecc.recovery.norms import reestimate

        return reestimate(analysis, statistics, self.include, self.exclude)


@dataclass(frozen=True, kw_only=True)
class BiasCorrection(EstimatingPass):
    """Gives every layer with a bias the mean outputs that it has in the original model.

    Before: ``W' x' + b``.  After: ``W' x' + b'`` with ``b' = b + mean(W x) - mean(W' x')`` over calibration
    data, layer by layer (Nagel et al., "Data-Free Quantization", 2019, section 4.2, measured, not derived).
    Needs calibration data.
    """

    def estimate(self, analysis: Analysis, statistics: Statistics) -> Estimated:
        """New biases."""
        from sparsecc.recovery.norms import correct_biases

        return correct_biases(analysis, statistics, self.include, self.exclude)

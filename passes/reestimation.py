"""Means and deviations of activations, as they are in the pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecc.axes.analysis import Analysis
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class BatchNormReestimation(Pass):
    """Gives batch norms the mean and variance of what they read in the pruned model.

    Before: ``running_mean`` and ``running_var`` of the dense model.  After: those of all calibration batches
    together, layer by layer (Li et al., "EagleEye", 2020, section 3.3, without momentum).  ``include`` and
    ``exclude``: name patterns.  Needs calibration data.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_names(self.include, self.exclude)

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """New means and variances."""
        from sparsecc.recovery.norms import reestimate

        statistics = needed(saliency, type(self).__name__)
        found = reestimate(analysis, statistics, self.include, self.exclude)
        return Choice({}, found.actions, found.skips)


@dataclass(frozen=True, kw_only=True)
class BiasCorrection(Pass):
    """Gives every layer with a bias the mean outputs that it has in the original model.

    Before: ``W' x' + b``.  After: ``W' x' + b'`` with ``b' = b + mean(W x) - mean(W' x')`` over calibration
    data, layer by layer (Nagel et al., "Data-Free Quantization", 2019, section 4.2, measured, not derived).
    ``include`` and ``exclude``: name patterns.  Needs calibration data.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_names(self.include, self.exclude)

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """New biases."""
        from sparsecc.recovery.norms import correct_biases

        statistics = needed(saliency, type(self).__name__)
        found = correct_biases(analysis, statistics, self.include, self.exclude)
        return Choice({}, found.actions, found.skips)

"""Passes that need calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsecc.errors import InvalidOption
from sparsecc.saliency import Saliency

if TYPE_CHECKING:
    from sparsecc.calibration import Statistics


def needed(saliency: Saliency | None, name: str) -> Statistics:
    """The statistics that a pass works with; raises InvalidOption without calibration data."""
    if saliency is None or saliency.statistics is None:
        raise InvalidOption(
            f"{name} needs calibration data: sparsecc.prune(model, inputs, recipe=..., calibration=[...]), "
            "with example inputs to run on"
        )
    found: Statistics = saliency.statistics
    return found

"""Axis terms, the rules of every operator family, and the analysis that follows from them."""

from sparsecc.axes import (
    attention,
    conv,
    elementwise,
    indexing,
    layout,
    linear,
    norm,
    recurrent,
    reduce,
    signal,
    similarity,
)
from sparsecc.axes.analysis import Analysis, Frozen, Group
from sparsecc.axes.registry import RULES, rule

_FAMILIES = (
    attention,
    conv,
    elementwise,
    indexing,
    layout,
    linear,
    norm,
    recurrent,
    reduce,
    signal,
    similarity,
)

__all__ = ["RULES", "Analysis", "Frozen", "Group", "rule"]

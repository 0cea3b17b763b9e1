"""Axis terms, the rules of every operator family, and the analysis that follows from them."""

from sparsecc.axes import (
    attention,
    conv,
    elementwise,
    fused,
    heads,
    indexing,
    layout,
    linear,
    norm,
    quant,
    recurrent,
    reduce,
    routing,
    scatter,
    signal,
    similarity,
)
from sparsecc.axes.analysis import Analysis, Frozen, Group
from sparsecc.axes.registry import RULES, rule

_FAMILIES = (
    attention,
    conv,
    elementwise,
    fused,
    heads,
    indexing,
    layout,
    linear,
    norm,
    quant,
    recurrent,
    reduce,
    routing,
    scatter,
    signal,
    similarity,
)

__all__ = ["RULES", "Analysis", "Frozen", "Group", "rule"]

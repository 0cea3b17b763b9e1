"""Axis terms, the rules of every operator family, and the analysis that follows from them."""

from sparsecc.axes import attention, conv, elementwise, layout, linear, norm, recurrent, reduce
from sparsecc.axes.analysis import Analysis, Frozen, Group
from sparsecc.axes.registry import RULES, rule

_FAMILIES = (attention, conv, elementwise, layout, linear, norm, recurrent, reduce)

__all__ = ["RULES", "Analysis", "Frozen", "Group", "rule"]

"""How much worse a model gets when a group alone loses positions, and what to remove from that."""

from sparsecc.probing.measure import LOSSES, SHARES, Probe, measured, tried
from sparsecc.probing.table import Line, Sensitivity

__all__ = ["LOSSES", "SHARES", "Line", "Probe", "Sensitivity", "measured", "tried"]

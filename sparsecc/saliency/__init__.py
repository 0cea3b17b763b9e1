"""Saliency: how much each position of a coupled group matters."""

from sparsecc.saliency.groups import NORMALISERS, REDUCTIONS, Saliency, group_scores
from sparsecc.saliency.magnitude import L1, L2, Criterion, Lp, Random
from sparsecc.saliency.names import CRITERIA, criterion

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "NORMALISERS",
    "REDUCTIONS",
    "Criterion",
    "Lp",
    "Random",
    "Saliency",
    "criterion",
    "group_scores",
]

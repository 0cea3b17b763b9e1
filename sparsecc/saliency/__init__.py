"""Saliency: how much each position of a coupled group matters."""

from sparsecc.saliency.geometry import FPGM
from sparsecc.saliency.groups import NORMALISERS, REDUCTIONS, Saliency, group_scores
from sparsecc.saliency.magnitude import L1, L2, Criterion, LInf, Lp, Random
from sparsecc.saliency.names import CRITERIA, criterion
from sparsecc.saliency.scales import NormScale

__all__ = [
    "CRITERIA",
    "FPGM",
    "L1",
    "L2",
    "NORMALISERS",
    "REDUCTIONS",
    "Criterion",
    "LInf",
    "Lp",
    "NormScale",
    "Random",
    "Saliency",
    "criterion",
    "group_scores",
]

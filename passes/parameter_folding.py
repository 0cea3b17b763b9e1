"""Weights that the model computes anew at every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.folding import folding
from sparsecc.saliency import Saliency
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class ParameterFolding(Pass):
    """Stores what is computed over whole axes of parameters, so that it can be pruned like a weight.

    Before: ``weight[64,32,3,3] -> standardise -> conv``, where no input channel can go, because every mean
    and variance is taken over all of them.  After: ``weight_folded[64,32,3,3] -> conv``.  The result equals
    the original; what is trained afterwards are the stored values.  A PyTorch model comes back as a graph
    module, because its class computes the weight.  Goes alone: prune what comes of it.
    """

    mode: ClassVar[Literal["prune", "slim"]] = "slim"
    turn: ClassVar[int] = 9

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Every value that can be stored."""
        if analysis.given.kept or analysis.given.actions:
            raise InvalidOption(
                "ParameterFolding goes alone: fold first (sparsecc.fold), then slim the result"
            )
        found = folding(analysis)
        return Choice({}, found.folds, found.skips)

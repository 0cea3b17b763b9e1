"""Channels that hold zeros or constants, or that nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsecc.axes.analysis import Analysis
from sparsecc.saliency import Saliency
from sparsecc.slimming import slimming
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class DeadChannelElimination(Pass):
    """Removes positions without changing what the model computes.

    Before: ``conv1[64,3,3,3] -> relu -> conv2[64,64,1,1] + bias2``, where filters 5 and 9 of conv1 are
    zero and have biases b5 and b9.  After: ``conv1[62,3,3,3] -> relu -> conv2[64,62,1,1] + bias2'``
    with ``bias2' = bias2 + conv2[:, 5] relu(b5) + conv2[:, 9] relu(b9)``.

    A constant other than zero that is read beside zero padding stays, because a bias cannot stand
    for it at the borders, and so does one that no bias can take.  The result equals the original in
    evaluation mode.
    """

    mode: ClassVar[Literal["prune", "slim"]] = "slim"

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Everything that can go."""
        found = slimming(analysis)
        return Choice(found.kept, found.writes, found.skips)

"""Whole experts of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsecc.axes.analysis import Analysis
from sparsecc.plan import Skip
from sparsecc.removal import RemovalPass
from sparsecc.saliency import Saliency
from sparsecc.selection import select
from sparsecc.transform import Choice


@dataclass(frozen=True, kw_only=True)
class ExpertPruning(RemovalPass):
    """Removes the least salient experts, found from the graph: their matrices and their rows of the router.

    Experts are positions of an axis along which the matrices of a parameter are stacked, and along which a
    router picks the best (``topk``) or weighs all (``softmax``).  A removed expert is one whose logit is
    minus infinity: the router chooses among the others, and their weights add up to what they should.

    Before: ``router[8,64] up[8,256,64] down[8,64,256]``, two of eight for every token.  After, with
    ``sparsity=0.5``: ``router[4,64] up[4,256,64] down[4,64,256]``, two of four.

    ``min_keep`` experts stay at least, and never fewer than the router picks.  The other options are those of
    ``ChannelPruning``.  Experts whose positions are read for anything else (``for`` loops over experts,
    comparisons with their numbers, limits within groups of experts), and such as are modules of a list, are
    left alone, with the reason.
    """

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Least salient experts of every router."""
        chosen = select(analysis, ("expert",), include=self.include, exclude=self.exclude)
        found = self.removed(analysis, saliency, chosen)
        return replace(found, skips=(*found.skips, *_left(analysis)))


def _left(analysis: Analysis) -> tuple[Skip, ...]:
    """Routers whose experts stay, and a word where there are none at all."""
    routed = {str(f.reason): f for f in analysis.frozen if (f.weight, f.axis) in analysis.routers}
    found = [Skip(f"{f.weight}[{f.axis}]", str(f.reason)) for f in routed.values()]
    if not found and not any(g.kind == "expert" for g in analysis.groups):
        return (Skip("experts", "no router over matrices stacked in one parameter was found"),)
    return tuple(found)

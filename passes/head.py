"""Attention heads, key-value groups, and the dimensions inside heads."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.axes.analysis import Analysis
from sparsecc.removal import RemovalPass
from sparsecc.saliency import Saliency
from sparsecc.selection import select
from sparsecc.transform import Choice


@dataclass(frozen=True, kw_only=True)
class HeadPruning(RemovalPass):
    """Removes the least salient heads of every attention, found from the graph.

    Heads are the free batch positions of a product of two activations.  With grouped queries the
    positions are key-value groups and query slots, so the ratio stays whole by construction.

    Before: ``q[768,768] k[768,768] v[768,768] o[768,768]``, 12 heads of 64.  After, with
    ``sparsity=0.5``: ``q[384,768] k[384,768] v[384,768] o[768,384]``, 6 heads.

    ``head_dims`` also removes dimensions inside heads (the softmax scale stays what it was).  The
    other options are those of ``ChannelPruning``.
    """

    heads: bool = True
    head_dims: bool = False

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Least salient heads (and head dimensions) of every attention."""
        kinds = (*(("head",) if self.heads else ()), *(("head_dim",) if self.head_dims else ()))
        chosen = select(analysis, kinds, include=self.include, exclude=self.exclude)
        return self.removed(analysis, saliency, chosen)

"""Channels, filters, neurons and coupled residual widths."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.axes.analysis import Analysis
from sparsecc.removal import RemovalPass
from sparsecc.saliency import Saliency
from sparsecc.selection import select
from sparsecc.transform import Choice


@dataclass(frozen=True, kw_only=True)
class ChannelPruning(RemovalPass):
    """Removes the least salient channels of every coupled group.

    Before: ``conv1[64,3,3,3] -> bn1[64] -> conv2[64,64,3,3]``.  After, with ``sparsity=0.5``:
    ``conv1[32,3,3,3] -> bn1[32] -> conv2[64,32,3,3]``; widths that a residual sum couples go together.

    ``sparsity``: share of positions removed, 0 <= sparsity < 1.  ``allocation``: ``uniform``, ``global``,
    ``isomorphic``, one that is measured (``sensitivity``, ``sensitivity:kl``, ``sensitivity:loss``; of the
    groups' parameters ``sparsity`` goes then), or shares by group (see ``RemovalPass``).  ``multiple_of``:
    widths are rounded up to it.  ``min_keep``: positions that every group keeps.  ``include`` and
    ``exclude``: name patterns of weights or modules.  ``residual``: whether widths that residual sums share
    may shrink.
    """

    residual: bool = True

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Least salient positions of every channel group that may be touched."""
        chosen = select(
            analysis, ("channel",), include=self.include, exclude=self.exclude, residual=self.residual
        )
        return self.removed(analysis, saliency, chosen)

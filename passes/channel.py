"""Channels, filters, neurons and coupled residual widths."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.allocation import Allocation, allocate
from sparsecc.axes.analysis import Analysis
from sparsecc.saliency import Saliency
from sparsecc.selection import Selected, check_options, select
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class ChannelPruning(Pass):
    """Removes the least salient channels of every coupled group.

    Before: ``conv1[64,3,3,3] -> bn1[64] -> conv2[64,64,3,3]``.  After, with ``sparsity=0.5``:
    ``conv1[32,3,3,3] -> bn1[32] -> conv2[64,32,3,3]``; widths that a residual sum couples go together.

    ``sparsity``: share of positions removed, 0 <= sparsity < 1.  ``allocation``: ``uniform``, ``global`` or
    ``isomorphic``.  ``multiple_of``: widths are rounded up to it.  ``min_keep``: positions that every
    group keeps.  ``include`` and ``exclude``: name patterns of weights or modules.  ``residual``:
    whether widths that residual sums share may shrink.
    """

    sparsity: float = 0.5
    allocation: Allocation = "uniform"
    multiple_of: int = 1
    min_keep: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    residual: bool = True

    def __post_init__(self) -> None:
        check_options(
            self.sparsity, self.multiple_of, self.min_keep, self.allocation, self.include, self.exclude
        )

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Least salient positions of every channel group that may be touched."""
        chosen: Selected = select(
            analysis, ("channel",), include=self.include, exclude=self.exclude, residual=self.residual
        )
        ranking = saliency or Saliency(analysis)
        groups, unknown = ranking.rankable(chosen.groups)
        kept = allocate(
            groups,
            ranking,
            self.sparsity,
            allocation=self.allocation,
            multiple_of=self.multiple_of,
            min_keep=self.min_keep,
        )
        return Choice(kept, (), (*chosen.skips, *unknown))

"""What passes share that remove the least salient positions of groups."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.allocation import Allocation, allocate
from sparsecc.axes.analysis import Analysis
from sparsecc.saliency import Saliency
from sparsecc.selection import Selected, check_options
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class RemovalPass(Pass):
    """``sparsity`` of the positions go, those that matter least.

    ``allocation``: ``uniform``, ``global`` or ``isomorphic``.  ``multiple_of``: widths are rounded up to it.
    ``min_keep``: positions that every group keeps.  ``include`` and ``exclude``: name patterns of weights or
    modules.
    """

    sparsity: float = 0.5
    allocation: Allocation = "uniform"
    multiple_of: int = 1
    min_keep: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(
            self.sparsity, self.multiple_of, self.min_keep, self.allocation, self.include, self.exclude
        )

    def removed(self, analysis: Analysis, saliency: Saliency | None, chosen: Selected) -> Choice:
        """Least salient positions of the groups that may be touched; others with the reason."""
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

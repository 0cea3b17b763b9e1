"""N:M patterns of single elements along contraction axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM
from sparsecc.patterns.orders import better_orders, with_orders
from sparsecc.patterns.survey import Scores, Survey, masked, survey
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class NMPattern(Pass):
    """Keeps the N most salient of every M consecutive weights along the axis that a layer sums over.

    Before: ``linear[2,8]`` with rows ``[9 1 8 2 3 7 4 6]``.  After, with ``pattern="2:4"``:
    ``[9 0 8 0 0 7 0 6]``.  Linear layers and matrix products are patterned along their inputs,
    convolutions along their input channels at every position of the kernel.  The weights keep their shapes;
    those that have the pattern already stay bit for bit.

    ``pattern``: N:M, 1 <= N < M.  ``include`` and ``exclude``: name patterns of weights or modules.
    ``permute``: first reorder the positions of coupled groups (channels, neurons, residual widths, head
    dimensions) so that more magnitude survives; the reordered model computes the same function.
    Groups of excluded weights keep their order, and those along which a layer has the pattern already.
    """

    pattern: str = "2:4"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    permute: bool = False
    turn: ClassVar[int] = 1

    def __post_init__(self) -> None:
        NM.parse(self.pattern)
        check_names(self.include, self.exclude)
        if not isinstance(self.permute, bool):
            raise InvalidOption(f"permute={self.permute!r}: give True or False")

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Masks of every layer that can have the pattern and lacks it."""
        scores = (saliency or Saliency(analysis)).elements
        found = self._survey(analysis, scores)
        orders = better_orders(analysis, found, exclude=self.exclude) if self.permute else {}
        if orders:
            found = self._survey(with_orders(analysis, orders), scores)
        masks, told = masked(found)
        return Choice(orders, masks, found.skips, told)

    def _survey(self, analysis: Analysis, scores: Scores) -> Survey:
        return survey(analysis, NM.parse(self.pattern), scores, include=self.include, exclude=self.exclude)

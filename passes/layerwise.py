"""Single elements, chosen layer by layer from what each layer reads in the model as pruned so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.terms import Kept
from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM
from sparsecc.patterns.orders import better_orders, with_orders
from sparsecc.patterns.survey import survey
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass, check_share

if TYPE_CHECKING:
    from sparsecc.recovery.layerwise import Method


@dataclass(frozen=True, kw_only=True)
class LayerwisePass(Pass):
    """Options of passes that prune layer by layer.

    ``sparsity``: share of the elements that goes, unless ``pattern`` is N:M.  ``include`` and ``exclude``:
    name patterns of weights or modules.  ``permute``: first reorder positions of coupled groups, as
    ``NMPattern`` does, so that the pattern keeps more of what the saliency of the run calls large.
    """

    sparsity: float = 0.5
    pattern: str = ""
    permute: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        if self.pattern:
            NM.parse(self.pattern)
        if not isinstance(self.permute, bool) or (self.permute and not self.pattern):
            raise InvalidOption(f"permute={self.permute!r}: give True or False, and True only with a pattern")
        check_names(self.include, self.exclude)

    def method(self) -> Method:
        """What is done to a layer."""
        raise NotImplementedError(f"{type(self).__name__} does not define method()")

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Masks and new values of every layer that may be touched."""
        from sparsecc.recovery.layerwise import prune_layers

        statistics = needed(saliency, type(self).__name__)
        orders = self._orders(analysis, saliency) if self.permute else {}
        found = prune_layers(
            with_orders(analysis, orders) if orders else analysis,
            statistics,
            self.method(),
            include=self.include,
            exclude=self.exclude,
        )
        return Choice(orders, found.actions, found.skips, found.patterns)

    def _orders(self, analysis: Analysis, saliency: Saliency | None) -> dict[str, Kept]:
        scores, pattern = (saliency or Saliency(analysis)).elements, NM.parse(self.pattern)
        layers = survey(analysis, pattern, scores, include=self.include, exclude=self.exclude)
        return better_orders(analysis, layers, exclude=self.exclude)


@dataclass(frozen=True, kw_only=True)
class SparseGPT(LayerwisePass):
    """Removes elements of weights and updates the others, layer by layer (Frantar and Alistarh, 2023).

    Before: ``linear[2,8]`` with rows ``[9 1 8 2 3 7 4 6]``.  After, with ``pattern="2:4"``:
    ``[9.2 0 8.1 0 0 7.3 0 5.9]``: which elements go, and what the others become, follows from what the
    layer reads on the calibration data, in the model as pruned so far.

    ``sparsity`` is the share of every block of 128 columns.  ``damping``: what is added to the diagonal of
    second moments, as a share of its mean.  Needs calibration data; all batches are held in memory, with
    what they have become at the layer that is worked on.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise InvalidOption(f"damping={self.damping!r}: give a positive share, such as 0.01")

    def method(self) -> Method:
        """The surgeon, for a pattern or a share."""
        from sparsecc.recovery.layerwise import surgery
        from sparsecc.recovery.obs import patterned, unstructured

        if self.pattern:
            nm = NM.parse(self.pattern)
            return surgery(patterned(nm.n, nm.m), nm.m, str(nm), self.damping)
        return surgery(unstructured(self.sparsity), 1, "unstructured", self.damping)


@dataclass(frozen=True, kw_only=True)
class Wanda(LayerwisePass):
    """Keeps the elements of every row with the highest |w| ||x||, layer by layer (Sun et al., 2024).

    Before: ``linear[2,8]`` with rows ``[9 1 8 2 3 7 4 6]``.  After, with ``pattern="2:4"`` and inputs of
    equal norms: ``[9 0 8 0 0 7 0 6]``.  Norms are those of what the layer reads on the calibration data in
    the model as pruned so far; with ``saliency="wanda"`` other passes take those of the original model.

    ``sparsity`` is the share of every row.  Needs calibration data.
    """

    def method(self) -> Method:
        """Selection, for a pattern or a share."""
        from sparsecc.recovery.layerwise import selection
        from sparsecc.recovery.obs import highest_of_groups, lowest_of_rows

        if self.pattern:
            nm = NM.parse(self.pattern)
            return selection(highest_of_groups(nm.n, nm.m), nm.m, str(nm))
        return selection(lowest_of_rows(self.sparsity), 1, "unstructured")

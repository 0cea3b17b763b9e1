"""Single elements, with updates of those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass, check_share


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Pass):
    """Removes elements of weights and updates the others, layer by layer (Frantar and Alistarh, 2023).

    Before: ``linear[2,8]`` with rows ``[9 1 8 2 3 7 4 6]``.  After, with ``pattern="2:4"``:
    ``[9.2 0 8.1 0 0 7.3 0 5.9]``: which elements go, and what the others become, follows from what the
    layer reads on the calibration data, in the model as pruned so far.

    ``sparsity``: share of the elements of every block of 128 columns that goes, unless ``pattern`` is
    N:M.  ``damping``: what is added to the diagonal of second moments, as a share of its mean.  ``include``
    and ``exclude``: name patterns of weights or modules.  Needs calibration data; all batches are held in
    memory, with what they have become at the layer that is worked on.
    """

    sparsity: float = 0.5
    pattern: str = ""
    damping: float = 0.01
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        if self.pattern:
            NM.parse(self.pattern)
        if not self.damping > 0:
            raise InvalidOption(f"damping={self.damping!r}: give a positive share, such as 0.01")
        check_names(self.include, self.exclude)

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Masks and new values of every layer that may be touched."""
        from sparsecc.recovery.obs import patterned, unstructured
        from sparsecc.recovery.sparse_gpt import Wanted, sparse_gpt

        statistics = needed(saliency, type(self).__name__)
        if self.pattern:
            nm = NM.parse(self.pattern)
            wanted = Wanted(patterned(nm.n, nm.m), nm.m, str(nm), self.damping)
        else:
            wanted = Wanted(unstructured(self.sparsity), 1, "elements", self.damping)
        found = sparse_gpt(analysis, statistics, wanted, include=self.include, exclude=self.exclude)
        return Choice({}, found.actions, found.skips, found.patterns)

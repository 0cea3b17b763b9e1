"""Single weights anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.patterns.masking import MaskingPass
from sparsecc.patterns.units import Units


@dataclass(frozen=True, kw_only=True)
class ElementPruning(MaskingPass):
    """Zeroes the least salient single weights of layers that sum products.

    Before: ``linear[2,4]`` with rows ``[9 1 8 2]`` and ``[3 7 4 6]``.  After, with ``sparsity=0.5``:
    ``[9 0 8 0]`` and ``[0 7 0 6]``.  The weights keep their shapes (Han et al., 2015, section 3).

    ``sparsity``: share of weights that are zero afterwards, 0 <= sparsity < 1; those that were zero before
    count, those that other passes remove do not.  ``scope``: weights are compared within their ``layer``,
    within their output ``row`` (Sun et al., "A Simple and Effective Pruning Approach for Large Language
    Models", 2024, section 3), or ``global``; then the saliency's normaliser makes layers comparable
    (``lamp``: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, section 3).
    ``densities``: ``uniform``, or ``erk`` (Evci et al., 2020, appendix A).  ``include`` and ``exclude``:
    name patterns of weights or modules.
    """

    @property
    def units(self) -> Units:
        """Single elements."""
        return Units()

    @property
    def pattern(self) -> str:
        """What the zeros are called in reports."""
        return "unstructured"

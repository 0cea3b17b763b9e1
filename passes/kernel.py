"""Whole kernels of convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecc.patterns.layers import Layer
from sparsecc.patterns.masking import BlockMaskingPass
from sparsecc.patterns.units import Units


@dataclass(frozen=True, kw_only=True)
class KernelPruning(BlockMaskingPass):
    """Zeroes the least salient kernels of convolutions: all K x K weights between two channels.

    Before: ``conv[64,32,3,3]``, 2,048 kernels of 9 weights.  After, with ``sparsity=0.5``: 1,024 of them are
    zero, and the weight keeps its shape (Mao et al., "Exploring the Regularity of Sparse Structure in
    Convolutional Neural Networks", 2017, section 3.1).

    ``scope="row"`` compares the kernels of one filter.  ``reduction``: how a kernel's element scores become
    one: ``mean``, ``sum`` or ``max``.  The other options are those of ``ElementPruning``, for kernels.
    """

    @property
    def units(self) -> Units:
        """Kernels."""
        return Units(places=None)

    @property
    def pattern(self) -> str:
        """What the zeros are called in reports."""
        return "kernels"

    def refusal(self, layer: Layer, shape: tuple[int, ...]) -> str:
        """Layers without kernels are left alone."""
        if layer.kernel is not None and math.prod(shape[d] for d in layer.kernel) == 1:
            return "it has no kernels of several weights; ElementPruning takes single ones"
        return super().refusal(layer, shape)

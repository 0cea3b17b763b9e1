"""Blocks, rows and columns of weight matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsecc.errors import InvalidOption
from sparsecc.patterns.masking import BlockMaskingPass
from sparsecc.patterns.units import Units


@dataclass(frozen=True, kw_only=True)
class BlockPruning(BlockMaskingPass):
    """Zeroes the least salient blocks of weight matrices (Gray et al., "GPU Kernels for Block-Sparse
    Weights", 2017; Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016, section 3).

    Before: ``linear[2,4]`` with rows ``[9 1 8 2]`` and ``[3 7 4 6]``.  After, with ``block=(2, 2)``:
    ``[9 1 0 0]`` and ``[3 7 0 0]`` (equal blocks: the first stays).  The weights keep their shapes.

    ``block``: output rows by positions that the sums run over, as the product sees the weight.  Blocks of a
    convolution lie in its output and input channels at one place of the kernel; ``(n, "all")`` spans the
    kernel too: n whole rows, and ``("all", m)`` m whole columns.  Layers that are not made of whole blocks
    are left dense, with the reason.  ``reduction``: how a block's element scores become one: ``mean``,
    ``sum`` or ``max``.  The other options are those of ``ElementPruning``, for blocks.
    """

    block: tuple[int | str, int | str] = (4, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        block: Any = self.block
        if not isinstance(block, tuple) or len(block) != 2 or not all(_is_size(n) for n in block):
            raise InvalidOption(
                f"block={block!r}: give (rows, columns), such as (4, 4), (1, 'all') or ('all', 1)"
            )
        if block in ((1, 1), ("all", "all")):
            raise InvalidOption(f"block={block!r}: use {_INSTEAD[block]}")
        if block[1] == "all" and self.scope == "row":
            raise InvalidOption(
                f"block={block!r} with scope='row': a row has one such block; use scope='layer'"
            )

    @property
    def units(self) -> Units:
        """Blocks; whole rows span the kernel."""
        rows, columns = (None if n == "all" else int(n) for n in self.block)
        return Units(rows, None if columns is None else 1, columns)

    @property
    def pattern(self) -> str:
        """What the zeros are called in reports."""
        rows, columns = self.block
        return _NAMES.get((rows, columns), f"{rows}x{columns} blocks")


_INSTEAD: dict[Any, str] = {
    (1, 1): "ElementPruning for single elements",
    ("all", "all"): "DepthPruning for whole blocks of layers",
}
_NAMES: dict[Any, str] = {(1, "all"): "rows", ("all", 1): "columns"}


def _is_size(value: Any) -> bool:
    return value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value > 0)

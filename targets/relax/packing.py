"""2:4 weights in the order in which the functions for processors read them.

    W [out, k] -> values [rows, k/4, 2], index [rows, k/4] (uint8)

``index`` holds ``index0 | index1 << 2`` of one group of four columns, ascending.  Rows are padded with zeros
to a multiple of ``ROWS``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsecc.targets.relax.product import GROUP, KEPT, Array

ROWS = 4
"""Output features that a function computes at one time."""


def pack_rows(matrix: Array) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Values and index of a 2:4 matrix [out, k] (k a multiple of 4), of any element type."""
    out, k = matrix.shape
    padded = np.zeros((-(-out // ROWS) * ROWS, k), matrix.dtype)
    padded[:out] = matrix
    groups = padded.reshape(len(padded), k // GROUP, GROUP)
    kept = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :KEPT], axis=-1)
    index = (kept[..., 0] | kept[..., 1] << 2).astype(np.uint8)
    return np.take_along_axis(groups, kept, -1), index

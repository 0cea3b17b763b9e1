"""N:M patterns: at most N of every M consecutive weights along the contraction axis are not zero.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (2021), section 3;
Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), section 3, for 2:4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecc.errors import InvalidOption

Array = npt.NDArray[Any]
_TEXT = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` of every ``m`` consecutive elements are not zero, 1 <= n < m."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> NM:
        """Read ``"2:4"``; raises InvalidOption for anything else.

        >>> NM.parse("2:4")
        NM(n=2, m=4)
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or not int(match[1]) < int(match[2]):
            raise InvalidOption(
                f"pattern={text!r}: give N:M with 1 <= N < M, such as 2:4 (2 of 4 weights are kept)"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def holds(self, weight: Array, axis: int) -> bool:
        """Whether a weight has the pattern along ``axis`` (-0.0 is a zero)."""
        counts = np.count_nonzero(self._groups(weight, axis), axis=-1)
        return bool((counts <= self.n).all())

    def keep(self, scores: Array, axis: int) -> npt.NDArray[np.bool_]:
        """The N elements with the highest scores of every group along ``axis``; of equal ones the first."""
        groups = self._groups(scores, axis)
        first = np.argsort(-groups, axis=-1, kind="stable")[..., : self.n]
        kept = np.zeros(groups.shape, bool)
        np.put_along_axis(kept, first, True, axis=-1)
        moved = kept.reshape(*groups.shape[:-2], -1)
        return np.ascontiguousarray(np.moveaxis(moved, -1, axis))

    def fits(self, size: int) -> bool:
        """Whether an axis of ``size`` positions is made of whole groups."""
        return size > 0 and size % self.m == 0

    def _groups(self, array: Array, axis: int) -> Array:
        moved = np.moveaxis(array, axis, -1)
        return moved.reshape(*moved.shape[:-1], -1, self.m)

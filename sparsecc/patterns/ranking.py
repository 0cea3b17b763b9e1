"""Which units of which layers go: the least salient ones of every row, every layer, or all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparsecc.patterns.nm import Array
from sparsecc.patterns.units import Keep


def count(size: int, share: float) -> int:
    """How many of ``size`` go: never more than that share of them.

    >>> count(10, 0.3), count(10, 0.35)
    (3, 3)
    """
    return int(np.floor(size * share + 1e-6))


def least(scores: Array, number: int) -> Keep:
    """The ``number`` lowest of all scores; of equal ones the last.

    >>> least(np.array([3, 1, 2, 1]), 1)
    array([False, False, False,  True])
    """
    flat = scores.reshape(-1)
    if not number:
        return np.zeros(scores.shape, bool)
    bar = np.partition(flat, number - 1)[number - 1]
    lowest: Keep = flat < bar
    equal = np.flatnonzero(flat == bar)
    lowest[equal[len(equal) - (number - np.count_nonzero(lowest)) :]] = True
    return lowest.reshape(scores.shape)


def least_of_rows(scores: Array, number: int) -> Keep:
    """The ``number`` lowest scores of every row of ``[rows, ...]``; of equal ones the last."""
    flat = scores.reshape(len(scores), -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    lowest = np.zeros(flat.shape, bool)
    np.put_along_axis(lowest, order[:, flat.shape[1] - number :], True, axis=1)
    return lowest.reshape(scores.shape)


def _of_layers(scores: Sequence[Array], shares: Sequence[float]) -> list[Keep]:
    return [least(s, count(s.size, share)) for s, share in zip(scores, shares, strict=True)]


def _of_rows(scores: Sequence[Array], shares: Sequence[float]) -> list[Keep]:
    out = []
    for grid, share in zip(scores, shares, strict=True):
        rows = grid.reshape(-1, *grid.shape[2:])
        out.append(least_of_rows(rows, count(rows[0].size if len(rows) else 0, share)).reshape(grid.shape))
    return out


def _of_all(scores: Sequence[Array], shares: Sequence[float]) -> list[Keep]:
    if not scores:
        return []
    flat = np.concatenate([s.reshape(-1) for s in scores])
    chosen = np.split(least(flat, count(flat.size, shares[0])), np.cumsum([s.size for s in scores])[:-1])
    return [part.reshape(s.shape) for part, s in zip(chosen, scores, strict=True)]


#: what is compared with each other -> the units that go, of scores ``[matrices, rows, places, channels]``
SCOPES: dict[str, Callable[[Sequence[Array], Sequence[float]], list[Keep]]] = {
    "layer": _of_layers,
    "row": _of_rows,
    "global": _of_all,
}

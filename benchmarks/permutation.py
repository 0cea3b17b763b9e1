"""How much magnitude 2:4 keeps without and with another order of the columns, and how long finding it takes.

``python -m benchmarks.permutation`` prints two tables: tiny matrices beside the optimum of an exhaustive
search, and larger ones beside a plain greedy exchange of columns (Pool and Yu, NeurIPS 2021, section 4: the
best exchange of two columns of different stripes, again and again), written here without any of our tricks.
Times are CPU-seconds of one thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecc.patterns.nm import NM
from sparsecc.patterns.permutation import retained, search
from sparsecc.report import table

Scores = npt.NDArray[np.float32]
Order = npt.NDArray[np.intp]

PATTERN = NM(2, 4)
TINY = ((4, 8), (16, 8), (8, 12), (32, 12))
LARGE = ((64, 128), (128, 128), (384, 384), (384, 1536), (768, 768), (768, 3072))
#: columns up to which the plain exchange is run
GREEDY = 128


def matrix(shape: tuple[int, int], seed: int = 0) -> Scores:
    """Magnitudes of a Gaussian matrix whose rows and columns differ in scale, as in trained layers."""
    random = np.random.default_rng(seed)
    rows, columns = (np.exp(0.3 * random.standard_normal(n)) for n in shape)
    values: Scores = np.abs(random.standard_normal(shape) * rows[:, None] * columns).astype(np.float32)
    return values


def optimum(scores: Scores) -> float:
    """The most that any order keeps: all ways to deal the columns to stripes."""

    def deals(left: tuple[int, ...]) -> Iterator[float]:
        if not left:
            yield 0.0
            return
        for others in itertools.combinations(left[1:], PATTERN.m - 1):
            kept = retained(scores[:, [left[0], *others]], PATTERN)
            rest = tuple(c for c in left[1:] if c not in others)
            yield from (kept + more for more in deals(rest))

    return max(deals(tuple(range(scores.shape[1]))))


def greedy(scores: Scores) -> Order:
    """The best exchange of two columns, until none helps."""
    stripes = np.arange(scores.shape[1]).reshape(-1, PATTERN.m)
    groups = range(len(stripes))

    def best(i: int, j: int) -> tuple[float, int, int]:
        before = retained(scores[:, stripes[i]], PATTERN) + retained(scores[:, stripes[j]], PATTERN)
        found = (0.0, 0, 0)
        for a, b in itertools.product(range(PATTERN.m), repeat=2):
            ours, theirs = stripes[i].copy(), stripes[j].copy()
            ours[a], theirs[b] = theirs[b], ours[a]
            after = retained(scores[:, ours], PATTERN) + retained(scores[:, theirs], PATTERN)
            found = max(found, (after - before, a, b))
        return found

    gains = {pair: best(*pair) for pair in itertools.combinations(groups, 2)}
    while True:
        (i, j), (gain, a, b) = max(gains.items(), key=lambda item: item[1][0])
        if gain <= 1e-6:
            return stripes.reshape(-1)
        stripes[i, a], stripes[j, b] = stripes[j, b], stripes[i, a]
        gains.update({p: best(*p) for p in gains if {i, j} & set(p)})


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the CPU-seconds that it took."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def tiny() -> str:
    """Our search beside the optimum, worst of five matrices."""
    rows = []
    for shape in TINY:
        shares, wide = [], []
        for seed in range(5):
            scores = matrix(shape, seed)
            best = optimum(scores)
            shares.append(retained(scores, PATTERN, search(scores, PATTERN)) / best)
            wide.append(retained(scores, PATTERN) / best)
        rows.append([f"{shape[0]} x {shape[1]}", f"{min(wide):.4f}", f"{min(shares):.4f}"])
    return table(["matrix", "as it is / optimum", "search / optimum"], rows)


def large() -> str:
    """Shares of the magnitude that are kept, and seconds."""
    rows = []
    search(matrix((4, 16)), PATTERN)  # imports are not timed
    for shape in LARGE:
        scores = matrix(shape)
        total = float(scores.sum(dtype=np.float64))
        order, seconds = timed(partial(search, scores, PATTERN))
        plain, slow = timed(partial(greedy, scores)) if shape[1] <= GREEDY else (None, 0.0)
        rows.append(
            [
                f"{shape[0]} x {shape[1]}",
                f"{retained(scores, PATTERN) / total:.4f}",
                f"{retained(scores, PATTERN, order) / total:.4f}",
                f"{seconds:.2f}",
                "-" if plain is None else f"{retained(scores, PATTERN, plain) / total:.4f}",
                "-" if plain is None else f"{slow:.2f}",
            ]
        )
    return table(["matrix", "as it is", "search", "s", "plain exchange", "s"], rows)


if __name__ == "__main__":
    print(tiny())
    print()
    print(large())

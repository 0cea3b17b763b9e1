"""Finds the order of the columns of a matrix in which an N:M pattern keeps the most magnitude.

The columns are dealt to stripes of M; which stripe comes first and the order inside a stripe do not matter.
Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021), section 4, exchange two columns of
different stripes at a time.  What is new here is that the gain of every exchange comes from one
matrix of L1 distances.  In one row, let s be the (N+1)-th largest of the elements of a stripe, and
t the N-th largest of those that are left when column a leaves it.  Column a takes max(a - s, 0) with it,
and column b brings max(b - t, 0).  Summed over rows, since 2 max(b - t, 0) = |b - t| + b - t,

    gain[a, b] = (|b - t|_1 + sum b - sum t) / 2 - sum max(a - s, 0)

is what the stripe of a wins when b comes for a, and an exchange wins ``gain[a, b] + gain[b, a]``.  Exchanges
between different pairs of stripes add up exactly, so that many are made at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsecc.patterns.nm import NM

Matrix = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

#: elements that a search may compare; one core does about 1e9 of them in a second
BUDGET = 3e9
#: what it may compare for each element of the full matrix of gains: small matrices are done sooner
_DEPTH = 50.0
#: what one round costs beside its comparisons, in comparisons
_ROUND = 2e5
#: gains below this share of what is kept are rounding errors
_EPSILON = 1e-12
#: stripes that lose a column to another one when a search goes on from a local optimum
_KICKED = 3


def retained(scores: npt.NDArray[np.floating], pattern: NM, order: Places | None = None) -> float:
    """Sum of the scores ``[rows, columns]`` that the pattern keeps along the columns, in some order."""
    placed = scores if order is None else scores[:, order]
    grid = placed.reshape(len(placed), placed.shape[1] // pattern.m, pattern.m)
    best = np.partition(grid, pattern.m - pattern.n, axis=-1)[..., pattern.m - pattern.n :]
    return float(best.sum(dtype=np.float64))


def search(scores: npt.NDArray[np.floating], pattern: NM, *, budget: float = BUDGET, seed: int = 0) -> Places:
    """An order of the columns of ``scores`` [rows, columns] in which the pattern keeps much, or the old one.

    The number of columns must be a multiple of M; scores are finite and not negative.  The same arguments
    give the same order: ``budget`` bounds the work, not the time.
    """
    rows, columns = scores.shape
    identity = np.arange(columns)
    if columns <= pattern.m or not rows:
        return identity
    random = np.random.default_rng([seed, rows, columns])
    budget = min(budget, _DEPTH * (rows * columns**2 + _ROUND))
    found = _Search(_sampled(scores, pattern, budget, random), pattern, budget, random).run()
    return found if retained(scores, pattern, found) > retained(scores, pattern) else identity


def _sampled(
    scores: npt.NDArray[np.floating], pattern: NM, budget: float, random: np.random.Generator
) -> npt.NDArray[np.floating]:
    """The rows that are looked at: all, or as many random ones as a few rounds can afford."""
    rows, columns = scores.shape
    affordable = max(64, int(budget / 5 / (columns // pattern.m) ** 2))
    if rows <= affordable:
        return scores
    return scores[np.sort(random.choice(rows, affordable, replace=False))]


class _Search:
    """Exchanges of columns; ``left`` is what may still be spent."""

    def __init__(
        self, scores: npt.NDArray[np.floating], pattern: NM, budget: float, random: np.random.Generator
    ) -> None:
        self.pattern = pattern
        self.left = budget
        self.random = random
        self.columns: Matrix = np.ascontiguousarray(scores.T, np.float64)
        self.sums = self.columns.sum(1)
        self.floor = _EPSILON * float(self.sums.sum())
        self.owner = np.empty(len(self.columns), np.intp)  # the stripe of every column

    def run(self) -> Places:
        """The best order that was found."""
        count, rows = self.columns.shape
        start = np.arange(count).reshape(-1, self.pattern.m)
        if 12.0 * count**2 * rows > self.left:
            return self._coarse(start).reshape(-1)
        best, kept = start, -1.0
        for stripes in (start, self._dealt()):
            tried = stripes.copy()
            gains = self._gains(tried, tried.reshape(-1))[np.argsort(tried.reshape(-1))]
            self._exchange(tried, gains, np.arange(count))
            if self._kept(tried) > kept:
                best, kept, table = tried, self._kept(tried), gains
        return self._explore(best, table).reshape(-1)

    def _dealt(self) -> Places:
        """Columns dealt to stripes by their sums, there and back: each stripe has large and small ones."""
        ranked = np.argsort(-self.sums, kind="stable").reshape(self.pattern.m, -1)
        ranked[1::2] = ranked[1::2, ::-1]
        return np.ascontiguousarray(ranked.T)

    def _kept(self, stripes: Places) -> float:
        grid = self.columns[stripes]
        best = np.partition(grid, self.pattern.m - self.pattern.n, axis=1)[
            :, self.pattern.m - self.pattern.n :
        ]
        return float(best.sum())

    def _gains(self, stripes: Places, candidates: Places, slots: Places | None = None) -> Matrix:
        """What stripes win when candidates come for their columns, [stripes * M, candidates].

        With ``slots``, for one column of every stripe only: [stripes, candidates].
        """
        import torch

        n = self.pattern.n
        block = self.columns[stripes]
        ordered = np.sort(block, axis=1)[:, ::-1]
        last, first = ordered[:, n - 1 : n], ordered[:, n : n + 1]
        if slots is not None:
            block = block[np.arange(len(stripes)), slots][:, None]
        lost = np.maximum(block - first, 0).sum(-1).reshape(-1)
        bar = np.where(block >= last, first, last).reshape(-1, block.shape[-1])
        coming = self.columns[candidates]
        self.left -= float(len(bar)) * coming.size + _ROUND
        apart = torch.cdist(torch.from_numpy(bar)[None], torch.from_numpy(coming)[None], p=1)[0].numpy()
        gains: Matrix = (apart + self.sums[candidates] - bar.sum(1)[:, None]) / 2 - lost[:, None]
        return gains

    # -- all columns against all ------------------------------------------------------------------

    def _exchange(self, stripes: Places, gains: Matrix, active: Places) -> float:
        """Exchange columns, first of all ``active`` ones, until none wins; returns what was won.

        ``stripes`` and ``gains`` [columns, columns] change with it.
        """
        owner = self.owner
        owner[stripes.reshape(-1)] = np.repeat(np.arange(len(stripes)), self.pattern.m)
        won = 0.0
        while len(active) and self.left > 0:
            both = gains[active] + gains[:, active].T
            both[owner[active][:, None] == owner[None, :]] = 0.0
            partner = both.argmax(1)
            win = both[np.arange(len(active)), partner]
            good = win > self.floor
            active, partner, win = active[good], partner[good], win[good]
            changed: list[int] = []
            for i in np.argsort(-win, kind="stable"):
                a, b = int(active[i]), int(partner[i])
                if owner[a] not in changed and owner[b] not in changed:
                    changed += [int(owner[a]), int(owner[b])]
                    self._swap(stripes, a, b)
                    won += float(win[i])
            if changed:
                self._refresh(stripes, gains, np.array(changed))
                active = np.union1d(active, stripes[changed].reshape(-1))
        return won

    def _swap(self, stripes: Places, a: int, b: int) -> None:
        ours, theirs = stripes[self.owner[a]], stripes[self.owner[b]]
        ours[ours == a], theirs[theirs == b] = b, a

    def _refresh(self, stripes: Places, gains: Matrix, changed: Places) -> None:
        slots = stripes[changed].reshape(-1)
        gains[slots] = self._gains(stripes[changed], np.arange(len(self.columns)))
        self.owner[slots] = np.repeat(changed, self.pattern.m)

    def _explore(self, stripes: Places, gains: Matrix) -> Places:
        """Kick a few stripes of a local optimum, exchange again, and go on from what is not worse."""
        groups = len(stripes)
        best, most, kept = stripes, self._kept(stripes), self._kept(stripes)
        while self.left > 0:
            chosen = self.random.choice(groups, min(_KICKED, groups), replace=False)
            slots = self.random.integers(0, self.pattern.m, len(chosen))
            trial, table = stripes.copy(), gains.copy()
            trial[chosen, slots] = np.roll(trial[chosen, slots], 1)
            before = self._kept(stripes[chosen])
            self._refresh(trial, table, chosen)
            change = self._kept(trial[chosen]) - before
            change += self._exchange(trial, table, trial[chosen].reshape(-1))
            if change > -self.floor:
                stripes, gains, kept = trial, table, kept + change
                if kept > most + self.floor:
                    best, most = stripes, kept
        return best

    # -- one column of every stripe at a time -----------------------------------------------------

    def _coarse(self, stripes: Places) -> Places:
        """Rounds in which one random column of every stripe may be exchanged: M * M times cheaper each."""
        groups, m = stripes.shape
        stripes = stripes.copy()
        everyone = np.arange(groups)
        while self.left > 0:
            picked: Places = np.asarray(self.random.integers(0, m, groups), np.intp)
            ours = stripes[everyone, picked]
            gains = self._gains(stripes, ours, picked)
            for i, j in _matched(gains + gains.T, self.floor):
                stripes[i, picked[i]], stripes[j, picked[j]] = ours[j], ours[i]
        return stripes


def _matched(both: Matrix, floor: float) -> list[tuple[int, int]]:
    """Disjoint pairs with large entries above the diagonal, the largest first."""
    np.fill_diagonal(both, 0.0)
    first, second = np.nonzero(np.triu(both > floor))
    ranked = np.argsort(-both[first, second], kind="stable")
    free = np.ones(len(both), bool)
    found = []
    for at in ranked:
        i, j = int(first[at]), int(second[at])
        if free[i] and free[j]:
            free[i] = free[j] = False
            found.append((i, j))
    return found

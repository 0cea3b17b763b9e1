"""One option of every list such that the sum of costs is least and the sum of savings meets a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: units that a budget is counted in, where savings have no divisor that makes fewer
RESOLUTION = 1 << 14


@dataclass(frozen=True)
class Option:
    """What an option saves (of anything, 0 or more) and what it costs."""

    saving: int
    cost: float


def cheapest(lists: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The place of the chosen option in every list, which begins with one that saves nothing.

    The sum of costs is the least of all choices that save at most ``budget`` and less than it by less than
    the largest step between two options of one list (or, where all together save less than ``budget``, the
    most that there is).  A knapsack of several choices by dynamic programming (Kellerer, Pferschy and
    Pisinger, "Knapsack Problems", 2004, section 11.5): exact where ``budget`` is at most ``RESOLUTION`` times
    the greatest common divisor of all savings; otherwise savings are rounded up to its part.
    """
    divisor = math.gcd(*(o.saving for options in lists for o in options)) or 1
    unit = max(divisor, -(-budget // RESOLUTION))
    weights = [[-(-o.saving // unit) for o in options] for options in lists]
    most = sum(max(w) for w in weights)
    room = min(budget // unit, most)
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    taken: list[npt.NDArray[np.int32]] = []
    for options, savings in zip(lists, weights, strict=True):
        best, chosen = _extended(best, options, savings)
        taken.append(chosen)
    least = max(0, room - _slack(weights) + 1) if room < most else room
    place = least + int(np.argmin(best[least:]))
    picks: list[int] = []
    for chosen, savings in zip(reversed(taken), reversed(weights), strict=True):
        picks.append(int(chosen[place]))
        place -= savings[picks[-1]]
    return picks[::-1]


def _extended(
    best: npt.NDArray[np.float64], options: Sequence[Option], savings: Sequence[int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Least costs for every saving once one more list takes part, and which of its options that takes."""
    found = np.full_like(best, np.inf)
    chosen = np.zeros(len(best), np.int32)
    for place, (option, saving) in enumerate(zip(options, savings, strict=True)):
        if saving >= len(best):
            continue
        cost = best[: len(best) - saving] + option.cost
        better = cost < found[saving:]
        found[saving:][better] = cost[better]
        chosen[saving:][better] = place
    return found, chosen


def _slack(weights: Sequence[Sequence[int]]) -> int:
    """The largest step between neighbouring options of one list."""
    gaps = [b - a for w in weights for a, b in zip(sorted(w)[:-1], sorted(w)[1:], strict=True)]
    return max(gaps, default=0) or 1

"""What is summed over the rows that a weight is multiplied with, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sparsecc.calibration.readings import Reading
from sparsecc.subject import Step


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _diagonal(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Reading, Step], torch.Tensor]:
    return lambda reading, step: reading.summed(step, lambda x: function(_wide(x))).double()


#: columns of a second moment that are computed together
_BLOCK = 128


def gram_(total: torch.Tensor, groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add x.T x of the rows ``[R, K]`` of every group to ``[G, K, K]`` in place; half is a mirror image."""
    size = total.shape[2]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for group, rows in enumerate(groups):
            total[group, start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        total[:, stop:, start:stop] = total[:, start:stop, stop:].transpose(1, 2)
    return total


def _second(reading: Reading, step: Step) -> torch.Tensor:
    groups = [_wide(part) for part in reading.parts(step)]
    size = groups[0].shape[1]
    return gram_(groups[0].new_zeros(len(groups), size, size), groups)


def add_(total: torch.Tensor, name: str, reading: Reading, step: Step) -> torch.Tensor:
    """Add what one more step sums up to, in place."""
    if name != "hessian":
        return total.add_(MOMENTS[name](reading, step))
    return gram_(total, [_wide(part) for part in reading.parts(step)])


#: name -> sum over the rows of one step: ``[G, K]``, or ``[G, K, K]`` for ``hessian``
MOMENTS: dict[str, Callable[[Reading, Step], torch.Tensor]] = {
    "mean": _diagonal(lambda x: x),
    "absolute": _diagonal(torch.abs),
    "square": _diagonal(torch.square),
    "nonzero": _diagonal(lambda x: (x != 0).to(x.dtype)),
    "hessian": _second,
}


@dataclass
class Moments:
    """Sums over ``count`` rows, by name of the moment."""

    count: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, reading: Reading, step: Step, result: torch.Tensor, names: frozenset[str]) -> None:
        """Take the rows of one step in."""
        self.count += reading.count(step, result)
        for name in names:
            if name in self.sums:
                add_(self.sums[name], name, reading, step)
            else:
                self.sums[name] = MOMENTS[name](reading, step)

    def __add__(self, other: Moments) -> Moments:
        sums = {n: self.sums[n] + other.sums[n] for n in self.sums.keys() & other.sums.keys()}
        return Moments(self.count + other.count, sums)

    def average(self, name: str) -> torch.Tensor:
        """The sum over the number of rows."""
        return self.sums[name] / max(self.count, 1)

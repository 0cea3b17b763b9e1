"""Criteria that need weights alone: magnitude (L1, L2, Lp, L-infinity) and random.

A criterion gives every position along an axis of a weight a non-negative score that adds up over
positions (for Lp: the sum of |w|^p), and says how sums become a saliency (the p-th root).
Han et al., "Learning both Weights and Connections" (2015), section 3; Li et al., "Pruning
Filters for Efficient ConvNets" (2017), section 3.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from sparsecc.errors import InvalidOption

if TYPE_CHECKING:
    import torch

Scores = npt.NDArray[np.float64]

#: what of a group is scored: weights with two or more axes, or the scales of its norm layers
Reads = Literal["matrices", "scales"]

#: elements that are worked on at a time: they stay in the cache, and so does the memory that planning takes
_CHUNK = 1 << 17


def _double(sums: torch.Tensor) -> Scores:
    """Sums in a type that numpy has, as float64."""
    return sums.cpu().numpy().astype(np.float64)


def _summed(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Sums over all axes but ``kept``."""
    dims = [d for d in range(values.dim()) if d != kept]
    return values.sum(dims) if dims else values


class Unscored(InvalidOption):
    """The criterion says nothing about the elements of this weight."""


@dataclass(frozen=True)
class Criterion:
    """Scores positions of weights.

    A criterion that ``needs_data`` is given ``Statistics``; ``moments`` names those that it reads, so that
    one pass over the data collects them.  One with ``needs_values`` False is given weights that are on the
    meta device.  ``joint``: scores of all weights of a group are summed before ``finish``, and no reduction
    is asked for.  ``reads``: what of a group is scored.  ``join``: how scores of several positions of an axis
    that stand for one of a group become one.  ``unknown``: why groups are left alone that have nothing to
    read.
    """

    needs_data: ClassVar[bool] = False
    moments: ClassVar[tuple[str, ...]] = ()
    needs_values: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    reads: ClassVar[Reads] = "matrices"
    join: ClassVar[Literal["sum", "max"]] = "sum"
    unknown: ClassVar[str] = "the criterion says nothing about its positions"

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> Sequence[Scores | None]:
        """Additive score of every position along each axis: float64 of shape ``[weight.shape[axis]]``.

        None for an axis that the criterion says nothing about.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define scores()")

    def finish(self, total: Scores) -> Scores:
        """Saliency of positions from their summed scores."""
        return total

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> npt.NDArray[Any]:
        """Score of every single element, shape of the weight; only their order matters.  Default: |w|."""
        wide = weight.detach() if str(weight.dtype) == "torch.float64" else weight.detach().float()
        found: npt.NDArray[Any] = wide.abs().cpu().numpy()
        return found


@dataclass(frozen=True)
class Lp(Criterion):
    """(sum of |w|^p)^(1/p), p > 0."""

    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise InvalidOption(f"p={self.p!r}: the norm needs p > 0")

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores]:
        """Sums of |w|^p over all other axes, in float32 (float64 for float64 weights); reads weights once."""
        if not weight.numel():
            return [np.zeros(weight.shape[axis]) for axis in axes]
        if not any(axes):
            firsts = _double(self._rows(weight))
            return [firsts for _ in axes]
        first, rest = self._sums(weight, rows=0 in axes)
        inner = rest if weight.dim() == 2 else rest.reshape(weight.shape[1:])
        return [_double(first if axis == 0 else _summed(inner, axis - 1)) for axis in axes]

    def _sums(self, weight: torch.Tensor, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over each position of the first axis, ``[n]``, and over the first axis, ``[rest]``."""
        import torch

        rest = weight.numel() // weight.shape[0]
        if weight.numel() <= _CHUNK:
            powers = self._powers(weight.reshape(-1, rest))
            total = powers.sum(0)
            return powers.sum(1) if rows else total, total
        parts = weight.detach().split(max(1, _CHUNK // rest))
        first, down = [], []
        for part in parts:
            powers = self._powers(part.reshape(-1, rest))
            down.append(powers.sum(0))
            if rows:
                first.append(powers.sum(1))
        total = torch.stack(down).sum(0)
        return torch.cat(first) if rows else total, total

    def _rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Sums over each position of the first axis, which torch's norm does without a temporary."""
        import torch

        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        flat = weight.detach().reshape(weight.shape[0], -1)
        flat = flat if flat.is_floating_point() else flat.float()
        norms: torch.Tensor = torch.linalg.vector_norm(flat, self.p, 1, dtype=accumulate)
        return norms.double().pow_(self.p)

    def _powers(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        wide = weight if weight.dtype == torch.float64 else weight.float()
        if self.p == 2:
            return wide.square()
        return wide.abs() if self.p == 1 else wide.abs().pow_(self.p)

    def finish(self, total: Scores) -> Scores:
        """The p-th root of summed powers."""
        return np.power(total, 1.0 / self.p)


@dataclass(frozen=True)
class LInf(Criterion):
    """Largest |w|: the limit of Lp."""

    join: ClassVar[Literal["sum", "max"]] = "max"

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores]:
        """The largest |w| over all other axes."""
        if not weight.numel():
            return [np.zeros(weight.shape[axis]) for axis in axes]
        sizes = weight.detach().abs()
        flat = (sizes.movedim(axis, 0).reshape(sizes.shape[axis], -1) for axis in axes)
        return [_double(rows.amax(1).double()) for rows in flat]


class L1(Lp):
    """Sum of |w|."""

    def __init__(self) -> None:
        super().__init__(1.0)


class L2(Lp):
    """Root of the sum of squares."""

    def __init__(self) -> None:
        super().__init__(2.0)


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform scores from ``seed`` and the weight's name: reproducible, independent of order."""

    seed: int = 0
    needs_values: ClassVar[bool] = False

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores]:
        """Uniform in [0, 1)."""
        return [self._generator(f"{name}[{axis}]").random(weight.shape[axis]) for axis in axes]

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> npt.NDArray[Any]:
        """Uniform in [0, 1)."""
        return self._generator(name).random(tuple(weight.shape))

    def _generator(self, words: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(words.encode())])

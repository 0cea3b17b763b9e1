"""Criteria that need weights alone: magnitude (L1, L2, Lp) and random.

A criterion gives every position along an axis of a weight a non-negative score that adds up over
positions (for Lp: the sum of |w|^p), and says how sums become a saliency (the p-th root).
Han et al., "Learning both Weights and Connections" (2015), section 3; Li et al., "Pruning
Filters for Efficient ConvNets" (2017), section 3.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from sparsecc.errors import InvalidOption

if TYPE_CHECKING:
    import torch

Scores = npt.NDArray[np.float64]

#: elements that are worked on at a time: they stay in the cache, and so does the memory that planning takes
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Criterion:
    """Scores positions of weights.

    ``statistics`` names what has to be collected from data first; a criterion with ``needs_values``
    False is given weights on the meta device.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    needs_values: ClassVar[bool] = True

    def scores(self, name: str, weight: torch.Tensor, axis: int, statistics: Any = None) -> Scores:
        """Additive score of every position along ``axis``, shape ``[weight.shape[axis]]``, float64."""
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

    def scores(self, name: str, weight: torch.Tensor, axis: int, statistics: Any = None) -> Scores:
        """Sum of |w|^p over all other axes, in float32 (float64 for float64 weights)."""
        before, size, after = (
            math.prod(weight.shape[:axis]),
            weight.shape[axis],
            math.prod(weight.shape[axis + 1 :]),
        )
        if not weight.numel():
            return np.zeros(size)
        if before == 1:
            return self._rows(weight.reshape(size, after))
        rows = weight.reshape(before, size * after)
        total: Any = 0.0
        step = max(1, _CHUNK // max(1, size * after))
        for start in range(0, before, step):
            total = total + self._powers(rows[start : start + step]).sum(0)
        return total.reshape(size, after).sum(1).double().cpu().numpy()  # type: ignore[no-any-return]

    def _rows(self, weight: torch.Tensor) -> Scores:
        """Sums over contiguous rows, which torch's norm does without a temporary."""
        import torch

        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        wide = weight if weight.is_floating_point() else weight.float()
        norm = torch.linalg.vector_norm(wide, self.p, 1, dtype=accumulate)
        return norm.double().pow(self.p).cpu().numpy()  # type: ignore[no-any-return]

    def _powers(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        wide = weight if weight.dtype == torch.float64 else weight.float()
        if self.p == 2:
            return wide.square()
        return wide.abs() if self.p == 1 else wide.abs().pow_(self.p)

    def finish(self, total: Scores) -> Scores:
        """The p-th root of summed powers."""
        return np.power(total, 1.0 / self.p)


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

    def scores(self, name: str, weight: torch.Tensor, axis: int, statistics: Any = None) -> Scores:
        """Uniform in [0, 1)."""
        return self._generator(f"{name}[{axis}]").random(weight.shape[axis])

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> npt.NDArray[Any]:
        """Uniform in [0, 1)."""
        return self._generator(name).random(tuple(weight.shape))

    def _generator(self, words: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(words.encode())])


#: text name -> criterion
CRITERIA: dict[str, Criterion] = {"l1": L1(), "l2": L2(), "random": Random()}
_LP = re.compile(r"l(\d+(?:\.\d+)?)")


def criterion(name: str | Criterion, *, seed: int = 0) -> Criterion:
    """The criterion of that name: ``l1``, ``l2``, ``l0.5``, ``random``; InvalidOption otherwise."""
    if isinstance(name, Criterion):
        return name
    if name == "random":
        return Random(seed)
    if name in CRITERIA:
        return CRITERIA[name]
    match = _LP.fullmatch(name)
    if match is None:
        raise InvalidOption(
            f"saliency {name!r} is not known; there are {', '.join(CRITERIA)} and l<p>, such as l0.5"
        )
    return Lp(float(match.group(1)))

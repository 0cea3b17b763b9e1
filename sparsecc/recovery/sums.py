"""What least squares need of a layer's rows: sums of products, of what it should see and what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparsecc.calibration.readings import Reading
from sparsecc.subject import Step

#: how much each of the rows ``[G, R, K]`` counts, ``[G, R]`` or, alike in all groups, ``[1, R]``
Weigh = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sums:
    """Sums over weighted rows: x.T z ``[G, K, S]``, z.T z ``[G, S, S]``, x ``[G, K]``, z ``[G, S]``, 1."""

    cross: torch.Tensor
    second: torch.Tensor
    x: torch.Tensor
    z: torch.Tensor
    count: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.cross + other.cross,
            self.second + other.second,
            self.x + other.x,
            self.z + other.z,
            self.count + other.count,
        )

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x and of z."""
        return self.x / self.count, self.z / self.count

    def about(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``cross`` and ``second`` of rows less x and z."""
        return _about(self.cross, self.x, self.z, x, z, self.count), _about(
            self.second, self.z, self.z, z, z, self.count
        )

    def to(self, dtype: torch.dtype) -> Sums:
        """The same in another dtype."""
        cross, second, x, z = (t.to(dtype) for t in (self.cross, self.second, self.x, self.z))
        return Sums(cross, second, x, z, self.count)


def _about(
    product: torch.Tensor, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, z: torch.Tensor, count: float
) -> torch.Tensor:
    """Sum of (a - x).T (b - z) from the sum of a.T b and the sums of a and b."""
    return (
        product - x[:, :, None] * b[:, None] - a[:, :, None] * z[:, None] + count * x[:, :, None] * z[:, None]
    )


def sums(
    reading: Reading,
    towards: Sequence[Step],
    pruned: Sequence[Step],
    columns: torch.Tensor,
    weigh: Weigh,
) -> Sums:
    """Over batches: x the rows of ``towards``, z the ``columns`` of those of ``pruned``."""
    total: Sums | None = None
    for original, step in zip(towards, pruned, strict=True):
        read = wide(reading.rows(step))
        aim = read if original is step else wide(reading.rows(original))
        z = read[:, :, columns]
        weight = weigh(aim)[:, :, None]
        weighted = z * weight
        cross = aim.transpose(1, 2) @ weighted
        second = cross[:, columns] if original is step else z.transpose(1, 2) @ weighted
        part = Sums(cross, second, (aim * weight).sum(1), weighted.sum(1), float(weight.sum()))
        total = part if total is None else total + part
    assert total is not None
    return total


def equal(rows: torch.Tensor) -> torch.Tensor:
    """Every row counts alike."""
    return torch.ones(1, rows.shape[1], dtype=rows.dtype)


def relative(reading: Reading, matrix: torch.Tensor, steps: Sequence[Step]) -> Weigh:
    """Rows count by what is usual over what the layer gives for them, both as mean squares.

    So few rows with massive activations (Sun et al., "Massive activations in large language models", 2024)
    do not decide for all others.
    """

    def given(rows: torch.Tensor) -> torch.Tensor:
        each = (rows @ matrix.transpose(1, 2)).square().mean(2)
        return each if reading.stack else each.mean(0, keepdim=True)  # groups of a convolution share a row

    seen = torch.cat([given(wide(reading.rows(step))).flatten() for step in steps])
    seen = seen[seen > 0] if reading.ends is not None else seen  # zeros fill up what reads fewer rows
    usual = seen.median() if len(seen) else seen.new_zeros(())
    return lambda rows: usual / (given(rows) + usual) if usual > 0 else equal(rows)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()

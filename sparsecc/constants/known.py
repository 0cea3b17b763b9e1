"""Known entries of tensors, and what can be done with them without knowing where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparsecc.graph import Value

#: tensors with more entries than this are not computed
MAX_ENTRIES = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Known entries of a tensor and their values.

    Both tensors have the rank of the value, and broadcast to its shape: along an axis of size 1 all
    positions are alike.  Where ``known`` is False ``value`` holds anything.
    """

    known: torch.Tensor
    value: torch.Tensor

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors at their common shape."""
        known, value = torch.broadcast_tensors(self.known, self.value)
        return known, value

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Known:
        """The same movement of data on both."""
        known, value = self.pair()
        return Known(function(known), function(value))

    def alike(self, dim: int) -> Known:
        """Known along ``dim`` only where all positions are known and equal; the axis gets size 1."""
        known, value = self.pair()
        first = value.narrow(dim, 0, 1)
        return Known(known.all(dim, keepdim=True) & (value == first).all(dim, keepdim=True), first)

    def at(self, dim: int, size: int) -> Known:
        """With ``size`` positions spelled out along ``dim``."""
        return self.map(
            lambda t: t.expand(*t.shape[:dim], size, *t.shape[dim + 1 :]) if t.shape[dim] != size else t
        )

    def only(self, value: float) -> Known:
        """Known only where the number is ``value``."""
        return Known(self.known & (self.value == value), self.value)


def fits(known: Known, value: Value) -> bool:
    """A mistake in a rule must not become a wrong number."""
    shape = torch.broadcast_shapes(known.known.shape, known.value.shape)
    return len(shape) == len(value.shape) and all(
        n in (1, m) for n, m in zip(shape, value.shape, strict=True)
    )


def ranked(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.reshape([1] * (rank - tensor.dim()) + list(tensor.shape))


def either(parts: Sequence[Known | None]) -> Known | None:
    """Known where any part is; earlier parts go first."""
    out: Known | None = None
    for part in parts:
        if part is None:
            continue
        if out is None:
            out = part
        else:
            value = torch.where(out.known, out.value.double(), part.value.double())
            out = Known(out.known | part.known, value)
    return out


def everywhere(value: Value, number: float) -> Known | None:
    dtype = getattr(torch, value.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return None
    shape = [1] * len(value.shape)
    wide = torch.float64 if dtype.is_floating_point else dtype
    return Known(torch.ones(shape, dtype=torch.bool), torch.full(shape, number, dtype=wide))


def joined(parts: Sequence[tuple[Known | None, int]], dim: int, out: Value) -> Known | None:
    """Parts of known sizes one after another along ``dim``."""
    if all(k is None for k, _ in parts):
        return None
    rank = len(out.shape)
    nothing = Known(torch.zeros([1] * rank, dtype=torch.bool), torch.zeros([1] * rank, dtype=torch.float64))
    filled = [(nothing if k is None else k, n) for k, n in parts]
    if out.is_dynamic(dim):
        return _alike_parts([k.alike(dim) for k, _ in filled])
    known, value = zip(*(k.at(dim, n).pair() for k, n in filled), strict=True)
    return Known(_cat(known, dim), _cat([v.double() if v.is_floating_point() else v for v in value], dim))


def _alike_parts(parts: Sequence[Known]) -> Known:
    out = parts[0]
    for part in parts[1:]:
        out = Known(out.known & part.known & (out.value == part.value), out.value)
    return out


def _cat(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    return torch.cat([t.expand(*shape[:dim], t.shape[dim], *shape[dim + 1 :]) for t in tensors], dim)

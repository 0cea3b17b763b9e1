"""What abstract execution knows of a value: shape and type, small known numbers, where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from sparsecc.onnxfile.model import to_torch
from sparsecc.reference.onnx_ops.registry import Value

Origin: TypeAlias = "tuple[Literal['literal', 'dim'], str, int]"
"""``('literal', tensor, flat index)`` or ``('dim', value, axis)``."""

MAX_KNOWN = 65536
MAX_KNOWN_FLOATS = 64


class Tags:
    """Numbers that stand for elements: 0 for none, else a place in one of the registered ranges."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, Literal["literal", "dim"], str]] = []
        self._next = 1

    def new(self, kind: Literal["literal", "dim"], name: str, count: int) -> torch.Tensor:
        start = self._next
        self._ranges.append((start, kind, name))
        self._next += count
        return torch.arange(start, start + count)

    def origin(self, tag: int) -> Origin | None:
        if tag <= 0:
            return None
        low, high = 0, len(self._ranges)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._ranges[middle][0] <= tag else (low, middle)
        start, kind, name = self._ranges[low]
        return kind, name, tag - start


@dataclass(slots=True)
class Cell:
    """A value of abstract execution: a tensor without data, what is known of it, and its tags."""

    value: Value
    known: torch.Tensor | None = None
    tags: torch.Tensor | None = None
    why: str = ""

    @property
    def unknown(self) -> bool:
        return bool(self.why)


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def computed(value: Any, tags: torch.Tensor | None) -> Cell:
    """The cell of an operator's output."""
    if value is None:
        return Cell(None, why="an optional value is absent")
    if isinstance(value, np.ndarray):
        found = to_torch(value)
        if found is None:
            return Cell(torch.empty(value.shape, dtype=torch.int8, device="meta"))
        value = found
    if isinstance(value, torch.Tensor) and not value.is_meta:
        limit = MAX_KNOWN_FLOATS if value.dtype.is_floating_point else MAX_KNOWN
        if value.numel() <= limit:
            return Cell(meta(value), value, tags)
        return Cell(meta(value))
    return Cell(value)


def collapsed(given: Sequence[Cell | None], outputs: Sequence[Cell]) -> bool:
    """Whether a size became 0 that was not before."""
    if not any(isinstance(cell.value, torch.Tensor) and 0 in cell.value.shape for cell in outputs):
        return False
    known = all(cell is None or cell.known is not None for cell in given)
    before = any(isinstance(c.value, torch.Tensor) and 0 in c.value.shape for c in given if c is not None)
    return not before and not known


def common(first: Cell, second: Cell, declared: Cell) -> Cell:
    """What two branches of an If agree on."""
    a, b = first.value, second.value
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return declared
    if a.shape != b.shape or a.dtype != b.dtype:
        return declared
    same = first.known is not None and second.known is not None and torch.equal(first.known, second.known)
    return Cell(a, first.known if same else None)

"""What goes as one inside a weight: single elements, blocks, rows, columns, kernels of convolutions.

A weight is looked at as its product sees it: matrices of rows (outputs) by places of the kernel by channels
(the axis that N:M patterns run along).  A linear layer has one matrix and one place.  Of weights with
further axes (one matrix an expert or a head), every matrix stands by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecc.patterns.layers import Layer
from sparsecc.patterns.nm import Array

Keep = npt.NDArray[np.bool_]

#: how the scores of the elements of a unit become one
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": lambda scores, axes: scores.mean(axes, dtype=np.float64),
    "sum": lambda scores, axes: scores.sum(axes, dtype=np.float64),
    "max": lambda scores, axes: scores.max(axes),
}
_INNER = (2, 4, 6)


def to_grid(array: Array, layer: Layer) -> Array:
    """The array as ``[matrices, rows, places, channels]``."""
    return array.transpose(_order(layer, array.ndim)).reshape(grid_sizes(layer, array.shape))


def from_grid(grid: Array, layer: Layer, shape: tuple[int, ...]) -> Array:
    """Inverse of ``to_grid`` for an array of that shape."""
    order = _order(layer, len(shape))
    moved = grid.reshape([shape[d] for d in order])
    return np.ascontiguousarray(moved.transpose(np.argsort(order)))


def grid_sizes(layer: Layer, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """How many matrices, rows, places and channels a weight of that shape has."""
    free = _free(layer, len(shape))
    parts = (free[:-1], free[-1:], layer.kernel or ())
    outer, rows, places = (math.prod(shape[d] for d in some) for some in parts)
    return outer, rows, places, shape[layer.axis]


def matrix_sizes(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Outputs, channels, and sizes of the kernel: what densities of layers are computed from."""
    outer, rows, _, channels = grid_sizes(layer, shape)
    return (outer * rows, channels, *(shape[d] for d in layer.kernel or ()))


def _free(layer: Layer, rank: int) -> list[int]:
    return [d for d in range(rank) if d != layer.axis and d not in (layer.kernel or ())]


def _order(layer: Layer, rank: int) -> list[int]:
    return [*_free(layer, rank), *(layer.kernel or ()), layer.axis]


@dataclass(frozen=True, slots=True)
class Units:
    """Rows, places and channels of a unit; None stands for all there are."""

    rows: int | None = 1
    places: int | None = 1
    channels: int | None = 1

    def why_not(self, layer: Layer, shape: tuple[int, ...]) -> str:
        """Why a weight is not made of whole units, or ''."""
        if layer.kernel is None:
            return "the operators that read it sum along different axes of it"
        if self.rows != 1 and layer.groups > 1:
            return f"its {layer.groups} groups of rows read different inputs"
        _, rows, _, channels = grid_sizes(layer, shape)
        for size, part, words in (
            (rows, self.rows, "it has {} rows"),
            (channels, self.channels, "its sums run over {} positions"),
        ):
            if part is not None and size % part:
                return f"{words.format(size)}, which are no multiple of {part}"
        return ""

    def scores(self, elements: Array, reduction: str = "mean") -> Array:
        """Scores of units, ``[matrices, rows, places, channels]``, from a grid of those of elements."""
        if self == Units():
            return elements
        found: Array = REDUCTIONS[reduction](self._split(elements), _INNER)
        return found

    def dead(self, values: Array) -> Keep:
        """Units of a grid of values that are all zero."""
        zero: Keep = (self._split(values) == 0).all(_INNER)
        return zero

    def elements(self, units: Keep, sizes: tuple[int, ...]) -> Keep:
        """A choice of units as one of the elements of a grid."""
        parts = self._parts(sizes)
        wide = np.broadcast_to(units[:, :, None, :, None, :, None], parts)
        return wide.reshape(sizes)

    def _parts(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes with rows, places and channels each split into units and what is inside of them."""
        outer, *inner = sizes
        own = [
            n if p is None else p for n, p in zip(inner, (self.rows, self.places, self.channels), strict=True)
        ]
        return (outer, *(k for n, p in zip(inner, own, strict=True) for k in (n // max(p, 1), p)))

    def _split(self, grid: Array) -> Array:
        return grid.reshape(self._parts(grid.shape))

"""What earlier passes leave of a layer's weight: magnitudes at the positions that stay, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.patterns.layers import Layer
from sparsecc.patterns.nm import Array

Indices = Sequence[npt.NDArray[np.int64] | None]


@dataclass(eq=False)
class Present:
    """``values``: |w| at the positions ``indices`` of every axis (None: all), 0 where an earlier pass masks.

    ``shape`` is that of the whole weight.
    """

    values: Array
    indices: list[npt.NDArray[np.int64] | None]
    shape: tuple[int, ...]

    def of(self, scores: Array) -> Array:
        """Scores of the whole weight at those positions; what is zero there scores nothing."""
        return np.where(self.values == 0, 0, taken(scores, self.indices))


def present(analysis: Analysis, keeps: Keeps, layer: Layer) -> Present | str:
    """What is left of a layer, or why nothing is to be done to it."""
    values = magnitudes(analysis, layer.weight)
    if not np.isfinite(values).all():
        return "it holds NaN or infinite elements"
    masked = analysis.given.masks.get(layer.weight)
    if masked is not None:
        values = np.where(masked, values, 0)
    axes = analysis.solver.axes[analysis.view.weights[layer.weight]]
    indices = [keeps.indices(t) for t in axes]
    return Present(taken(values, indices), indices, values.shape)


def magnitudes(analysis: Analysis, weight: str) -> Array:
    """|w| as float64 where the weight is that, else as float32 (which holds float16 and bfloat16)."""
    tensor = analysis.view.weight(weight).detach()
    wide = tensor.double() if str(tensor.dtype) == "torch.float64" else tensor.float()
    found: Array = wide.abs().cpu().numpy()
    return found


def taken(array: Array, indices: Indices) -> Array:
    """The array at some positions of every axis."""
    for axis, at in enumerate(indices):
        if at is not None:
            array = array.take(at, axis)
    return array


def spread(keep: npt.NDArray[np.bool_], indices: Indices, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """A mask of the kept positions as one of the whole weight; what goes anyway is not masked."""
    if all(at is None for at in indices):
        return keep
    full = np.ones(shape, bool)
    full[np.ix_(*(np.arange(n) if at is None else at for at, n in zip(indices, shape, strict=True)))] = keep
    return full

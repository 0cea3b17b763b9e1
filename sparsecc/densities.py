"""How dense each layer is where a share of all weights stays: uniform, Erdős–Rényi, Erdős–Rényi-Kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sparsecc.errors import InvalidOption

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Every layer has the same density.

    >>> uniform({"a": (4, 4), "b": (8, 2)}, 0.25)
    {'a': 0.25, 'b': 0.25}
    """
    _check(density)
    return dict.fromkeys(shapes, density)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdős–Rényi: densities proportional to (in + out) / (in * out).

    Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
    Inspired by Network Science" (2018), eq. 1; kernels of convolutions do not count.
    """
    return _scaled(shapes, density, lambda shape: sum(shape[:2]) / math.prod(shape[:2]))


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdős–Rényi-Kernel: densities proportional to (in + out + w + h) / (in * out * w * h).

    Evci et al., "Rigging the Lottery: Making All Tickets Winners" (2020), section 3 and appendix A.
    Layers that would be denser than whole stay whole, and the others share what is left.
    """
    return _scaled(shapes, density, lambda shape: sum(shape) / math.prod(shape))


def _scaled(shapes: Shapes, density: float, raw: Callable[[Sequence[int]], float]) -> dict[str, float]:
    _check(density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    weights = {name: raw(shape) if sizes[name] else 0.0 for name, shape in shapes.items()}
    whole: set[str] = set()
    while True:
        left = [name for name in shapes if name not in whole]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in whole)
        total = sum(weights[name] * sizes[name] for name in left)
        scale = budget / total if total else 0.0
        over = [name for name in left if scale * weights[name] > 1]
        if not over:
            return {name: 1.0 if name in whole else scale * weights[name] for name in shapes}
        whole.update(over)


def _check(density: float) -> None:
    if not 0 <= density <= 1:
        raise InvalidOption(f"density={density!r}: give the share of weights that stay, 0 <= density <= 1")


#: name -> density of every layer, given shapes and the density of all layers together
DENSITIES: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"uniform": uniform, "er": er, "erk": erk}

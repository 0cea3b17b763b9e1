"""How dense each layer stays where a share of all weights goes.

Evci et al., "Rigging the Lottery: Making All Tickets Winners" (2020), section 3 (1) and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
Densities = Callable[[Shapes, float], dict[str, float]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same density everywhere.

    >>> uniform({"a": (2, 2), "b": (4, 8)}, 0.75)
    {'a': 0.25, 'b': 0.25}
    """
    return dict.fromkeys(shapes, 1 - sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Densities in proportion to (sum of sizes) / (product of sizes): Erdős–Rényi kernel.

    Layers that would be denser than dense stay dense, and the others make up for it, so that ``sparsity`` of
    all weights goes.

    >>> erk({"a": (2, 2), "b": (8, 8)}, 0.5)
    {'a': 1.0, 'b': 0.46875}
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items() if math.prod(shape)}
    budget = (1 - sparsity) * sum(math.prod(shape) for shape in shapes.values())
    while raw:
        left = budget - sum(math.prod(shape) for name, shape in shapes.items() if name not in raw)
        scale = left / sum(share * math.prod(shapes[name]) for name, share in raw.items())
        full = [name for name, share in raw.items() if scale * share > 1]
        if not full:
            break
        raw = {name: share for name, share in raw.items() if name not in full}
    return {name: max(0.0, scale * raw[name]) if name in raw else 1.0 for name in shapes}


#: text name -> densities of layers by name
DENSITIES: dict[str, Densities] = {"uniform": uniform, "erk": erk}

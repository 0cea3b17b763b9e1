"""What kernels of this package were measured to gain, product by product (``python -m benchmarks.gpu``).

``measured.json`` has rows by architecture: element type, tokens, output features, K, microseconds of the
dense product, the tile that is built, and its microseconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import log2

import numpy as np

FILE = "measured.json"

_ALIKE = {"fp16": "bf16"}
"""Element types whose products take as long as those of another."""

_BEYOND = 2.0
"""By what factor each size may differ from the nearest that was measured."""

_FEWEST = 3
"""Numbers of tokens that a weight has to be measured with."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Dense over sparse time, of a weight of the nearest size, in an element type, on a GPU."""

    ratio: float
    out: int
    k: int
    dtype: str
    gpu: str

    def __str__(self) -> str:
        size = f"{self.out} x {self.k} in {self.dtype}"
        return f"{self.ratio:.2f}x expected, from products with {size} that were measured on {self.gpu}"


def gain(arch: str, dtype: str, rows: int, out: int, k: int) -> Gain | None:
    """The gain for a product, between numbers of tokens that were measured; None where none are near."""
    kind = _ALIKE.get(dtype, dtype)
    gpu, sizes = _table(arch, kind)
    if not sizes or rows < 1:
        return None
    nearest = min(sizes, key=lambda size: (log2(size[0] / out) ** 2 + log2(size[1] / k) ** 2, size))
    times = sizes[nearest]
    counts = sorted(times)
    limits = ((out, nearest[0], nearest[0]), (k, nearest[1], nearest[1]), (rows, counts[0], counts[-1]))
    if any(not least / _BEYOND <= value <= most * _BEYOND for value, least, most in limits):
        return None
    ratio = 2.0 ** float(np.interp(log2(rows), [log2(n) for n in counts], [log2(times[n]) for n in counts]))
    return Gain(ratio, *nearest, kind, gpu)


def measured_on(arch: str) -> str:
    """The GPU of an architecture that was measured; '' where none was."""
    return _table(arch, "bf16")[0]


@cache
def _table(arch: str, dtype: str) -> tuple[str, dict[tuple[int, int], dict[int, float]]]:
    """The GPU, and ratios by (out, K) and tokens."""
    found = json.loads(resources.files(__package__).joinpath(FILE).read_text()).get(arch)
    sizes: dict[tuple[int, int], dict[int, float]] = {}
    for kind, tokens, out, k, dense, _, ours in found["rows"] if found else ():
        if kind == dtype:
            sizes.setdefault((out, k), {})[tokens] = dense / ours
    enough = {size: times for size, times in sizes.items() if len(times) >= _FEWEST}
    return (found["gpu"] if found else "", enough)

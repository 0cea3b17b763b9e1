"""What a product takes at least: bytes over a GPU's bandwidth, or operations over its tensor cores' peak.

Figures are the vendor's, and no kernel reaches them: a roof says what limits a layer and what 2:4 could save,
not how long it takes.  Peaks of 16-bit floats are with sums in float32, as all kernels here have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from sparsecc.targets.cuda.problem import Problem


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's memory bandwidth in GB/s, and TFLOP/s of (dense, 2:4) products by bytes of an element.

    As vendors do it, the 2:4 peak counts the operations of the dense product.
    """

    name: str
    bandwidth: float
    peaks: Mapping[int, tuple[float, float]]
    source: str


#: target, GPU that it is named for, GB/s, TFLOP/s of 16-bit products (dense, 2:4), of 8-bit ones, and where
#: these figures stand
_TABLE = (
    ("sm80", "A100 80GB PCIe", 1935, (312, 624), (624, 1248), "NVIDIA A100 data sheet, 2021"),
    ("sm86", "RTX 3090", 936, (71, 142), (284, 568), "NVIDIA Ampere GA102 white paper, 2021"),
    ("sm89", "RTX 4090", 1008, (165.2, 330.4), (660.6, 1321.2), "NVIDIA Ada white paper, 2022"),
    ("sm90", "H100 SXM", 3350, (989.4, 1978.9), (1978.9, 3957.8), "NVIDIA H100 data sheet, 2023"),
    ("sm120", "RTX 5080", 960, (112.6, 225.1), (450.2, 900.4), "NVIDIA RTX Blackwell white paper, 2025"),
)
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        target: Gpu(name, bandwidth, MappingProxyType({2: wide, 1: narrow}), source)
        for target, name, bandwidth, wide, narrow, source in _TABLE
    }
)
"""GPUs by the target that is named for them."""


LAUNCH = 0.9
"""Microseconds that a kernel costs beyond what it computes, when launches overlap (A. Gray, "Getting Started
with CUDA Graphs", NVIDIA Technical Blog, 2019: 3.8 for a kernel of 2.9 on a V100)."""


@dataclass(frozen=True, slots=True)
class Roof:
    """The least that a product takes on a GPU: ``bytes`` moved once each, ``flops`` of the dense product."""

    bytes: int
    flops: int
    bandwidth: float
    peak: float

    @property
    def memory(self) -> float:
        """Microseconds of memory traffic."""
        return self.bytes / self.bandwidth / 1e3

    @property
    def compute(self) -> float:
        """Microseconds of tensor cores."""
        return self.flops / self.peak / 1e6

    @property
    def microseconds(self) -> float:
        return max(self.memory, self.compute)

    @property
    def limit(self) -> str:
        """What the product waits for: ``memory`` or ``compute``."""
        return "memory" if self.memory >= self.compute else "compute"


def roof(
    gpu: Gpu, problem: Problem, rows: int, *, element: int, output: int, residual: bool, sparse: bool = True
) -> Roof:
    """The roof of a product with 2:4 or dense weights; ``element`` and ``output`` are bytes of one number."""
    moved = traffic(problem, rows, element=element, output=output, residual=residual, sparse=sparse)
    return Roof(moved, 2 * problem.out * problem.k * rows, gpu.bandwidth, gpu.peaks[element][sparse])


def traffic(
    problem: Problem, rows: int, *, element: int, output: int, residual: bool, sparse: bool = True
) -> int:
    """Bytes that have to cross from and to memory for ``rows`` tokens or output pixels, each once.

    Of a convolution's input every pixel that a kernel reads counts once, borders aside.
    """
    if sparse:
        packed = 16 * problem.row_tiles * 64 * problem.units
        weights = packed // 2 * element + packed // 8
    else:
        weights = problem.out * problem.k * element
    conv = problem.conv
    read = problem.k if conv is None else conv.channels * prod(map(min, conv.stride, conv.kernel))
    return weights + rows * (read * element + problem.out * output * (2 if residual else 1))

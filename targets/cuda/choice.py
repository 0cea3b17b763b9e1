"""Decides layer by layer whether 2:4 pays: expected time of the dense product over that of the sparse one.

Where the kernels of this package were measured (``measured``: Hopper), their gain decides.  Elsewhere the
ratios are of cuSPARSELt over cuBLASLt with algorithm search, square products in 16-bit floats and in int8
(SlideSparse, arXiv 2603.05232, published measurements of January 2026; torch 2.9, CUDA 12.9).  What was not
measured there is interpolated in the logarithm of the product's size, and nothing is said to be faster
than the largest product measured, or than the bytes that it moves allow (``roofline``).  For int8 on GPUs
that were not measured the slower of those that were decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda.config import ELEMENTS, OUTPUT_BYTES
from sparsecc.targets.cuda.layers import Layer
from sparsecc.targets.cuda.measured import gain
from sparsecc.targets.cuda.plan_kernels import OUTPUTS
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.roofline import GPUS, LAUNCH, roof
from sparsecc.targets.cuda.tune import Meter, Times

CHOICES = ("modelled", "measured", "always")


@dataclass(frozen=True, slots=True)
class Curve:
    """Speed-up of 2:4 over dense for square products of the given widths on one GPU."""

    gpu: str
    ratios: Mapping[int, float]

    def at(self, flops: float) -> float:
        """The speed-up for a product of ``flops`` operations, interpolated; flat outside of what is known."""
        widths = sorted(self.ratios)
        known = [np.log2(2.0 * width**3) for width in widths]
        return float(np.interp(np.log2(max(flops, 1.0)), known, [self.ratios[w] for w in widths]))


_A100 = {512: 0.87, 1024: 1.24, 2048: 1.08, 4096: 1.81, 8192: 1.52, 16384: 1.22}
_RTX_4090 = {512: 0.97, 1024: 1.28, 2048: 1.86, 4096: 1.83, 8192: 1.95, 16384: 1.90}
_H100 = {512: 0.60, 1024: 0.75, 2048: 0.97, 4096: 1.53, 8192: 1.59, 16384: 1.45}
_RTX_5080 = {512: 1.32, 1024: 1.63, 2048: 1.89, 4096: 1.93, 8192: 1.81, 16384: 1.53}

CURVES: Mapping[str, Curve] = MappingProxyType(
    {
        "sm80": Curve("A100 PCIe, fp16", MappingProxyType(_A100)),
        "sm86": Curve("RTX 4090, fp16 (the nearest GPU measured)", MappingProxyType(_RTX_4090)),
        "sm89": Curve("RTX 4090, fp16", MappingProxyType(_RTX_4090)),
        "sm90": Curve("H100, bf16", MappingProxyType(_H100)),
        "sm120": Curve("RTX 5080, bf16", MappingProxyType(_RTX_5080)),
    }
)

_A100_INT8 = {512: 1.05, 1024: 1.18, 2048: 1.42, 4096: 2.06, 8192: 2.19, 16384: 2.18}
_H100_INT8 = {512: 0.96, 1024: 1.30, 2048: 1.58, 4096: 1.28, 8192: 1.71, 16384: 1.79}
_LEAST_INT8 = {width: min(ratio, _H100_INT8[width]) for width, ratio in _A100_INT8.items()}
_NO_INT8 = Curve(
    "A100 or H100, int8, whichever gains less: none was measured here", MappingProxyType(_LEAST_INT8)
)

INT8_CURVES: Mapping[str, Curve] = MappingProxyType(
    {
        "sm80": Curve("A100 PCIe, int8", MappingProxyType(_A100_INT8)),
        "sm86": _NO_INT8,
        "sm89": _NO_INT8,
        "sm90": Curve("H100, int8", MappingProxyType(_H100_INT8)),
        "sm120": _NO_INT8,
    }
)


#: how the reason begins where a layer should have been measured, and could not be
UNMEASURED = "not measured here; "


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a layer and why; ``expected`` is the speed-up, 0 where none is known.

    ``timed``: it follows from times of these kernels.
    """

    layer: str
    weight: str
    out: int
    k: int
    rows: int
    sparse: bool
    expected: float
    why: str
    tile: str = ""
    timed: bool = False

    def __str__(self) -> str:
        size = f"{self.weight} [{self.out} x {self.k}], {self.rows} rows"
        return f"{size}: {'2:4' if self.sparse else 'dense'}, {self.why}"


def choose(layer: Layer, arch: str, how: str, dtype: str = "fp16", measure: Meter | None = None) -> Choice:
    """Sparse or dense for one layer.

    ``how`` is ``modelled``, ``always`` (wherever it is possible), or ``measured``: by ``measure``, and
    modelled where that has no times.  Raises ``InvalidOption`` for another word.
    """
    if how not in CHOICES:
        raise InvalidOption(f"choose must be one of {', '.join(CHOICES)}; got {how!r}")

    def made(sparse: bool, expected: float, why: str, tile: str = "", timed: bool = False) -> Choice:
        size = (layer.out, layer.k, layer.rows)
        return Choice(layer.name, layer.weight, *size, sparse, expected, why, tile, timed)

    if layer.refusal:
        return made(False, 0.0, layer.refusal)
    if how == "always":
        return made(True, 0.0, "asked for wherever it is possible")
    times = measure(layer, dtype) if how == "measured" and measure is not None else None
    if times is not None:
        why = f"{times.ratio:.2f}x measured: {times.dense:.1f} us dense, {_best(times)}"
        return made(times.ratio > 1.0, times.ratio, why, times.best, timed=True)
    known = None if layer.conv is not None else gain(arch, dtype, layer.rows, layer.out, layer.k)
    expected, why = _modelled(layer, arch, dtype) if known is None else (known.ratio, str(known))
    said = (UNMEASURED if how == "measured" else "") + why
    return made(expected > 1.0, expected, said, timed=known is not None)


def _modelled(layer: Layer, arch: str, dtype: str) -> tuple[float, str]:
    """The lower of what was published for a product of this size and what bytes, peaks and launches allow."""
    curve, gpu = (INT8_CURVES if dtype == "int8" else CURVES)[arch], GPUS[arch]
    dense, sparse = (
        roof(
            gpu,
            Problem(layer.out, layer.k, conv=layer.conv),
            layer.rows,
            element=ELEMENTS[dtype].bytes,
            output=OUTPUT_BYTES[OUTPUTS[layer.matrix.dtype]],
            residual=layer.epilogue.residual,
            sparse=sparse,
        )
        for sparse in (False, True)
    )
    known = curve.at(layer.flops)
    allowed = (dense.microseconds + LAUNCH) / (sparse.microseconds + LAUNCH)
    if allowed < known:
        return allowed, f"{allowed:.2f}x at most: {dense.limit} limits the dense product ({gpu.name})"
    return known, f"{known:.2f}x expected at {layer.flops / 1e9:.3g} GFLOP (cuSPARSELt on {curve.gpu})"


def _best(times: Times) -> str:
    return f"{times.tiles[times.best]:.1f} us with {times.best}" if times.tiles else "no kernel fits"

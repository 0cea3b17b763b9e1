"""What quantising a model gives: the model, what was checked, and what was measured."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from onnx import ModelProto

from sparsecc.atomic import atomic_write
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.report import human, table


@dataclass(frozen=True, slots=True)
class Layer:
    """One product's weight: ``weight`` in the float model, ``stored`` as ``dtype`` in the quantised one.

    ``patterns``: those that were promised, and 2:4 where the float weight has it; all of them are there.
    Of ``size`` elements ``zeros_before`` were zero, and ``zeros`` are: small ones become zero, too.
    """

    weight: str
    stored: str
    dtype: str
    patterns: tuple[str, ...]
    zeros_before: int
    zeros: int
    size: int


@dataclass(frozen=True, slots=True)
class Error:
    """How far an output is from that of the float model, measured over all elements of ``batches`` batches.

    ``sqnr_db``: 10 log10 of (sum of y^2 over sum of (y - float y)^2); ``relative`` is the root of the
    inverse of that ratio, ``largest`` the largest difference.  These are those of onnxruntime as it runs the
    model on this processor.  ``exact_db`` is the first with products in floats, as the file says: kernels for
    integers may saturate sums.  NaN where the file itself has operators of integers.
    """

    output: str
    sqnr_db: float
    relative: float
    largest: float
    batches: int
    exact_db: float = math.nan

    def __str__(self) -> str:
        exact = "" if math.isnan(self.exact_db) else f" ({self.exact_db:.1f} dB with products in floats)"
        return (
            f"{self.output}: SQNR {self.sqnr_db:.1f} dB, relative error {self.relative:.2e}, largest "
            f"difference {self.largest:.2e}{exact}"
        )


@dataclass(frozen=True)
class QuantisedReport:
    """Figures of a quantised model.  ``errors`` are measured on the batches that were held out."""

    weights: str
    activations: str | None
    layers: tuple[Layer, ...]
    errors: tuple[Error, ...]
    calibrated_on: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> str:
        """What was checked of zeros, as a sentence."""
        named: dict[str, int] = {}
        for layer in self.layers:
            for pattern in layer.patterns:
                named[pattern] = named.get(pattern, 0) + 1
        words = ", ".join(f"{pattern} in {count}" for pattern, count in named.items())
        found = f"; patterns there: {words}" if words else ""
        return f"every zero of {len(self.layers)} weights is a zero as an integer{found}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        activations = self.activations or "float, quantised when the model runs"
        lines = [
            f"quantised: weights {self.weights}, activations {activations}; "
            f"{human(self.bytes_before)}B -> {human(self.bytes_after)}B",
            f"checked: {self.kept}",
            *(f"measured on {e.batches} held-out batches: {e}" for e in self.errors),
            *(f"note: {note}" for note in self.notes),
            table(
                ["weight", "stored as", "patterns", "zeros before", "zeros"],
                [
                    [
                        layer.weight,
                        layer.dtype,
                        " ".join(layer.patterns) or "-",
                        f"{layer.zeros_before / max(layer.size, 1):.1%}",
                        f"{layer.zeros / max(layer.size, 1):.1%}",
                    ]
                    for layer in self.layers
                ],
            ),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Quantised:
    """A model of 8 bits, ``model``, as a ModelProto, and the ``report``.

    That zeros and patterns are there is checked.  That it computes about what the float model computes is
    measured, and no certificate.
    """

    model: ModelProto
    report: QuantisedReport
    file: OnnxFile = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ONNX file; it appears whole or not at all."""
        with atomic_write(path) as stream:
            stream.write(self.file.to_bytes())

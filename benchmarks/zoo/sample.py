"""The models that the tests prune: small, quick, and of every family."""

from __future__ import annotations

from benchmarks.zoo.entry import Path

#: path -> ``SUITE/NAME`` -> the least share of the parameters that must go at 50 %
FLOORS: dict[Path, dict[str, float]] = {"torch": {}, "onnx": {}}

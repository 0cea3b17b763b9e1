"""Tiny models of the graph patterns that pruners meet, each with example inputs.

A builder gives ``(module, example_inputs)``; ``CASES`` lists them with what is expected of them.
"""

from tests.patterns import (  # noqa: F401  (each adds its own to CASES)
    attention,
    convolutions,
    detectors,
    feed_forward,
    interface,
    norms,
    positions,
    published,
    recurrent,
    spread,
    structures,
)
from tests.patterns.base import CASES, Case

__all__ = ["CASES", "Case"]

"""The models that the tests prune: small, quick, and of every family."""

from __future__ import annotations

#: ``SUITE/NAME`` -> paths
SAMPLE: dict[str, tuple[str, ...]] = {}

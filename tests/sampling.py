"""Which of many alike cases the gate runs; the nightly suite runs all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(count: int, values: Iterable[Any]) -> list[Any]:
    """Parameters of which each ``count``-th runs in the gate, the first one among them."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if place % count == 0 else pytest.mark.nightly,
        )
        for place, value in enumerate(values)
    ]

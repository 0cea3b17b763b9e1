"""Which of many alike cases the gate runs; the nightly suite runs all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(count: int, values: Iterable[Any], first: int = 0) -> list[Any]:
    """Parameters of which each ``count``-th runs in the gate, from place ``first`` on."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if place % count == first else pytest.mark.nightly,
        )
        for place, value in enumerate(values)
    ]

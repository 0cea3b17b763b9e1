"""Where results are kept: docs/accuracy.json, which several processes may add to."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsecc.atomic import atomic_write

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS, TABLE = DOCS / "accuracy.json", DOCS / "accuracy.md"


def load() -> dict[str, Any]:
    """Everything that was measured."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"dense": {}, "rows": {}}
    return found


def save(change: Callable[[dict[str, Any]], None]) -> None:
    """Read, change and write, alone."""
    with (DOCS / ".accuracy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = load()
        change(kept)
        with atomic_write(RESULTS) as stream:
            stream.write((json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())

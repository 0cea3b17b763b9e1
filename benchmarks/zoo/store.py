"""Rows of finished runs, one JSON line each; a later line of the same key replaces an earlier one."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from benchmarks.zoo.measure import Row

_FIELDS = {f.name for f in fields(Row)}


def load(file: Path) -> dict[str, Row]:
    """Rows by key; a line that an interrupted run left unfinished is ignored."""
    rows: dict[str, Row] = {}
    if not file.exists():
        return rows
    for line in file.read_text("utf-8").splitlines():
        try:
            document = json.loads(line)
        except json.JSONDecodeError:
            continue
        row = Row(**{name: value for name, value in document.items() if name in _FIELDS})
        rows[row.key] = row
    return rows


def append(file: Path, row: Row) -> None:
    """Add a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row.to_json()) + "\n")

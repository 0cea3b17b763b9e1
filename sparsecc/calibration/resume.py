"""Keeps what was summed so far in a file, so that collecting goes on where it was interrupted."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecc.atomic import atomic_write
from sparsecc.calibration.moments import Moments
from sparsecc.errors import InvalidModel

#: seconds between two writes
EVERY = 30.0


class Progress:
    """Moments by the name of what they are of, and how many batches are in them.

    ``key`` says of which model and which moments; a file that says something else is an error and stays.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if path is None else Path(path)
        self.key = key
        self.done = 0
        self.moments: dict[str, Moments] = {}
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                told: Mapping[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InvalidModel(f"{path}: no statistics, or damaged ones ({error})") from error
        if told.get("key") != self.key:
            raise InvalidModel(
                f"{path}: these are the statistics of another model, or other ones; delete the file, or give "
                "another name"
            )
        self.done = int(told["done"])
        for name, tensor in tensors.items():
            what, _, moment = name.rpartition("|")
            found = self.moments.setdefault(what, Moments(int(told[f"count {what}"])))
            found.sums[moment] = tensor

    def advance(self) -> None:
        """One more batch is in; write from time to time."""
        self.done += 1
        if self.path is not None and time.monotonic() - self._written >= EVERY:
            self.write()

    def write(self) -> None:
        """Write atomically, where there is a path."""
        from safetensors.torch import save

        if self.path is None:
            return
        told: dict[str, Any] = {"key": self.key, "done": str(self.done)}
        told |= {f"count {what}": str(m.count) for what, m in self.moments.items()}
        tensors = {
            f"{what}|{name}": t.contiguous() for what, m in self.moments.items() for name, t in m.sums.items()
        }
        with atomic_write(self.path) as stream:
            stream.write(save(tensors, told))
        self._written = time.monotonic()

"""Files that are made once on a machine: entries by the data that they were made from.

    store = Store.default()                    None where it is switched off
    store.put({"source": "...", "arch": "sm_80"}, {"kernel.cubin": code})
    store.get({"source": "...", "arch": "sm_80"})                  {"kernel.cubin": code}, or None

The folder is ``$SPARSECC_KERNELS``, or ``~/.cache/sparsecc/kernels``; ``off`` in its place keeps nothing.  It
may be removed at any time, and is held below ``LIMIT`` bytes: what was not used for longest goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc.atomic import atomic_write
from sparsecc.errors import InvalidOption

VARIABLE = "SPARSECC_KERNELS"
OFF = ("off", "0", "")
LIMIT = 1 << 30
"""Bytes of all entries of the default store; an entry takes some 20 to 60 KB."""

_KEY = "key.json"
_SUFFIX = ".kept"
_DIGEST = hashlib.sha256


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of zip files behind their own digests; each holds its key, whose digest names the file.

    Several processes may use it: entries appear whole, and an entry that is damaged, or of another key, is
    as good as none.  Where the folder cannot be written nothing is kept, and nothing fails.
    """

    folder: Path
    limit: int = LIMIT

    @classmethod
    def default(cls) -> Store | None:
        """The store of this user, None where it is switched off."""
        chosen = os.environ.get(VARIABLE, "~/.cache/sparsecc/kernels")
        return None if chosen.lower() in OFF else cls(Path(chosen).expanduser())

    def get(self, key: Mapping[str, Any]) -> dict[str, bytes] | None:
        """What was kept under ``key`` (plain data), by file name."""
        text = _text(key)
        path = self._path(text)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, packed = content[: _DIGEST().digest_size], content[_DIGEST().digest_size :]
        if _DIGEST(packed).digest() != digest:
            return None
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        if found.pop(_KEY) != text:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now; what was not goes first
        return found

    def put(self, key: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Keep ``files`` under ``key``, and make room."""
        text = _text(key)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in {_KEY: text, **files}.items():
                archive.writestr(name, content)
        with contextlib.suppress(OSError, InvalidOption):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path(text)) as sink:
                sink.write(_DIGEST(packed.getvalue()).digest() + packed.getvalue())
            self._make_room()

    def _path(self, text: bytes) -> Path:
        return self.folder / f"{_DIGEST(text).hexdigest()}{_SUFFIX}"

    def _make_room(self) -> None:
        """Remove the entries that were not used for longest, down to half of the limit."""
        entries = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                found = path.stat()
                entries.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return
        for _, size, path in sorted(entries):
            if total <= self.limit // 2:
                break
            path.unlink(missing_ok=True)
            total -= size


def _text(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True).encode()

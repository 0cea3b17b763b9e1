"""Reads safetensors checkpoints tensor by tensor."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsecc.errors import InvalidModel

#: safetensors' names of dtypes
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str]


class Shards(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name: a ``.safetensors`` file, or a folder as transformers writes it.

    A tensor is read when it is asked for, into memory of its own, and shared as long as somebody holds it.
    Raises InvalidModel for what is no checkpoint, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _files(self.path)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(_entries(file))
        self._alive: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._alive.get(name)
        if found is None:
            entry = self.entries[name]
            found = self._alive[name] = _read(entry, name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / _INDEX).is_file():
        try:
            listed = json.loads((path / _INDEX).read_text())["weight_map"].values()
            names = sorted({str(name) for name in listed})
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise InvalidModel(f"{path / _INDEX}: no index of a checkpoint ({error})") from error
        if bad := [n for n in names if Path(n).name != n]:
            raise InvalidModel(f"{path / _INDEX}: names files outside of its folder: {', '.join(bad)}")
        return [path / name for name in names]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    raise InvalidModel(
        f"{path}: no checkpoint; give a .safetensors file or a folder with {_SINGLE} or {_INDEX}"
    )


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118  (no mapping)
                part = handle.get_slice(name)
                yield name, Entry(file, part.get_dtype(), tuple(part.get_shape()), metadata)
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{file}: no safetensors file, or it is damaged ({error})") from error


def _read(entry: Entry, name: str) -> torch.Tensor:
    """A copy of the tensor: what is mapped would count as memory as long as the file is open."""
    from safetensors import safe_open

    with safe_open(entry.file, framework="pt") as handle:
        stored: Any = handle.get_tensor(name)
        found: torch.Tensor = stored.clone()
    return found

"""Reads safetensors checkpoints tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import struct
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


#: a header is text about tensors: no checkpoint has one of this size
_LONGEST = 100 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored: ``start`` is the first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str]
    start: int = 0


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
            found = self._alive[name] = self._tensor(name)
        return found

    def _tensor(self, name: str) -> torch.Tensor:
        return read(self.entries[name])

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
    """What a file's header says, checked against the file.

    Read by hand, because libraries map whole files, which counts as memory
    (https://github.com/huggingface/safetensors, "Format").
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _LONGEST):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        for name, told in header.items():
            yield name, _entry(file, told, metadata, 8 + length, size)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidModel(f"{file}: no safetensors file, or it is damaged ({error})") from error


def _entry(file: Path, told: Any, metadata: Mapping[str, str], data: int, size: int) -> Entry:
    shape = tuple(int(n) for n in told["shape"])
    begin, end = (int(n) for n in told["data_offsets"])
    width = DTYPES[told["dtype"]].itemsize if told["dtype"] in DTYPES else None
    fits = width is None or end - begin == width * math.prod(shape)
    if not (0 <= begin <= end <= size - data and fits and all(n >= 0 for n in shape)):
        raise ValueError(f"offsets {begin} to {end} for shape {list(shape)}")
    return Entry(file, str(told["dtype"]), shape, metadata, data + begin)


def read(entry: Entry) -> torch.Tensor:
    """A copy of the tensor in memory of its own."""
    dtype = DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    found = torch.empty(count, dtype=dtype)
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        got = stream.readinto(found.view(torch.uint8).numpy().data)
    if got != count * dtype.itemsize:
        raise InvalidModel(f"{entry.file}: ends before its tensors do")
    return found.reshape(entry.shape)

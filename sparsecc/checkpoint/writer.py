"""Writes a safetensors checkpoint tensor by tensor, in any order."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from sparsecc.checkpoint.shards import DTYPES, Entry
from sparsecc.errors import InvalidModel

_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class ShardWriter:
    """A folder with the files of a checkpoint, whose tensors may have other shapes and other names.

    ``names`` maps the names of those that stay to what they are called then; without it all stay.  A file
    that loses all of its tensors is left out.  The header of a file says where every tensor is, so that each
    can be put in its place as soon as it is known (https://github.com/huggingface/safetensors, "Format").
    """

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        shapes: Mapping[str, tuple[int, ...]],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.entries = entries
        self.names = {n: n for n in entries} if names is None else dict(names)
        self._places: dict[str, tuple[Path, int]] = {}
        files: dict[Path, list[str]] = {}
        for name in self.names:
            files.setdefault(entries[name].file, []).append(name)
        for file, inside in files.items():
            self._begin(folder / file.name, inside, shapes)
        self.left = set(self.names)

    @property
    def files(self) -> dict[str, str]:
        """Name of the file that every tensor is in, by the tensor's new name."""
        return {new: self._places[old][0].name for old, new in self.names.items()}

    def _begin(self, file: Path, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, object] = {"__metadata__": dict(self.entries[names[0]].metadata)}
        at = 0
        starts: dict[str, int] = {}
        for name in sorted(names, key=lambda n: -_SIZES[self.entries[n].dtype]):
            shape = shapes.get(name, self.entries[name].shape)
            size = _SIZES[self.entries[name].dtype] * torch.Size(shape).numel()
            header[self.names[name]] = {
                "dtype": self.entries[name].dtype,
                "shape": list(shape),
                "data_offsets": [at, at + size],
            }
            starts[name], at = at, at + size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + at)
        self._places.update({name: (file, 8 + len(text) + start) for name, start in starts.items()})

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, in the dtype that the checkpoint has it in."""
        self._store(name, tensor)
        self.left.discard(name)

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        stored = tensor.detach().to("cpu", DTYPES[self.entries[name].dtype]).contiguous()
        file, start = self._places[name]
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(stored.reshape(-1).view(torch.uint8).numpy().data)


def check_known(entries: Mapping[str, Entry]) -> None:
    """Raise InvalidModel for dtypes that cannot be written."""
    odd = sorted({e.dtype for e in entries.values()} - DTYPES.keys())
    if odd:
        raise InvalidModel(f"the checkpoint holds {', '.join(odd)}, of which there is no plain float32 value")

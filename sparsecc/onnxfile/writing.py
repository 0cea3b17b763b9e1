"""Writing an ONNX model with its external data, atomically and in the layout that it had."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto

from sparsecc.atomic import atomic_write, check_writable
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.onnxfile.model import (
    ALIGNMENT,
    EXTERNAL_THRESHOLD,
    PAYLOAD,
    SPLIT_AT,
    Array,
    OnnxFile,
    encode,
    external_entries,
    external_path,
    graph_tensors,
    graphs,
    payload_bytes,
    serialise,
)

_Content = Callable[[BinaryIO], Any]


@dataclass(eq=False)
class _Slot:
    """One payload of an external file: where it stood, where it will stand, and its bytes."""

    tensors: list[TensorProto]
    data: Array
    old_offset: int
    moved: bool
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return payload_bytes(self.tensors[0].data_type, self.data.size)


def write_model(model: OnnxFile, path: Path, *, compact: bool) -> None:
    """Write ``model`` to ``path``; see ``OnnxFile.save``."""
    check_writable(path)
    external = list(_external(model.proto))
    _spare_own_data(model, path)
    if model.raw is not None:
        files: dict[str, _Content] = _copies(model, path, external)
        raw = model.raw
    elif not external and model.proto.ByteSize() <= SPLIT_AT:
        files, raw = {}, serialise(model.proto)
    else:
        proto = ModelProto()
        proto.CopyFrom(model.proto)
        files = _placed(
            model, path, proto, compact=compact, split=not external or proto.ByteSize() > SPLIT_AT
        )
        raw = serialise(proto)
    _write_all(path, raw, files)


def _write_all(path: Path, raw: bytes, files: Mapping[str, _Content]) -> None:
    """Write everything beside its place first; then data files appear, and last the model."""
    targets = {path.parent / location: content for location, content in files.items()}
    for target in targets:
        _mkdir(target)
    with ExitStack() as stack:  # left in reverse order
        streams = [stack.enter_context(atomic_write(path))]
        streams[0].write(raw)
        for target, content in targets.items():
            streams.append(stack.enter_context(atomic_write(target)))
            content(streams[-1])
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())


def _spare_own_data(model: OnnxFile, path: Path) -> None:
    for source in source_files(model):
        if source != model.path and path.exists() and path.samefile(source):
            raise InvalidOption(
                f"cannot write {path}: the model's external data is there; choose another name"
            )


def _placed(
    model: OnnxFile, path: Path, proto: ModelProto, *, compact: bool, split: bool
) -> dict[str, _Content]:
    """Give every external payload its file and offset, also in ``proto``; the contents of the files."""
    slots = _slots(model, proto)
    if split:
        slots.setdefault(next(iter(slots), f"{path.name}.data"), []).extend(_inline_slots(model, proto))
    files: dict[str, _Content] = {}
    for location, entries in slots.items():
        _place(entries, compact)
        target = _free_location(model, path, location, files)
        for slot in entries:
            for tensor in slot.tensors:
                _point(tensor, target, slot, renamed=target != location)
        files[target] = partial(_write_slots, entries)
    return files


def _external(proto: ModelProto) -> Iterator[TensorProto]:
    for graph in graphs(proto):
        for tensor in graph_tensors(graph):
            if tensor.data_location == TensorProto.EXTERNAL:
                yield tensor


def _slots(model: OnnxFile, proto: ModelProto) -> dict[str, list[_Slot]]:
    """Payloads by file, in the order of the old offsets; tensors that share one keep sharing it."""
    shared: dict[tuple[str, int, int], _Slot] = {}
    files: dict[str, list[_Slot]] = {}
    last: dict[str, int] = {}
    for tensor in _external(proto):
        entries = external_entries(tensor)
        location = entries.get("location", "")
        if PAYLOAD in entries:
            data = model.read(tensor)
            # a replaced payload has no offset any more: it stays behind its predecessor in the file
            slot = _Slot([tensor], data, last.get(location, 0), moved=True)
        else:
            offset = int(entries.get("offset", "0"))
            data = model.read(tensor)
            key = (location, offset, payload_bytes(tensor.data_type, data.size))
            if key in shared:
                shared[key].tensors.append(tensor)
                continue
            slot = shared[key] = _Slot([tensor], data, offset, moved=False)
            last[location] = offset
        files.setdefault(location, []).append(slot)
    for slots in files.values():
        slots.sort(key=lambda slot: slot.old_offset)
    return files


def _inline_slots(model: OnnxFile, proto: ModelProto) -> list[_Slot]:
    return [
        _Slot([tensor], model.read(tensor), 0, moved=True)
        for tensor in proto.graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL
        and tensor.data_type != TensorProto.STRING
        and int(np.prod(tensor.dims, dtype=np.float64)) >= EXTERNAL_THRESHOLD
    ]


def _place(slots: list[_Slot], compact: bool) -> None:
    """Give every payload its offset; without ``compact`` only those that changed move."""
    if compact:
        end, alignment = 0, _alignment(slots)
        for slot in slots:
            slot.offset = -(-end // alignment) * alignment
            end = slot.offset + slot.nbytes
        return
    kept = sorted((slot for slot in slots if not slot.moved), key=lambda slot: slot.old_offset)
    for slot in kept:
        slot.offset = slot.old_offset
    gaps, end = [], 0
    for slot in kept:
        gaps.append([end, slot.offset])
        end = max(end, slot.offset + slot.nbytes)
    for slot in (slot for slot in slots if slot.moved):
        for gap in gaps:
            start = -(-gap[0] // ALIGNMENT) * ALIGNMENT
            if start + slot.nbytes <= gap[1]:
                slot.offset, gap[0] = start, start + slot.nbytes
                break
        else:
            slot.offset = -(-end // ALIGNMENT) * ALIGNMENT
            end = slot.offset + slot.nbytes


def _alignment(slots: list[_Slot]) -> int:
    """The alignment that the payloads had, up to a page, or the usual one where that cannot be told."""
    offsets = [slot.old_offset for slot in slots if slot.old_offset]
    if len(offsets) < 3:
        return ALIGNMENT
    return min(4096, *(offset & -offset for offset in offsets))


def _point(tensor: TensorProto, location: str, slot: _Slot, *, renamed: bool) -> None:
    """Rewrite the external entries of a tensor, unless they are right as they are."""
    entries = external_entries(tensor)
    if not slot.moved and not renamed and int(entries.get("offset", "0")) == slot.offset:
        return
    keep = {key: value for key, value in entries.items() if key not in (PAYLOAD, "checksum")}
    keep.update(location=location, offset=str(slot.offset), length=str(slot.nbytes))
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in keep.items():
        tensor.external_data.add(key=key, value=value)


def _copies(model: OnnxFile, path: Path, external: list[TensorProto]) -> dict[str, _Content]:
    """The files of an unchanged model, to be put beside the new one byte for byte."""
    if model.base_dir is None:
        return {}
    files: dict[str, _Content] = {}
    for location in dict.fromkeys(external_entries(tensor).get("location", "") for tensor in external):
        source = external_path(model.base_dir, location, location, model.path)
        target = path.parent / location
        if _same(target, path):
            raise InvalidOption(f"cannot write {path}: external data has to go there; choose another name")
        if not (target.exists() and target.samefile(source)):
            files[location] = partial(_copy_file, source)
    return files


def _copy_file(source: Path, file: BinaryIO) -> None:
    try:
        with source.open("rb") as original:
            shutil.copyfileobj(original, file, 1 << 22)
    except FileNotFoundError as error:
        raise InvalidModel(f"the external data {source} was removed after loading") from error


def _free_location(model: OnnxFile, path: Path, location: str, taken: Container[str]) -> str:
    """``location``, or another name where that is the new model or a file that the model was read from."""
    candidates = [location, f"{path.name}.data", *(f"{path.name}-{k}.data" for k in range(2, 100))]
    sources = source_files(model)
    for candidate in candidates:
        target = path.parent / candidate
        if candidate in taken or _same(target, path):
            continue
        if not any(target.exists() and target.samefile(source) for source in sources):
            return candidate
    raise InvalidOption(f"no free name for the external data of {path}; save the model to another folder")


def _same(target: Path, path: Path) -> bool:
    """Whether two paths are the same place, also where nothing is there yet."""
    return os.path.realpath(target) == os.path.realpath(path)


def source_files(model: OnnxFile) -> list[Path]:
    """The files that a model was read from: its own, then those of its external data."""
    found = [] if model.path is None else [model.path]
    if model.base_dir is not None:
        locations = {external_entries(tensor).get("location", "") for tensor in _external(model.proto)}
        found += [external_path(model.base_dir, location, location, model.path) for location in locations]
    return [path for path in found if path.exists()]


def _mkdir(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOption(
            f"cannot write {target}: {error.strerror or error}; nothing was changed"
        ) from error


def _write_slots(slots: list[_Slot], file: BinaryIO) -> None:
    for slot in sorted(slots, key=lambda slot: slot.offset):
        file.seek(slot.offset)
        file.write(encode(slot.data, slot.tensors[0].data_type))

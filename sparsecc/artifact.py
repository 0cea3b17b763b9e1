"""The artifact: a compiled model in one file that needs no user code and holds no pickle.

One stored (uncompressed) zip:

    manifest.json       what it is: versions, target, recipe, signature, report, certificate, member hashes
    model.onnx          the model; its weights inside, or in weights.bin where protobuf's 2 GB do not suffice
    plan.json, plan.safetensors, ...    further members as the target and the compiler gave them

The same content gives the same bytes.  Saving replaces the file in one step or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparsecc import __version__
from sparsecc.atomic import atomic_write
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.signature import Signature

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "weights.bin"

_CHUNK = 1 << 20
_MANIFEST_LIMIT = 64 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "sparsecc": str,
    "target": str,
    "recipe": (str, type(None)),
    "signature": dict,
    "report": dict,
    "certificate": dict,
    "members": dict,
}


@dataclass(frozen=True, slots=True)
class StoredMember:
    """A member that stays in the artifact file until it is read."""

    archive: Path
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Generated:
    """A member whose content is made, in pieces, each time that it is read; always the same content."""

    chunks: Callable[[], Iterable[bytes]]


Member = bytes | Path | StoredMember | Generated


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compiled model: ``manifest`` is JSON data, ``members`` are named contents, read when needed."""

    manifest: Mapping[str, Any]
    members: Mapping[str, Member] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The target string that the model was compiled for."""
        return str(self.manifest["target"])

    @property
    def signature(self) -> Signature:
        """How the model is called."""
        return Signature.from_json(self.manifest["signature"])

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of one member, in pieces."""
        if name not in self.members:
            raise InvalidModel(
                f"the artifact has no member {name!r}; it has {', '.join(sorted(self.members))}"
            )
        return _chunks(self.members[name])

    def read(self, name: str) -> bytes:
        """The whole content of one member."""
        return b"".join(self.chunks(name))

    def extract(self, folder: str | os.PathLike[str], *names: str) -> None:
        """Write members (all, or ``names``) below ``folder``, which must exist."""
        for name in names or sorted(self.members):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as sink:
                sink.writelines(self.chunks(name))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact to ``path`` in one step; a file that is there survives any failure.

        An artifact whose main product is an ONNX file (target ``onnx``) writes the plain ONNX file
        where ``path`` ends in ``.onnx``.
        """
        if Path(path).suffix == ".onnx":
            self._save_onnx(Path(path))
            return
        hashes = {name: _digest(member) for name, member in sorted(self.members.items())}
        manifest = _manifest_bytes({**self.manifest, "members": hashes})
        with atomic_write(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _store(archive, MANIFEST, manifest, len(manifest))
            for name, entry in hashes.items():
                _check_name(name)
                written = _store(archive, name, self.members[name], entry["bytes"])
                if written != entry["sha256"]:
                    raise InvalidModel(
                        f"the member {name!r} changed while the artifact was written; save again"
                    )

    def _save_onnx(self, path: Path) -> None:
        if self.manifest.get("main") != MODEL:
            raise InvalidOption(
                f"{path} would be a plain ONNX file, but this is an artifact for {self.target!r}: "
                "compile with target='onnx', or save under another ending"
            )
        if WEIGHTS in self.members:
            _save_onnx_with_weights(self, path)
            return
        with atomic_write(path) as sink:
            sink.writelines(self.chunks(MODEL))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Open an artifact and check all of it: structure, names, sizes, hashes, version.

        Raises ``InvalidModel`` for anything that is not an artifact this version can read.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidModel(f"give the path of an artifact, not a {type(path).__name__}")
        path = Path(path)
        try:
            archive = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise InvalidModel(f"there is no artifact {path}") from error
        except OSError as error:
            raise InvalidModel(f"cannot read the artifact {path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            hint = "; an ONNX file is an input: give it to sparsecc.compile" if path.suffix == ".onnx" else ""
            raise InvalidModel(
                f"{path} is not a sparsecc artifact, or it is truncated ({error}){hint}"
            ) from error
        with archive:
            return _load(cls, path, archive)


def make_manifest(
    *,
    target: str,
    signature: Signature,
    recipe: str | None = None,
    report: Mapping[str, Any] | None = None,
    certificate: Mapping[str, Any] | None = None,
    main: str | None = None,
) -> dict[str, Any]:
    """The manifest of a new artifact; ``main`` names the member that is its plain product, if any."""
    return {
        "format": FORMAT,
        "sparsecc": __version__,
        "target": target,
        "recipe": recipe,
        "signature": signature.to_json(),
        "report": dict(report or {}),
        "certificate": dict(certificate or {}),
        **({"main": main} if main is not None else {}),
    }


def _chunks(member: Member) -> Iterator[bytes]:
    if isinstance(member, bytes):
        yield member
    elif isinstance(member, Generated):
        yield from member.chunks()
    elif isinstance(member, StoredMember):
        try:
            with zipfile.ZipFile(member.archive) as archive, archive.open(member.name) as stream:
                yield from iter(partial(stream.read, _CHUNK), b"")
        except (FileNotFoundError, KeyError, zipfile.BadZipFile) as error:
            raise InvalidModel(
                f"the artifact {member.archive} was changed or removed after loading"
            ) from error
    else:
        with open(member, "rb") as stream:
            yield from iter(partial(stream.read, _CHUNK), b"")


def _digest(member: Member) -> dict[str, Any]:
    if isinstance(member, StoredMember):
        return {"bytes": member.size, "sha256": member.sha256}
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(member):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _store(archive: zipfile.ZipFile, name: str, member: Member, size: int) -> str:
    """Append one member; its hash as written.  Fixed time and mode, so that the bytes repeat."""
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr = 3, 0o644 << 16
    digest = hashlib.sha256()
    with archive.open(info, "w", force_zip64=size >= zipfile.ZIP64_LIMIT) as sink:
        for chunk in _chunks(member):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    try:
        return (
            json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        ).encode()
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"the report or the certificate is not plain JSON data: {error}") from error


def _load(cls: type[Artifact], path: Path, archive: zipfile.ZipFile) -> Artifact:
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) != len(entries):
        raise InvalidModel(f"{path} is not a sparsecc artifact: a member is there twice")
    for entry in entries:
        _check_entry(path, entry)
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InvalidModel(f"{path} is not a sparsecc artifact: its members are larger than the file")
    by_name = {entry.filename: entry for entry in entries}
    manifest = _read_manifest(path, archive, by_name.pop(MANIFEST, None))
    recorded = manifest.pop("members")
    if recorded.keys() != by_name.keys():
        odd = ", ".join(sorted(recorded.keys() ^ by_name.keys()))
        raise InvalidModel(f"{path} is damaged: manifest and content differ in {odd}")
    members: dict[str, Member] = {}
    for name in sorted(by_name):
        members[name] = _checked_member(path, archive, name, recorded[name])
    artifact = cls(manifest, members)
    _ = artifact.signature  # malformed ones are refused here, not at the first call
    return artifact


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    _check_name(entry.filename)
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.file_size != entry.compress_size
        or entry.flag_bits & 1
    ):
        raise InvalidModel(
            f"{path} is not a sparsecc artifact: {entry.filename!r} is compressed or encrypted"
        )


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name or len(name) > 255:
        raise InvalidModel(f"{name!r} is not a valid member name of an artifact")


def _read_manifest(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None) -> dict[str, Any]:
    if entry is None:
        raise InvalidModel(f"{path} is not a sparsecc artifact: it has no {MANIFEST}")
    if entry.file_size > _MANIFEST_LIMIT:
        raise InvalidModel(
            f"{path} has a manifest of {entry.file_size} bytes; at most {_MANIFEST_LIMIT} are read"
        )
    try:
        manifest = json.loads(archive.read(entry))
    except (ValueError, RecursionError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InvalidModel(f"the manifest of {path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise InvalidModel(f"the manifest of {path} is not that of a sparsecc artifact")
    if manifest["format"] != FORMAT:
        raise InvalidModel(
            f"{path} has artifact format {manifest['format']} of sparsecc {manifest.get('sparsecc', '?')}; "
            f"this is sparsecc {__version__}, which reads format {FORMAT}: install a matching version"
        )
    for key, kind in _KEYS.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise InvalidModel(f"the manifest of {path} is malformed at {key!r}")
    return manifest


def _checked_member(path: Path, archive: zipfile.ZipFile, name: str, recorded: Any) -> StoredMember:
    digest = hashlib.sha256()
    try:
        with archive.open(name) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise InvalidModel(f"{path} is damaged: {name!r} cannot be read ({error})") from error
    size = archive.getinfo(name).file_size
    if recorded != {"bytes": size, "sha256": digest.hexdigest()}:
        raise InvalidModel(f"{path} is damaged: {name!r} does not have the recorded hash")
    return StoredMember(path.absolute(), name, size, digest.hexdigest())


def _save_onnx_with_weights(artifact: Artifact, path: Path) -> None:
    """Write the weights to a new file beside the model, named by their content, then the model."""
    import onnx

    weights = f"{path.name}.{_digest(artifact.members[WEIGHTS])['sha256'][:12]}.data"
    with atomic_write(path.with_name(weights)) as sink:
        sink.writelines(artifact.chunks(WEIGHTS))
    model = onnx.ModelProto.FromString(artifact.read(MODEL))
    for entry in _locations(model):
        entry.value = weights
    with atomic_write(path) as sink:
        sink.write(model.SerializeToString(deterministic=True))


def _locations(message: Any) -> Iterator[Any]:
    """Every external-data location entry below a protobuf message."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for item in value if hasattr(value, "append") else [value]:
            if descriptor.name == "external_data":
                if item.key == "location":
                    yield item
            else:
                yield from _locations(item)

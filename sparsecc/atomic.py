"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sparsecc.errors import InvalidOption

StrPath = str | os.PathLike[str]

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def atomic_write(path: StrPath) -> Iterator[BinaryIO]:
    """A stream whose content appears at ``path`` when the block ends without an error.

    The content goes to a new file in the same folder, is flushed to the disk, and takes the place of
    ``path`` in one step; a link stays a link.  Permissions are those of the file that was there, or what
    the umask gives a new one.  Raises ``InvalidOption`` where the path cannot be written; whatever was
    there then stays.
    """
    final = _writable(path)
    # The names of two writers at the same time differ, and a name at the file system's limit still fits.
    temporary = final.with_name(f".{final.name[:64]}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, _NEW, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with open(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(final.stat().st_mode))
        os.replace(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        # An error of another file, which the block was reading, carries that file's name.
        if error.filename is None or os.fspath(error.filename) == os.fspath(temporary):
            raise _unwritable(path, error) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: StrPath) -> None:
    """Raise the ``InvalidOption`` that writing to ``path`` would raise, where that can be told before.

    Writes nothing; for work that takes long before there is something to write.
    """
    final = _writable(path)
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise InvalidOption(f"cannot write {path}: the folder {final.parent} is read-only; choose another")


def _writable(path: StrPath) -> Path:
    """Where a file really goes: behind links, in a folder that is there."""
    try:
        final = Path(os.path.realpath(path))
        if final.is_dir():
            raise InvalidOption(f"cannot write {path}: it is a folder; give the name of a file")
        if not final.parent.is_dir():
            raise InvalidOption(f"cannot write {path}: there is no folder {final.parent}; create it first")
    except (OSError, ValueError) as error:  # a name that is too long or holds a null character
        if isinstance(error, InvalidOption):
            raise
        raise _unwritable(path, error) from error
    return final


def _unwritable(path: StrPath, error: Exception) -> InvalidOption:
    reason = getattr(error, "strerror", None) or str(error)
    return InvalidOption(f"cannot write {path}: {reason}; nothing was changed, choose another place")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

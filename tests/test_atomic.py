"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from sparsecc.atomic import atomic_write, check_writable
from sparsecc.errors import InvalidOption


def test_content_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic_write(path) as stream:
        stream.write(b"1")
        assert not path.exists()
    assert path.read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_the_umask_or_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        with atomic_write(path):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    with atomic_write(path):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "x")
    with atomic_write(link) as stream:
        stream.write(b"1")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "x").read_bytes() == b"1"
    assert len(list((tmp_path / "folder").iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_the_old_file_survives_an_error_in_the_block(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def write() -> None:
        with atomic_write(path) as stream:
            stream.write(b"1")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["open", "fsync", "chmod", "replace"])
def test_the_old_file_survives_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        message = "No space left on device; nothing was changed"
        with pytest.raises(InvalidOption, match=message), atomic_write(path) as stream:
            stream.write(b"1")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_writing_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="No space left"), atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "x"):
        (tmp_path / "other").read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [check_writable, lambda path: atomic_write(path).__enter__()])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "it is a folder"),
        ("nowhere/x", "there is no folder"),
        ("file/x", "there is no folder"),
        ("a\0b", "null"),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, check: Any, name: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidOption, match=message):
        check(f"{tmp_path}/{name}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="cannot write"), atomic_write(tmp_path / ("a" * 300)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InvalidOption, match="read-only"):
            check_writable(tmp_path / "x")
        with pytest.raises(InvalidOption, match="Permission denied"), atomic_write(tmp_path / "x"):
            pass
    finally:
        tmp_path.chmod(0o755)

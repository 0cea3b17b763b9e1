"""Kernels kept on disk: found again, never wrong ones, whatever happens to the files."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsecc.errors import SparseccError
from sparsecc.targets.cuda import kept, store
from sparsecc.targets.cuda.build import Kernel, Wanted, build_gemm, build_gemms
from sparsecc.targets.cuda.config import Epilogue
from sparsecc.targets.cuda.nvrtc import Compiled
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.store import Store
from sparsecc.targets.cuda.tiles import default_config
from sparsecc.targets.cuda.tvm_build import Source

KEY = {"a": 1, "b": ["x", None]}
FILES = {"one.bin": bytes(range(200)) * 2, "two.txt": b"", "three.json": b"[1]"}


# -- the store ----------------------------------------------------------------------------------------


def test_what_was_put_is_found_and_nothing_else(tmp_path: Path) -> None:
    kept_here = Store(tmp_path / "deep" / "folder")
    assert kept_here.get(KEY) is None
    kept_here.put(KEY, FILES)
    assert kept_here.get(KEY) == FILES
    assert Store(kept_here.folder).get({"b": ["x", None], "a": 1}) == FILES
    assert kept_here.get({**KEY, "a": 2}) is None
    kept_here.put(KEY, {"other": b"2"})
    assert kept_here.get(KEY) == {"other": b"2"}


def test_a_damaged_entry_is_none_and_is_made_again(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed."""
    here = Store(tmp_path)
    here.put(KEY, FILES)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place, byte in enumerate(whole):
        for content in (whole[:place], whole[:place] + bytes([byte ^ 1 << place % 8]) + whole[place + 1 :]):
            path.write_bytes(content)
            assert here.get(KEY) is None
    here.put(KEY, FILES)
    assert here.get(KEY) == FILES


def test_an_entry_under_another_name_is_none(tmp_path: Path) -> None:
    here, other = Store(tmp_path), {**KEY, "a": 2}
    here.put(KEY, FILES)
    (first,) = tmp_path.iterdir()
    here.put(other, FILES)
    (second,) = set(tmp_path.iterdir()) - {first}
    os.replace(first, second)
    assert here.get(other) is None


def test_old_entries_make_room(tmp_path: Path) -> None:
    here = Store(tmp_path, limit=200_000)
    for number in range(8):
        here.put({"n": number}, {"x": os.urandom(20_000)})
        for path in tmp_path.iterdir():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    assert here.get({"n": 0}) is not None  # used now
    here.put({"n": 8}, {"x": os.urandom(60_000)})
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert total <= 100_000
    assert here.get({"n": 0}) is not None
    assert here.get({"n": 8}) is not None
    assert here.get({"n": 1}) is None


def test_writers_at_the_same_time_leave_one_whole_entry(tmp_path: Path) -> None:
    here = Store(tmp_path, limit=50_000)
    wrong: list[Any] = []

    def work() -> None:
        for turn in range(20):
            key = {"n": turn % 5}
            content = {"x": bytes([turn % 5]) * 5000}
            here.put(key, content)
            found = here.get(key)
            if found not in (None, content):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(path.suffix == ".kept" for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    here = Store(tmp_path / "file" / "below")
    here.put(KEY, FILES)
    assert here.get(KEY) is None


@pytest.mark.parametrize("word", ["off", "OFF", "0", ""])
def test_it_can_be_switched_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.VARIABLE, word)
    assert Store.default() is None


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv(store.VARIABLE)
    assert Store.default() == Store(tmp_path / ".cache" / "sparsecc" / "kernels")
    monkeypatch.setenv(store.VARIABLE, "~/elsewhere")
    assert Store.default() == Store(tmp_path / "elsewhere")


# -- kernels in it ------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of the test's own."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """What another process would not know."""
    kept.source.cache_clear()
    kept.compiled.cache_clear()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Compilers that take no time, and how often each was called."""
    calls = {"source": 0, "compiled": 0}

    def gemm_source(config: Any, problem: Any, *, name: str) -> Source:
        calls["source"] += 1
        return Source(f"// {config} {problem}", f"{name}_kernel", ("d", "weight"))

    def compile_source(text: str, arch: str) -> Compiled:
        calls["compiled"] += 1
        return Compiled(arch, f"{arch} {text}".encode(), "ptx", 40 + calls["compiled"], 0, 8, 0, True)

    monkeypatch.setattr(kept, "gemm_source", gemm_source)
    monkeypatch.setattr(kept, "compile_source", compile_source)
    return calls


def small(**changed: Any) -> Kernel:
    return build_gemm(replace(default_config("small"), **changed), Problem(64, 64), ["sm_80", "sm_90"])


def test_another_process_builds_nothing(here: Path, stand_ins: dict[str, int]) -> None:
    first = small()
    assert stand_ins == {"source": 1, "compiled": 2}
    forget()
    again = small()
    assert stand_ins == {"source": 1, "compiled": 2}
    assert (again.manifest(), again.files()) == (first.manifest(), first.files())


def test_real_kernels_come_back_with_the_same_bytes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    pytest.importorskip("nvidia")
    first = small()
    forget()
    monkeypatch.setattr(kept, "gemm_source", None)
    monkeypatch.setattr(kept, "compile_source", None)
    again = small()
    assert (again.manifest(), again.files()) == (first.manifest(), first.files())


@pytest.mark.parametrize(
    "changed",
    [
        {"stages": 3},
        {"dtype": "bf16", "out_dtype": "bf16"},
        {"out_dtype": "fp32"},
        {"layout": "nchw"},
        {"epilogue": Epilogue(bias=True)},
    ],
)
def test_other_kernels_are_others(changed: dict[str, Any], here: Path, stand_ins: dict[str, int]) -> None:
    small()
    forget()
    assert small(**changed).source != small().source
    assert stand_ins == {"source": 2, "compiled": 4}


def test_other_versions_and_another_generator_make_everything_anew(
    here: Path, stand_ins: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    small()
    for name, made in (
        ("apache-tvm", {"source": 2, "compiled": 2}),
        ("nvidia-cuda-nvrtc", {"source": 2, "compiled": 4}),
        ("nvidia-cuda-runtime", {"source": 2, "compiled": 6}),
    ):
        before = kept._versions

        def versions(*names: str, before: Any = before, name: str = name) -> dict[str, str]:
            return {**before(*names), **({name: "0.1"} if name in names else {})}

        monkeypatch.setattr(kept, "_versions", versions)
        forget()
        small()
        assert stand_ins == made, name
    monkeypatch.setattr(kept, "_package_digest", lambda: "another")
    forget()
    small()
    assert stand_ins == {"source": 3, "compiled": 6}  # the same source is the same machine code


def test_entries_that_lack_something_are_made_again(here: Path, stand_ins: dict[str, int]) -> None:
    first = small()
    for path in here.iterdir():
        with zipfile.ZipFile(path) as archive:  # which may begin with other bytes
            files = {name: archive.read(name) for name in archive.namelist()}
        key = json.loads(files.pop("key.json"))
        for lacking in files:
            Store(here).put(key, {name: c for name, c in files.items() if name != lacking})
            forget()
            assert small().parameters == first.parameters
        for facts in (b"[]", b"{}", b'{"entry": 1}', b"\xff", b'{"arch": "sm_80", "registers": "many"}'):
            Store(here).put(key, {**files, "facts.json": facts})
            forget()
            assert small().parameters == first.parameters
    forget()
    before = dict(stand_ins)
    small()
    assert stand_ins == before


def test_switched_off_leaves_nothing(
    here: Path, stand_ins: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.VARIABLE, "off")
    small()
    forget()
    small()
    assert stand_ins == {"source": 2, "compiled": 4}
    assert not list(here.iterdir())


def test_the_digest_is_of_the_text_that_generates() -> None:
    assert len(kept._package_digest()) == 64
    assert kept._versions("torch", "no-such-distribution")["no-such-distribution"] == ""


def test_many_kernels_are_built_at_once_and_each_once(here: Path, stand_ins: dict[str, int]) -> None:
    """In order, whatever repeats, and the same as one by one."""
    asked = [
        Wanted(default_config(tile), Problem(64, k), arches)
        for tile, k, arches in (
            ("small", 64, ("sm_90", "sm_80")),
            ("batch8", 128, ("sm_80",)),
            ("small", 64, ("sm_80",)),
            ("small", 128, ("sm_86", "sm_86")),
        )
    ]
    found = build_gemms(asked)
    assert stand_ins == {"source": 3, "compiled": 4}
    assert [list(kernel.images) for kernel in found] == [["sm_80", "sm_90"], ["sm_80"], ["sm_80"], ["sm_86"]]
    assert [(kernel.config, kernel.problem) for kernel in found] == [(w.config, w.problem) for w in asked]
    for one, kernel in zip(asked, found, strict=True):
        assert build_gemm(one.config, one.problem, one.arches).files() == kernel.files()


def test_a_compilation_that_fails_beside_others_is_the_error(
    here: Path, stand_ins: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_source(text: str, arch: str) -> Compiled:
        if arch == "sm_86":
            raise SparseccError("NVRTC cannot compile this")
        return Compiled(arch, b"code", "ptx", 40, 0, 8, 0, True)

    monkeypatch.setattr(kept, "compile_source", compile_source)
    with pytest.raises(SparseccError, match="cannot compile this"):
        build_gemms([Wanted(default_config("small"), Problem(64, 64), ("sm_80", "sm_86", "sm_90"))])

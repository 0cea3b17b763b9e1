"""The artifact file: round trips, repeatable bytes, atomic saving, and hostile or damaged input."""

from __future__ import annotations

import errno
import io
import json
import os
import pickletools
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import load as load_safetensors

from sparsecc import artifact as module
from sparsecc.artifact import FORMAT, MANIFEST, MODEL, Artifact, Generated, atomic_write, make_manifest
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.signature import Signature, TensorSpec
from sparsecc.target import TargetSpec
from sparsecc.targets.cpu import Cpu
from sparsecc.targets.onnx import Onnx

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 2), ("x",)),), (TensorSpec("y", "float32", None),), ("x",)
)
TENSORS = b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "  # an empty safetensors file


def relu() -> OnnxFile:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return OnnxFile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def compiled(target: str = "cpu") -> Artifact:
    back_end = Cpu() if target == "cpu" else Onnx()
    return back_end.build(
        relu(),
        TargetSpec.parse(target),
        recipe="channels(sparsity=0.5)",
        report={"parameters": {"before": 4, "after": 2}, "note": "größer ✓"},
        certificate={"verdict": "PASSED", "error": 1.5e-13},
        members={"plan.json": b'{"takes": []}', "plan.safetensors": TENSORS},
    )


def small(**members: Any) -> Artifact:
    return Artifact(
        make_manifest(target="cpu", signature=SIGNATURE),
        {k.replace("__", "."): v for k, v in members.items()},
    )


# ---------------------------------------------------------------------- round trips


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    original = compiled()
    path = tmp_path / "model.scc"
    original.save(path)
    loaded = Artifact.load(path)
    assert loaded.target == "cpu"
    assert loaded.signature == original.signature
    assert loaded.manifest == json.loads(json.dumps(original.manifest))
    assert set(loaded.members) == set(original.members)
    for name in original.members:
        assert loaded.read(name) == original.read(name)
    assert Cpu().executor(loaded)([[1.0, -1.0]]).tolist() == [[1.0, 0.0]]
    loaded.save(path)  # over the very file that the members are read from
    again = tmp_path / "again.scc"
    original.save(again)
    assert path.read_bytes() == again.read_bytes()


def test_no_member_is_a_pickle_and_each_opens_with_its_own_reader(tmp_path: Path) -> None:
    compiled().save(tmp_path / "model.scc")
    loaded = Artifact.load(tmp_path / "model.scc")
    readers: dict[str, Callable[[bytes], Any]] = {
        ".json": json.loads,
        ".onnx": onnx.load_model_from_string,
        ".safetensors": load_safetensors,
    }
    with zipfile.ZipFile(tmp_path / "model.scc") as archive:
        names = archive.namelist()
        assert names == [MANIFEST, *sorted(loaded.members)]
        for name in names:
            content = archive.read(name)
            readers[Path(name).suffix](content)
            assert not zipfile.is_zipfile(io.BytesIO(content))
            with pytest.raises(ValueError, match=r".*"):
                pickletools.dis(content, out=io.StringIO())


def test_the_bytes_repeat_whatever_the_time_order_or_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled().save(tmp_path / "a.scc")
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.setattr("time.time", lambda: 2e9)
    second = compiled()
    members = dict(reversed(list(second.members.items())))
    manifest = dict(reversed(list(second.manifest.items())))
    Artifact(manifest, members).save(tmp_path / "b.scc")
    assert (tmp_path / "a.scc").read_bytes() == (tmp_path / "b.scc").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.scc") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_members_may_be_files_or_made_while_writing(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(3 << 20))
    made = Generated(lambda: iter([b"abc", b"", b"def"]))
    artifact = small(weights__bin=tmp_path / "weights", made__bin=made)
    artifact.save(tmp_path / "a.scc")
    loaded = Artifact.load(tmp_path / "a.scc")
    assert loaded.read("made.bin") == b"abcdef"
    assert loaded.read("weights.bin") == bytes(3 << 20)
    folder = tmp_path / "out"
    folder.mkdir()
    loaded.extract(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["made.bin", "weights.bin"]


def test_a_member_that_changes_while_it_is_written_is_noticed(tmp_path: Path) -> None:
    contents = iter([b"one", b"two"])
    artifact = small(made__bin=Generated(lambda: iter([next(contents)])))
    with pytest.raises(InvalidModel, match=r"'made.bin' changed"):
        artifact.save(tmp_path / "a.scc")
    assert list(tmp_path.iterdir()) == []


def test_asking_for_a_member_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no member 'b'; it has a.bin"):
        small(a__bin=b"").read("b")
    small(a__bin=b"1").save(tmp_path / "a.scc")
    loaded = Artifact.load(tmp_path / "a.scc")
    (tmp_path / "a.scc").unlink()
    with pytest.raises(InvalidModel, match="removed after loading"):
        loaded.read("a.bin")


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_a_report_that_is_no_json_is_refused(tmp_path: Path, value: Any) -> None:
    artifact = Artifact(make_manifest(target="cpu", signature=SIGNATURE, report={"x": value}), {})
    with pytest.raises(InvalidOption, match="not plain JSON"):
        artifact.save(tmp_path / "a.scc")


# ---------------------------------------------------------------------- plain ONNX


def test_the_onnx_target_saves_a_plain_onnx_file(tmp_path: Path) -> None:
    artifact = compiled("onnx")
    artifact.save(tmp_path / "plain.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() == artifact.read(MODEL)
    onnx.checker.check_model(str(tmp_path / "plain.onnx"), full_check=True)
    with pytest.raises(InvalidModel, match=r"not a sparsecc artifact.*give it to sparsecc.compile"):
        Artifact.load(tmp_path / "plain.onnx")
    artifact.save(tmp_path / "full.scc")
    Artifact.load(tmp_path / "full.scc").save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == artifact.read(MODEL)


def test_other_targets_do_not_pretend_to_be_onnx(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="compile with target='onnx'"):
        compiled("cpu").save(tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- saving


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """A file that must survive whatever the test does, alone in its folder."""
    path = tmp_path / "kept.scc"
    small(a__bin=b"earlier").save(path)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_earlier_artifact_survives_an_error_while_writing(kept: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        small(a__bin=Generated(broken)).save(kept)


def test_an_earlier_artifact_survives_an_error_in_the_second_reading(kept: Path) -> None:
    counter: list[int] = []

    def broken() -> Iterator[bytes]:
        counter.append(1)
        yield b"some"
        if len(counter) == 2:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        small(a__bin=Generated(broken)).save(kept)
    assert len(counter) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_earlier_artifact_survives_a_full_or_failing_disk(
    kept: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, call, fail)
    with pytest.raises(InvalidOption, match=f"{os.strerror(code)}; nothing was changed"):
        small(a__bin=b"later").save(kept)
    monkeypatch.undo()


def test_saving_to_a_folder_or_into_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="it is a folder"):
        small().save(tmp_path)
    with pytest.raises(InvalidOption, match="there is no folder"):
        small().save(tmp_path / "nowhere" / "a.scc")
    with pytest.raises(InvalidOption, match="cannot write"):
        small().save(tmp_path / ("a" * 300))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidOption, match="there is no folder"):
        small().save(tmp_path / "file" / "a.scc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InvalidOption, match="Permission denied"):
            small().save(tmp_path / "a.scc")
    finally:
        tmp_path.chmod(0o755)


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.scc"
    before = os.umask(0o027)
    try:
        small().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    small(a__bin=b"1").save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.scc"
    link.symlink_to(tmp_path / "real" / "a.scc")
    small().save(link)
    assert link.is_symlink()
    assert Artifact.load(tmp_path / "real" / "a.scc").target == "cpu"


def test_writers_at_the_same_time_leave_one_whole_artifact(tmp_path: Path) -> None:
    path = tmp_path / "a.scc"
    artifacts = [small(a__bin=bytes([k]) * 200_000) for k in range(6)]
    threads = [threading.Thread(target=artifact.save, args=(path,)) for artifact in artifacts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = Artifact.load(path).read("a.bin")
    assert content in [bytes([k]) * 200_000 for k in range(6)]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_shows_nothing_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic_write(path) as stream:
        stream.write(b"1")
        assert not path.exists()
    assert path.read_bytes() == b"1"


# ---------------------------------------------------------------------- hostile and damaged files


def rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> None:
    """A copy of an artifact with changed members, the hashes left as they were."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edit_manifest(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members[MANIFEST])
        manifest.update(changes)
        members[MANIFEST] = json.dumps({k: v for k, v in manifest.items() if v != "DROP"}).encode()

    return change


def put(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: content})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("../evil", b""), "'../evil' is not a valid member name"),
        (put("/etc/passwd", b""), "not a valid member name"),
        (put("a/../../b", b""), "not a valid member name"),
        (put("c:\\b", b""), "not a valid member name"),
        (put("folder/", b""), "not a valid member name"),
        (put(".hidden", b""), "not a valid member name"),
        (put("a" * 300, b""), "not a valid member name"),
        (put("extra.bin", b"1"), r"manifest and content differ in extra.bin"),
        (lambda members: members.pop("plan.json"), r"differ in plan.json"),
        (put(MODEL, b"other"), r"'model.onnx' does not have the recorded hash"),
        (lambda members: members.pop(MANIFEST), r"has no manifest.json"),
        (put(MANIFEST, b"{"), "cannot be read"),
        (put(MANIFEST, b"\xff\xfe"), "cannot be read"),
        (put(MANIFEST, b"[" * 100_000), "cannot be read"),
        (put(MANIFEST, b"[]"), "not that of a sparsecc artifact"),
        (put(MANIFEST, b"{}"), "not that of a sparsecc artifact"),
        (
            edit_manifest(format=FORMAT + 1, sparsecc="9.0"),
            r"format 2 of sparsecc 9.0.*install a matching version",
        ),
        (edit_manifest(format=True), "not that of a sparsecc artifact"),
        (edit_manifest(target=3), "malformed at 'target'"),
        (edit_manifest(members="DROP"), "malformed at 'members'"),
        (edit_manifest(members={"a": None}), "differ in"),
        (edit_manifest(report=[]), "malformed at 'report'"),
        (edit_manifest(signature={"inputs": []}), "signature of the model is malformed"),
    ],
)
def test_hostile_and_damaged_artifacts_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    compiled().save(tmp_path / "good.scc")
    rewrite(tmp_path / "good.scc", tmp_path / "bad.scc", change)
    with pytest.raises(InvalidModel, match=message):
        Artifact.load(tmp_path / "bad.scc")


def test_compressed_members_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    compiled().save(tmp_path / "good.scc")
    bomb = put("plan.json", bytes(50 << 20))
    rewrite(tmp_path / "good.scc", tmp_path / "bad.scc", bomb, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidModel, match="compressed or encrypted"):
        Artifact.load(tmp_path / "bad.scc")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    compiled().save(tmp_path / "a.scc")
    with zipfile.ZipFile(tmp_path / "a.scc", "a") as archive:
        archive.writestr(MODEL, b"other")
    with pytest.raises(InvalidModel, match="there twice"):
        Artifact.load(tmp_path / "a.scc")


def test_a_huge_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled().save(tmp_path / "a.scc")
    monkeypatch.setattr(module, "_MANIFEST_LIMIT", 100)
    with pytest.raises(InvalidModel, match="at most 100 are read"):
        Artifact.load(tmp_path / "a.scc")


def test_what_is_no_artifact_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="there is no artifact"):
        Artifact.load(tmp_path / "missing.scc")
    with pytest.raises(InvalidModel, match="cannot read the artifact"):
        Artifact.load(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "zip").write_bytes(b"PK\x05\x06" + bytes(18))
    for name in ("empty", "zip"):
        with pytest.raises(InvalidModel, match="not a sparsecc artifact"):
            Artifact.load(tmp_path / name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_invalid_model_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    artifact = compiled()
    artifact.save(tmp_path / "good.scc")
    good = bytearray((tmp_path / "good.scc").read_bytes())
    if data.draw(st.booleans()):
        del good[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "bad.scc").write_bytes(good)
    try:
        loaded = Artifact.load(tmp_path / "bad.scc")
        contents = {name: loaded.read(name) for name in loaded.members}
    except InvalidModel:
        return
    assert contents == {name: artifact.read(name) for name in artifact.members}

"""The container of ONNX models: every source, every layout, and files that mean harm."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsecc.errors import InvalidModel, SparseccError, UnsupportedModel
from sparsecc.onnxfile import model as model_module
from sparsecc.onnxfile import writing
from sparsecc.onnxfile.model import OnnxFile, copy_proto, replace_tensor

FLOAT = TensorProto.FLOAT


def mlp(opset: int = 17) -> ModelProto:
    """x[b,4] -> Relu(x @ w1 + b1) @ w2, the second weight as a Constant node."""
    rng = np.random.default_rng(0)
    w1, b1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((4, 8), (8,), (8, 2)))
    nodes = [
        helper.make_node("Constant", [], ["w2"], value=numpy_helper.from_array(w2, "value")),
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b1"], ["a"], name="bias"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["b", 2])],
        [numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(b1, "b1")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def save_external(folder: Path, name: str = "model.onnx") -> Path:
    """``mlp`` with its initializers in one file of external data."""
    path = folder / name
    proto = mlp()
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


# ---------------------------------------------------------------------- sources


def sources(tmp_path: Path) -> dict[str, Any]:
    import onnx_ir

    path = tmp_path / "mlp.onnx"
    path.write_bytes(mlp().SerializeToString())
    return {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "proto": mlp(),
        "ir": onnx_ir.from_proto(mlp()),
    }


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "proto", "ir"])
def test_every_source_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path)[kind]
    model = OnnxFile.load(source)
    assert model.kind == ("path" if kind == "str" else kind)
    wanted = OnnxFile.load(mlp())
    for name in ("w1", "b1", "w2"):
        torch.testing.assert_close(model.tensor(name), wanted.tensor(name), rtol=0, atol=0)
    back = model.to_kind()
    assert type(back) is (ModelProto if kind in ("path", "str") else type(source))
    assert OnnxFile.load(back).tensor("w1").shape == (4, 8)


def test_graphsurgeon_graphs_are_taken_and_given_back() -> None:
    gs = pytest.importorskip("onnx_graphsurgeon")
    model = OnnxFile.load(gs.import_onnx(mlp()))
    assert model.kind == "gs"
    assert model.tensor("w1").shape == (4, 8)
    assert isinstance(model.to_kind(), gs.Graph)


def test_other_sources_are_refused() -> None:
    with pytest.raises(TypeError, match="give a path, bytes"):
        OnnxFile.load(3)


def test_an_unchanged_model_keeps_its_bytes(tmp_path: Path) -> None:
    raw = mlp().SerializeToString() + b""
    model = OnnxFile.load(raw)
    assert model.to_bytes() == raw
    model.save(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == raw


def test_the_given_proto_is_not_modified() -> None:
    proto = mlp()
    before = proto.SerializeToString()
    model = OnnxFile.load(proto)
    model.tensor("w1")
    copy_proto(
        model.proto, {"w1": replace_tensor(model.initializers["w1"], "w1", np.zeros((4, 2), np.float32))}
    )
    assert proto.SerializeToString() == before


# ---------------------------------------------------------------------- weights

DTYPES: list[tuple[int, Any]] = [
    (TensorProto.FLOAT, np.float32), (TensorProto.DOUBLE, np.float64), (TensorProto.FLOAT16, np.float16),
    (TensorProto.BFLOAT16, ml_dtypes.bfloat16), (TensorProto.INT8, np.int8), (TensorProto.UINT8, np.uint8),
    (TensorProto.INT16, np.int16), (TensorProto.UINT16, np.uint16), (TensorProto.INT32, np.int32),
    (TensorProto.UINT32, np.uint32), (TensorProto.INT64, np.int64), (TensorProto.UINT64, np.uint64),
    (TensorProto.BOOL, np.bool_), (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2), (TensorProto.INT4, ml_dtypes.int4),
    (TensorProto.UINT4, ml_dtypes.uint4), (TensorProto.COMPLEX64, np.complex64),
]  # fmt: skip


def with_initializer(tensor: TensorProto) -> ModelProto:
    proto = mlp()
    proto.graph.initializer.append(tensor)
    return proto


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("elem_type", "dtype"), DTYPES, ids=[str(np.dtype(d)) for _, d in DTYPES])
def test_every_element_type_is_read_and_written(elem_type: int, dtype: Any, raw: bool) -> None:
    values = np.array([[0, 1, 3], [2, 1, 0]]).astype(dtype)
    if raw:
        tensor = numpy_helper.from_array(values, "t")
        assert tensor.HasField("raw_data")
    else:
        tensor = helper.make_tensor("t", elem_type, values.shape, values.reshape(-1).tolist())
    tensor.doc_string = "kept"
    model = OnnxFile.load(with_initializer(tensor))
    assert model.tensor_type("t") == ((2, 3), elem_type)
    np.testing.assert_array_equal(model.array("t").astype(np.float32), values.astype(np.float32))
    assert model.tensor("t").to(torch.float32).tolist() == values.astype(np.float32).tolist()
    smaller = replace_tensor(tensor, "t", values[:, :1])
    assert (smaller.name, smaller.doc_string, smaller.data_type) == ("t", "kept", elem_type)
    assert smaller.HasField("raw_data") == raw
    again = OnnxFile.load(with_initializer(smaller))
    np.testing.assert_array_equal(again.array("t").astype(np.float32), values[:, :1].astype(np.float32))


def test_constant_nodes_with_plain_attributes() -> None:
    proto = mlp()
    made = {
        "i": ("value_int", 7),
        "is": ("value_ints", [1, 2]),
        "f": ("value_float", 0.5),
        "fs": ("value_floats", [1.0]),
    }
    for name, (key, value) in made.items():
        proto.graph.node.append(helper.make_node("Constant", [], [name], **{key: value}))
    model = OnnxFile.load(proto)
    assert {name: model.tensor(name).tolist() for name in made} == {n: v for n, (_, v) in made.items()}
    assert model.tensor_type("is") == ((2,), TensorProto.INT64)


def test_reading_an_inline_weight_twice_shares_it_while_it_is_held() -> None:
    model = OnnxFile.load(mlp())
    assert model.tensor("w1").data_ptr() == model.tensor("w1").data_ptr()


def test_strings_are_no_tensors() -> None:
    model = OnnxFile.load(with_initializer(helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"b"])))
    assert model.array("s").tolist() == [b"a", b"b"]
    with pytest.raises(UnsupportedModel, match="'s'"):
        model.tensor("s")


# ---------------------------------------------------------------------- external data


def test_external_data_is_mapped_and_not_loaded(tmp_path: Path) -> None:
    model = OnnxFile.load(save_external(tmp_path))
    assert not model.initializers["w1"].raw_data
    torch.testing.assert_close(model.tensor("w1"), OnnxFile.load(mlp()).tensor("w1"))
    model.tensor("w1").zero_()  # copy on write
    assert OnnxFile.load(tmp_path / "model.onnx").tensor("w1").abs().sum() > 0


def test_a_file_over_two_gigabytes(tmp_path: Path) -> None:
    rows = (5 << 29) // 4 // 1024  # 2.5 GiB, as a file with a hole
    tensor = TensorProto(name="big", data_type=FLOAT, dims=[rows, 1024], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="big.bin")
    (tmp_path / "m.onnx").write_bytes(with_initializer(tensor).SerializeToString())
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(rows * 1024 * 4)
        file.seek(rows * 1024 * 4 - 4)
        file.write(np.float32(5).tobytes())
    big = OnnxFile.load(tmp_path / "m.onnx").tensor("big")
    assert big.shape == (rows, 1024)
    assert big[-1, -1].item() == 5


def test_an_unchanged_external_model_is_copied_byte_for_byte(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    OnnxFile.load(path).save(out / "copy.onnx")
    assert (out / "copy.onnx").read_bytes() == path.read_bytes()
    assert (out / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()


@pytest.mark.parametrize("compact", [True, False])
def test_replaced_external_weights_keep_the_layout(tmp_path: Path, compact: bool) -> None:
    model = OnnxFile.load(save_external(tmp_path))
    payloads: dict[str, Any] = {}
    smaller = replace_tensor(model.initializers["w1"], "w1", model.array("w1")[:, :4], payloads)
    assert not smaller.raw_data
    derived = model.derive(copy_proto(model.proto, {"w1": smaller}), payloads)
    assert derived.tensor("w1").shape == (4, 4)
    out = tmp_path / "out"
    out.mkdir()
    derived.save(out / "new.onnx", compact=compact)
    assert sorted(p.name for p in out.iterdir()) == ["new.onnx", "weights.bin"]
    again = OnnxFile.load(out / "new.onnx")
    np.testing.assert_array_equal(again.array("w1"), model.array("w1")[:, :4])
    np.testing.assert_array_equal(again.array("b1"), model.array("b1"))
    if compact:
        assert (out / "weights.bin").stat().st_size < (tmp_path / "weights.bin").stat().st_size
    else:
        assert again.initializers["b1"].SerializeToString() == model.initializers["b1"].SerializeToString()
    embedded = derived.to_kind("proto")
    np.testing.assert_array_equal(OnnxFile.load(embedded, base_dir=tmp_path).array("w1"), again.array("w1"))


def test_saving_beside_the_source_leaves_its_weights_alone(tmp_path: Path) -> None:
    model = OnnxFile.load(save_external(tmp_path))
    before = (tmp_path / "weights.bin").read_bytes()
    payloads: dict[str, Any] = {}
    zero = replace_tensor(model.initializers["w1"], "w1", np.zeros((4, 8), np.float32), payloads)
    derived = model.derive(copy_proto(model.proto, {"w1": zero}), payloads)
    derived.save(tmp_path / "pruned.onnx")
    assert (tmp_path / "weights.bin").read_bytes() == before
    assert OnnxFile.load(tmp_path / "pruned.onnx").array("w1").sum() == 0
    assert (tmp_path / "pruned.onnx.data").exists()


def test_a_result_over_the_limit_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SPLIT_AT", 100)
    monkeypatch.setattr(writing, "EXTERNAL_THRESHOLD", 16)
    model = OnnxFile.load(mlp())
    derived = model.derive(copy_proto(model.proto, {}))
    derived.save(tmp_path / "big.onnx")
    again = OnnxFile.load(tmp_path / "big.onnx")
    assert again.initializers["w1"].data_location == TensorProto.EXTERNAL
    np.testing.assert_array_equal(again.array("w1"), model.array("w1"))
    onnx.checker.check_model(str(tmp_path / "big.onnx"))


def test_a_result_over_the_limit_is_not_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxFile.load(mlp())
    derived = model.derive(model.proto, {"w1": np.zeros(8, np.float32)})
    monkeypatch.setattr(model_module, "SPLIT_AT", 10)
    with pytest.raises(UnsupportedModel, match="save it to a path"):
        derived.to_kind("proto")


def external(key: str, value: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        proto = onnx.load(folder / "model.onnx", load_external_data=False)
        entries = proto.graph.initializer[0].external_data
        for entry in entries:
            if entry.key == key:
                entry.value = value
        (folder / "model.onnx").write_bytes(proto.SerializeToString())

    return edit


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    outside.write_bytes((folder / "weights.bin").read_bytes())
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (external("location", "../outside.bin"), "leaves the folder"),
        (external("location", "/etc/passwd"), "no relative path"),
        (external("location", "C:\\weights.bin"), "no relative path"),
        (external("location", "a/../../x"), "leaves the folder"),
        (external("location", ""), "no relative path"),
        (external("location", "gone.bin"), "is missing"),
        (external("location", "."), "not a file"),
        (external("offset", "1000000"), "truncated"),
        (external("offset", "-1"), "not a number"),
        (external("offset", "9" * 30), "not a number"),
        (external("length", "1"), "needs 128 bytes"),
        (link_out, "a link out of the folder"),
        (lambda folder: os.truncate(folder / "weights.bin", 10), "truncated"),
    ],
)
def test_hostile_external_data_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = save_external(folder)
    damage(folder)
    with pytest.raises(InvalidModel, match=message):
        OnnxFile.load(path)


def test_external_data_without_a_folder_says_what_to_do(tmp_path: Path) -> None:
    model = OnnxFile.load(save_external(tmp_path).read_bytes())
    with pytest.raises(InvalidModel, match="give base_dir="):
        model.tensor("w1")
    assert OnnxFile.load((tmp_path / "model.onnx").read_bytes(), base_dir=tmp_path).tensor("w1").shape == (
        4,
        8,
    )


# ---------------------------------------------------------------------- damaged and hostile graphs


def edited(edit: Callable[[ModelProto], Any]) -> Callable[[], ModelProto]:
    def build() -> ModelProto:
        proto = mlp()
        edit(proto)
        return proto

    return build


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    nodes = [helper.make_node(call, ["x"], [f"y{k}"], domain="f") for k, call in enumerate(calls)]
    nodes.append(helper.make_node("Identity", ["x"], ["y"]))
    return helper.make_function("f", name, ["x"], ["y"], nodes, [helper.make_opsetid("", 17)])


def with_functions(*functions: onnx.FunctionProto) -> ModelProto:
    proto = mlp()
    proto.opset_import.append(helper.make_opsetid("f", 1))
    proto.graph.node.append(helper.make_node(functions[0].name, ["x"], ["unused"], domain="f"))
    proto.functions.extend(functions)
    return proto


def nested_bytes(depth: int) -> bytes:
    """A model with Ifs within Ifs, as bytes: protobuf does not build such a thing."""

    def field(number: int, payload: bytes) -> bytes:
        size, length = len(payload), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + payload

    graph = b""
    for _ in range(depth):
        branch = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"  # type: GRAPH
        graph = field(1, field(2, b"y") + field(4, b"If") + field(5, branch))
    return mlp().SerializeToString() + field(7, graph)


def cyclic(proto: ModelProto) -> None:
    proto.graph.node[1].input[0] = "r"


def sparse(proto: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    proto.graph.sparse_initializer.add(values=values, dims=[4])


HOSTILE: dict[str, tuple[Callable[[], ModelProto], type[SparseccError], str]] = {
    "empty": (ModelProto, InvalidModel, "no graph"),
    "no outputs": (edited(lambda p: p.graph.ClearField("output")), InvalidModel, "no outputs"),
    "cycle": (edited(cyclic), InvalidModel, "cycle through"),
    "undefined input": (
        edited(lambda p: p.graph.node[1].input.__setitem__(1, "nowhere")), InvalidModel, "reads 'nowhere'",
    ),
    "undefined output": (
        edited(lambda p: setattr(p.graph.output[0], "name", "z")), InvalidModel, "'z' is never computed",
    ),
    "defined twice": (
        edited(lambda p: p.graph.node[2].output.__setitem__(0, "h")), InvalidModel, "'h' is defined twice",
    ),
    "initializer twice": (
        edited(lambda p: p.graph.initializer.append(p.graph.initializer[0])), InvalidModel, "'w1' is defined",
    ),
    "unknown operator": (
        edited(lambda p: setattr(p.graph.node[3], "op_type", "Relux")), InvalidModel, "no operator 'Relux'",
    ),
    "wrong arity": (edited(lambda p: p.graph.node[3].input.append("h")), InvalidModel, "has 2 inputs"),
    "missing attribute": (
        edited(lambda p: setattr(p.graph.node[3], "op_type", "Cast")), InvalidModel, "lacks its attribute",
    ),
    "domain not imported": (
        edited(lambda p: setattr(p.graph.node[3], "domain", "other")), InvalidModel, "does not import",
    ),
    "absurd shape": (
        edited(lambda p: p.graph.initializer[0].dims.append(1 << 40)), InvalidModel, "needs|damaged",
    ),
    "negative shape": (
        edited(lambda p: p.graph.initializer[0].dims.__setitem__(0, -4)), InvalidModel, "impossible shape",
    ),
    "short payload": (
        edited(lambda p: setattr(p.graph.initializer[0], "raw_data", b"123")), InvalidModel, "has 3 bytes",
    ),
    "unknown type": (
        edited(lambda p: setattr(p.graph.initializer[0], "data_type", 99)), InvalidModel, "unknown element",
    ),
    "old opset": (lambda: mlp(10), UnsupportedModel, "version_converter"),
    "future opset": (lambda: mlp(9999), UnsupportedModel, "upgrade onnx"),
    "sparse": (edited(sparse), UnsupportedModel, "SparseTensor"),
    "recursion": (
        lambda: with_functions(function("a", ["b"]), function("b", ["a"])), InvalidModel, "calls itself",
    ),
    "explosion": (
        lambda: with_functions(*(function(f"f{k}", [f"f{k + 1}"] * 9) for k in range(9)), function("f9", [])),
        InvalidModel, "expand to more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_graphs_are_refused(case: str) -> None:
    build, error, message = HOSTILE[case]
    with pytest.raises(error, match=message):
        OnnxFile.load(build())


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="no such file"):
        OnnxFile.load(tmp_path / "gone.onnx")
    with pytest.raises(InvalidModel, match="is a folder"):
        OnnxFile.load(tmp_path)
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InvalidModel, match="empty"):
        OnnxFile.load(tmp_path / "empty.onnx")
    (tmp_path / "text.onnx").write_bytes(b"PK\x03\x04 this is a zip file" * 10)
    with pytest.raises(InvalidModel, match=r"not a complete ONNX model|no graph"):
        OnnxFile.load(tmp_path / "text.onnx")
    with pytest.raises(InvalidModel, match="cannot read"):
        OnnxFile.load("a\0b")
    with pytest.raises(InvalidModel, match="nested too deeply"):
        OnnxFile.load(nested_bytes(60))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_never_do_worse_than_a_clear_error(data: st.DataObject) -> None:
    raw = bytearray(mlp().SerializeToString())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(1, len(raw) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SparseccError):
        model = OnnxFile.load(bytes(raw))
        for name in (*model.initializers, *model.constants):
            model.array(name)


# ---------------------------------------------------------------------- functions, checks, writing


def test_functions_are_inlined() -> None:
    proto = with_functions(function("a", ["b"]), function("b", []))
    model = OnnxFile.load(proto).inlined()
    assert not model.proto.functions
    assert all(node.domain == "" for node in model.proto.graph.node)
    plain = OnnxFile.load(mlp())
    assert plain.inlined() is plain


def test_check_reports_what_the_checker_says(tmp_path: Path) -> None:
    assert OnnxFile.load(mlp()).check(full=True) is None
    assert OnnxFile.load(save_external(tmp_path)).check(full=True) is None
    wrong = mlp()
    wrong.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    assert "shape" in (OnnxFile.load(wrong).check(full=True) or "").lower()


def test_copies_keep_everything_that_is_not_replaced() -> None:
    proto = mlp()
    proto.doc_string, proto.producer_name = "doc", "me"
    proto.metadata_props.add(key="k", value="v")
    model = OnnxFile.load(proto)
    assert copy_proto(proto, {}).SerializeToString() == proto.SerializeToString()
    half = replace_tensor(model.proto.graph.node[0].attribute[0].t, "w2", model.array("w2")[:4])
    copy = copy_proto(proto, {"w2": half})
    assert OnnxFile.load(copy).tensor("w2").shape == (4, 2)
    for before, after in zip(proto.graph.node[1:], copy.graph.node[1:], strict=True):
        assert before.SerializeToString() == after.SerializeToString()
    assert copy.metadata_props[0].value == "v"


def test_writing_where_one_cannot_is_one_error(tmp_path: Path) -> None:
    model = OnnxFile.load(mlp())
    with pytest.raises(SparseccError, match="cannot write"):
        model.save(tmp_path / "no" / "such" / "folder.onnx")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(SparseccError, match="cannot write"):
        model.save(tmp_path / "file" / "m.onnx")
    with pytest.raises(SparseccError, match="is a folder"):
        model.save(tmp_path)
    if os.geteuid() != 0:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(SparseccError, match="cannot write"):
            model.save(tmp_path / "m.onnx")
        tmp_path.chmod(stat.S_IRWXU)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(SparseccError, match="No space left"):
        OnnxFile.load(mlp()).save(path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

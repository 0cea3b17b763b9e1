"""Profiles, the build script, and what TensorRT-RTX accepts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.targets.tensorrt import prepare
from sparsecc.targets.tensorrt.gate import accepted, runtime
from sparsecc.targets.tensorrt.packing import script, trtexec
from sparsecc.targets.tensorrt.profiles import profiles
from tests.sampling import every
from tests.tensorrt.graphs import (
    KERNELS,
    MATRICES,
    QUANTISED,
    needs_rtx,
    one,
    quantised_model,
)


def test_profiles_cover_dynamic_sizes_and_take_wishes() -> None:
    file = OnnxFile.load(one("plain"))
    assert profiles(file).ranges == {"x": ((1, 6, 8), (8, 6, 8), (32, 6, 8))}
    assert profiles(file, "n=2:3:4").ranges == {"x": ((2, 6, 8), (3, 6, 8), (4, 6, 8))}
    assert profiles(file, "n=5").ranges == {"x": ((5, 6, 8),) * 3}
    for wrong in ("m=1:2:3", "n=3:2:1", "n=a", "n=1:2"):
        with pytest.raises(InvalidOption, match="profile: "):
            profiles(file, wrong)
    line = trtexec(profiles(file))
    assert "--sparsity=enable" in line
    assert "--minShapes=x:1x6x8 --optShapes=x:8x6x8 --maxShapes=x:32x6x8" in line


def test_sizes_that_do_not_fit_are_not_proposed() -> None:
    """A table of 100 positions bounds the length; a model of fixed sizes has no profile."""
    table = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["s"], start=1, end=2),
            helper.make_node("Slice", ["w", "zero", "s"], ["p"]),
            helper.make_node("Add", ["x", "p"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones((100, 4), np.float32), "w"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
        ],
    )
    proto = helper.make_model(table, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    low, usual, high = profiles(OnnxFile.load(proto)).ranges["x"]
    assert low[1] <= usual[1] <= high[1] <= 100
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 9, 4]))
    assert profiles(OnnxFile.load(proto)).ranges == {}
    assert "Shapes" not in trtexec(profiles(OnnxFile.load(proto)))


def test_the_script_stands_alone(tmp_path: Path) -> None:
    text = script(profiles(OnnxFile.load(one("plain"))))
    imports = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imports <= set(sys.stdlib_module_names)
    (tmp_path / "build_engine.py").write_text(text)
    where = {"cwd": tmp_path, "capture_output": True, "text": True}
    shown = subprocess.run([sys.executable, "-I", "build_engine.py", "--help"], **where)  # type: ignore[call-overload]
    assert shown.returncode == 0
    assert "names: n" in shown.stdout
    assert "Layers eligible for sparse math" in shown.stdout
    missing = [sys.executable, "-I", "build_engine.py", "--module", "no_such_tensorrt"]
    failed = subprocess.run(missing, **where)  # type: ignore[call-overload]
    assert failed.returncode == 1
    assert "no_such_tensorrt" in failed.stderr


@needs_rtx
def test_the_script_builds_an_engine(tmp_path: Path) -> None:
    trt = runtime()
    assert trt is not None
    proto = prepare(one("transposed"), "fp16")
    (tmp_path / "build_engine.py").write_text(script(profiles(OnnxFile.load(proto))))
    onnx.save(proto, tmp_path / "model.onnx")
    command = [sys.executable, "-I", str(tmp_path / "build_engine.py"), "--module", trt.__name__]
    done = subprocess.run(
        [*command, "--capability", "SM80", "--profile", "n=1:2:4"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.engine").stat().st_size > 100
    assert "bytes in" in done.stdout
    for extra, message in (
        (["--capability", "SM80", "--profile", "m=1"], "there is no dynamic size 'm'; there is n"),
        (["--capability", "SM999"], "SM999"),
        (["--onnx", str(tmp_path / "absent.onnx"), "--capability", "SM80"], "absent.onnx"),
    ):
        failed = subprocess.run([*command, *extra], capture_output=True, text=True)
        assert failed.returncode == 1
        assert message in failed.stderr


def cases() -> Iterator[tuple[str, bool]]:
    yield from ((name, False) for name in MATRICES if name not in QUANTISED)
    yield from ((name, True) for name in KERNELS if name not in QUANTISED)


@needs_rtx
@pytest.mark.parametrize("linear", ["matmul", "conv"])
@pytest.mark.parametrize(("spelling", "spatial"), every(2, cases()))
def test_tensorrt_rtx_accepts_every_spelling(spelling: str, spatial: bool, linear: str) -> None:
    proto = one(spelling, spatial)
    for dtype in (None, "fp16", "bf16"):
        assert accepted(prepare(proto, dtype, linear=linear).SerializeToString()), (spelling, dtype)


@needs_rtx
def test_what_is_not_accepted_is_told() -> None:
    node = helper.make_node("NoSuch", ["x"], ["y"], domain="elsewhere")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    found = accepted(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), {})
    assert not found
    assert "NoSuch" in found.why


@needs_rtx
def test_quantised_products_are_accepted() -> None:
    found = accepted(prepare(quantised_model()).SerializeToString())
    assert found, found.why

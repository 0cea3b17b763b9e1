"""The target from compile to run; TensorRT itself is a stand-in."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel, InvalidOption, TargetRefused, TargetUnavailable
from sparsecc.targets.tensorrt import build_engine
from sparsecc.targets.tensorrt.gate import runtime
from tests.tensorrt.graphs import (
    one,
    quantised_model,
)


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, 4, 8).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 32)
        x = x + self.out(mixed)
        y: torch.Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return y


def dynamic() -> Any:
    return ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)},)


@pytest.fixture(scope="module")
def built() -> tuple[Block, torch.Tensor, sparsecc.Compiled]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 32)
    options = {"check": "rtx"} if runtime() is not None else {}
    return model, x, sparsecc.compile(
        model, (x,), target="tensorrt-2:4", options=options, dynamic_shapes=dynamic()
    )  # fmt: skip


def test_a_transformer_is_compiled_verified_and_loaded(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], tmp_path: Path
) -> None:
    model, x, compiled = built
    assert compiled.certificate.status == "VERIFIED"
    layers = json.loads(compiled.artifact.read("layers.json"))
    assert [(entry["holds"], entry["rounds"]) for entry in layers] == [(True, "fp16")] * 5
    assert {"build_engine.py", "trtexec.txt", "model.onnx"} <= compiled.artifact.members.keys()
    assert "x:8x128x32" in compiled.artifact.read("trtexec.txt").decode()
    y = compiled(x)
    assert y.dtype == torch.float32
    compiled.save(tmp_path / "a.scc")
    again = sparsecc.load(tmp_path / "a.scc")
    assert torch.equal(again(x), y)
    assert torch.equal(torch.from_numpy(again(x.numpy())), y)
    assert sparsecc.verify(model, again, (x,)).status == "VERIFIED"
    options = {"check": "rtx"} if runtime() is not None else {}
    other = sparsecc.compile(model, (x,), target="tensorrt-2:4", options=options, dynamic_shapes=dynamic())
    other.save(tmp_path / "b.scc")
    assert (tmp_path / "a.scc").read_bytes() == (tmp_path / "b.scc").read_bytes()


def test_the_notes_say_what_holds_and_what_is_not_measured(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled],
) -> None:
    text = "\n".join(built[2].report.notes)
    assert "holds for 5 of 5 products" in text
    assert "nothing here has been measured on hardware" in text
    assert "trtexec --onnx=model.onnx" in text
    if runtime() is not None:
        assert "parses and builds the model" in text


def test_a_wrong_weight_in_the_artifact_fails_verification(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled],
) -> None:
    model, x, compiled = built
    proto = onnx.ModelProto.FromString(compiled.artifact.read("model.onnx"))
    weight = next(
        t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT16 and len(t.dims) == 2
    )
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    members = {**compiled.artifact.members, "model.onnx": proto.SerializeToString()}
    ready = compiled._ready()
    broken = Artifact(compiled.artifact.manifest, members)
    other = sparsecc.Compiled(type(ready)(broken, ready.plan, ready.certificate, ready.report))
    assert sparsecc.verify(model, other, (x,)).status == "FAILED"


@pytest.mark.parametrize("member", ["layers.json", "build.json"])
def test_damaged_artifacts_are_refused(
    built: tuple[Block, torch.Tensor, sparsecc.Compiled], member: str
) -> None:
    from sparsecc.targets.tensorrt.target import Tensorrt

    artifact = built[2].artifact
    with pytest.raises(InvalidModel, match=member):
        Tensorrt().notes(Artifact(artifact.manifest, {**artifact.members, member: b"[1, {"}))


@pytest.mark.parametrize("target", ["tensorrt-2:4-bf16", "tensorrt-2:4-fp16"])
def test_a_convnet_is_compiled(target: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 12, 12)
    options = {"check": "rtx"} if runtime() is not None else {}
    compiled = sparsecc.compile(net, (x,), target=target, options=options)
    assert compiled.certificate.status == "VERIFIED"
    layers = json.loads(compiled.artifact.read("layers.json"))
    assert [entry["holds"] for entry in layers] == [True, False, True, True]
    assert {entry["rounds"] for entry in layers} == {target[-4:]}
    assert "1 positions" in layers[1]["why"]


def test_int8_needs_a_quantised_model() -> None:
    with pytest.raises(TargetRefused, match=r"int8 needs the ranges of activations.*quantise it first"):
        sparsecc.compile(Block(), (torch.randn(2, 5, 32),), target="tensorrt-2:4-int8")
    compiled = sparsecc.compile(quantised_model(), target="tensorrt-int8")
    assert compiled.certificate.status == "VERIFIED"
    (entry,) = json.loads(compiled.artifact.read("layers.json"))
    assert (entry["dtype"], entry["holds"], entry["axis"]) == ("int8", True, 0)


def test_options_of_the_target_are_checked() -> None:
    for options, message in (
        ({"linear": "gemm"}, "matmul or conv"),
        ({"check": "x"}, "none or rtx"),
        ({"profile": "nobody=3"}, "there is no dynamic size 'nobody'"),
        ({"shape": "1"}, "no option 'shape'"),
    ):
        with pytest.raises(InvalidOption, match=message):
            sparsecc.compile(one("plain"), target="tensorrt", options=options)
    for target in ("tensorrt-1:4", "tensorrt-2:4-fp64"):
        with pytest.raises(TargetUnavailable, match="it has"):
            sparsecc.compile(one("plain"), target=target)


def test_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from sparsecc.cli.commands import cli

    onnx.save(one("transposed"), tmp_path / "m.onnx")
    out = tmp_path / "m.scc"
    command = ["compile", str(tmp_path / "m.onnx"), "--target", "tensorrt-2:4", "-o", str(out)]
    done = CliRunner().invoke(cli, [*command, "--option", "profile=n=1:4:16"])
    assert done.exit_code == 0, done.output
    assert Artifact.load(out).read("trtexec.txt").decode().endswith("--maxShapes=x:16x6x8\n")
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(out), "--json"]).output)
    (row,) = shown["layers"]
    assert (row["sparse"], row["type"], row["axis"]) == ("eligible", "float16", "0")
    assert row["done"] == "Transpose folded into its weight; computed in fp16"
    assert CliRunner().invoke(cli, ["inspect", str(out)]).exit_code == 0
    assert CliRunner().invoke(cli, ["run", str(out)]).exit_code == 0


# -- the engine, with a stand-in for TensorRT --------------------


def test_settings_reach_tensorrt() -> None:
    """What no wheel can show here: the calls, on an object that records them."""
    from unittest.mock import MagicMock

    trt = MagicMock()
    trt.ILogger, trt.__name__ = object, "tensorrt"
    builder = trt.Builder.return_value
    network = builder.create_network.return_value
    network.num_inputs, network.get_input.return_value.name = 1, "x"
    network.get_input.return_value.shape = (-1, 6, 8)
    builder.build_serialized_network.return_value = b"engine"
    ranges = {"x": ((1, 6, 8), (8, 6, 8), (32, 6, 8))}
    assert build_engine.build(trt, b"model", ranges, MagicMock(), workspace=1 << 20) == b"engine"
    config = builder.create_builder_config.return_value
    config.set_flag.assert_called_once_with(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, 1 << 20)
    builder.create_optimization_profile.return_value.set_shape.assert_called_once_with("x", *ranges["x"])
    config.add_optimization_profile.assert_called_once()
    with pytest.raises(build_engine.BuildFailed, match="input x has dynamic sizes and no profile"):
        build_engine.build(trt, b"model", {}, MagicMock())
    builder.build_serialized_network.return_value = None
    log = MagicMock()
    log.errors.return_value = "no tactic"
    with pytest.raises(build_engine.BuildFailed, match="no tactic"):
        build_engine.build(trt, b"model", ranges, log)


class FakeContext:
    """An execution context of an engine for y = 2 x, on memory that it is told the addresses of."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "x" and shape[0] <= 32

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shape[:-1], 12)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        rows = int(np.prod(self.shape[:-1]))
        x = np.ctypeslib.as_array((ctypes.c_float * (rows * 8)).from_address(self.addresses["x"]))
        (out,) = self.addresses.keys() - {"x"}
        y = np.ctypeslib.as_array((ctypes.c_float * (rows * 12)).from_address(self.addresses[out]))
        y.reshape(rows, 12)[:] = 2 * x.reshape(rows, 8)[:, :1]
        return True


def fake_tensorrt(context: FakeContext | None) -> Any:
    from types import SimpleNamespace

    engine = SimpleNamespace(
        create_execution_context=lambda: context, get_tensor_dtype=lambda name: "DataType.FLOAT"
    )
    runtime_ = SimpleNamespace(deserialize_cuda_engine=lambda data: None if context is None else engine)
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(Logger=logger, Runtime=lambda log: runtime_, __version__="11.4")


def with_engine() -> Artifact:
    artifact = sparsecc.compile(one("plain"), target="tensorrt-2:4").artifact
    return Artifact(artifact.manifest, {**artifact.members, "model.engine": b"engine"})


def test_an_engine_is_run_on_memory_of_torch() -> None:
    from sparsecc.targets.tensorrt.executor import EngineExecutor

    class Here(EngineExecutor):
        device = "cpu"

        def _launch(self) -> bool:
            return bool(self._context.execute_async_v3(0))

    found = Here(with_engine(), fake_tensorrt(FakeContext()))
    x = torch.randn(3, 6, 8)
    assert torch.equal(found(x), (2 * x[..., :1]).expand(3, 6, 12))
    assert isinstance(found(x.numpy()), np.ndarray)
    with pytest.raises(TargetRefused, match="outside the engine's profile"):
        found(torch.randn(33, 6, 8))


def test_an_engine_that_cannot_be_read_here_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecc.targets.ort import OrtExecutor
    from sparsecc.targets.tensorrt.executor import executor

    artifact = with_engine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(None))
    with pytest.warns(UserWarning, match="for another version or GPU: build it here"):
        found = executor(artifact)
    assert isinstance(found, OrtExecutor)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.warns(UserWarning, match="the engine is not used"):
        assert isinstance(executor(artifact), OrtExecutor)

"""Quantised models compiled for sparse tensor cores: operator, artifact, certificate, kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import sparsecc
from sparsecc.artifact import Artifact
from sparsecc.errors import TargetRefused
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.cuda.launch import kernels_of
from sparsecc.targets.cuda.operator import Operands, output_shape
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.reference import KIND
from tests.cuda_sim.simulator import COMPILER, Simulator, aligned
from tests.onnx_graphs import Graph
from tests.quantised_graphs import built, dynamic, single, two_of_four

ALWAYS = {"choose": "always"}

# -- the operator -------------------------------------------------------------------------------------


def operands(x: torch.Tensor, **given: Any) -> tuple[Any, ...]:
    packed = pack(torch.from_numpy(two_of_four(24, x.shape[-1])))
    values, metadata = torch.from_numpy(packed.values), torch.from_numpy(packed.metadata)
    rest = {
        "scale": torch.rand(24),
        "bias": None,
        "residual": None,
        "activation": "none",
        "conv": [],
        **given,
    }
    made = Operands(x, values, metadata, out=24, k=x.shape[-1], dtype="int8", kernels="", **rest)
    return tuple(getattr(made, name) for name in Operands.__slots__)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_the_operator_takes_integers(dtype: torch.dtype) -> None:
    x = torch.randint(0, 128, (3, 5, 32)).to(dtype)
    given = operands(x, bias=torch.randn(24), residual=torch.randn(3, 5, 24), activation="relu")
    hidden = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in given]
    shown = torch.ops.sparsecc.sparse_matmul(*hidden)
    y = torch.ops.sparsecc.sparse_matmul(*given)
    assert y.dtype == torch.float32
    assert list(y.shape) == output_shape(x.shape, 24, [])
    assert (shown.shape, shown.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_sums_are_exact_where_float32_has_no_room(dtype: torch.dtype) -> None:
    """Sums beyond 2**24 are rounded once, as the hardware's conversion from int32 does."""
    info = torch.iinfo(dtype)
    x = torch.randint(info.min, info.max + 1, (7, 16384), generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    x[0] = info.max
    weight = two_of_four(24, 16384).astype(np.int64)
    exact = (x.numpy().astype(np.int64) - (128 if dtype == torch.uint8 else 0)) @ weight.T
    weight_sum = np.abs(weight).sum(1).max()
    assert weight_sum * 127 > 2**24
    y = torch.ops.sparsecc.sparse_matmul(*operands(x, scale=torch.ones(24)))
    np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


# -- artifacts ----------------------------------------------------------------------------------------


def net() -> onnx.ModelProto:
    """A convolution and a linear layer, for two images: one kernel for each is enough."""
    g = Graph(17)
    y = g.node("Relu", [g.conv(g.input("x", [2, 8, 7, 7]), "conv", 8, 16)], "active")
    return g.build(g.head(y, 16, 8))


def batches(count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 8, 7, 7, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def compiled() -> tuple[onnx.ModelProto, sparsecc.Compiled]:
    pytest.importorskip("tvm")
    result = sparsecc.prune(net(), batches()[0], recipe="NMPattern(pattern='2:4')")
    model = sparsecc.quantize(result, calibration=batches(), activations="uint8").model
    return model, sparsecc.compile(model, batches()[0], target="sm80-2:4-int8", options=ALWAYS)


def test_a_model_is_pruned_quantised_compiled_verified_and_loaded(
    compiled: tuple[onnx.ModelProto, sparsecc.Compiled], tmp_path: Path
) -> None:
    model, artifact = compiled
    assert artifact.certificate.status == "VERIFIED"
    entries = json.loads(artifact.artifact.read("layers.json"))
    assert [(entry["sparse"], entry["dtype"]) for entry in entries] == [(True, "int8")] * 2
    alone = [c for c in artifact.certificate.checks if c.what == "each product in integers"]
    assert alone
    assert all(c.bound < 1e-4 for c in alone)
    (x,) = batches()[3]
    artifact.save(tmp_path / "a.scc")
    again = sparsecc.load(tmp_path / "a.scc")
    assert torch.equal(again(x), artifact(x))
    wanted = Runner(OnnxFile.load(model), dtype=torch.float64).run({"x": x})
    (value,) = wanted.values()
    step = float(value.abs().max()) / 100
    assert float((again(x) - value).abs().max()) < step
    assert sparsecc.verify(model, again, batches()[0]).status == "VERIFIED"


@pytest.mark.parametrize("what", ["values", "scale", "bias"])
def test_the_least_change_of_an_artifact_fails_verification(
    compiled: tuple[onnx.ModelProto, sparsecc.Compiled], what: str
) -> None:
    """One weight off by one, one scale or one bias off by a hundredth: less than quantisers round."""
    model, artifact = compiled
    proto = onnx.ModelProto.FromString(artifact.artifact.read("model.onnx"))
    node = next(node for node in proto.graph.node if node.op_type == KIND)
    name = node.input[{"values": 1, "scale": 3, "bias": 4}[what]]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    if what == "values":
        flat = array.view(np.int8).reshape(-1)
        flat[np.flatnonzero(flat > 1)[0]] -= 1
    else:
        array.reshape(-1)[3] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    members = {**artifact.artifact.members, "model.onnx": proto.SerializeToString()}
    ready = artifact._ready()
    broken = sparsecc.Compiled(
        type(ready)(
            Artifact(artifact.artifact.manifest, members), ready.plan, ready.certificate, ready.report
        )
    )
    certificate = sparsecc.verify(model, broken, batches()[0])
    assert certificate.status == "FAILED"
    assert {c.what for c in certificate.checks if not c.passed} == {"each product in integers"}


@pytest.mark.skipif(COMPILER is None, reason="the simulator needs a C++ compiler")
def test_the_artifacts_kernels_give_the_operators_bits(
    compiled: tuple[onnx.ModelProto, sparsecc.Compiled],
) -> None:
    """On what every layer really reads: simulated instructions against the operator on the CPU."""
    artifact = compiled[1].artifact
    kernels = kernels_of(artifact)
    seen: list[str] = []

    def compare(node: onnx.NodeProto, index: int, given: list[Any], default: Any) -> tuple[Any, ...]:
        outputs: tuple[torch.Tensor, ...] = default(given)
        if node.op_type == KIND:
            names = next(list(a.strings) for a in node.attribute if a.name == "kernels")
            found = simulated(kernels[names[0].decode()], given, outputs[0].shape)
            assert torch.equal(found, outputs[0])
            seen.append(names[0].decode())
        return outputs

    file = OnnxFile.load(onnx.ModelProto.FromString(artifact.read("model.onnx")))
    (x,) = batches()[0]
    Runner(file).run({"x": x}, hook=compare)
    assert [("conv" in name or "_k3x3" in name) for name in seen] == [True, False]


def simulated(kernel: Any, given: list[Any], shape: torch.Size) -> torch.Tensor:
    """The output of a kernel's own source, as stored, for the inputs of its node."""
    x, values, metadata, scale, bias, residual = (*given, None, None)[:6]
    x = (x.to(torch.int16) - (128 if x.dtype == torch.uint8 else 0)).to(torch.int8)
    out = aligned(np.full(shape.numel(), np.nan, np.float32))
    tensors = {
        "weight": values,
        "metadata": metadata,
        "x": x,
        "scale": scale,
        "bias": bias,
        "residual": residual,
    }
    arrays = {name: aligned(t.contiguous().numpy()) for name, t in tensors.items() if t is not None}
    if kernel.problem.conv is None:
        launch = kernel.launch(tokens=x.numel() // x.shape[-1])
    else:
        launch = kernel.launch(batch=x.shape[0], height=x.shape[2], width=x.shape[3])
    simulator = Simulator(kernel.source, kernel.entry, kernel.parameters, [*tensors, "d"])
    report = simulator.run(
        {**arrays, "d": out}, launch.scalars, launch.grid, launch.block, launch.shared_bytes
    )
    assert not report.errors, report.messages
    assert report.counts["mma.sp"] > 0
    return torch.from_numpy(out).view(shape)


def test_dynamically_quantised_models_compile() -> None:
    pytest.importorskip("tvm")
    proto = dynamic()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    made = sparsecc.compile(proto, target="sm86-2:4-int8", options=ALWAYS)
    assert made.certificate.status == "VERIFIED"
    (entry,) = json.loads(made.artifact.read("layers.json"))
    assert entry["sparse"]
    assert {"q", "z", "scale"} <= set(entry["reads"])
    assert any(c.what == "each product in integers" for c in made.certificate.checks)


def test_float_models_are_refused_with_the_way_out() -> None:
    """Also those whose weights alone are integers."""
    pytest.importorskip("tvm")
    floats = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = built(floats, {"w": two_of_four(4, 8).T.astype(np.float32)}, [2, 8], ["y"])
    weights = single().proto
    weights.graph.node[-1].input[0] = "x"
    for model in (proto, weights):
        with pytest.raises(TargetRefused, match=r"sm80-2:4-int8.*\n.*sparsecc\.quantize\(model, calibration"):
            sparsecc.compile(model, target="sm80-2:4-int8")

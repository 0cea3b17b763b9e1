"""A model of more than 2 GB, which no protobuf message holds: external data in, external data out."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

import sparsecc

WIDTH = 8192
LAYERS = 8  # of 256 MiB each, 2 GiB in all


def write(path: Path) -> None:
    """x[N,64] -> 8 layers of 8192 x 8192 with ReLU -> [N,16]; weights are written one by one."""
    random = np.random.default_rng(0)
    sizes = [64, *[WIDTH] * (LAYERS + 1), 16]
    tensors, nodes, last = [], [], "x"
    with (path.parent / "weights.bin").open("wb") as stream:
        for place, (cin, cout) in enumerate(itertools.pairwise(sizes)):
            array = random.standard_normal((cin, cout), np.float32)
            array *= (2 / cin) ** 0.5
            tensor = TensorProto(name=f"w{place}", data_type=TensorProto.FLOAT, dims=array.shape)
            tensor.raw_data = b""
            set_external_data(tensor, "weights.bin", stream.tell(), array.nbytes)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            stream.write(array.data)
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [last, f"w{place}"], [f"h{place}"]))
            last = f"h{place}"
            if cout != 16:
                nodes.append(helper.make_node("Relu", [last], [f"r{place}"]))
                last = f"r{place}"
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", s]) for n, s in (("x", 64), (last, 16))]
    graph = helper.make_graph(nodes, "large", info[:1], info[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


@pytest.mark.nightly
def test_a_file_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    source, target = tmp_path / "in" / "large.onnx", tmp_path / "out" / "small.onnx"
    source.parent.mkdir()
    target.parent.mkdir()
    write(source)
    before = source.read_bytes()
    assert (source.parent / "weights.bin").stat().st_size > 2**31
    result = sparsecc.prune(source, sparsity=0.25, include=["w0", "w3"])
    assert result.certificate.status == "VERIFIED"
    kept = {line.group: line.kept for line in result.report.groups if line.kept < line.size}
    assert set(kept.values()) == {WIDTH * 3 // 4}
    assert len(kept) == 3  # what w0 writes, and what w3 reads and writes
    result.save(target)
    assert source.read_bytes() == before
    stored = {t.name: tuple(t.dims) for t in onnx.load(target, load_external_data=False).graph.initializer}
    assert stored["w3"] == (WIDTH * 3 // 4, WIDTH * 3 // 4)
    assert stored["w6"] == (WIDTH, WIDTH)
    assert target.stat().st_size < 2**20  # the weights lie beside it
    del result
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones((2, 64), np.float32)})
    assert found.shape == (2, 16)
    assert np.isfinite(found).all()

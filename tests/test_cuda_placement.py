"""Artifacts on a GPU: sizes and numbers stay on the CPU, so that nothing waits and graphs can be captured."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from sparsecc.errors import InvalidModel, SparseccError
from sparsecc.fx.capture import capture
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.reference.onnx_run import Runner
from sparsecc.targets.cuda.placement import Placed
from tests.simulated_gpu import GPU, Simulated, simulation
from tests.test_onnx_run import feeds, node_cases


class Decoder(nn.Module):
    """Norms, rotary positions by length, grouped queries, a causal mask that is computed, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o, self.gate, self.up, self.down = (
            nn.Linear(*s) for s in ((32, 32), (32, 64), (32, 64), (64, 32))
        )
        self.register_buffer("rates", 1 / 100 ** (torch.arange(4) / 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, length = self.norm(x), x.shape[1]
        angles = torch.arange(length)[:, None] * self.rates
        cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))

        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.view(*t.shape[:2], -1, 8).transpose(1, 2)

        def turned(t: torch.Tensor) -> torch.Tensor:
            return t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin

        q, k, v = turned(heads(self.q(y))), turned(heads(self.k(y))), heads(self.v(y))
        mask = torch.full((length, length), float("-inf")).triu(1)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        found = torch.softmax(q @ k.mT / 8**0.5 + mask, -1) @ v
        x = x + self.o(found.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Convolutions(nn.Module):
    """Images: padding, resizing by sizes of another value, pooling, pixel shuffles, the best of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.first(x)))
        z = F.interpolate(self.second(F.pad(y, (2, 1, 1, 2))), size=y.shape[2:], mode="nearest")
        z = F.pixel_shuffle((y + z)[:, :, : y.shape[2] - 1], 2)
        z = F.max_pool2d(z, 2).flatten(2).mean(-1)
        return torch.cat([self.last(z), z.topk(2, -1).values, z.argmax(-1, keepdim=True).float()], -1)


class Language(nn.Module):
    """Tokens looked up, with positions by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        y = self.layer(x, src_key_padding_mask=ids == 0)
        return F.linear(y, self.words.weight), y[torch.arange(len(ids)), ids.argmax(-1)]


class Tables(nn.Module):
    """Buffers that are cut by a length: positions, a causal mask as GPT-2 keeps it; and NaN of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(128, 16)
        self.register_buffer("ids", torch.arange(128).flip(0)[None])
        self.register_buffer("allowed", torch.ones(1, 128, 128, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        y = x + self.places(self.ids[:, :length])
        scores = torch.where(self.allowed[:, :length, :length], y @ y.mT, torch.full([], -1e9))
        return torch.softmax(scores, -1) @ y + torch.full((length, 1), float("nan")).isnan()


def drawn(kind: type[nn.Module]) -> torch.Tensor:
    if kind is Language:
        return torch.randint(1, 50, (3, 7))
    shapes = {Decoder: (2, 6, 32), Convolutions: (2, 3, 11, 9), Tables: (2, 9, 16)}
    return torch.randn(shapes[kind])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", [Decoder, Convolutions, Language, Tables])
def test_nothing_waits_for_the_gpu(
    kind: type[nn.Module], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once warm, a run reads no number of the GPU and copies none there; it gives what the CPU gives."""
    torch.manual_seed(0)
    model, x = kind().eval(), drawn(kind)
    exported = torch.export.export(model, (x,)) if fixed else capture(model, (x,)).exported
    file = OnnxFile.load(to_onnx(exported))
    name = file.inputs[0].name
    wanted = Runner(file).run({name: x})
    with torch.inference_mode(), simulation(monkeypatch) as mode:
        placed = Placed(file, GPU)
        there = x.to(GPU)
        assert isinstance(there, Simulated)
        placed.run({name: there})
        mode.capturing = True
        found = placed.run({name: there})
        mode.capturing = False
        assert all(value.device == GPU for value in found.values())
        for key, value in found.items():
            torch.testing.assert_close(value.held, wanted[key])


@pytest.mark.parametrize("block", range(4))
def test_every_operator_finds_its_operands_on_one_device(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' test cases that come with onnx: what the CPU gives, wherever parts of it run."""
    failures, tried = [], 0
    for case in node_cases()[block::4]:
        file = OnnxFile.load(case.model)
        given = feeds(file, case.data_sets[0][0])
        plain = all(
            isinstance(v, np.ndarray) and v.dtype.kind in "fiub" and v.dtype.isbuiltin == 1
            for v in given.values()
        )
        if Runner(file).program.bodies or not plain:
            continue
        x = {name: torch.from_numpy(value.copy()) for name, value in given.items()}
        try:
            wanted = Runner(file).run(x)
        except SparseccError:
            continue
        tried += 1
        try:
            with torch.inference_mode(), simulation(monkeypatch):
                found = Placed(file, GPU).run({name: value.to(GPU) for name, value in x.items()})
        except Exception as error:
            failures.append(f"{case.name}: {error}")
            continue
        for name, value in found.items():
            if isinstance(value, torch.Tensor):
                assert isinstance(value, Simulated), case.name
                torch.testing.assert_close(value.held, wanted[name], equal_nan=True, msg=case.name)
    assert not failures, "\n".join(failures)
    assert tried > 300


def test_the_simulation_tells_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without placement, sizes are numbers of the GPU: the check can fail."""
    model, x = Decoder().eval(), drawn(Decoder)
    file = OnnxFile.load(to_onnx(capture(model, (x,)).exported))
    with torch.inference_mode(), simulation(monkeypatch) as mode:
        runner, there = Runner(file, device=GPU), x.to(GPU)
        mode.capturing = True
        with pytest.raises(InvalidModel, match=r"while a graph is captured|waits for the GPU"), GPU:
            runner.run({file.inputs[0].name: there})


def test_what_a_graph_reads_is_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask for nine positions, captured, is there after a run with eleven."""

    def lengths(length: int) -> torch.Tensor:
        return torch.randn(2, length, 32)

    model = Decoder().eval()
    sizes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    file = OnnxFile.load(to_onnx(torch.export.export(model, (lengths(9),), dynamic_shapes=sizes)))
    name = file.inputs[0].name
    with torch.inference_mode(), simulation(monkeypatch) as mode:
        placed = Placed(file, GPU)
        placed.run({name: lengths(9).to(GPU)})
        there = lengths(9).to(GPU)
        mode.capturing = True
        placed.run({name: there})
        mode.capturing = False
        read = [weakref.ref(moved) for _, moved in placed._there.values()]
        other = placed.run({name: lengths(11).to(GPU)})
        gc.collect()
        assert read
        assert all(reference() is not None for reference in read)
        x = lengths(11)
        found = placed.run({name: x.to(GPU)})
        assert next(iter(other.values())).shape == (2, 11, 32)
        torch.testing.assert_close(next(iter(found.values())).held, model(x))


def test_sequences_are_where_their_items_are(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("SequenceConstruct", ["wide"], ["s"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["sums"], keepdims=0),
        helper.make_node("SequenceInsert", ["s", "sums"], ["t"]),
        helper.make_node("ConcatFromSequence", ["t"], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_empty_tensor_value_info("t"),
        ],
        [numpy_helper.from_array(np.array([0]), "axes")],
    )
    file = OnnxFile.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    x = torch.randn(3, 4)
    wanted = Runner(file).run({"x": x})
    with torch.inference_mode(), simulation(monkeypatch):
        found = Placed(file, GPU).run({"x": x.to(GPU)})
    torch.testing.assert_close(found["y"].held, wanted["y"])
    for ours, theirs in zip(found["t"], wanted["t"], strict=True):
        torch.testing.assert_close(ours.held, theirs)

"""Checkpoints pruned on disk, against the same model pruned in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsecc
from sparsecc.checkpoint import Shards, parameters_on_meta, prune_checkpoint
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.passes import ChannelPruning, NMPattern, SparseGPT, Wanda
from sparsecc.saliency import Saliency, criterion


class Block(nn.Module):
    """Attention with a buffer that no checkpoint holds, and a gated feed-forward part."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.register_buffer("angles", torch.linspace(0.3, 1.0, width // 2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        turned = torch.cat((self.angles.sin(), self.angles.cos()))
        x = x + self.o(a) * turned
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """A table, blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 16)
        self.blocks = nn.Sequential(Block(16, 24), Block(16, 24))
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.table(ids)))


def on_disk(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """The model with values, and its checkpoint of two files as transformers would write it."""
    model = Model().eval()
    state = {n: t.to(dtype).contiguous() for n, t in model.state_dict().items()}
    halves = [{n: t for n, t in state.items() if ("blocks.0" in n) == first} for first in (True, False)]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder.mkdir()
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, {"format": "pt"})
    weight_map = {n: f for f, half in zip(names, halves, strict=True) for n in half}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text("{}")
    model.load_state_dict({n: t.float() for n, t in state.items()})
    return model


def empty() -> Model:
    """The model without values."""
    with parameters_on_meta():
        return Model().eval()


DATA = [torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(s)) for s in range(4)]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_buffers_have_values_and_parameters_have_none() -> None:
    """RoPE's tables are in no checkpoint."""
    model = empty()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize(
    "recipe",
    [
        [SparseGPT(pattern="2:4", exclude=("head*",))],
        [Wanda(sparsity=0.5)],
        [ChannelPruning(sparsity=0.25, include=("*gate*",), residual=False), SparseGPT(pattern="2:4")],
        [ChannelPruning(sparsity=0.5)],
    ],
    ids=str,
)
def test_the_result_is_that_of_pruning_in_memory(tmp_path: Path, recipe: list[Any]) -> None:
    """Every tensor, bit for bit where nothing was updated."""
    model = on_disk(tmp_path / "in")

    def scores(analysis: Any, statistics: Any) -> Saliency:
        return Saliency(analysis, criterion("wanda"), statistics=statistics)

    found = prune_checkpoint(
        empty(), (DATA[0],), tmp_path / "in", tmp_path / "out", recipe, calibration=DATA, saliency=scores
    )
    want = sparsecc.prune(model, (DATA[0],), recipe=recipe, saliency="wanda", calibration=DATA)
    assert want.certificate.status == "VERIFIED"
    tensors = stored(tmp_path / "out")
    state = want.model.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(tensors[name] == 0, tensor == 0), name
    assert (tmp_path / "out" / "config.json").exists()
    assert {p.weight for p in found.patterns} == {p.weight for p in want.plan.patterns}


def test_half_precision_checkpoints_stay_that(tmp_path: Path) -> None:
    """Stored in bfloat16, worked on in the model's float32, written in bfloat16; untouched bytes stay."""
    on_disk(tmp_path / "in", torch.bfloat16)
    recipe = [SparseGPT(pattern="2:4", include=("blocks.1.*",))]
    prune_checkpoint(empty(), (DATA[0],), tmp_path / "in", tmp_path / "out", recipe, calibration=DATA)
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        touched = name.startswith("blocks.1") and tensor.dim() == 2
        assert torch.equal(tensor, before[name]) != touched, name


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither a half-written folder nor a temporary one."""
    on_disk(tmp_path / "in")

    def broken() -> Any:
        raise RuntimeError("no more data")

    class Data(list[Any]):
        def __iter__(self) -> Any:
            yield DATA[0]
            broken()

    with pytest.raises(RuntimeError, match="no more data"):
        prune_checkpoint(
            empty(), (DATA[0],), tmp_path / "in", tmp_path / "out", [SparseGPT()], calibration=Data()
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_bad_requests_are_clear(tmp_path: Path) -> None:
    """An output that is there, a model with values, another model's weights, passes that need memory."""
    on_disk(tmp_path / "in")
    (tmp_path / "there").mkdir()
    arguments: dict[str, Any] = {"calibration": DATA}
    with pytest.raises(InvalidOption, match="already"):
        prune_checkpoint(empty(), (DATA[0],), tmp_path / "in", tmp_path / "there", [SparseGPT()], **arguments)
    with pytest.raises(InvalidOption, match="parameters_on_meta"):
        prune_checkpoint(Model(), (DATA[0],), tmp_path / "in", tmp_path / "out", [SparseGPT()], **arguments)
    with pytest.raises(InvalidOption, match="in memory"):
        prune_checkpoint(empty(), (DATA[0],), tmp_path / "in", tmp_path / "out", [NMPattern()], **arguments)
    save_file({"table.weight": torch.zeros(30, 16)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidModel, match="holds no"):
        prune_checkpoint(
            empty(), (DATA[0],), tmp_path / "other.safetensors", tmp_path / "out", [SparseGPT()], **arguments
        )
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InvalidModel, match="damaged"):
        Shards(tmp_path / "broken.safetensors")
    with pytest.raises(InvalidModel, match="no checkpoint"):
        Shards(tmp_path)
    (tmp_path / "in" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(InvalidModel, match="outside"):
        Shards(tmp_path / "in")


def test_a_tensor_is_shared_while_it_is_held(tmp_path: Path) -> None:
    """Two readers of one weight get one copy; nobody, none."""
    on_disk(tmp_path / "in")
    shards = Shards(tmp_path / "in")
    first = shards["head.weight"]
    assert shards["head.weight"] is first
    del first
    assert not shards._alive

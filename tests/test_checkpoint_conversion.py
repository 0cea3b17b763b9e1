"""Checkpoints whose tensors have other names than the model's, or hold its weights in pieces.

The oracle is the same model pruned in memory; ``from_pretrained`` reads what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsecc
from sparsecc.checkpoint import load_checkpoint, parameters_on_meta, prune_checkpoint
from sparsecc.checkpoint.conversion import Converted, opened
from sparsecc.errors import InvalidModel, UnsupportedModel
from sparsecc.passes import ChannelPruning, ExpertPruning, Wanda
from tests.test_checkpoint_widths import empty, on_disk, tensors

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def mixtral() -> Any:
    return transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)


def qwen2_moe() -> Any:
    return transformers.Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )  # fmt: skip


def neox() -> Any:
    return transformers.GPTNeoXConfig(**SIZES)


CONFIGS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (mixtral, qwen2_moe, neox)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_stored_in_pieces_is_what_the_model_has(name: str, tmp_path: Path) -> None:
    model = on_disk(tmp_path / "dense", CONFIGS[name]())
    found = opened(tmp_path / "dense", empty(CONFIGS[name]()))
    assert isinstance(found, Converted)
    for key, value in model.named_parameters():
        assert torch.equal(found[key], value), key
        assert found.entries[key].shape == tuple(value.shape)


CUT, SPARSE = [ChannelPruning(sparsity=0.5, residual=False)], [Wanda(sparsity=0.5)]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mixtral", CUT),
        ("mixtral", SPARSE),
        pytest.param("neox", CUT, marks=pytest.mark.nightly),
        pytest.param("qwen2_moe", CUT, marks=pytest.mark.nightly),
        pytest.param("neox", SPARSE, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_the_result_is_that_of_pruning_in_memory(name: str, recipe: list[Any], tmp_path: Path) -> None:
    model = on_disk(tmp_path / "dense", CONFIGS[name]())
    data = [IDS] if isinstance(recipe[0], Wanda) else None
    done = prune_checkpoint(
        empty(CONFIGS[name]()), IDS, tmp_path / "dense", tmp_path / "out", recipe, calibration=data
    )
    wanted = sparsecc.prune(model, IDS, recipe=recipe, calibration=data, verify=False)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert done.from_pretrained
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    torch.testing.assert_close(logits(loaded.eval()), logits(wanted.model), rtol=1e-5, atol=1e-5)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "dense").keys()
    if data is None:
        assert done.certificate.status == "VERIFIED"
        assert sum(t.numel() for t in tensors(tmp_path / "out").values()) < model.num_parameters()


@pytest.mark.nightly
def test_experts_go_from_disk(tmp_path: Path) -> None:
    model = on_disk(tmp_path / "dense", mixtral())
    recipe = [ExpertPruning(sparsity=0.5)]
    done = prune_checkpoint(empty(mixtral()), IDS, tmp_path / "dense", tmp_path / "out", recipe)
    wanted = sparsecc.prune(model, IDS, recipe=recipe, verify=False)
    left = {key.split("experts.")[1][0] for key in tensors(tmp_path / "out") if "experts." in key}
    assert left == {"0", "1"}
    if done.from_pretrained:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    else:
        loaded = load_checkpoint(empty(mixtral()), tmp_path / "out", IDS)
    torch.testing.assert_close(logits(loaded), logits(wanted.model), rtol=1e-5, atol=1e-5)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A checkpoint of one file, with a change."""
    state = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    change(state)
    other = folder.parent / "changed"
    other.mkdir()
    save_file(state, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((folder / "config.json").read_text())
    return other


@pytest.mark.parametrize("change", ["lost", "other shape", "twice"])
def test_pieces_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    on_disk(tmp_path / "dense", mixtral())

    def spoil(state: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(state) if "experts.1." in n)
        if change == "lost":
            del state[name]
        elif change == "other shape":
            state[name] = state[name][:-1].contiguous()
        else:
            state["model.layers.0.mlp.gate.weight"] = torch.zeros(4, 32)

    folder = rewritten(tmp_path / "dense", spoil)
    with pytest.raises(InvalidModel):
        prune_checkpoint(empty(mixtral()), IDS, folder, tmp_path / "out", [ExpertPruning(sparsity=0.5)])
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_model_reads_are_kept(tmp_path: Path) -> None:
    on_disk(tmp_path / "dense", neox())
    folder = rewritten(tmp_path / "dense", lambda state: state.update(beside=torch.arange(3)))
    recipe = [ChannelPruning(sparsity=0.5, residual=False)]
    prune_checkpoint(empty(neox()), IDS, folder, tmp_path / "out", recipe)
    assert torch.equal(tensors(tmp_path / "out")["beside"], torch.arange(3))
    assert "num_local_experts" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_constants_made_while_the_model_runs_are_named(tmp_path: Path) -> None:
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48
    )
    on_disk(tmp_path / "dense", config)
    with parameters_on_meta():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match=r"self_attention\.forward makes constants while it runs"):
        prune_checkpoint(model, IDS, tmp_path / "dense", tmp_path / "out", [ChannelPruning(sparsity=0.5)])

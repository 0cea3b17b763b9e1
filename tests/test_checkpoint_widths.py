"""Structurally pruned checkpoints: from_pretrained loads what the original masked by hand computes.

The oracle knows nothing of plans: what was kept is read off the written weights, whose rows all differ.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparsecc.checkpoint.prune as pruning
from sparsecc.checkpoint import load_checkpoint, parameters_on_meta, prune_checkpoint
from sparsecc.errors import InvalidModel, InvalidOption, PlanConflict, VerificationFailed
from sparsecc.passes import PASSES, ChannelPruning, HeadPruning, SparseGPT
from sparsecc.recipe import parse
from sparsecc.verification import Certificate
from sparsecc.verification.certificate import Check

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
NEURONS = ChannelPruning(sparsity=0.5, residual=False)


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**{
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
        **more,
    })  # fmt: skip


def qwen2() -> Any:
    return transformers.Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )


def opt() -> Any:
    return transformers.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip


def on_disk(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose biases and norms have random values too, saved in several files."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + torch.randn_like(parameter) * 0.1).to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


def empty(config: Any) -> Any:
    with parameters_on_meta():
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def kept(before: torch.Tensor, after: torch.Tensor, dim: int = 0) -> list[int]:
    """Which slices of ``before`` make ``after``."""
    places = {tuple(row.flatten().tolist()): i for i, row in enumerate(before.unbind(dim))}
    return [places[tuple(row.flatten().tolist())] for row in after.unbind(dim)]


def only(weight: torch.Tensor, places: Sequence[int], dim: int) -> None:
    """Zero everything that is read from other positions."""
    gone = [i for i in range(weight.shape[dim]) if i not in set(places)]
    with torch.no_grad():
        weight.index_fill_(dim, torch.tensor(gone), 0.0)


def same(loaded: Any, masked: Any) -> None:
    """Equal in float64, but for the norms and rotations that the classes compute in float32."""
    ours, theirs = logits(loaded), logits(masked)
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * 2e-6)


def reloaded(folder: Path) -> Any:
    """What transformers makes of a folder, where it makes nothing up."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(told.values()), told
    return model.eval()


def mask_llama(model: Any, cut: dict[str, torch.Tensor], layers: dict[int, int]) -> None:
    """Zero what reads the neurons and heads that are gone; ``layers`` maps new numbers to old ones."""
    for i, layer in enumerate(model.model.layers):
        new = next((n for n, old in layers.items() if old == i), None)
        if new is None:
            only(layer.self_attn.o_proj.weight, [], 1)
            only(layer.mlp.down_proj.weight, [], 1)
            continue
        prefix = f"model.layers.{new}."
        only(
            layer.mlp.down_proj.weight,
            kept(layer.mlp.gate_proj.weight, cut[f"{prefix}mlp.gate_proj.weight"]),
            1,
        )
        rows = kept(layer.self_attn.q_proj.weight, cut[f"{prefix}self_attn.q_proj.weight"])
        only(layer.self_attn.o_proj.weight, rows, 1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)])
def test_llama_loses_a_layer_neurons_and_heads(tmp_path: Path, dtype: torch.dtype) -> None:
    config = llama(num_hidden_layers=3)
    model = on_disk(tmp_path / "in", config, dtype)
    recipe = parse(
        "DepthPruning(blocks=('model.layers.1*',)); ChannelPruning(sparsity=0.5, residual=False); "
        "HeadPruning(sparsity=0.5)",
        PASSES,
    )
    found = prune_checkpoint(empty(config), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out", recipe)
    assert found.certificate.status == "VERIFIED"
    assert found.from_pretrained
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    assert {k: v for k, v in told.items() if before.get(k) != v} == {
        "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2
    }  # fmt: skip
    cut = tensors(tmp_path / "out")
    assert all(t.dtype == dtype for t in cut.values())
    assert cut["model.layers.0.self_attn.k_proj.weight"].shape == (16, 48)
    mask_llama(model, {n: t.float() for n, t in cut.items()}, {0: 0, 1: 2})
    same(reloaded(tmp_path / "out"), model)


@pytest.mark.nightly
def test_qwen2_loses_neurons_and_grouped_heads(tmp_path: Path) -> None:
    """``head_dim`` has to be said once heads no longer fill the hidden width; embeddings stay tied."""
    model = on_disk(tmp_path / "in", qwen2())
    found = prune_checkpoint(
        empty(qwen2()), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out",
        [NEURONS, HeadPruning(sparsity=0.5)],
    )  # fmt: skip
    assert found.from_pretrained, found.notes
    cut = tensors(tmp_path / "out")
    assert cut["model.layers.0.self_attn.q_proj.weight"].shape == (16, 64)
    mask_llama(model, cut, {0: 0, 1: 1})
    same(reloaded(tmp_path / "out"), model)


@pytest.mark.nightly
def test_gpt2_loses_a_layer_and_neurons(tmp_path: Path) -> None:
    model = on_disk(tmp_path / "in", gpt2())
    recipe = parse(
        "DepthPruning(blocks=('transformer.h.1*',)); ChannelPruning(sparsity=0.5, residual=False)", PASSES
    )
    found = prune_checkpoint(empty(gpt2()), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out", recipe)
    assert found.from_pretrained, found.notes
    cut = tensors(tmp_path / "out")
    block = model.transformer.h[0]
    only(block.mlp.c_proj.weight, kept(block.mlp.c_fc.weight, cut["transformer.h.0.mlp.c_fc.weight"], 1), 0)
    del model.transformer.h[1]
    same(reloaded(tmp_path / "out"), model)


@pytest.mark.nightly
def test_opt_loses_neurons(tmp_path: Path) -> None:
    model = on_disk(tmp_path / "in", opt())
    found = prune_checkpoint(empty(opt()), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out", [NEURONS])
    assert found.from_pretrained, found.notes
    cut = tensors(tmp_path / "out")
    for i, layer in enumerate(model.model.decoder.layers):
        only(layer.fc2.weight, kept(layer.fc1.weight, cut[f"model.decoder.layers.{i}.fc1.weight"]), 1)
    same(reloaded(tmp_path / "out"), model)


def test_what_no_config_says_loads_by_its_plan_and_in_no_other_way(tmp_path: Path) -> None:
    """OPT's heads fill its hidden width, so that no field describes fewer of them."""
    model = on_disk(tmp_path / "in", opt())
    found = prune_checkpoint(
        empty(opt()), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out", [HeadPruning(sparsity=0.5)]
    )
    assert found.certificate.status == "VERIFIED"
    assert not found.from_pretrained
    assert any("load_checkpoint" in note for note in found.notes)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cut = tensors(tmp_path / "out")
    for i, layer in enumerate(model.model.decoder.layers):
        name = f"model.decoder.layers.{i}.self_attn.v_proj.weight"
        only(layer.self_attn.out_proj.weight, kept(layer.self_attn.v_proj.weight, cut[name]), 1)
    loaded = load_checkpoint(empty(opt()), tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight
    same(loaded, model)
    with pytest.raises(PlanConflict):
        load_checkpoint(empty(gpt2()), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    with pytest.raises(InvalidModel):
        load_checkpoint(empty(opt()), tmp_path / "out")


def test_a_config_on_disk_that_is_another_model_is_not_kept(tmp_path: Path) -> None:
    """What would be loaded from it is not what was pruned."""
    on_disk(tmp_path / "in", opt())
    told = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**told, "activation_function": "gelu"}))
    found = prune_checkpoint(empty(opt()), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out", [NEURONS])
    assert not found.from_pretrained
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_the_class_cannot_say_loads_as_a_graph(tmp_path: Path) -> None:
    """One query of two is left in every group, and Llama's code leaves out the repetition."""
    config = llama(num_attention_heads=8)
    model = on_disk(tmp_path / "in", config)
    found = prune_checkpoint(
        empty(config), {"input_ids": IDS}, tmp_path / "in", tmp_path / "out", [HeadPruning(sparsity=0.5)]
    )
    assert found.certificate.status == "VERIFIED"
    assert not found.from_pretrained
    cut = tensors(tmp_path / "out")
    for i, layer in enumerate(model.model.layers):
        rows = kept(layer.self_attn.q_proj.weight, cut[f"model.layers.{i}.self_attn.q_proj.weight"])
        only(layer.self_attn.o_proj.weight, rows, 1)
    with pytest.raises(InvalidOption, match="example_inputs"):
        load_checkpoint(empty(config), tmp_path / "out")
    loaded = load_checkpoint(empty(config), tmp_path / "out", {"input_ids": IDS})
    with torch.no_grad():
        ours, theirs = loaded(input_ids=IDS).logits, model(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * 1e-5)


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk(tmp_path / "in", opt())
    before = tensors(tmp_path / "in")

    def prune(*passes: Any, **options: Any) -> Any:
        inputs = {"input_ids": IDS}
        return prune_checkpoint(
            empty(opt()), inputs, tmp_path / "in", tmp_path / "out", list(passes), **options
        )

    with pytest.raises(InvalidOption, match="calibration"):
        prune(SparseGPT())
    failed = Certificate("FAILED", "pruned(x) = masked(x)", (Check("float64", "relative error", 1, 0, "x"),))
    monkeypatch.setattr(pruning, "compared", lambda *_: failed)
    with pytest.raises(VerificationFailed):
        prune(NEURONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    after = tensors(tmp_path / "in")
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert prune(NEURONS, verify=False).certificate.status == "UNCHECKED"

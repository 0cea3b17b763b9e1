"""Hugging Face models: a configuration that describes the result loads it, any other is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load

import sparsecc
from sparsecc.fx.config import changed, descriptions
from sparsecc.plan import SetModule

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
WIDTHS = "ChannelPruning(sparsity=0.5); HeadPruning(sparsity=0.5)"
INNER = "ChannelPruning(sparsity=0.5, residual=False)"


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def qwen2() -> Any:
    config = transformers.Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    if "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS}


def pruned(make: Callable[[], Any], recipe: str, **options: Any) -> tuple[Any, sparsecc.Pruned]:
    torch.manual_seed(0)
    model = make().eval()
    return model, sparsecc.prune(model, inputs(model), recipe=recipe, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits  # type: ignore[no-any-return]


def differing(old: Any, new: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(new).items() if vars(old).get(k) != v}


@pytest.mark.parametrize(
    ("make", "recipe", "fields"),
    [
        (llama, WIDTHS, {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4,
                         "num_key_value_heads": 2}),
        (qwen2, "ChannelPruning(sparsity=0.5)", {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}),
        (bert, WIDTHS, {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}),
        pytest.param(gpt2, WIDTHS, {"n_embd": 32, "n_head": 2}, marks=pytest.mark.nightly),
        (gpt2, INNER, {"n_inner": 128}),
        (vit, INNER, {"intermediate_size": 32}),
    ],
)  # fmt: skip
def test_results_that_a_config_describes_load_again(
    make: Callable[[], Any], recipe: str, fields: dict[str, int], tmp_path: Path
) -> None:
    """Exactly the fields that have to change do, although others hold the same numbers."""
    model, result = pruned(make, recipe)
    before = copy.deepcopy(model.config)
    assert result.certificate.status == "VERIFIED"
    assert type(result.model) is type(model)
    assert differing(before, model.config) == {}
    assert differing(before, result.model.config) == fields
    assert any("save_pretrained and from_pretrained work" in note for note in result.report.notes)
    applied = result.plan.apply(model)
    assert differing(result.model.config, applied.config) == {}
    assert torch.equal(logits(applied), logits(result.model))
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval()), logits(result.model))


def test_a_rescaled_softmax_is_told_from_the_right_one() -> None:
    """Head dimensions change the scale and the rotation that a class computes; no shape shows it."""
    model, result = pruned(llama, "HeadPruning(sparsity=0.5, heads=False, head_dims=True)")
    assert result.certificate.status == "VERIFIED"
    assert differing(model.config, result.model.config) == {}
    (note,) = [n for n in result.report.notes if n.startswith("config")]
    assert "keeps its old widths" in note
    assert "differs by" in note


@pytest.mark.parametrize(("make", "recipe"), [
    (bert, "HeadPruning(sparsity=0.5)"),  # 64 wide inside and 32 in the attention: no field says so
    (llama, "ChannelPruning(sparsity=0.5, include=('model.layers.0.mlp',))"),  # layers differ
])  # fmt: skip
def test_what_no_field_can_say_is_left_alone(make: Callable[[], Any], recipe: str) -> None:
    model, result = pruned(make, recipe)
    assert type(result.model) is type(model)
    assert differing(model.config, result.model.config) == {}
    assert any("from_pretrained cannot load the result" in note for note in result.report.notes)


def test_layers_that_are_gone_need_no_other_change(tmp_path: Path) -> None:
    model, result = pruned(llama, "DepthPruning(blocks=('model.layers.1*',))")
    assert differing(model.config, result.model.config) == {"num_hidden_layers": 1}
    assert any("config describes the result as it is" in note for note in result.report.notes)
    result.model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(result.model))


def test_a_buffer_that_no_state_dict_holds_is_told_and_comes_back_with_the_plan(tmp_path: Path) -> None:
    model, result = pruned(llama, "HeadPruning(sparsity=0.5, heads=False, head_dims=True)")
    (note,) = [n for n in result.report.notes if "no part of a state dict" in n]
    assert "model.rotary_emb.inv_freq" in note
    result.save(tmp_path / "small.plan")
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    again = sparsecc.Plan.load(tmp_path / "small.plan").apply(fresh)
    with ZipFile(tmp_path / "small.plan") as archive:
        again.load_state_dict(load(archive.read("weights.safetensors")))
    assert torch.equal(logits(again), logits(result.model))
    frequencies = result.model.model.rotary_emb.inv_freq
    assert frequencies.shape == (2,)
    assert torch.equal(again.model.rotary_emb.inv_freq, frequencies)


def test_a_model_without_such_buffers_has_no_such_note() -> None:
    _, result = pruned(gpt2, INNER)
    assert not [n for n in result.report.notes if "state dict" in n]


def test_changes_are_put_back_where_they_do_not_do() -> None:
    model = llama()
    before = copy.deepcopy(model.config)
    changes = [SetModule("", "config.hidden_size", 8), SetModule("", "config.made_up", 3)]
    seen: list[int] = []

    def fail() -> None:
        with changed(model, changes):
            seen.extend((model.config.hidden_size, model.config.made_up))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [8, 3]
    assert vars(model.config) == vars(before)


def test_a_config_is_looked_for_in_vain_without_trying_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of different widths have no scalar field; nothing is built to find that out."""
    import sparsecc.fx.config as config

    built: list[Any] = []
    monkeypatch.setattr(config, "_shapes", lambda kind, tried: built.append(tried))
    model = llama().eval()
    subject = sparsecc.pipeline.open_subject(model, inputs(model))
    kept = {"model.layers.0.mlp.gate_proj.weight[0]": torch.arange(64).numpy() < 32}
    plan = sparsecc.lowering.lower(subject.analysis, kept)
    narrow = sparsecc.fx.module.narrowed(model, plan, subject.program.tied)
    keeps = subject.analysis.keeps(kept)
    assert list(descriptions(narrow, subject.program, subject.view, plan, keeps)) == []
    assert not built


def test_a_field_that_the_configuration_computes_is_no_obstacle() -> None:
    """Falcon's head_dim is a property without a setter."""
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True,
    )  # fmt: skip
    model = transformers.FalconForCausalLM(config).eval()
    result = sparsecc.prune(model, {"input_ids": IDS}, sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert result.report.after["parameters"] < 0.6 * result.report.before["parameters"]

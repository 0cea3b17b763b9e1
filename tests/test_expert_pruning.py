"""Whole experts: the pruned model is the original whose router has minus infinity for those that went.

The oracle is the original's own code with masked logits; which experts stayed is read off the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.errors import InvalidOption
from sparsecc.lowering import lower
from tests.patterns.feed_forward import mixture_of_experts
from tests.patterns.published import experts_by_top_k


class Mixture(nn.Module):
    """A router over matrices in two parameters; ``keep`` masks its logits."""

    def __init__(self, experts: int, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))
        self.count = count
        self.keep: torch.Tensor | None = None

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        found = self.router(x)
        return found if self.keep is None else found.masked_fill(~self.keep, float("-inf"))

    def every(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("nd,edh->neh", x, self.up).relu()
        return torch.einsum("neh,ehd,ne->nd", hidden, self.down, gates)


class Soft(Mixture):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.every(x, self.logits(x).softmax(-1))


class SoftBatched(Mixture):
    """Batched products, the experts in front."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.silu(x @ self.up) @ self.down
        return (out * self.logits(x).softmax(-1).t().unsqueeze(-1)).sum(0)


class Scattered(Mixture):
    """All experts run; weights of those that were not chosen are zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.logits(x)
        best, places = logits.softmax(-1).topk(self.count, -1)
        best = best / best.sum(-1, keepdim=True)
        return self.every(x, torch.zeros_like(logits).scatter(-1, places, best))


class OneHot(Mixture):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, places = self.logits(x).softmax(-1).topk(self.count, -1)
        chosen = F.one_hot(places, self.up.shape[0]).to(best)
        return self.every(x, (chosen * best.unsqueeze(-1)).sum(1))


class Gathered(Mixture):
    """The chosen matrices are looked up; weights are normalised among the chosen, and looked up again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.logits(x)
        places = logits.topk(self.count, -1)[1]
        weights = logits.gather(-1, places).softmax(-1)
        hidden = torch.einsum("nd,nkdh->nkh", x, self.up[places]).relu()
        return torch.einsum("nkh,nkhd,nk->nd", hidden, self.down[places], weights)


STYLES: tuple[type[Mixture], ...] = (Soft, SoftBatched, Scattered, OneHot, Gathered)


def made(style: Callable[..., Mixture], *sizes: int, seed: int = 0) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(seed)
    return style(*sizes).eval(), torch.randn(11, sizes[1])


def kept(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Which rows of ``before`` make ``after``, as a mask."""
    same = (before.flatten(1)[:, None] == after.flatten(1)[None]).all(-1)
    assert (same.sum(0) == 1).all()
    return same.any(1)


@pytest.mark.parametrize("sizes", [(3, 4, 5, 1), (5, 6, 7, 2), (9, 4, 3, 3), (4, 4, 4, 2)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_the_result_is_the_original_with_masked_logits(style: type[Mixture], sizes: tuple[int, ...]) -> None:
    """Also where width, inner width and number of experts are all the same."""
    model, x = made(style, *sizes)
    result = sparsecc.prune(model, (x,), recipe="ExpertPruning(sparsity=0.5)")
    assert result.certificate.status == "VERIFIED"
    assert type(result.model) is style
    assert not result.plan.skips
    left = sizes[0] - sizes[0] // 2
    assert result.model.router.weight.shape == (left, sizes[1])
    assert result.model.down.shape == (left, sizes[2], sizes[1])
    keep = kept(model.router.weight, result.model.router.weight)
    assert torch.equal(keep, kept(model.up, result.model.up))
    assert torch.equal(keep, kept(model.down, result.model.down))
    more = torch.randn(64, sizes[1], generator=torch.Generator().manual_seed(5)).double()
    dense = model.double()(more)
    model.keep = keep
    wanted, found = model(more), result.model.double()(more)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(dense, wanted)


@pytest.mark.parametrize("style", STYLES[2:])
def test_as_many_stay_as_the_router_picks(style: type[Mixture]) -> None:
    model, x = made(style, 5, 4, 3, 3)
    result = sparsecc.prune(model, (x,), recipe="ExpertPruning(sparsity=0.95, allocation='global')")
    assert result.model.router.weight.shape[0] == 3
    full, x = made(style, 3, 4, 3, 3)
    result = sparsecc.prune(full, (x,), recipe="ExpertPruning(sparsity=0.95)")
    assert result.model.router.weight.shape[0] == 3
    analysis = sparsecc.analyze(model, (x,))
    (group,) = [g for g in analysis.groups if g.kind == "expert"]
    with pytest.raises(InvalidOption, match="3 of its positions have to stay, and 2 would"):
        lower(analysis, {group.name: np.arange(5) < 2})
    with pytest.raises(InvalidOption, match="keep their order"):
        lower(analysis, {group.name: np.array([3, 2, 1, 0])})


def test_experts_are_a_granularity_of_their_own() -> None:
    """Passes for channels leave experts, and this one leaves channels."""
    model, x = made(Scattered, 4, 4, 6, 2)
    channels = sparsecc.prune(model, (x,), sparsity=0.5).model
    assert channels.up.shape == (4, 4, 3)
    both = sparsecc.prune(model, (x,), recipe="ExpertPruning(sparsity=0.5); ChannelPruning(sparsity=0.5)")
    assert both.model.up.shape == (2, 4, 3)
    assert both.certificate.status == "VERIFIED"


@pytest.mark.parametrize("style", STYLES)
def test_an_expert_of_zeros_still_takes_part(style: type[Mixture]) -> None:
    """It takes its share of the weights, so lossless slimming must not remove it."""
    model, x = made(style, 4, 4, 5, 2)
    with torch.no_grad():
        for parameter in (model.router.weight, model.router.bias, model.up, model.down):
            parameter[1] = 0
    result = sparsecc.slim(model, (x,))
    assert result.model.router.weight.shape[0] == 4
    torch.testing.assert_close(result.model(x), model(x))


def test_verification_sees_experts_in_another_order() -> None:
    """The reference knows which rows belong to which matrices."""
    model, x = made(Gathered, 6, 4, 5, 2)
    result = sparsecc.prune(model, (x,), recipe="ExpertPruning(sparsity=0.5)")
    with torch.no_grad():
        result.model.router.weight.copy_(result.model.router.weight.roll(1, 0))
    assert sparsecc.verify(model, result.model, (x,), plan=result.plan).status == "FAILED"


# -- what is left alone -------------------------------------------------------------------------------


class Compared(Mixture):
    """Experts are told by their numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, places = self.logits(x).softmax(-1).topk(self.count, -1)
        return self.every(x, ((places == 2) * best).sum(-1, keepdim=True) + self.logits(x).softmax(-1))


class PutOut(Mixture):
    def forward(self, x: torch.Tensor) -> Any:
        places = self.logits(x).topk(self.count, -1)[1]
        return torch.einsum("nd,nkdh->nkh", x, self.up[places]).sum(1), places


class Spare(Mixture):
    """One more class than there are experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.logits(x).topk(self.count, -1)[1]
        chosen = F.one_hot(places, self.up.shape[0] + 1).float().sum(1)
        return self.every(x, chosen[:, :-1])


class Limited(Mixture):
    """The best of two groups of experts each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = self.logits(x).view(-1, 2, self.up.shape[0] // 2)
        best, places = grouped.topk(1, -1)
        gates = torch.zeros_like(grouped).scatter(-1, places, best)
        return self.every(x, gates.flatten(1))


class Embedded(Mixture):
    """Positions also look up a table that is no expert's."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.table = nn.Embedding(sizes[0] + 2, sizes[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.logits(x).topk(self.count, -1)[1]
        hidden = torch.einsum("nd,nkdh->nkh", x, self.up[places]).relu()
        return torch.einsum("nkh,nkhd->nd", hidden, self.down[places]) + self.table(places).sum(1)


@pytest.mark.parametrize("style", [Compared, PutOut, Spare, Limited, Embedded])
def test_positions_that_are_data_keep_every_expert(style: type[Mixture]) -> None:
    model, x = made(style, 6, 4, 5, 2)
    result = sparsecc.prune(model, (x,), recipe="ExpertPruning(sparsity=0.5)")
    assert result.model.router.weight.shape[0] == 6
    assert not any(d.size == 6 for d in result.plan.decisions)
    assert any("router" in s.where and s.reason for s in result.plan.skips)


@pytest.mark.parametrize("built", [experts_by_top_k, mixture_of_experts])
def test_experts_in_a_list_are_left_with_a_word(built: Callable[[], Any]) -> None:
    model, inputs = built()
    result = sparsecc.prune(model.eval(), inputs, recipe="ExpertPruning(sparsity=0.5)")
    assert not result.plan
    assert result.plan.skips


def test_the_best_of_channels_are_no_experts() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).topk(2, -1)[0])

    analysis = sparsecc.analyze(Pooled(), (torch.randn(3, 4),))
    assert not analysis.groups
    assert any("reads positions" in str(f) for f in analysis.frozen)


# -- transformers -------------------------------------------------------------------------------------


def masked(gate: Any, keep: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The router's own steps, with minus infinity for experts that went."""

    def forward(hidden: torch.Tensor) -> Any:
        logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight).masked_fill(~keep, float("-inf"))
        best, places = logits.softmax(-1).topk(gate.top_k, -1)
        if getattr(gate, "norm_topk_prob", True):
            best = best / best.sum(-1, keepdim=True)
        return logits, best, places

    return forward


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("Mixtral", "batched_mm"),
        ("Qwen2Moe", "grouped_mm"),
        pytest.param("Mixtral", "grouped_mm", marks=pytest.mark.nightly),
        pytest.param("Qwen2Moe", "batched_mm", marks=pytest.mark.nightly),
    ],
)
def test_transformers_lose_experts_and_load_again(name: str, way: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    experts = {
        "Mixtral": {"num_local_experts": 6},
        "Qwen2Moe": {
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    }[name]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2, **experts,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=way).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(3, 96, (2, 7))
    result = sparsecc.prune(model, {"input_ids": ids}, recipe="ExpertPruning(sparsity=0.5)")
    assert result.certificate.status == "VERIFIED"
    assert type(result.model) is type(model)
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for old, new in zip(model.model.layers, again.model.layers, strict=True):
        keep = kept(old.mlp.gate.weight, new.mlp.gate.weight)
        assert keep.sum() == 3
        old.mlp.gate.forward = masked(old.mlp.gate, keep)
    with torch.no_grad():
        wanted, found = model(input_ids=ids).logits, again(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-5)

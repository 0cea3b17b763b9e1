"""Matrices stacked in one parameter are pruned as the layers that they are: one for every expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.calibration.readings import readings
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.plan import Take

E, T, K, N, OUT = 3, 7, 16, 24, 8

RECIPES = (
    "Wanda(sparsity=0.5)",
    "Wanda(pattern='2:4')",
    "SparseGPT(sparsity=0.5)",
    "SparseGPT(pattern='2:4')",
)


class Separate(nn.Module):
    """Every expert has layers of its own."""

    def __init__(self, alike: bool = False) -> None:
        super().__init__()
        self.alike = alike
        self.up = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(N, OUT, bias=False) for _ in range(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = [x if self.alike else x[e] for e in range(E)]
        hidden = [up(one).relu() for up, one in zip(self.up, given, strict=True)]
        return torch.stack([down(one) for down, one in zip(self.down, hidden, strict=True)])

    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``[E, N, K]`` and ``[E, OUT, N]``."""
        with torch.no_grad():
            return tuple(  # type: ignore[return-value]
                torch.stack([layer.weight for layer in layers])  # type: ignore[misc]
                for layers in (self.up, self.down)
            )


class Stacked(nn.Module):
    """The same experts in two parameters; ``turn`` puts the axes of a stack in their stored order."""

    turn: tuple[int, ...] = (0, 1, 2)

    def __init__(self, separate: Separate) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(w.permute(self.turn).contiguous()) for w in separate.stacks())

    def straight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``[E, N, K]`` and ``[E, OUT, N]``."""
        back = [self.turn.index(d) for d in range(3)]
        return self.up.detach().permute(back), self.down.detach().permute(back)


class Matmul(Stacked):
    turn = (0, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.up).relu() @ self.down


class Transposed(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.up.transpose(1, 2)).relu(), self.down.mT)


class FromTheLeft(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.down @ (self.up @ x.mT).relu()).mT


class Einsum(Stacked):
    turn = (1, 2, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("etn,one->eto", torch.einsum("etk,nke->etn", x, self.up).relu(), self.down)


class Alike(Stacked):
    """All experts read the same."""

    turn = (0, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("etn,eno->eto", (x @ self.up).relu(), self.down)


KINDS = (Matmul, Transposed, FromTheLeft, Einsum, Alike)


def drawn(kind: type[Stacked]) -> tuple[Separate, Stacked, list[Any]]:
    torch.manual_seed(3)
    separate = Separate(alike=kind is Alike)
    shape = (T, K) if kind is Alike else (E, T, K)
    return separate, kind(separate), [(torch.randn(shape),) for _ in range(4)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_is_pruned_as_a_layer_of_its_own(kind: type[Stacked], recipe: str) -> None:
    separate, stacked, batches = drawn(kind)
    wanted = sparsecc.prune(separate, batches[0], recipe=recipe, calibration=batches)
    found = sparsecc.prune(stacked, batches[0], recipe=recipe, calibration=batches)
    assert found.certificate.status == wanted.certificate.status == "VERIFIED"
    assert not found.plan.skips
    for mine, theirs in zip(found.model.straight(), wanted.model.stacks(), strict=True):
        assert torch.equal(mine == 0, theirs == 0)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_neurons_that_went_before_do_not_count() -> None:
    _, stacked, batches = drawn(Matmul)
    recipe = "ChannelPruning(sparsity=0.25); Wanda(sparsity=0.5)"
    found = sparsecc.prune(stacked, batches[0], recipe=recipe, calibration=batches)
    assert found.certificate.status == "VERIFIED"
    up, down = found.model.straight()
    assert up.shape == (E, N * 3 // 4, K)
    assert (up == 0).sum(2).eq(K // 2).all()
    assert (down == 0).sum(2).eq(N * 3 // 8).all()


@pytest.mark.parametrize("rows", ["equal", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_solves_for_each_matrix(kind: type[Stacked], rows: str) -> None:
    _, stacked, batches = drawn(kind)
    up, down = stacked.straight()
    recipe = f"ChannelPruning(sparsity=0.25); Reconstruction(rows='{rows}', damping=0.01)"
    found = sparsecc.prune(stacked, batches[0], recipe=recipe, calibration=batches)
    assert found.certificate.status == "VERIFIED"
    places = next(take.indices for take in found.plan.of(Take) if take.weight == "down")
    _, solved = found.model.straight()
    reads = [
        torch.cat([F.linear(x if kind is Alike else x[e], up[e]).relu() for (x,) in batches])
        for e in range(E)
    ]
    reads = [x.double() for x in reads]
    given = [(x @ w.double().T).square().mean(1) for x, w in zip(reads, down, strict=True)]
    usual = torch.cat(given).median()  # of all matrices together
    for w, x, size, new in zip(down.double(), reads, given, solved.double(), strict=True):
        counts = usual / (size + usual) if rows == "relative" else torch.ones_like(size)
        z = x[:, places]
        second, cross = z.T @ (z * counts[:, None]), x.T @ (z * counts[:, None])
        extra = 0.01 * second.diagonal().mean()
        right = w @ cross + extra * w[:, places]
        wanted = torch.linalg.solve(second + extra * torch.eye(len(places)), right.T).T
        torch.testing.assert_close(new, wanted, rtol=1e-3, atol=1e-4)


def test_a_matrix_that_reads_nothing_is_pruned_for_what_the_others_read() -> None:
    _, stacked, batches = drawn(Matmul)
    scale = torch.linspace(0.1, 3, K)
    batches = [(torch.stack([torch.zeros(T, K), x[1] * scale, x[2] * scale]),) for (x,) in batches]
    up = stacked.straight()[0]
    found = sparsecc.prune(
        stacked, batches[0], recipe="Wanda(sparsity=0.5, include=('up',))", calibration=batches
    )
    squares = sum(x[1].square().sum(0) + x[2].square().sum(0) for (x,) in batches)
    scores = up[0].square() * squares
    lost = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, : K // 2], True)
    assert torch.equal(found.model.straight()[0][0] == 0, lost)
    both = sparsecc.prune(stacked, batches[0], recipe="SparseGPT(sparsity=0.5)", calibration=batches)
    assert both.certificate.status == "VERIFIED"
    assert (both.model.straight()[0][0] != 0).sum() == N * K // 2


def test_moments_are_completed_with_the_mean_of_the_others() -> None:
    _, stacked, batches = drawn(Matmul)
    analysis = sparsecc.analyze(stacked, batches[0])
    (reading,) = readings(analysis).of["up"]
    moment = torch.tensor([[1.0, 3.0], [0.0, 0.0], [3.0, 5.0]])
    assert reading.completed(moment).tolist() == [[1, 3], [2, 4], [3, 5]]
    assert torch.equal(reading.completed(torch.zeros(3, 2)), torch.ones(3, 2))
    assert torch.equal(reading.completed(torch.zeros(3, 2, 2)), torch.eye(2).expand(3, 2, 2))


@pytest.mark.parametrize("saliency", ["wanda", "obs", "activation", "apoz"])
def test_criteria_score_stacks_as_they_score_layers(saliency: str) -> None:
    """A neuron that all experts share has the sum of what it is worth in each."""
    separate, stacked, batches = drawn(Matmul)
    options: dict[str, Any] = {"saliency": saliency, "calibration": batches}
    recipe = "ElementPruning(sparsity=0.5, scope='row')"
    if saliency in ("wanda", "obs"):
        wanted = sparsecc.prune(separate, batches[0], recipe=recipe, **options)
        found = sparsecc.prune(stacked, batches[0], recipe=recipe, **options)
        for mine, theirs in zip(found.model.straight(), wanted.model.stacks(), strict=True):
            assert torch.equal(mine == 0, theirs == 0)
    shared = sparsecc.prune(stacked, batches[0], recipe="ChannelPruning(sparsity=0.5)", **options)
    assert shared.certificate.status == "VERIFIED"
    assert shared.model.straight()[0].shape == (E, N // 2, K)


def graph(w: np.ndarray[Any, Any], transposed: bool) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "moved" if transposed else "w"], ["y"])]
    if transposed:
        nodes.insert(0, helper.make_node("Transpose", ["w"], ["moved"], perm=[0, 2, 1]))
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [E, "t", size])
        for n, size in (("x", K), ("y", N))
    )
    made = helper.make_graph(nodes, "stack", [x], [y], [numpy_helper.from_array(w, "w")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_onnx_stacks_are_pruned_as_layers(recipe: str, transposed: bool) -> None:
    separate, _, batches = drawn(Matmul)
    up = separate.stacks()[0]
    w = (up if transposed else up.mT).contiguous().numpy()
    data = [{"x": x.numpy()} for (x,) in batches]
    found = sparsecc.prune(graph(w, transposed), recipe=recipe, calibration=data)
    assert found.certificate.status == "VERIFIED"

    class Ups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = separate.up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(x[e]) for e, layer in enumerate(self.up)])

    wanted = sparsecc.prune(Ups(), batches[0], recipe=recipe, calibration=batches).model
    pruned = torch.from_numpy(numpy_helper.to_array(found.model.graph.initializer[0]).copy())
    pruned = pruned if transposed else pruned.mT
    theirs = torch.stack([layer.weight.detach() for layer in wanted.up])
    assert torch.equal(pruned == 0, theirs == 0)
    torch.testing.assert_close(pruned, theirs, rtol=1e-4, atol=1e-5)


# -- experts that a router deals rows to --------------------------------------------------------------


def mixture(name: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
}


def dealt(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Rows that every expert of the first layer reads, by its own router: before and between its layers."""
    experts = model.model.layers[0].mlp.experts
    rows: list[list[torch.Tensor]] = [[], []]
    seen: list[tuple[Any, ...]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        handle.remove()
        for hidden, index, _ in seen:
            for e in range(experts.num_experts):
                given = hidden[(index == e).any(-1)]
                gate, up = F.linear(given, experts.gate_up_proj[e]).chunk(2, -1)
                rows[0].append(given)
                rows[1].append(F.silu(gate) * up)
    count = experts.num_experts
    return [[torch.cat(some[e::count]) for e in range(count)] for some in rows]


@pytest.mark.parametrize("name", MIXTURES)
def test_routed_experts_are_pruned_for_the_rows_that_they_get(name: str) -> None:
    model = mixture(name, **MIXTURES[name])
    batches = [{"input_ids": torch.randint(3, 96, (2, 9))} for _ in range(3)]
    rows = dealt(model, batches)
    experts = model.model.layers[0].mlp.experts
    options: dict[str, Any] = {
        "calibration": batches,
        "recipe": "Wanda(sparsity=0.5, include=('*layers.0.mlp.experts.gate_up*',))",
    }
    found = sparsecc.prune(model, batches[0], **options)
    assert found.certificate.status == "VERIFIED"
    assert type(found.model) is type(model)
    weight, read = experts.gate_up_proj.detach(), rows[0]
    for e, given in enumerate(read):
        scores = weight[e].square() * given.square().sum(0)
        lost = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :16], True)
        if len(given):
            assert torch.equal(found.model.model.layers[0].mlp.experts.gate_up_proj[e] == 0, lost)
    options["recipe"] = "SparseGPT(pattern='2:4', include=('*experts*',))"
    both = sparsecc.prune(model, batches[0], **options)
    assert both.certificate.status == "VERIFIED"
    for layer in both.model.model.layers:
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert (stack.reshape(-1, 4) != 0).sum(1).le(2).all()


def test_mixtures_of_sixteen_bits_are_verified() -> None:
    model = mixture("Mixtral", **MIXTURES["Mixtral"]).bfloat16()
    batches = [{"input_ids": torch.randint(3, 96, (2, 9))} for _ in range(2)]
    found = sparsecc.prune(model, batches[0], recipe="Wanda(sparsity=0.5)", calibration=batches)
    assert found.certificate.status == "VERIFIED"


@pytest.mark.parametrize("rows", ["equal", "relative"])
def test_rows_of_another_routing_are_not_compared(rows: str) -> None:
    """Where earlier layers were pruned, an expert reads other tokens than in the original model."""
    model = mixture("Mixtral", **MIXTURES["Mixtral"])
    batches = [{"input_ids": torch.randint(3, 96, (2, 9))} for _ in range(4)]
    recipe = f"ChannelPruning(sparsity=0.25); Reconstruction(rows='{rows}', damping=0.1)"
    found = sparsecc.prune(model, batches[0], recipe=recipe, calibration=batches)
    assert found.certificate.status == "VERIFIED"


def test_a_parameter_that_is_stacked_in_two_ways_is_left_with_a_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ebk,eok->ebo", x, self.w) + torch.einsum("obk,eok->ebo", x, self.w)

    x = torch.randn(4, 5, 8)
    found = sparsecc.prune(Twice(), (x,), recipe="Wanda(sparsity=0.5)", calibration=[(x,)])
    assert not (found.model.w == 0).any()
    assert [skip.reason for skip in found.plan.skips] == ["products stack it along different axes"]


def test_all_of_a_mixture_is_pruned() -> None:
    """No product of the model is left out."""
    model = mixture("Mixtral", **MIXTURES["Mixtral"])
    batches = [{"input_ids": torch.randint(3, 96, (2, 9))} for _ in range(2)]
    found = sparsecc.prune(model, batches[0], recipe="Wanda(sparsity=0.5)", calibration=batches)
    assert not found.plan.skips
    assert {p.weight for p in found.plan.patterns if "experts" in p.weight} == {
        f"model.layers.{i}.mlp.experts.{n}" for i in range(2) for n in ("gate_up_proj", "down_proj")
    }


def test_experts_that_went_before_do_not_count() -> None:
    model = mixture("Mixtral", **MIXTURES["Mixtral"])
    batches = [{"input_ids": torch.randint(3, 96, (2, 9))} for _ in range(2)]
    recipe = "ExpertPruning(sparsity=0.5); Wanda(sparsity=0.5, include=('*experts*',))"
    found = sparsecc.prune(model, batches[0], recipe=recipe, calibration=batches)
    assert found.certificate.status == "VERIFIED"
    for layer in found.model.model.layers:
        stack = layer.mlp.experts.down_proj
        assert len(stack) == 3
        assert (stack == 0).sum(2).eq(stack.shape[2] // 2).all()


def test_a_stack_of_stacks_is_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, 4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    x = torch.randn(2, 3, 5, 4)
    found = sparsecc.prune(Both(), (x,), recipe="Wanda(sparsity=0.5)", calibration=[(x,)])
    assert not found.plan.skips
    w = found.model.w.detach()
    assert (w == 0).sum(2).eq(2).all()


@pytest.mark.parametrize("onnx_file", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_neurons_that_no_matrix_reads_are_dead(kind: type[Stacked], onnx_file: bool) -> None:
    """However the product is spelled: zeros along what it sums over, in every matrix of the stack."""
    _, stacked, data = drawn(kind)
    with torch.no_grad():
        stacked.straight()[1][:, :, 1:4] = 0
    stacked.eval()
    given = to_onnx(torch.export.export(stacked, data[0])) if onnx_file else stacked
    result = sparsecc.slim(given, None if onnx_file else data[0])
    assert result.certificate.status == "VERIFIED"
    assert [line.kept for line in result.report.groups] == [N - 3]

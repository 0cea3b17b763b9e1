"""Soft masks on coupled groups, and slimming in the middle of training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, note, settings
from torch import Tensor, nn

import sparsecc
from sparsecc.axes.terms import atom, concat, pick, product
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.fx.subject import TorchSubject
from sparsecc.saliency import L2
from sparsecc.train import Constant, Cubic, OneShot, Sparsifier, Structured, slim
from sparsecc.train.structured import group_maps, places, soft
from tests.random_nets import Net
from tests.test_property_torch import nets
from tests.train_nets import OPTIMIZERS, Residual, batch, mlp, residual, train

IMAGES = (torch.randn(2, 3, 6, 6),)
IMAGES_64 = (torch.randn(2, 3, 6, 6, dtype=torch.float64),)


def test_masked_positions_are_zero_wherever_they_stand() -> None:
    model = residual()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = Cubic(sparsity=0.5, end=8, every=2)
    sparsifier = Sparsifier(model, optimizer, schedule=schedule, pattern=Structured(), example_inputs=IMAGES)
    assert set(sparsifier.groups) == {"stem.weight[0]", "conv1.weight[0]"}

    def check(step: int) -> None:
        kept = sparsifier.groups["stem.weight[0]"]
        assert int((~kept).sum()) == int(8 * schedule.at(step) + 1e-9)
        for tensor, axis in (
            (model.stem.weight, 0), (model.n0.weight, 0), (model.n0.bias, 0), (model.conv1.weight, 1),
            (model.conv2.weight, 0), (model.n2.weight, 0), (model.n2.bias, 0), (model.head.weight, 1),
        ):  # fmt: skip
            gone = tensor.detach().movedim(axis, 0)[torch.from_numpy(~kept)]
            assert (gone == 0).all()
            for value in optimizer.state[tensor].values():
                if value.shape == tensor.shape:
                    assert (value.movedim(axis, 0)[torch.from_numpy(~kept)] == 0).all()

    check(0)
    train(model, optimizer, sparsifier, 10, after=check)


@pytest.mark.parametrize("saliency", ["random", "movement"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_positions_that_are_gone_stay_gone(saliency: str, allocation: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = Cubic(sparsity=0.75, end=12, every=2)
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=schedule,
        pattern=Structured(allocation=allocation),
        saliency=saliency,
        example_inputs=(torch.randn(2, 8),),
    )
    for step in range(12):
        before = sparsifier.groups
        train(model, optimizer, sparsifier, 1, first=step)
        assert all((before[n] | ~m).all() for n, m in sparsifier.groups.items())
    assert sum(int(m.sum()) for m in sparsifier.groups.values()) == 7


def test_groups_are_chosen_by_their_norm() -> None:
    model = residual(torch.float64, norms=False)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    tensors = [
        (model.stem.weight, 0),
        (model.conv1.weight, 1),
        (model.conv2.weight, 0),
        (model.head.weight, 1),
    ]
    norms = sum(t.detach().movedim(a, 0).flatten(1).norm(dim=1) for t, a in tensors)
    assert isinstance(norms, Tensor)
    sparsifier = Sparsifier(
        model, optimizer, schedule=OneShot(sparsity=0.5), pattern="channels", example_inputs=IMAGES_64
    )
    kept = sparsifier.groups["stem.weight[0]"]
    assert sorted(np.flatnonzero(kept)) == sorted(norms.topk(4).indices.tolist())
    want = sparsecc.prune(residual(torch.float64, norms=False), IMAGES_64, sparsity=0.5, verify=False)
    assert {d.group: d.kept.tolist() for d in want.plan.decisions} == {
        n: np.flatnonzero(m).tolist() for n, m in sparsifier.groups.items()
    }
    assert L2()


@pytest.mark.parametrize(
    ("name", "norms"),
    [("sgd", True), ("sgd", False), ("adamw", True), ("adamw", False), ("rmsprop", True)],
)
def test_training_slimmed_is_training_masked(name: str, norms: bool) -> None:
    model = residual(torch.float64, norms)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "lr": 0.02},
        {"params": [p for n, p in model.named_parameters() if not n.endswith("bias")]},
    ]
    optimizer = OPTIMIZERS[name](groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    twin = residual(torch.float64, norms)
    twin_optimizer = OPTIMIZERS[name](
        [
            {"params": [p for n, p in twin.named_parameters() if n.endswith("bias")], "lr": 0.02},
            {"params": [p for n, p in twin.named_parameters() if not n.endswith("bias")]},
        ]
    )
    twin_scheduler = torch.optim.lr_scheduler.StepLR(twin_optimizer, 3, 0.5)
    schedule = Cubic(sparsity=0.5, end=6, every=3)
    options: dict[str, Any] = {"schedule": schedule, "pattern": "channels", "example_inputs": IMAGES_64}
    ours = Sparsifier(model, optimizer, **options)
    theirs = Sparsifier(twin, twin_optimizer, **options)
    masked = train(twin, twin_optimizer, theirs, 16, after=lambda _: twin_scheduler.step())
    first = train(model, optimizer, ours, 8, after=lambda _: scheduler.step())
    result = ours.slim()
    assert result.certificate.status == "VERIFIED"
    assert result.certificate.claim == "slim(x) = original(x)"
    assert isinstance(result.model, Residual)
    assert result.model.training
    assert result.optimizer is optimizer
    assert result.model.stem.weight.shape == (4, 3, 3, 3)
    rest = train(result.model, optimizer, None, 8, first=8, after=lambda _: scheduler.step())
    assert masked == pytest.approx([*first, *rest], rel=1e-9, abs=1e-9)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in result.model.parameters()}
    assert set(map(id, optimizer.state)) == held
    for parameter, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, Tensor) or value.shape in ((), parameter.shape)
    for kept, full in ((result.model.conv1.weight, twin.conv1.weight),):
        rows, columns = (np.flatnonzero(ours.groups[n]) for n in ("conv1.weight[0]", "stem.weight[0]"))
        assert torch.allclose(kept, full[rows][:, columns], rtol=1e-9, atol=1e-12)


def test_the_narrow_model_and_its_optimizer_can_be_stored() -> None:
    model = residual()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    sparsifier = Sparsifier(
        model, optimizer, schedule=OneShot(sparsity=0.5, start=2), pattern="channels", example_inputs=IMAGES
    )
    train(model, optimizer, sparsifier, 4)
    decided = {d.group: d.kept.tolist() for d in sparsifier.plan().decisions}
    result = sparsifier.slim()
    narrow, plan = result.model, result.plan
    assert decided == {d.group: d.kept.tolist() for d in plan.decisions}
    again = plan.apply(residual(seed=3))
    again.load_state_dict(narrow.state_dict())
    other = OPTIMIZERS["adamw"](again.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(narrow, optimizer, None, 3) == train(again, other, None, 3)


def test_slim_by_a_plan_from_elsewhere() -> None:
    model = residual()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, None, 3)
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    x, y = batch(3, model)
    F.cross_entropy(model(x), y).backward()
    gradient = model.conv1.weight.grad
    plan = sparsecc.prune(model, IMAGES, sparsity=0.25).plan
    narrow, same = slim(model, optimizer, plan)
    assert same is optimizer
    kept = {d.group: d.kept for d in plan.decisions}
    assert isinstance(narrow, Residual)
    assert gradient is not None
    rows, columns = kept["conv1.weight[0]"], kept["stem.weight[0]"]
    want = before["conv1.weight"][rows][:, columns]
    assert torch.equal(optimizer.state[narrow.conv1.weight]["momentum_buffer"], want)
    assert torch.equal(narrow.conv1.weight.grad, gradient[rows][:, columns])  # type: ignore[arg-type]
    with pytest.raises(PlanConflict, match="another model"):
        slim(narrow, optimizer, plan)


def test_masks_in_a_plan_cut_the_state_too() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, None, 2)
    plan = sparsecc.prune(model, (torch.randn(2, 8),), recipe="ChannelPruning(); NMPattern()").plan
    narrow, _ = slim(model, optimizer, plan)
    first = narrow[0].weight  # type: ignore[index]
    assert first.shape == (8, 8)
    assert (first == 0).float().mean() == 0.5
    state = optimizer.state[first]["momentum_buffer"]
    assert torch.equal(state == 0, first == 0)


def test_removed_blocks_leave_the_optimizer() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            out: Tensor = self.last(x)
            return out

    model = Deep()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, None, 2)
    state = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    plan = sparsecc.prune(model, (torch.randn(2, 8),), recipe="DepthPruning(sparsity=0.34)").plan
    with pytest.raises(PlanConflict, match="give example_inputs"):
        slim(model, optimizer, plan)
    narrow, _ = slim(model, optimizer, plan, (torch.randn(2, 8),))
    assert len(optimizer.param_groups[0]["params"]) == 8
    found = [optimizer.state[p]["exp_avg"] for p in narrow.parameters()]
    assert all(any(torch.equal(v, w) for w in state.values()) for v in found)
    train(narrow, optimizer, None, 2)


def test_factored_state_is_cut_and_unknown_state_is_refused() -> None:
    model = residual()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    train(model, optimizer, None, 2)
    plan = sparsecc.prune(model, IMAGES, sparsity=0.5).plan
    narrow, _ = slim(model, optimizer, plan)
    train(narrow, optimizer, None, 2)
    model = residual()
    other = OPTIMIZERS["sgd"](model.parameters())
    train(model, other, None, 1)
    other.state[model.conv1.weight]["momentum_buffer"] = torch.zeros(5)
    before = [id(p) for p in other.param_groups[0]["params"]]
    with pytest.raises(InvalidOption, match="not known how to cut"):
        slim(model, other, plan)
    assert before == [id(p) for p in other.param_groups[0]["params"]], "nothing was changed"


# -- which groups ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A layer norm over a width that would have to be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.mid = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 16)
        self.down = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.mid(self.norm(self.up(x)))))
        return out


def test_widths_under_a_norm_are_left_alone_with_the_reason() -> None:
    model = Normed()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(
        model,
        optimizer,
        schedule=OneShot(sparsity=0.5),
        pattern="channels",
        example_inputs=(torch.randn(2, 8),),
    )
    assert set(sparsifier.groups) == {"mid.weight[0]"}
    assert any("reads every position" in s.reason for s in sparsifier.skips if s.where == "up.weight[0]")
    narrow = sparsifier.finish()
    assert narrow.mid.out_features == 8  # type: ignore[union-attr]


def test_weights_that_are_normed_by_a_parametrization() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 12)), nn.ReLU(), nn.Linear(12, 4)
    )
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(InvalidOption, match="no weight can be made sparse"):
        Sparsifier(
            model,
            optimizer,
            schedule=OneShot(sparsity=0.5),
            pattern="channels",
            example_inputs=(torch.randn(2, 8),),
        )


@pytest.mark.nightly
@settings(max_examples=40, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(nets())
def test_zeros_stand_for_removed_positions_in_any_network(net: Net) -> None:
    note(f"Net({net.steps}, {net.kind!r}, 0, {net.form})")
    net = net.double()
    examples = tuple(x.double() for x in net.examples)
    subject = TorchSubject(net, examples)
    analysis, _ = soft(subject.analysis, Structured(kinds=("channel", "head", "head_dim")), (), (), subject)
    if not analysis.groups:
        return
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    sparsifier = Sparsifier(
        net,
        optimizer,
        schedule=Constant(sparsity=0.5),
        pattern=Structured(kinds=("channel", "head", "head_dim")),
        example_inputs=examples,
    )
    with torch.no_grad():
        masked = net(*examples)
        narrow = sparsifier.slim(verify=False).model(*examples)
    for a, b in zip(_flat(masked), _flat(narrow), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def _flat(value: Any) -> list[Tensor]:
    from torch.utils import _pytree

    return [t for t in _pytree.tree_leaves(value) if isinstance(t, Tensor)]


def test_places_of_atoms_in_axes() -> None:
    a, b = atom(3), atom(2)
    assert [m.tolist() for m in places(product([a, b]), a)] == [[0, 0, 1, 1, 2, 2]]
    assert [m.tolist() for m in places(product([a, b]), b)] == [[0, 1, 0, 1, 0, 1]]
    assert [m.tolist() for m in places(concat([a, b, a]), a)] == [
        [0, 1, 2, -1, -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, 0, 1, 2],
    ]
    assert [m.tolist() for m in places(pick(a, [2, 0]), a)] == [[2, 0]]
    assert places(b, a) == []


def test_sums_over_groups() -> None:
    model = residual()
    analysis = sparsecc.analyze(model, IMAGES)
    maps = {m.name: m for m in group_maps(analysis)}
    values = {n: p.detach().square() for n, p in model.named_parameters()}
    tensors = [("conv1.weight", 0), ("n1.weight", 0), ("n1.bias", 0), ("conv2.weight", 1)]
    want = sum(values[n].movedim(a, 0).reshape(12, -1).sum(1) for n, a in tensors)
    assert isinstance(want, Tensor)
    assert torch.allclose(maps["conv1.weight[0]"].sums(values), want)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allocation": "erk"}, "uniform, global"),
        ({"kinds": ()}, "channel, head"),
        ({"kinds": "channel"}, "give a tuple"),
        ({"multiple_of": 0}, "positive"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidOption, match=match):
        Structured(**options)


def test_slim_needs_a_structured_pattern() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, schedule=OneShot(sparsity=0.5), weights=["0.weight"])
    with pytest.raises(InvalidOption, match="Structured"):
        sparsifier.slim()

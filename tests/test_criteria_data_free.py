"""Criteria without data against brute force, and allocation among isomorphic groups."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsecc
from sparsecc.allocation import allocate, signatures
from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.terms import Term, atom, concat, fold, pick, product
from sparsecc.errors import InvalidOption
from sparsecc.passes import PASSES
from sparsecc.pipeline import decide, open_subject
from sparsecc.recipe import parse
from sparsecc.saliency import CRITERIA, FPGM, LInf, NormScale, Saliency, criterion
from tests.exported import exported
from tests.patterns import CASES

Array = np.ndarray[Any, Any]


def analysed(model: nn.Module, *shape: int) -> Analysis:
    return sparsecc.analyze(model.eval(), (torch.randn(*shape),))


def group(analysis: Analysis, member: str) -> Group:
    return next(g for g in analysis.groups if member in map(str, g.members))


def convnet() -> nn.Sequential:
    """Channels with and without a norm layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
    )
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, -3, 0.1, 2, -0.2, 1, 0.0, 4]))
    return net


def slices(weight: torch.Tensor, axis: int) -> list[Array]:
    array = weight.detach().double().numpy()
    return [array.take(i, axis).reshape(-1) for i in range(array.shape[axis])]


# -- L-infinity ----------------------------------------------------------------------------------------


def test_linf_is_the_largest_weight() -> None:
    net = convnet()
    analysis = analysed(net, 2, 3, 10, 10)
    found = Saliency(analysis, criterion("linf")).of(group(analysis, "0.weight[0]"))
    rows = [[np.abs(s).max() for s in slices(net[k].weight, axis)] for k, axis in ((0, 0), (3, 1))]
    assert found == pytest.approx(np.sum(rows, 0), rel=1e-6)


def test_linf_of_heads_is_the_largest_of_all_their_rows() -> None:
    model, inputs = CASES["vision_transformer"].make()
    analysis = sparsecc.analyze(model, inputs)
    scores = Saliency(analysis, LInf(), reduction="max")
    for heads in (g for g in analysis.groups if g.kind == "head"):
        wide = max(
            float(analysis.view.weight(m.weight).detach().abs().max())
            for m in heads.members
            if len(analysis.view.weights[m.weight].shape) > 1
        )
        assert scores.of(heads).max() == pytest.approx(wide, rel=1e-6)


TERMS = st.recursive(
    st.integers(1, 3).map(atom),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(product),
        st.lists(inner, min_size=2, max_size=3).map(concat),
    ),
    max_leaves=5,
)


@given(TERMS, st.integers(0, 999), st.booleans())
def test_folding_by_brute_force(term: Term, seed: int, shuffled: bool) -> None:
    """Every position of an axis is a set of atom positions; each of these gets the sum or the largest."""
    random = np.random.default_rng(seed)
    labels = positions(term)
    if shuffled:
        order = random.permutation(len(labels))[: max(1, len(labels) // 2)]
        term, labels = pick(term, order), [labels[i] for i in order]
    values = random.random(len(labels))
    for largest, join in ((False, np.sum), (True, np.max)):
        found: dict[Term, Any] = {}
        fold(term, values, found, largest=largest)
        for part, scores in found.items():
            for i, score in enumerate(scores):
                mine = [v for v, at in zip(values, labels, strict=True) if (part, i) in at]
                assert score == pytest.approx(join(mine) if mine else 0.0)


def positions(term: Term) -> list[set[tuple[Term, int]]]:
    if term.kind == "atom":
        return [{(term, i)} for i in range(term.size)]
    parts = [positions(p) for p in term.parts]
    if term.kind == "concat":
        return [at for part in parts for at in part]
    return [set().union(*some) for some in itertools.product(*parts)]


# -- scales of norm layers -----------------------------------------------------------------------------


def test_scales_rank_channels_and_groups_without_them_stay() -> None:
    net = convnet()
    result = sparsecc.prune(net, (torch.randn(2, 3, 10, 10),), saliency="bn", sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    (decision,) = result.plan.decisions
    assert decision.kept.tolist() == [1, 3, 5, 7]
    assert [(s.where, s.reason) for s in result.plan.skips] == [
        ("3.weight[0]", "no norm layer scales its positions (saliency 'bn')")
    ]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(8),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm1d(8, affine=True),
    ],
)
def test_all_norm_layers_have_scales(norm: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Conv1d(3, 8, 1), norm, nn.Conv1d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x)
            last = isinstance(self.norm, (nn.LayerNorm, nn.RMSNorm))
            y = self.norm(y.transpose(1, 2)).transpose(1, 2) if last else self.norm(y)
            return self.down(y)  # type: ignore[no-any-return]

    net = Net()
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([0.5, -3, 0.1, 2, -0.2, 1, 0.0, 4]))
    analysis = analysed(net, 2, 3, 5)
    scores, known = Saliency(analysis, NormScale()), 0
    for found in analysis.groups:
        if "norm.weight[0]" in map(str, found.members) and found.size == 8:
            assert scores.of(found) == pytest.approx([0.5, 3, 0.1, 2, 0.2, 1, 0.0, 4])
            known += 1
    assert known == (0 if isinstance(norm, nn.GroupNorm) else 1)


def test_scales_of_a_residual_width_add_up() -> None:
    model, inputs = CASES["residual_projection"].make()
    model.eval()
    analysis = sparsecc.analyze(model, inputs)
    scores = Saliency(analysis, NormScale())
    weights = dict(model.named_parameters())
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    checked = 0
    for found in filter(scores.knows, analysis.groups):
        names = [m.weight for m in found.members if m.weight in norms]
        assert scores.of(found) == pytest.approx(
            sum(weights[n].detach().abs().double().numpy() for n in names)
        )
        checked += len(names)
    assert checked


def test_scales_in_onnx() -> None:
    result = sparsecc.prune(exported("residual_projection"), saliency="bn")
    model, inputs = CASES["residual_projection"].make()
    ours = sparsecc.prune(model, inputs, saliency="bn")
    assert result.certificate.status == ours.certificate.status == "VERIFIED"
    chosen = lambda r: sorted(d.kept.tolist() for d in r.plan.decisions)  # noqa: E731
    assert chosen(result) == chosen(ours)


def test_what_has_no_scale_is_not_guessed() -> None:
    net = convnet()
    analysis = analysed(net, 2, 3, 10, 10)
    scores = Saliency(analysis, NormScale())
    with pytest.raises(InvalidOption, match="no norm layer"):
        scores.of(group(analysis, "3.weight[0]"))
    with pytest.raises(InvalidOption, match="use l1"):
        NormScale().scores("w", torch.ones(2, 3), [0])


# -- geometric median ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 999), st.booleans())
def test_distances_by_brute_force(shape: list[int], seed: int, alike: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * 1e-3 + (100 if alike else 0)
    found = FPGM().scores("w", weight, range(len(shape)))
    for axis, scores in enumerate(found):
        rows = slices(weight, axis)
        want = [sum(float(np.linalg.norm(a - b)) for b in rows) for a in rows]
        assert scores == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_distances_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(17, 5)
    (whole,) = FPGM().scores("w", weight, [0])
    monkeypatch.setattr("sparsecc.saliency.geometry._CHUNK", 40)
    (parts,) = FPGM().scores("w", weight, [0])
    assert parts == pytest.approx(whole, rel=1e-12)


def test_the_most_replaceable_filter_goes() -> None:
    """A filter in the middle of the others goes before a small one at the edge."""
    net = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[9.0, 9], [1, 1], [5, 5], [9, 1], [1, 9]]))
        net[2].weight.fill_(1)
    kept = {}
    for name in ("l2", "fpgm"):
        result = sparsecc.prune(net, (torch.randn(2, 2),), saliency=name, sparsity=0.2)
        kept[name] = result.plan.decisions[0].kept.tolist()
    assert kept == {"l2": [0, 2, 3, 4], "fpgm": [0, 1, 3, 4]}


# -- all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bn", "fpgm"])
@pytest.mark.parametrize("recipe", ["ElementPruning()", "NMPattern()", "BlockPruning()"])
def test_single_weights_need_another_criterion(name: str, recipe: str) -> None:
    analysis = analysed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), 2, 8)
    with pytest.raises(InvalidOption, match=f"saliency '{name}' ranks .* use l1, l2"):
        decide(analysis, parse(recipe, PASSES), Saliency(analysis, criterion(name)))


@pytest.mark.parametrize("name", sorted(n for n, made in CRITERIA.items() if not made(0).needs_data))
@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
def test_results_are_verified(name: str, allocation: str) -> None:
    result = sparsecc.prune(exported("residual_projection"), saliency=name, allocation=allocation, seed=1)
    assert result.certificate.status == "VERIFIED"
    assert result.plan.decisions


def test_names() -> None:
    assert (criterion("linf"), criterion("bn"), criterion("fpgm")) == (LInf(), NormScale(), FPGM())
    with pytest.raises(InvalidOption, match="l1, l2, linf, bn, fpgm"):
        criterion("taylors")


# -- isomorphic groups ---------------------------------------------------------------------------------


class Tower(nn.Module):
    """Two kinds of branches of different magnitude, three of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.deep = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3)
        )
        self.bare = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 6)) for _ in range(3)
        )
        with torch.no_grad():
            for k, branch in enumerate((*self.deep, *self.bare)):
                for p in branch.parameters():
                    p.mul_((k % 3 + 1) * (100 if k < 3 else 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in (*self.deep, *self.bare):
            x = x + branch(x)
        return x


def test_groups_are_ranked_among_their_like() -> None:
    net = Tower()
    analysis = analysed(net, 2, 6)
    saliency = Saliency(analysis)
    kinds = dict(
        zip((g.name for g in analysis.groups), signatures(analysis.view, analysis.groups), strict=True)
    )
    assert len(set(kinds.values())) == 2
    kept = allocate(analysis.groups, saliency, 0.5, allocation="isomorphic")
    for part, width in (("deep", 8), ("bare", 5)):
        groups = [g for g in analysis.groups if g.name.startswith(part)]
        alone = allocate(groups, saliency, 0.5, allocation="global")
        assert all(np.array_equal(kept[g.name], alone[g.name]) for g in groups)
        assert sum(int(kept[g.name].sum()) for g in groups) == 3 * width - 3 * width // 2
    together = allocate(analysis.groups, saliency, 0.5, allocation="global")
    assert all(together[g.name].sum() == 1 for g in analysis.groups if g.name.startswith("bare"))
    assert len({int(kept[g.name].sum()) for g in analysis.groups if g.name.startswith("bare")}) > 1


def test_a_group_without_its_like_loses_its_share() -> None:
    analysis = analysed(convnet(), 2, 3, 10, 10)
    saliency = Saliency(analysis)
    kept, uniform = (
        allocate(analysis.groups, saliency, 0.5, allocation=a) for a in ("isomorphic", "uniform")
    )
    assert all(np.array_equal(kept[n], uniform[n]) for n in uniform)


def test_isomorphic_in_a_recipe() -> None:
    model, inputs = CASES["vision_transformer"].make()
    recipe = "ChannelPruning(allocation='isomorphic'); HeadPruning(allocation='isomorphic', head_dims=True)"
    result = sparsecc.prune(model, inputs, recipe=recipe)
    assert result.certificate.status == "VERIFIED"
    assert open_subject(model, inputs).analysis.groups
    with pytest.raises(InvalidOption, match="uniform, global, isomorphic"):
        parse("ChannelPruning(allocation='local')", PASSES)

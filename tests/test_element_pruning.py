"""Single weights: what stays is compared with a sort in plain Python."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsecc
from sparsecc.cli.command import run as run_command
from sparsecc.cli.commands import cli
from sparsecc.densities import DENSITIES
from sparsecc.errors import InvalidOption
from sparsecc.passes import PASSES, ElementPruning
from sparsecc.patterns.hardware import use
from sparsecc.plan import Mask, Plan
from sparsecc.recipe import parse, text
from sparsecc.report import Report
from sparsecc.saliency import Saliency, criterion
from tests.exported import exported
from tests.layouts import LAYOUTS, after, analysed, kept, number, weight
from tests.layouts import model as layered
from tests.oracles import fingerprint
from tests.patterns import CASES

SPARSITIES = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99])


def linear(inner: int, outer: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inner, outer)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight((outer, inner), seed, 40)) / 8)
    return layer


def net() -> nn.Sequential:
    return nn.Sequential(linear(8, 16, 1), nn.ReLU(), linear(16, 4, 2))


def zeros(tensor: Any) -> int:
    return int((np.asarray(tensor.detach() if isinstance(tensor, torch.Tensor) else tensor) == 0).sum())


def pruned(model: Any, inputs: Any, recipe: Any, **options: Any) -> Any:
    result = sparsecc.prune(model, inputs, recipe=recipe, **options)
    assert result.certificate.status == "VERIFIED", str(result.certificate)
    return result


def reason(result: Any, name: str) -> str:
    return next(s.reason for s in result.plan.skips if s.where == name)


# -- which weights -------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(LAYOUTS)), st.integers(1, 5), st.integers(1, 5), SPARSITIES, st.integers(0, 999)
)
def test_within_layers_and_rows(name: str, rows: int, channels: int, sparsity: float, seed: int) -> None:
    layout = LAYOUTS[name]
    before = weight(layout.shape(rows, channels), seed)
    analysis = analysed(layout, before)
    matrix = layout.seen(before)
    for scope in ("layer", "row"):
        plan = ElementPruning(sparsity=sparsity, scope=scope).plan(analysis)
        (left,) = after(plan, before)
        lines = [matrix.reshape(-1)] if scope == "layer" else list(matrix.reshape(rows, -1))
        stay = [kept(np.abs(line).tolist(), number(line.size, sparsity)) for line in lines]
        expected = np.where(np.array(stay).reshape(matrix.shape), matrix, 0)
        assert np.array_equal(layout.seen(left), expected)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
       st.sampled_from(sorted(LAYOUTS)), SPARSITIES, st.sampled_from(["none", "mean", "max"]),
       st.integers(0, 999))  # fmt: skip
def test_among_all_layers(
    sizes: list[tuple[int, int]], name: str, sparsity: float, normaliser: str, seed: int
) -> None:
    layout = LAYOUTS[name]
    before = [weight(layout.shape(*size), seed + k) * (k + 1) for k, size in enumerate(sizes)]
    analysis = analysed(layout, *before)
    plan = ElementPruning(sparsity=sparsity, scope="global").plan(
        analysis, Saliency(analysis, normaliser=normaliser)
    )
    scores: list[float] = []
    for w in before:
        flat = np.abs(layout.seen(w)).astype(np.float64).reshape(-1)
        by = {"none": 1.0, "mean": float(flat.mean()), "max": float(flat.max())}[normaliser]
        scores += (flat / by if by else flat).tolist()
    stay = kept(scores, number(len(scores), sparsity))
    for old, new in zip(before, after(plan, *before), strict=True):
        seen = layout.seen(old)
        here, stay = stay[: seen.size], stay[seen.size :]
        assert np.array_equal(layout.seen(new), np.where(np.reshape(here, seen.shape), seen, 0))


def test_lamp_is_that_of_the_paper() -> None:
    """Eq. 4 of Lee et al. for distinct weights: its square over the squares that are not smaller."""
    random = np.random.default_rng(0)
    before = [
        random.standard_normal(shape).astype(np.float32) * 3**k for k, shape in enumerate([(6, 5), (4, 3)])
    ]
    analysis = analysed(LAYOUTS["gemm transposed"], *before)
    plan = ElementPruning(sparsity=0.6, scope="global").plan(analysis, Saliency(analysis, normaliser="lamp"))
    scores = []
    for w in before:
        squares = w.astype(np.float64).reshape(-1) ** 2
        scores += [x / sum(y for y in squares if y >= x) for x in squares]
    stay = np.array(kept(scores, 25))
    found = np.concatenate([w.reshape(-1) for w in after(plan, *before)])
    assert np.array_equal(found != 0, stay)
    for w in after(plan, *before):
        assert zeros(w) < w.size  # the largest weight of a layer has score 1


def test_other_scores_and_what_is_zero_already() -> None:
    """With random scores, too, zeros go first, so that the share is the one that was asked for."""
    before = weight((20, 30), 7, 1)
    share = zeros(before) / before.size
    assert 0.2 < share < 0.5
    analysis = analysed(LAYOUTS["gemm transposed"], before)
    scores = Saliency(analysis, criterion("random", seed=5))
    (left,) = after(ElementPruning(sparsity=0.5).plan(analysis, scores), before)
    assert zeros(left) == 300
    nothing = ElementPruning(sparsity=0.2).plan(analysis, scores)
    assert not nothing.actions
    assert [p.state for p in nothing.patterns] == ["there"]


def test_what_is_there_stays_bit_for_bit() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = -0.0
    result = pruned(model, (torch.randn(2, 8),), ElementPruning())
    assert result.model[0].weight.view(torch.int32).equal(model[0].weight.view(torch.int32))
    assert [p.state for p in result.plan.patterns] == ["there", "pruned"]


# -- densities -----------------------------------------------------------------------------------------

SHAPES = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple), min_size=1
)


@given(SHAPES, st.sampled_from(sorted(DENSITIES)), st.floats(0.01, 0.99))
def test_densities_add_up(shapes: dict[str, tuple[int, ...]], name: str, density: float) -> None:
    found = DENSITIES[name](shapes, density)
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    assert found.keys() == shapes.keys()
    assert all(0 < d <= 1 + 1e-12 for d in found.values())
    total = sum(found[n] * sizes[n] for n in shapes)
    assert total == pytest.approx(density * sum(sizes.values()), rel=1e-9)
    open_ = [n for n in shapes if found[n] < 1 - 1e-9]
    if name == "erk" and open_:
        scale = [found[n] * sizes[n] / sum(shapes[n]) for n in open_]
        assert max(scale) == pytest.approx(min(scale), rel=1e-9)
        assert all(scale[0] * sum(shapes[n]) / sizes[n] >= 1 - 1e-9 for n in shapes if n not in open_)


def test_erdos_renyi_kernel_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)
    )
    result = pruned(model, (torch.randn(2, 3, 8, 8),), ElementPruning(sparsity=0.9, densities="erk"))
    shapes = {f"{k}.weight": tuple(model[k].weight.shape) for k in (0, 2, 4)}
    want = DENSITIES["erk"](shapes, 0.1)
    for k in (0, 2, 4):
        size = model[k].weight.numel()
        assert zeros(result.model[k].weight) == math.floor(size * (1 - want[f"{k}.weight"]) + 1e-6)
    first, second, _ = (result.plan.patterns[i].zeros / result.plan.patterns[i].size for i in range(3))
    assert first < second


def test_a_layer_that_stays_dense_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64))
    result = pruned(model, (torch.randn(2, 2),), ElementPruning(sparsity=0.5, densities="erk"))
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert reason(result, "0.weight") == "none of it is among the least salient"


# -- options, storage, reports -------------------------------------------------------------------------


def test_options_are_checked() -> None:
    for options, words in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"scope": "filter"}, "there are layer, row, global"),
        ({"densities": "er-k"}, "uniform"),
        ({"scope": "global", "densities": "erk"}, "the ranking says"),
        ({"include": "head"}, "tuple of name patterns"),
    ):
        with pytest.raises(InvalidOption, match=words):
            ElementPruning(**options)
    with pytest.raises(InvalidOption, match="no parameter"):
        ElementPruning(exclude=("nowhere",)).plan(analysed(LAYOUTS["gemm"], weight((2, 3), 0)))


def test_text_form() -> None:
    written = "ElementPruning(sparsity=0.7, scope='row', exclude=('head',)); ElementPruning()"
    assert text(parse(written, PASSES)) == written


def test_nothing_is_asked_for() -> None:
    assert not ElementPruning(sparsity=0.0).plan(analysed(LAYOUTS["gemm"], weight((2, 3), 0))).patterns


def test_names_choose_layers() -> None:
    result = pruned(net(), (torch.randn(2, 8),), ElementPruning(exclude=("0",)))
    assert [m.weight for m in result.plan.of(Mask)] == ["2.weight"]
    assert reason(result, "0.weight") == "excluded"
    result = pruned(net(), (torch.randn(2, 8),), ElementPruning(include=("0",)))
    assert reason(result, "2.weight") == "not included"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_left(number: float) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[2, 3] = number
    result = sparsecc.prune(model, (torch.randn(2, 8),), recipe=ElementPruning(), verify=False)
    assert "NaN or infinite" in reason(result, "0.weight")
    assert [m.weight for m in result.plan.of(Mask)] == ["2.weight"]


def test_what_is_told(tmp_path: Path) -> None:
    model = net()
    result = pruned(model, (torch.randn(2, 8),), ElementPruning(sparsity=0.75))
    first = result.report.patterns[0]
    assert (first.pattern, first.zeros, first.size) == ("unstructured", zeros(result.model[0].weight), 128)
    assert first.total == model[0].weight.abs().sum().item()
    assert first.kept == result.model[0].weight.abs().sum().item()
    share = sum(p.kept for p in result.report.patterns) / sum(p.total for p in result.report.patterns)
    said = (
        f"2 layers were pruned one-shot to 75.0% zeros (unstructured), keeping {share:.1%} of the magnitude"
    )
    assert f"{said}; accuracy was not checked" in result.report.notes
    for shown in (str(result.report), str(result.plan)):
        assert f"unstructured: {use('unstructured')}" in shown
        assert "75.0%" in shown
    result.plan.save(tmp_path / "p.plan")
    plan = Plan.load(tmp_path / "p.plan")
    assert plan == result.plan
    assert plan.patterns == result.plan.patterns
    assert fingerprint(plan.apply(model)) == fingerprint(result.model)
    again = Report.from_json(json.loads(json.dumps(result.report.to_json())))
    assert again == result.report


def test_plans_and_reports_of_older_versions() -> None:
    result = pruned(net(), (torch.randn(2, 8),), "NMPattern()")
    document, arrays = result.plan.to_parts()
    report = result.report.to_json()
    for pattern in (*document["patterns"], *report["patterns"]):
        del pattern["zeros"], pattern["size"]
    plan = Plan.from_parts(document, arrays)
    assert [(p.pattern, p.kept, p.size) for p in plan.patterns] == [
        (p.pattern, p.kept, 0) for p in result.plan.patterns
    ]
    assert "pruned one-shot  -  " in str(Report.from_json(report))


@pytest.mark.parametrize(
    ("pattern", "faster"),
    [("2:4", True), ("1:4", True), ("1:2", True), ("2:8", True), ("4:8", False), ("2:3", False),
     ("3:4", False), ("unstructured", False), ("4x4 blocks", False), ("kernels", False), ("rows", False)],
)  # fmt: skip
def test_what_hardware_can_use(pattern: str, faster: bool) -> None:
    assert ("sparse tensor cores can compute faster" in use(pattern)) == faster
    assert faster or "no target here computes faster" in use(pattern)


# -- with other passes, in both dialects ---------------------------------------------------------------


class Tied(nn.Module):
    """One matrix for two layers, and one that is also a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.first, self.second = linear(8, 8), linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(self.table(ids)))
        return self.head(torch.tanh(self.second(x)))  # type: ignore[no-any-return]


def test_tied_weights_are_masked_once_and_tables_not_at_all() -> None:
    result = pruned(Tied(), (torch.randint(0, 12, (2, 3)),), ElementPruning())
    assert [m.weight for m in result.plan.of(Mask)] == ["first.weight"]
    assert result.model.first.weight is result.model.second.weight
    assert zeros(result.model.first.weight) == 32
    assert "also read by index" in reason(result, "table.weight")


@pytest.mark.parametrize("order", ["ElementPruning({}); {other}", "{other}; ElementPruning({})"])
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_after_channels_the_share_is_of_what_is_left(order: str, scope: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), linear(128, 8))
    recipe = order.format(f"sparsity=0.75, scope='{scope}'", other="ChannelPruning()")
    result = pruned(model, (torch.randn(2, 4, 8, 8),), recipe)
    left = [result.model[k].weight for k in (0, 2, 4)]
    assert [tuple(w.shape) for w in left] == [(4, 4, 3, 3), (4, 4, 3, 3), (8, 64)]
    assert sum(map(zeros, left)) == sum(w.numel() for w in left) * 3 // 4
    if scope != "global":
        assert all(zeros(w) * 4 == w.numel() * 3 for w in left)
    if scope == "row":
        assert all(zeros(row) * 4 == row.numel() * 3 for w in left for row in w)
    assert [p.zeros for p in result.plan.patterns] == [zeros(w) for w in left]


def test_with_a_pattern() -> None:
    """What an N:M pattern took counts as zero, and what was zeroed first is not what a pattern keeps."""
    model = net()
    both = pruned(model, (torch.randn(2, 8),), "NMPattern(); ElementPruning(sparsity=0.75)")
    alone = pruned(model, (torch.randn(2, 8),), "NMPattern()")
    for k in (0, 2):
        w = both.model[k].weight
        assert zeros(w) == w.numel() * 3 // 4
        assert not bool((w[alone.model[k].weight == 0] != 0).any())
    first = pruned(model, (torch.randn(2, 8),), "ElementPruning(sparsity=0.25); NMPattern(permute=True)")
    for k in (0, 2):
        w = first.model[k].weight
        assert bool(((w.reshape(w.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


@pytest.mark.parametrize(
    "name",
    ["residual_projection", "grouped_conv", "conv1d_and_conv3d", "fused_qkv_chunk", "attention_einsum",
     "vision_transformer", "stacked_experts", "shared_module"],
)  # fmt: skip
def test_graph_patterns(name: str) -> None:
    model, inputs = CASES[name].make()
    result = pruned(model, inputs, ElementPruning(scope="row"))
    weights = dict(result.applied.program.weights)
    pruned_ = [p for p in result.plan.patterns if p.state == "pruned"]
    assert pruned_
    for p in pruned_:
        assert zeros(weights[p.weight]) == p.zeros
        assert p.kept == pytest.approx(float(weights[p.weight].detach().abs().sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["residual_projection", "grouped_conv", "vision_transformer"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_both_dialects_choose_the_same_weights(name: str, scope: str) -> None:
    model, inputs = CASES[name].make()
    recipe = ElementPruning(scope=scope)
    ours = pruned(model, inputs, recipe).plan.patterns
    theirs = pruned(exported(name), None, recipe).plan.patterns
    assert told(ours) == told(theirs)


def told(patterns: Any) -> list[Any]:
    return sorted((p.size, p.zeros, round(p.kept, 3)) for p in patterns if p.state == "pruned")


def test_the_command_line(tmp_path: Path) -> None:
    onnx.save(layered(LAYOUTS["matmul"], weight((8, 6), 1), weight((4, 8), 2)), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    recipe = "ElementPruning(scope='row'); BlockPruning(block=(2, 2))"
    assert run_command(cli, ["prune", str(tmp_path / "m.onnx"), "--recipe", recipe, "-o", str(out)]) == 0
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer]
    assert all(2 * zeros(w) >= w.size for w in stored)

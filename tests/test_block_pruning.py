"""Blocks, rows, columns and kernels: every block is looked at by itself."""

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
from sparsecc.errors import InvalidOption
from sparsecc.passes import PASSES, BlockPruning, ElementPruning, KernelPruning
from sparsecc.patterns.hardware import use
from sparsecc.patterns.layers import layers
from sparsecc.plan import Mask
from sparsecc.recipe import parse, text
from sparsecc.saliency import Saliency, criterion
from tests.exported import exported
from tests.layouts import LAYOUTS, Array, after, analysed, kept, number, weight
from tests.patterns import CASES
from tests.test_element_pruning import SPARSITIES, linear, pruned, reason, told, zeros

Place = tuple[slice, slice, slice]
MEAN = {"mean": np.mean, "sum": np.sum, "max": np.max}


def blocks(shape: tuple[int, ...], rows: int | None, places: int | None, channels: int | None) -> list[Place]:
    """Slices of every block of a weight [rows, places, channels], in order."""
    sizes = [n if p is None else p for n, p in zip(shape, (rows, places, channels), strict=True)]
    starts = [range(0, n, p) for n, p in zip(shape, sizes, strict=True)]
    return [
        tuple(slice(i, i + p) for i, p in zip(at, sizes, strict=True))  # type: ignore[misc]
        for at in itertools.product(*starts)
    ]


def expected(seen: Array, found: list[list[Place]], sparsity: float, reduction: str = "mean") -> Array:
    """``seen`` without the least blocks of every list."""
    out = seen.copy()
    for some in found:
        scores = [float(MEAN[reduction](np.abs(seen[at]).astype(np.float64))) for at in some]
        dead = [-1.0 if not np.any(seen[at]) else s for at, s in zip(some, scores, strict=True)]
        for at, stays in zip(some, kept(dead, number(len(some), sparsity)), strict=True):
            if not stays:
                out[at] = 0
    return out


# -- which blocks --------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(LAYOUTS)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
       st.tuples(st.integers(1, 3), st.integers(1, 3)), SPARSITIES, st.sampled_from(sorted(MEAN)),
       st.integers(0, 999))  # fmt: skip
def test_blocks(
    name: str, block: tuple[int, int], counts: tuple[int, int], sparsity: float, reduction: str, seed: int
) -> None:
    if block == (1, 1):
        return
    layout = LAYOUTS[name]
    before = weight(layout.shape(block[0] * counts[0], block[1] * counts[1]), seed)
    analysis, seen = analysed(layout, before), layout.seen(before)
    every = blocks(seen.shape, block[0], 1, block[1])
    lines = [list(some) for _, some in itertools.groupby(every, key=lambda at: at[0].start)]
    for scope, lists in (("layer", [every]), ("row", lines)):
        done = BlockPruning(block=block, sparsity=sparsity, scope=scope, reduction=reduction)
        (left,) = after(done.plan(analysis), before)
        assert np.array_equal(layout.seen(left), expected(seen, lists, sparsity, reduction))


@given(
    st.sampled_from(sorted(LAYOUTS)), st.integers(1, 4), st.integers(1, 4), SPARSITIES, st.integers(0, 999)
)
def test_rows_and_columns(name: str, rows: int, channels: int, sparsity: float, seed: int) -> None:
    layout = LAYOUTS[name]
    before = weight(layout.shape(rows, channels), seed)
    analysis, seen = analysed(layout, before), layout.seen(before)
    for block, parts in (((1, "all"), (1, None, None)), (("all", 1), (None, 1, 1))):
        plan = BlockPruning(block=block, sparsity=sparsity).plan(analysis)  # type: ignore[arg-type]
        (left,) = after(plan, before)
        assert np.array_equal(layout.seen(left), expected(seen, [blocks(seen.shape, *parts)], sparsity))
        assert {p.pattern for p in plan.patterns} == {"rows" if block[0] == 1 else "columns"}


@given(st.integers(1, 4), st.integers(1, 4), SPARSITIES, st.integers(0, 999))
def test_kernels(rows: int, channels: int, sparsity: float, seed: int) -> None:
    layout = LAYOUTS["conv"]
    before = weight(layout.shape(rows, channels), seed, 1)
    analysis, seen = analysed(layout, before), layout.seen(before)
    every = blocks(seen.shape, 1, None, 1)
    lines = [list(some) for _, some in itertools.groupby(every, key=lambda at: at[0].start)]
    for scope, lists in (("layer", [every]), ("row", lines)):
        (left,) = after(KernelPruning(sparsity=sparsity, scope=scope).plan(analysis), before)
        assert np.array_equal(layout.seen(left), expected(seen, lists, sparsity))


def test_blocks_of_all_layers_are_ranked_together() -> None:
    layout = LAYOUTS["gemm transposed"]
    before = [weight((4, 6), 1), weight((2, 8), 2) * 2]
    plan = BlockPruning(block=(2, 2), scope="global", sparsity=0.6).plan(analysed(layout, *before))
    every = [(k, at) for k, w in enumerate(before) for at in blocks(layout.seen(w).shape, 2, 1, 2)]
    scores = [float(np.abs(layout.seen(before[k])[at]).mean()) for k, at in every]
    left = after(plan, *before)
    for (k, at), stays in zip(every, kept(scores, number(len(every), 0.6)), strict=True):
        assert np.array_equal(layout.seen(left[k])[at], layout.seen(before[k])[at] * stays)


def test_single_elements_are_blocks_of_one() -> None:
    """Two units that hold one element each choose what ``ElementPruning`` does."""
    before = weight((6, 4), 3, 50)
    analysis = analysed(LAYOUTS["gemm transposed"], before)
    scores = Saliency(analysis, criterion("l1"))
    (ours,) = after(ElementPruning().plan(analysis, scores), before)
    every = blocks((6, 1, 4), 1, 1, 1)
    assert np.array_equal(ours[:, None, :], expected(before[:, None, :], [every], 0.5))


# -- what has no blocks --------------------------------------------------------------------------------


def test_layers_that_are_not_made_of_whole_blocks() -> None:
    model = nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 8), nn.ReLU(), linear(8, 3))
    result = pruned(model, (torch.randn(2, 6),), BlockPruning())
    assert [m.weight for m in result.plan.of(Mask)] == ["2.weight"]
    assert reason(result, "0.weight") == "its sums run over 6 positions, which are no multiple of 4"
    assert reason(result, "4.weight") == "it has 3 rows, which are no multiple of 4"
    assert whole(result.model[2].weight + 0, 4, 4)


def test_blocks_do_not_span_groups() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 4))
    inputs = (torch.randn(2, 8, 6, 6),)
    result = pruned(model, inputs, BlockPruning(block=(2, 2)))
    assert reason(result, "0.weight") == "its 2 groups of rows read different inputs"
    result = pruned(model, inputs, BlockPruning(block=(1, 2)))
    assert zeros(result.model[0].weight) == 8 * 4 * 9 // 2
    result = pruned(model, inputs, KernelPruning(scope="row"))
    assert all(zeros(row) == 18 for row in result.model[0].weight)


def test_kernels_are_those_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 4))
    result = pruned(model, (torch.randn(2, 4, 6, 6),), KernelPruning())
    assert [m.weight for m in result.plan.of(Mask)] == ["0.weight"]
    for name in ("1.weight", "3.weight"):
        assert "ElementPruning" in reason(result, name)


def test_options_are_checked() -> None:
    for block in ((0, 4), (4,), [4, 4], "4x4", (4, "some"), (True, 4), (1.5, 2)):
        with pytest.raises(InvalidOption, match="give \\(rows, columns\\)"):
            BlockPruning(block=block)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="ElementPruning"):
        BlockPruning(block=(1, 1))
    with pytest.raises(InvalidOption, match="DepthPruning"):
        BlockPruning(block=("all", "all"))
    with pytest.raises(InvalidOption, match="scope='layer'"):
        BlockPruning(block=(1, "all"), scope="row")
    with pytest.raises(InvalidOption, match="there are mean, sum, max"):
        KernelPruning(reduction="median")


def test_text_form() -> None:
    written = "BlockPruning(block=(1, 'all')); KernelPruning(sparsity=0.25); BlockPruning(reduction='max')"
    assert text(parse(written, PASSES)) == written


# -- with other passes, in both dialects ---------------------------------------------------------------


def whole(tensor: Any, rows: int, columns: int) -> bool:
    """Whether the zeros of a matrix come in whole blocks, half of them."""
    grid = tensor.detach().reshape(tensor.shape[0] // rows, rows, -1, columns)
    dead = (grid == 0).all(3).all(1)
    alive = (grid != 0).any(3).any(1)
    return bool((dead ^ alive).all()) and int(dead.sum()) * 2 == dead.numel()


@pytest.mark.parametrize("order", ["BlockPruning(); {}", "{}; BlockPruning()"])
def test_after_channels_blocks_are_those_of_what_is_left(order: str) -> None:
    model = nn.Sequential(linear(8, 16, 1), nn.ReLU(), linear(16, 16, 2), nn.ReLU(), linear(16, 4, 3))
    result = pruned(model, (torch.randn(2, 8),), order.format("ChannelPruning()"))
    for k in (0, 2, 4):
        assert whole(result.model[k].weight, 4, 4), result.model[k].weight


def test_channels_are_not_reordered_under_blocks() -> None:
    model = nn.Sequential(linear(8, 16, 1), nn.ReLU(), linear(16, 16, 2), nn.ReLU(), linear(16, 4, 3))
    recipe = "BlockPruning(block=(4, 2)); NMPattern(permute=True)"
    result = pruned(model, (torch.randn(2, 8),), recipe)
    for k in (0, 2, 4):
        w = result.model[k].weight.detach()
        assert bool(((w.reshape(w.shape[0], -1, 4) != 0).sum(-1) <= 2).all())
        dead = (w.reshape(w.shape[0] // 4, 4, -1, 2) == 0).all(3).all(1)
        assert int(dead.sum()) * 2 >= dead.numel()
    late = pruned(model, (torch.randn(2, 8),), "NMPattern(permute=True); BlockPruning(block=(4, 2))")
    assert late.plan.decisions
    for k in (0, 2, 4):
        w = late.model[k].weight.detach()
        dead = (w.reshape(w.shape[0] // 4, 4, -1, 2) == 0).all(3).all(1)
        assert int(dead.sum()) * 2 == dead.numel()


@pytest.mark.parametrize(
    "recipe", [BlockPruning(block=(2, 2)), BlockPruning(block=(1, "all")), KernelPruning()]
)
@pytest.mark.parametrize("name", ["residual_projection", "grouped_conv", "shared_module"])
def test_both_dialects_choose_the_same(name: str, recipe: Any) -> None:
    model, inputs = CASES[name].make()
    ours, theirs = pruned_or_whole(model, inputs, recipe), pruned_or_whole(exported(name), None, recipe)
    assert told(ours.plan.patterns) == told(theirs.plan.patterns)


def pruned_or_whole(model: Any, inputs: Any, recipe: Any) -> Any:
    result = sparsecc.prune(model, inputs, recipe=recipe)
    assert result.certificate.status == "VERIFIED" or not result.plan.actions
    return result


def test_reports_name_what_uses_them() -> None:
    model = nn.Sequential(linear(8, 8, 1), nn.ReLU(), linear(8, 8, 2))
    result = pruned(
        model, (torch.randn(2, 8),), "BlockPruning(); BlockPruning(block=(1, 'all'), sparsity=0.6)"
    )
    assert f"4x4 blocks: {use('4x4 blocks')}" in str(result.report)
    assert "ChannelPruning removes whole ones" in str(result.report)
    assert "4x4 blocks in 0.weight: 50.0% zeros, pruned one-shot" in str(result.plan)


def test_convolutions_of_one_channel_are_layers() -> None:
    """Their sums run over the kernel; depthwise ones are left as they are."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 2))
    result = pruned(model, (torch.randn(2, 1, 6, 6),), ElementPruning())
    assert zeros(result.model[0].weight) == 18
    assert "depthwise" in reason(result, "1.weight")
    found = {layer.weight: layer for layer in layers(result.subject.analysis)}
    assert found["0.weight"].kernel == (2, 3)
    assert not found["0.weight"].why

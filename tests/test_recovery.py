"""Updates of what is left: SparseGPT against the surgeon's formula, least squares against numpy."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsecc
from sparsecc.errors import InvalidOption
from sparsecc.passes import (
    BatchNormReestimation,
    BiasCorrection,
    ChannelPruning,
    NMPattern,
    Reconstruction,
    SparseGPT,
)
from sparsecc.patterns.nm import NM
from sparsecc.recovery.obs import patterned, surgeon, unstructured


def slowly(
    weight: np.ndarray[Any, Any], hessian: np.ndarray[Any, Any], unit: int, keeps: int | float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Algorithm 1 without factors: the inverse of what is left of H is computed anew for every column.

    ``keeps``: a share of the elements of ``unit`` columns that goes, or how many of a row's ``unit`` stay.
    """
    w, k = weight.copy(), weight.shape[1]
    keep = np.ones(w.shape, bool)
    for column in range(k):
        if column % unit == 0:
            stop = min(column + unit, k)
            scores = np.stack(
                [w[:, c] ** 2 / np.linalg.inv(hessian[c:, c:])[0, 0] for c in range(column, stop)], 1
            )
            keep[:, column:stop] = chosen(scores, keeps)
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in np.flatnonzero(~keep[:, column]):
            w[row, column:] -= w[row, column] / inverse[0, 0] * inverse[0]
    return np.where(keep, w, 0), keep


def chosen(scores: np.ndarray[Any, Any], keeps: int | float) -> np.ndarray[Any, Any]:
    """What stays of a block of scores."""
    keep = np.ones(scores.shape, bool)
    if isinstance(keeps, int):
        for row, values in enumerate(scores):
            keep[row, np.argsort(-values, kind="stable")[keeps:]] = False
        return keep
    gone = int(scores.size * keeps + 0.5)
    keep.reshape(-1)[np.argsort(scores.reshape(-1), kind="stable")[:gone]] = False
    return keep


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 12),
    seed=st.integers(0, 1000),
    pattern=st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 8), (8, 16), (3, 5), (5, 20)]),
)
def test_surgeon_is_the_paper_s_algorithm_for_patterns(
    rows: int, blocks: int, seed: int, pattern: tuple[int, int]
) -> None:
    """Recursion and factors change nothing, whatever the width."""
    n, m = pattern
    generator = np.random.default_rng(seed)
    k = blocks * m
    x = generator.normal(size=(3 * k, k)) @ generator.normal(size=(k, k))
    w, h = generator.normal(size=(rows, k)), x.T @ x
    damped = h + np.eye(k) * 0.01 * np.diag(h).mean()
    want, keep = slowly(w, damped, m, n)
    got, stays = surgeon(torch.from_numpy(w), torch.from_numpy(h), patterned(n, m))
    assert np.array_equal(stays.numpy(), keep)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


@pytest.mark.parametrize(("rows", "k"), [(3, 130), (4, 256), (2, 17), (5, 300)])
def test_surgeon_is_the_paper_s_algorithm_for_shares(rows: int, k: int) -> None:
    """Blocks of 128 columns, also where the last is shorter."""
    generator = np.random.default_rng(k)
    x = generator.normal(size=(2 * k, k)) * np.exp(generator.normal(size=k))
    w, h = generator.normal(size=(rows, k)), x.T @ x
    damped = h + np.eye(k) * 0.01 * np.diag(h).mean()
    want, keep = slowly(w, damped, 128, 0.5)
    got, stays = surgeon(torch.from_numpy(w), torch.from_numpy(h), unstructured(0.5))
    assert np.array_equal(stays.numpy(), keep)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


def test_columns_that_read_nothing_become_zero() -> None:
    """A dead input is no reason for a singular matrix."""
    h = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64))
    got, keep = surgeon(torch.ones(2, 4, dtype=torch.float64), h, patterned(2, 4))
    assert (got[:, 1] == 0).all()
    assert keep[:, 2:].all()
    assert torch.isfinite(got).all()


def test_zeros_that_must_stay_do() -> None:
    """Elements that are not allowed get no value, and the count holds without them."""
    torch.manual_seed(0)
    x = torch.randn(40, 8, dtype=torch.float64)
    allowed = torch.rand(5, 8) > 0.4
    got, keep = surgeon(torch.randn(5, 8, dtype=torch.float64), x.T @ x, patterned(2, 4), allowed=allowed)
    assert (got[~allowed] == 0).all()
    assert not (keep & ~allowed).any()


# -- whole models ------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """Two layers on correlated inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6)).to(dtype).eval()
    mix = torch.randn(12, 12, dtype=dtype)
    return net, [torch.randn(n, 12, dtype=dtype) @ mix for n in (50, 30)]


def test_layers_are_pruned_on_what_the_pruned_model_reads() -> None:
    """The second layer's update is that for the activations behind the pruned first layer."""
    net, data = mlp()
    result = sparsecc.prune(net, (data[0],), recipe=SparseGPT(pattern="2:4"), calibration=data)
    assert result.certificate.status == "VERIFIED"
    x = torch.cat(data)
    first, _ = surgeon(net[0].weight.detach(), x.T @ x, patterned(2, 4))
    torch.testing.assert_close(result.model[0].weight.detach(), first)
    hidden = torch.relu(nn.functional.linear(x, first, net[0].bias)).detach()
    second, _ = surgeon(net[2].weight.detach(), hidden.T @ hidden, patterned(2, 4))
    torch.testing.assert_close(result.model[2].weight.detach(), second)
    dense = (net[:2](x)).detach()
    other, _ = surgeon(net[2].weight.detach(), dense.T @ dense, patterned(2, 4))
    assert not torch.allclose(second, other)


class Mixed(nn.Module):
    """Convolutions with groups and strides, batch norm, a residual sum and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
        self.narrow = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.narrow(self.grouped(x).relu())
        return self.head(x.mean((2, 3)))


def trained() -> tuple[Mixed, list[torch.Tensor]]:
    """The net with batch norms that know their data."""
    torch.manual_seed(0)
    net = Mixed()
    data = [torch.randn(8, 4, 8, 8) * torch.rand(4)[:, None, None] for _ in range(3)]
    net.train()
    for _ in range(40):
        for batch in data:
            net(batch)
    return net.eval(), data


def change(net: nn.Module, result: Any, data: list[torch.Tensor]) -> float:
    """Mean squared change of the outputs, as a share of their variance."""
    with torch.no_grad():
        before, after = (torch.cat([m(x) for x in data]) for m in (net, result.model))
    return float((after - before).square().mean() / before.var(0).mean())


RECIPES: dict[str, list[Any]] = {
    "SparseGPT": [SparseGPT(pattern="2:4")],
    "SparseGPT, a share": [SparseGPT(sparsity=0.6)],
    "behind channels": [ChannelPruning(sparsity=0.25), SparseGPT(pattern="2:4")],
    "least squares": [ChannelPruning(sparsity=0.5), Reconstruction()],
    "least squares, all": [ChannelPruning(sparsity=0.5), Reconstruction(layers="all")],
    "least squares, own": [ChannelPruning(sparsity=0.5), Reconstruction(towards="own")],
    "biases": [ChannelPruning(sparsity=0.5), BiasCorrection()],
    "norms": [ChannelPruning(sparsity=0.5), BatchNormReestimation()],
    "all at once": [
        BatchNormReestimation(),
        Reconstruction(),
        SparseGPT(pattern="2:4", exclude=("head*",)),
        ChannelPruning(sparsity=0.25),
    ],
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recovery_is_verified_and_helps(name: str) -> None:
    """Against the same removal without recovery, on the calibration data."""
    net, data = trained()
    recipe = RECIPES[name]
    bare = [p for p in recipe if isinstance(p, ChannelPruning)]
    bare += [NMPattern() for p in recipe if isinstance(p, SparseGPT)]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
    assert result.certificate.status == "VERIFIED"
    without = sparsecc.prune(net, (data[0],), recipe=bare, saliency="wanda", calibration=data)
    assert change(net, result, data) < change(net, without, data)


def test_onnx_files_recover_as_modules_do() -> None:
    """The same updates in both dialects, up to rounding."""
    net, data = trained()
    program = torch.onnx.export(
        net, (data[0],), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    assert program is not None
    stream = io.BytesIO()
    program.save(stream)
    for recipe in (RECIPES["behind channels"], RECIPES["least squares, all"], RECIPES["biases"]):
        ours = sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
        theirs = sparsecc.prune(stream.getvalue(), recipe=recipe, saliency="wanda", calibration=data)
        assert theirs.certificate.status == "VERIFIED"
        session = sparsecc.compile(theirs.model, target="cpu")
        for batch in data:
            want = ours.model(batch).detach().numpy()
            got = np.asarray(next(iter(_values(session(batch)))))
            np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * np.abs(want).max())


def _values(outputs: Any) -> Any:
    return (
        outputs.values()
        if isinstance(outputs, dict)
        else outputs
        if isinstance(outputs, (list, tuple))
        else [outputs]
    )


def test_reconstruction_is_the_least_squares_solution() -> None:
    """Weights and bias of the reader are what numpy finds for the kept neurons, nearly undampened."""
    net, data = mlp()
    recipe = [ChannelPruning(sparsity=0.5), Reconstruction(damping=1e-11, rows="equal")]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        want = net(x).numpy()
        hidden = result.model[:2](x).numpy()
    best, *_ = np.linalg.lstsq(np.column_stack([hidden, np.ones(len(hidden))]), want, rcond=None)
    np.testing.assert_allclose(result.model[2].weight.detach().numpy(), best[:-1].T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.model[2].bias.detach().numpy(), best[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_that_lose_inputs_and_outputs_are_updated(groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=groups), nn.ReLU()),
        nn.Conv2d(12, 4, 3),
    ).double()
    data = [torch.randn(8, 3, 9, 9, dtype=torch.float64)]
    cut = "ChannelPruning(sparsity=0.5)"
    alone, updated = (
        sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
        for recipe in (cut, f"{cut}; Reconstruction()")
    )
    shapes = [[p.shape for p in r.model.parameters()] for r in (alone, updated)]
    assert shapes[0] == shapes[1]
    assert alone.report.after == updated.report.after
    assert change(net, updated, data) < change(net, alone, data)


def test_rows_count_by_what_is_usual_over_their_size() -> None:
    """The weighted least squares solution, where one row in ten is a thousand times the others."""
    net, data = mlp()
    data = [x * torch.where(torch.arange(len(x)) % 10 == 0, 1000.0, 1.0)[:, None] for x in data]
    recipe = [ChannelPruning(sparsity=0.5), Reconstruction(damping=1e-11)]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        given = (net[:2](x) @ net[2].weight.T).square().mean(1)
        root = (given.median() / (given + given.median())).sqrt()[:, None].numpy()
        want, hidden = net(x).numpy(), result.model[:2](x).numpy()
    best, *_ = np.linalg.lstsq(
        np.column_stack([hidden, np.ones(len(hidden))]) * root, want * root, rcond=None
    )
    np.testing.assert_allclose(result.model[2].weight.detach().numpy(), best[:-1].T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(result.model[2].bias.detach().numpy(), best[-1], rtol=1e-3, atol=1e-4)


def test_damping_is_found_on_batches_that_are_left_out() -> None:
    """Fewer rows than inputs: an undamped update fits them and nothing else, the one that is found helps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 8)).double().eval()
    data = [torch.randn(8, 8, dtype=torch.float64) for _ in range(8)]
    fresh = torch.randn(500, 8, dtype=torch.float64)

    def error(*more: Any) -> float:
        recipe = [ChannelPruning(sparsity=0.25), *more]
        result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
        with torch.no_grad():
            return float((net(fresh) - result.model(fresh)).square().mean())

    assert error(Reconstruction()) < 0.8 * error()
    assert error(Reconstruction()) < 0.8 * error(Reconstruction(damping=1e-8))


@pytest.mark.parametrize("refit", [True, False])
def test_batches_that_dampings_were_tried_on_can_be_left_out_for_good(refit: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)).double().eval()
    data = [torch.randn(16, 8, dtype=torch.float64) for _ in range(8)]
    moved = [*data[:-1], data[-1] * (1 + 1e-6)]  # so little that no other damping does better

    def weight(batches: list[torch.Tensor]) -> torch.Tensor:
        recipe = [ChannelPruning(sparsity=0.25), Reconstruction(refit=refit)]
        found: nn.Module = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=batches).model
        return found.get_parameter("2.weight").detach()

    assert torch.equal(weight(data), weight(moved)) is not refit


def test_reestimated_norms_are_those_of_what_is_read() -> None:
    """Mean and variance over all batches together, of the pruned model's activations."""
    net, data = trained()
    recipe = [NMPattern(), BatchNormReestimation()]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    with torch.no_grad():
        read = result.model.stem(torch.cat(data)).double()
    torch.testing.assert_close(
        result.model.norm.running_mean.double(), read.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    variance = read.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(result.model.norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)


def test_corrected_biases_give_the_original_means() -> None:
    """Layer by layer, up to the output."""
    net, data = trained()
    recipe = [ChannelPruning(sparsity=0.5), BiasCorrection()]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x).mean(0), net(x).mean(0), rtol=1e-3, atol=1e-4)


def test_patterns_hold_along_channels_of_convolutions() -> None:
    """2:4 runs over input channels at every position of a kernel, also behind removed channels."""
    net, data = trained()
    recipe = [ChannelPruning(sparsity=0.5, exclude=("stem*", "grouped*")), SparseGPT(pattern="2:4")]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
    for layer in (result.model.stem, result.model.grouped, result.model.narrow, result.model.head):
        assert NM(2, 4).holds(layer.weight.detach().numpy(), 1)
    assert {p.state for p in result.plan.patterns} == {"pruned"}


@pytest.mark.parametrize(
    "recipe", ["SparseGPT()", "Reconstruction()", "BatchNormReestimation()", "BiasCorrection()"]
)
def test_passes_that_need_data_say_so(recipe: str) -> None:
    """Without calibration data there is one clear error."""
    net, data = mlp()
    with pytest.raises(InvalidOption, match="calibration="):
        sparsecc.prune(net, (data[0],), recipe=recipe)


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 1.5}, {"pattern": "4:2"}, {"damping": 0.0}, {"include": "head"}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    """Each with the option's name."""
    with pytest.raises(InvalidOption, match=next(iter(options))):
        SparseGPT(**options)


def test_layers_that_cannot_have_a_pattern_are_told() -> None:
    """Widths that are no multiple, and values that are not finite."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batch = torch.randn(20, 6)
    result = sparsecc.prune(net, (batch,), recipe=SparseGPT(pattern="2:4"), calibration=[batch])
    assert [s.where for s in result.plan.skips] == ["0.weight"]
    assert "no multiple of 4" in result.plan.skips[0].reason


@pytest.mark.parametrize("first", ["", "ChannelPruning(sparsity=0.25, exclude=('stem*',)); "])
def test_patterns_run_along_the_new_order_of_channels(first: str) -> None:
    """A permuted result has the pattern in its own layout, is verified, and is of the same quality.

    The order is chosen by magnitudes times norms before updates, so that on
    so small a net it need not lose less.
    """
    net, data = trained()
    errors = []
    for permute in (False, True):
        recipe = f"{first}SparseGPT(pattern='2:4', permute={permute})"
        result = sparsecc.prune(net, (data[0],), recipe=recipe, saliency="wanda", calibration=data)
        assert result.certificate.status == "VERIFIED"
        reordered = any((np.diff(d.kept) < 0).any() for d in result.plan.decisions)
        assert reordered == permute
        for layer in (result.model.stem, result.model.grouped, result.model.narrow, result.model.head):
            width = layer.weight.shape[1]
            assert width % 4 or NM(2, 4).holds(layer.weight.detach().numpy(), 1)
        errors.append(change(net, result, data))
    assert errors[1] < 1.2 * errors[0]


def test_permuting_needs_a_pattern() -> None:
    """Shares have no order."""
    with pytest.raises(InvalidOption, match="permute"):
        SparseGPT(permute=True)


def test_its_own_stream_is_what_a_layer_reads_in_the_pruned_model() -> None:
    """With ``towards="own"`` the second of two updates aims at its own layer behind the pruned first one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 6))
    net = net.double().eval()
    data = [torch.randn(60, 12, dtype=torch.float64)]
    recipe = [ChannelPruning(sparsity=0.5), Reconstruction(damping=1e-11, towards="own", rows="equal")]
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    kept = {d.group: d.kept for d in result.plan.decisions}
    with torch.no_grad():
        hidden = result.model[:2](data[0])
        first = net[:2](data[0])
        best, *_ = np.linalg.lstsq(np.column_stack([hidden, np.ones(60)]), net[2](first).numpy(), rcond=None)
        full = torch.relu(torch.from_numpy(np.column_stack([hidden, np.ones(60)]) @ best))
        want = net[4](full).numpy()
        read = result.model[:4](data[0]).numpy()
    assert len(kept) == 2
    last, *_ = np.linalg.lstsq(np.column_stack([read, np.ones(60)]), want, rcond=None)
    np.testing.assert_allclose(result.model[4].weight.detach().numpy(), last[:-1].T, rtol=1e-4, atol=1e-6)

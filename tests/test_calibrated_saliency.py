"""Criteria that read data, against their formulas on module hooks and autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.errors import InvalidOption
from sparsecc.pipeline import open_subject
from sparsecc.saliency import Saliency, criterion

Tensors = dict[str, torch.Tensor]


class Gated(nn.Module):
    """A gated feed-forward block between two layers of fixed width, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 7, bias=False)
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def setting() -> tuple[nn.Module, list[torch.Tensor], CalibrationData]:
    """A net in float64, its batches, and its data with a loss."""
    torch.manual_seed(1)
    net = Gated().double().eval()
    batches = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3)]
    return net, batches, CalibrationData(batches, loss=lambda y, x: y.square().mean() + y.sin().sum())


def ranked(name: str) -> tuple[nn.Module, list[torch.Tensor], np.ndarray, Saliency]:
    """Saliency of the net's one group of seven neurons."""
    net, batches, data = setting()
    subject = open_subject(net, (batches[0],))
    (group,) = [g for g in subject.analysis.groups if g.size == 7]
    saliency = Saliency(subject.analysis, criterion(name), statistics=Statistics(subject, data))
    return net, batches, saliency.of(group), saliency


def hidden(net: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """What ``down`` reads: ``[rows, 7]``."""
    x = torch.cat(batches)
    return (F.silu(net.gate(x)) * net.up(x)).detach()  # type: ignore[operator]


def loss_of(net: nn.Module, x: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """The data's loss of a batch for these weights."""
    y = torch.func.functional_call(net, weights, (x,))
    return y.square().mean() + y.sin().sum()


def gradients(net: nn.Module, batches: list[torch.Tensor]) -> list[Tensors]:
    """Gradients of every batch."""
    weights = {n: p.detach() for n, p in net.named_parameters()}
    return [torch.func.grad(lambda w, x=x: loss_of(net, x, w))(weights) for x in batches]


def per_neuron(values: Tensors) -> torch.Tensor:
    """Sums over the matrices' elements that go with each of the seven neurons."""
    return values["gate.weight"].sum(1) + values["up.weight"].sum(1) + values["down.weight"].sum(0)


def mean_of(grads: list[Tensors], function: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """A function of gradients, averaged over batches."""
    return {n: torch.stack([function(g[n]) for g in grads]).mean(0) for n in grads[0]}


def test_wanda_of_a_neuron_is_what_its_readers_lose() -> None:
    """||x_k|| ||w_k||, on the rows that the reader sees."""
    net, batches, got, _ = ranked("wanda")
    x, w = hidden(net, batches), net.get_parameter("down.weight").detach()
    want = (x.square().mean(0) * w.square().sum(0)).sqrt()
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-10)


def test_wanda_of_elements_orders_as_the_paper_says() -> None:
    """|w_ok| ||x_k|| gives the same order as what is computed."""
    net, batches, _, saliency = ranked("wanda")
    x, w = hidden(net, batches), net.get_parameter("down.weight").detach()
    want = w.abs() * x.square().sum(0).sqrt()
    got = saliency.elements("down.weight")
    assert np.array_equal(np.argsort(got, axis=None), np.argsort(want.numpy(), axis=None))


def test_activation_and_apoz() -> None:
    """Mean magnitude, and the share that is not zero, of what a reader sees."""
    net, batches, got, _ = ranked("activation")
    x = hidden(net, batches)
    np.testing.assert_allclose(got / 3, x.abs().mean(0).numpy(), rtol=1e-10)
    relu = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    subject = open_subject(relu, (batches[0],))
    saliency = Saliency(
        subject.analysis, criterion("apoz"), statistics=Statistics(subject, CalibrationData(batches))
    )
    (group,) = subject.analysis.groups
    zeros = (relu[:2](torch.cat(batches)) == 0).double().mean(0)
    np.testing.assert_allclose(saliency.of(group) / 2, 1 - zeros.numpy(), rtol=1e-10)


def test_obs_is_the_error_after_the_best_update() -> None:
    """sqrt(sum w^2 / [H^-1]_kk) is the root of the least mean squared error without it."""
    net, batches, _, _ = ranked("wanda")
    subject = open_subject(net, (batches[0],))
    from sparsecc.saliency.calibrated import OBS

    saliency = Saliency(
        subject.analysis, OBS(damping=1e-12), statistics=Statistics(subject, CalibrationData(batches))
    )
    (group,) = [g for g in subject.analysis.groups if g.size == 7]
    x, w = hidden(net, batches).numpy(), net.get_parameter("down.weight").detach().numpy()
    for neuron, got in enumerate(saliency.of(group)):
        left = np.delete(x, neuron, 1)
        best, *_ = np.linalg.lstsq(left, x @ w.T, rcond=None)
        error = np.square(left @ best - x @ w.T).sum() / len(x)
        np.testing.assert_allclose(got, np.sqrt(error), rtol=1e-6)


def test_taylor_is_the_joint_first_order_change() -> None:
    """|sum g w| over all matrices of a neuron together, not a sum of magnitudes."""
    net, batches, got, saliency = ranked("taylor")
    mean = mean_of(gradients(net, batches), lambda g: g)
    products = {n: g * net.get_parameter(n).detach() for n, g in mean.items()}
    np.testing.assert_allclose(got, per_neuron(products).abs().numpy(), rtol=1e-9)
    np.testing.assert_allclose(
        saliency.elements("down.weight"), products["down.weight"].abs().numpy(), rtol=1e-9
    )


@pytest.mark.parametrize("name", ["snip", "fisher"])
def test_sums_of_element_scores(name: str) -> None:
    """SNIP: |g w| of the mean gradient; Fisher: g^2 w^2 / 2 with the mean of squares."""
    net, batches, got, _ = ranked(name)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    grads = gradients(net, batches)
    if name == "snip":
        scores = {n: (g * weights[n]).abs() for n, g in mean_of(grads, lambda g: g).items()}
    else:
        scores = {n: g * weights[n].square() / 2 for n, g in mean_of(grads, torch.square).items()}
    np.testing.assert_allclose(got, per_neuron(scores).numpy(), rtol=1e-9)


def hessians(net: nn.Module, batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The whole Hessian and gradient of every batch, over all parameters in order."""
    names = [n for n, _ in net.named_parameters()]
    sizes = [net.get_parameter(n).numel() for n in names]
    flat = torch.cat([net.get_parameter(n).detach().reshape(-1) for n in names])

    def loss(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = torch.split(vector, sizes)
        return loss_of(
            net, x, {n: p.reshape(net.get_parameter(n).shape) for n, p in zip(names, parts, strict=True)}
        )

    return [(torch.func.hessian(loss)(flat, x), torch.func.grad(loss)(flat, x)) for x in batches]


def unflattened(net: nn.Module, vector: torch.Tensor) -> Tensors:
    """A vector over all parameters, by name."""
    out, start = {}, 0
    for name, parameter in net.named_parameters():
        out[name] = vector[start : start + parameter.numel()].reshape(parameter.shape)
        start += parameter.numel()
    return out


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient() -> None:
    """Against the whole Hessian, batch by batch."""
    net, batches, got, _ = ranked("grasp")
    products = [h @ g for h, g in hessians(net, batches)]
    mean = unflattened(net, torch.stack(products).mean(0))
    scores = {n: v * net.get_parameter(n).detach() for n, v in mean.items()}
    np.testing.assert_allclose(got, per_neuron(scores).numpy(), rtol=1e-8)


def test_obd_estimates_the_diagonal_of_the_hessian() -> None:
    """The mean of many probes is within five deviations of the diagonal, which are small beside it."""
    torch.manual_seed(2)
    net = nn.Linear(5, 3).double().eval()
    batches = [torch.randn(6, 5, dtype=torch.float64)]
    subject = open_subject(net, (batches[0],))
    times = 150
    data = CalibrationData(batches * times, loss=lambda y, x: y.square().sum())
    found = Statistics(subject, data).gradient("weight", "curvature")
    want = (2 * batches[0].square().sum(0)).expand(3, 5)
    moment = 2 * batches[0].T @ batches[0]
    bound = 5 * (_off_diagonal(moment) + 2 * batches[0].sum(0).abs()) / (8 * times) ** 0.5
    assert ((found - want).abs() <= bound).all()
    assert (bound < want).all()


def _off_diagonal(hessian: torch.Tensor) -> torch.Tensor:
    """Root of the sum of squares beside the diagonal: the deviation of one probe."""
    return (hessian - torch.diag(hessian.diagonal())).square().sum(1).sqrt()


def test_synflow_uses_magnitudes_and_ones() -> None:
    """|w| dR/d|w| of the net with |w|, for ones."""
    net, _, got, _ = ranked("synflow")
    weights = {n: p.detach().abs() for n, p in net.named_parameters()}
    grads = torch.func.grad(
        lambda w: torch.func.functional_call(net, w, (torch.ones(6, 5, dtype=torch.float64),)).sum()
    )(weights)
    scores = {n: g * weights[n] for n, g in grads.items()}
    np.testing.assert_allclose(got, per_neuron(scores).numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["wanda", "activation", "obs", "taylor", "snip", "fisher", "obd", "grasp", "synflow"]
)
def test_every_criterion_prunes_a_convolutional_net(name: str) -> None:
    """Residual widths, a depthwise convolution, batch norm: all verified."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.wide = nn.Conv2d(8, 16, 1)
            self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.narrow = nn.Conv2d(16, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.stem(x)).relu()
            x = x + self.narrow(self.depth(self.wide(x).relu()).relu())
            return self.head(x.mean((2, 3)))

    data = [torch.randn(2, 3, 6, 6) for _ in range(2)]
    result = sparsecc.prune(
        Net().eval(),
        (data[0],),
        sparsity=0.5,
        saliency=name,
        calibration=CalibrationData(data, loss=lambda y, x: y.square().sum()),
    )
    assert result.certificate.status == "VERIFIED"
    assert result.model.wide.weight.shape[:2] == (8, 4)


def test_a_group_that_no_layer_sums_over_is_left_alone_with_the_reason() -> None:
    """The channels of a gate that only elementwise operators read have no reader that loses anything."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 6)
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.first(x)[:, None] * self.table).amax(-1)

    batch = torch.randn(3, 5)
    result = sparsecc.prune(Scaled().eval(), (batch,), saliency="wanda", calibration=[batch])
    assert any("says nothing" in skip.reason for skip in result.plan.skips)


def test_scores_that_are_not_finite_are_an_error() -> None:
    """Data that overflow give no ranking, and the message says whose scores they are."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    nn.init.constant_(net[0].weight, 1.0)
    batch = torch.full((3, 4), 3e38)
    with pytest.raises(InvalidOption, match=r"'2\.weight' are not finite"):
        sparsecc.prune(net, (torch.randn(2, 4),), saliency="wanda", calibration=[batch])

"""What is computed from parameters alone becomes a parameter, and the result is the same: both dialects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import sparsecc
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.fx.capture import capture
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.passes import DeadChannelElimination, ParameterFolding
from sparsecc.plan import Fold, Plan


class Standardised(nn.Conv2d):
    """Weight standardisation, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Trained(nn.Conv2d):
    """Weight standardisation with the operator of batch normalisation, as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Biased(nn.Module):
    """Attention with a bias that a small network makes of a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(25, 2))
        self.mix = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = (self.table @ self.mix).softmax(-1).reshape(5, 5, 4).permute(2, 0, 1)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(x.shape))
        return y


def convolutions(kind: type[nn.Conv2d]) -> nn.Module:
    return nn.Sequential(
        kind(3, 8, 3),
        nn.ReLU(),
        kind(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def wrapped(wrap: Any) -> nn.Module:
    return nn.Sequential(
        wrap(nn.Linear(6, 12)), nn.ReLU(), wrap(nn.Linear(12, 10)), nn.ReLU(), wrap(nn.Linear(10, 3))
    )


def shared() -> nn.Module:
    """One generated weight that two layers read, one of them transposed."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(12, 12)), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight / self.weight.norm(dim=1, keepdim=True)
            y: Tensor = self.head(F.relu(F.linear(F.relu(x @ w), w)))
            return y

    return Shared()


IMAGES = torch.randn(2, 3, 12, 12)
CASES: dict[str, tuple[nn.Module, Tensor, int]] = {
    # model, input, what is folded
    "standardised": (convolutions(Standardised), IMAGES, 2),
    "standardised by batch norm": (convolutions(Trained), IMAGES, 2),
    "weight norm": (wrapped(weight_norm), torch.randn(4, 6), 3),
    "spectral norm": (wrapped(spectral_norm), torch.randn(4, 6), 3),
    "old weight norm": (wrapped(torch.nn.utils.weight_norm), torch.randn(4, 6), 3),
    "position bias": (Biased(), torch.randn(2, 5, 16), 1),
    "shared": (shared(), torch.randn(4, 12), 1),
}


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """weight_norm of old warns of its age."""


@pytest.mark.parametrize("dialect", ["torch", "onnx"])
@pytest.mark.parametrize("case", CASES)
def test_fold_then_prune(case: str, dialect: str) -> None:
    """The result equals the original; afterwards axes can go that had to stay."""
    model, x, count = CASES[case]
    model.eval()
    given: Any = model if dialect == "torch" else to_onnx(capture(model, (x,)).exported)
    inputs = (x,) if dialect == "torch" else None
    before = sparsecc.prune(given, inputs, sparsity=0.5)
    assert any("sparsecc.fold" in f.reason for f in before.report.frozen)
    folded = sparsecc.fold(given, inputs)
    assert folded.certificate.status == "VERIFIED"
    folds = list(folded.plan.of(Fold))
    assert len(folds) >= count if dialect == "onnx" else len(folds) == count
    assert folded.plan.skips == ()
    again = sparsecc.prune(folded.model, inputs, sparsity=0.5)
    assert again.certificate.status == "VERIFIED"
    assert again.report.after["parameters"] < before.report.after["parameters"]
    assert not [f for f in again.report.frozen if f.kind == "parameters only"]
    with torch.no_grad():
        wanted = model(x)
    if dialect == "torch":
        assert isinstance(folded.model, nn.Module)
        torch.testing.assert_close(folded.model(x), wanted)
        names = {n for n, _ in folded.model.named_parameters()}
        assert {f.parameter for f in folds} <= names
    else:
        assert len(folded.model.graph.node) < len(given.graph.node)
        onnx.checker.check_model(folded.model)


def test_names_are_those_of_the_weights() -> None:
    """A weight that a parametrization computes has its own name afterwards."""
    model, x, _ = CASES["weight norm"]
    assert {f.parameter for f in sparsecc.fold(model, (x,)).plan.of(Fold)} == {
        "0.weight",
        "2.weight",
        "4.weight",
    }
    model, x, _ = CASES["old weight norm"]
    assert {f.parameter for f in sparsecc.fold(model, (x,)).plan.of(Fold)} == {
        "0.weight",
        "2.weight",
        "4.weight",
    }
    model, x, _ = CASES["standardised"]
    assert {f.parameter for f in sparsecc.fold(model, (x,)).plan.of(Fold)} == {
        "0.weight_folded",
        "2.weight_folded",
    }


def test_the_reason_says_what_to_do() -> None:
    """Frozen axes name the function."""
    model, x, _ = CASES["weight norm"]
    assert any("sparsecc.fold" in f.reason.text for f in sparsecc.analyze(model, (x,)).frozen)
    model, x, _ = CASES["standardised by batch norm"]
    assert any("sparsecc.fold" in f.reason.text for f in sparsecc.analyze(model, (x,)).frozen)


def test_nothing_to_fold_changes_nothing() -> None:
    """A model whose weights are weights comes back as its class."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    folded = sparsecc.fold(net, (torch.randn(3, 6),))
    assert not folded.plan
    assert type(folded.model) is nn.Sequential


def test_what_depends_on_inputs_or_chance_is_not_stored() -> None:
    """A weight that is normalised by the batch, one under dropout, and a buffer that is counted up."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 8))
            self.register_buffer("steps", torch.zeros(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1.0)
            a = self.a / (self.a.norm(dim=1, keepdim=True) + x.mean())
            b = self.b / (self.steps + self.b.abs()).sum(1, keepdim=True)
            return F.linear(F.relu(F.linear(x, a)), b)

    found = sparsecc.fold(Odd(), (torch.randn(3, 6),))
    assert found.certificate.status == "VERIFIED"
    stored = {f.parameter: f.values.shape for f in found.plan.of(Fold)}
    assert stored == {"a_folded": (8, 1)}  # the norm; what is computed with the input is not


def test_large_results_stay_computed() -> None:
    """What would take many times the memory of the parameters is left alone, with the reason."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(2048, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.a @ self.a.t()).softmax(1))

    found = sparsecc.fold(Outer(), (torch.randn(2, 2048),))
    assert not list(found.plan.of(Fold))
    assert "times the parameters" in found.plan.skips[0].reason


def test_plans_are_stored_and_applied(tmp_path: Path) -> None:
    """A plan on disk makes the same model; a state dict alone cannot say it."""
    model, x, _ = CASES["standardised"]
    folded = sparsecc.fold(model, (x,))
    folded.plan.save(tmp_path / "plan.zip")
    plan = Plan.load(tmp_path / "plan.zip")
    assert plan == folded.plan
    torch.testing.assert_close(plan.apply(model, (x,))(x), model(x))
    with pytest.raises(PlanConflict, match="use the model"):
        plan.apply(model.state_dict())
    with pytest.raises(PlanConflict):
        plan.apply(model)
    assert sparsecc.verify(model, folded, (x,)).status == "VERIFIED"


def test_a_wrong_value_is_found() -> None:
    """The certificate does not take the stored numbers on trust."""
    model, x, _ = CASES["weight norm"]
    folded = sparsecc.fold(model, (x,))
    with torch.no_grad():
        folded.model.get_parameter("2.weight")[0, 0] += 0.01
    assert sparsecc.verify(model, folded, (x,)).status == "FAILED"


def test_goes_alone() -> None:
    """What another pass decided is about the model before."""
    model, x, _ = CASES["standardised"]
    with torch.no_grad():
        model[6].weight[:, 3] = 0
    with pytest.raises(InvalidOption, match="alone"):
        sparsecc.prune(model, (x,), recipe=[DeadChannelElimination(), ParameterFolding()])


def test_low_precision() -> None:
    """Values are stored in the dtype that the model computes."""
    model = convolutions(Standardised).to(torch.bfloat16)
    folded = sparsecc.fold(model, (IMAGES.to(torch.bfloat16),))
    assert folded.certificate.status == "VERIFIED"
    assert folded.model.get_parameter("0.weight_folded").dtype == torch.bfloat16

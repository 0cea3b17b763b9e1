"""What is computed from parameters alone becomes a parameter, and the result is the same: both dialects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize
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


class Ordered(nn.Module):
    """Makes a weight of which every entry has a place: zero above the diagonal, and rising downwards."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp().cumsum(0).tril(1)


def ordered(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Ordered())


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
    "ordered": (wrapped(ordered), torch.randn(4, 6), 3),
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


def test_constants_with_an_order_are_no_weights() -> None:
    """What is read by place stays as it is where no parameter is behind it."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mask", torch.rand(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x) @ self.mask.tril())
            return y

    folded = sparsecc.fold(Masked(), (torch.randn(2, 6),))
    assert not folded.plan
    assert {"order matters"} <= {f.kind for f in sparsecc.prune(Masked(), (torch.randn(2, 6),)).report.frozen}


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


class Unit(nn.Linear):
    """Rows of norm one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


ROWS = torch.randn(3, 6)


def folded_as(model: nn.Module, x: Tensor, **tolerance: float) -> list[str]:
    """Fold, compare what the returned module computes itself, and give the names of its parameters."""
    folded = sparsecc.fold(model, (x,))
    torch.testing.assert_close(folded.model(x), model(x), **tolerance)
    return sorted(n for n, _ in folded.model.named_parameters())


def test_tied_weights_lose_all_their_names() -> None:
    first, second = Unit(6, 6), Unit(6, 6)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    assert folded_as(model, ROWS) == ["0.bias", "0.weight_folded", "2.bias"]


def test_a_shared_module_keeps_one_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(F.relu(self.inner(F.relu(self.inner(x)))))
            return y

    model = Shared().eval()
    assert folded_as(model, ROWS) == ["inner.bias", "inner.weight", "out.bias", "out.weight"]
    after = sparsecc.fold(model, (ROWS,))
    assert after.report.after["parameters"] == sum(p.numel() for p in after.model.parameters())


def test_forms_of_one_value_are_stored_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 6))

        def forward(self, i: Tensor) -> Tensor:
            rows = F.normalize(self.table, dim=1)
            return F.relu(F.embedding(i, rows)) @ rows.t()

    assert folded_as(Both(), torch.randint(0, 9, (2, 4))) == ["table_folded"]


def test_values_are_those_that_the_model_computes() -> None:
    """In float64 other numbers would be rounded up, and the result would be another model."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-14, 15, (64, 6)).float() * 0.05)
            with torch.no_grad():
                self.weight[0, 0] = 0.7

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.abs().max() / 7
            return F.linear(x, torch.round(self.weight / scale) * scale)

    torch.manual_seed(0)
    folded_as(Quantised(), ROWS, rtol=0, atol=0)


def test_names_that_are_taken_are_not_taken_again() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
            self.a_folded = nn.Linear(6, 6)
            self.register_buffer("b_folded", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            unit = [w / w.norm(dim=1, keepdim=True) for w in (self.a, self.b)]
            return self.a_folded(x @ unit[0]) @ unit[1] + self.b_folded

    names = folded_as(Named(), ROWS, rtol=1e-5, atol=1e-6)
    assert names == ["a_folded.bias", "a_folded.weight", "a_folded2", "b_folded2"]


def test_what_could_not_be_trained_still_cannot() -> None:
    model = Unit(6, 6)
    model.weight.requires_grad_(False)
    assert not sparsecc.fold(model, (ROWS,)).model.get_parameter("weight_folded").requires_grad


def test_branches_are_left_to_the_model() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x @ torch.cond(self.w.sum() > 0, lambda a: a.softmax(1), lambda a: a * 2, (self.w,))
            return y

    assert sparsecc.fold(Chosen(), (ROWS,)).certificate.status == "VERIFIED"
    assert sparsecc.slim(Chosen(), (ROWS,)).certificate.status == "VERIFIED"


def test_sizes_end_what_is_stored() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w / self.w.norm(dim=1, keepdim=True) * x.shape[0])

    model, other = Sized(), torch.randn(5, 6)
    folded = sparsecc.fold(model, (ROWS,))
    assert [f.parameter for f in folded.plan.of(Fold)] == ["w_folded"]
    torch.testing.assert_close(folded.model(other), model(other))


def test_numbers_without_axes_are_stored_as_such(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum() * self.w.norm()

    model = Scaled()
    folded = sparsecc.fold(model, (ROWS,))
    folded.plan.save(tmp_path / "plan.zip")
    assert Plan.load(tmp_path / "plan.zip").apply(model, (ROWS,))(ROWS).shape == ()


def _graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], **more: Any
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    stored = {
        "w": rng.standard_normal((8, 6), np.float32),
        "c": rng.standard_normal((2, 8), np.float32),
        "axis": np.array([1]),
        **more,
    }
    unit = [
        helper.make_node("ReduceL2", ["w", "axis"], ["n"], keepdims=1),
        helper.make_node("Div", ["w", "n"], ["unit"]),
    ]
    values = [
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in part.items()]
        for part in (inputs, outputs)
    ]
    initial = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    graph = helper.make_graph([*unit, *nodes], "g", *values, initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _ran(model: onnx.ModelProto, **feeds: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: list[Any] = session.run(None, feeds)
    return found


def test_onnx_sizes_that_the_search_cannot_vary_are_not_stored() -> None:
    """M = 2 L has one size that fits in the search; a scale by L must not be taken for fixed."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["l"]),
        helper.make_node("Cast", ["l"], ["scale"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["unit", "scale"], ["scaled"]),
        helper.make_node("Concat", ["x", "x"], ["xx"], axis=0),
        helper.make_node("Add", ["xx", "q"], ["y"]),
        helper.make_node("Gemm", ["y", "scaled"], ["z"], transB=1),
    ]
    model = _graph(nodes, {"x": ["L", 6], "q": ["M", 6]}, {"z": ["M", 8]}, zero=np.array(0))
    folded = sparsecc.fold(model).model
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((5, 6), np.float32), "q": rng.standard_normal((10, 6), np.float32)}
    np.testing.assert_allclose(_ran(folded, **feeds)[0], _ran(model, **feeds)[0], rtol=1e-4, atol=1e-5)


def test_onnx_weights_that_callers_may_feed_are_not_stored() -> None:
    nodes = [helper.make_node("Gemm", ["x", "unit"], ["z"], transB=1)]
    model = _graph(nodes, {"x": ["B", 6], "w": [8, 6]}, {"z": ["B", 8]})
    folded = sparsecc.fold(model).model
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((3, 6), np.float32), "w": rng.standard_normal((8, 6), np.float32)}
    np.testing.assert_array_equal(_ran(folded, **feeds)[0], _ran(model, **feeds)[0])


def test_onnx_names_that_are_taken_are_not_taken_again() -> None:
    nodes = [helper.make_node("Gemm", ["x", "unit"], ["z"], transB=1)]
    model = _graph(nodes, {"x": ["B", 6]}, {"z": ["B", 8]}, w_folded=np.ones(1, np.float32))
    folded = sparsecc.fold(model).model
    onnx.checker.check_model(folded, full_check=True)


def test_onnx_one_of_several_results_that_are_put_out() -> None:
    nodes = [
        helper.make_node("Split", ["unit"], ["top", "rest"], axis=0, num_outputs=2),
        helper.make_node("Gemm", ["x", "rest"], ["z"], transB=1),
    ]
    model = _graph(nodes, {"x": ["B", 6]}, {"z": ["B", 4], "top": [4, 6], "rest": [4, 6]})
    folded = sparsecc.fold(model).model
    x = np.random.default_rng(1).standard_normal((3, 6), np.float32)
    for got, wanted in zip(_ran(folded, x=x), _ran(model, x=x), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)

"""What evaluation leaves out: heads that only training runs, code whose result nobody reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsecc
from tests.oracles import error, forward64, zeroed

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU())


class Deep(nn.Module):
    """Deep supervision: a head on an inner layer, which only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.BatchNorm2d(8), conv(8, 6), nn.Flatten(), nn.Linear(6 * 64, 4))
        self.first, self.second, self.head = conv(3, 8), conv(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.first(x)
        out: Tensor = self.head(self.second(y).mean((2, 3)))
        return (out, self.aux(y)) if self.training else out


class Named(Deep):
    """The same, where the head's class has the width written into its code."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.first(x)
        out: Tensor = self.head(self.second(y).mean((2, 3)))
        return (out, self.aux(y.reshape(len(x), 8, 8, 8))) if self.training else out


class Targets(Deep):
    """The same, where training needs more than the example holds."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and target is None:
            raise ValueError("training needs targets")
        return super().forward(x)


class Unneeded(nn.Module):
    """Skips of which the last block's running sum is read by nobody, as in Conv-TasNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = conv(3, 8), nn.Linear(8, 4)
        self.inner = nn.ModuleList(conv(8, 10) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv2d(10, 8, 1) for _ in range(2))
        self.rest = nn.ModuleList(conv(10, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = torch.zeros_like(x)
        for inner, skip, rest in zip(self.inner, self.skip, self.rest, strict=True):
            y = inner(x)
            total, x = total + skip(y), x + rest(y)
        out: Tensor = self.head(total.mean((2, 3)))
        return out


def pruned(model: nn.Module) -> sparsecc.Pruned:
    torch.manual_seed(0)
    result = sparsecc.prune(model.eval(), (IMAGES,), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    return result


@pytest.mark.parametrize("kind", [Deep, Unneeded])
def test_is_cut_like_the_rest(kind: type[nn.Module]) -> None:
    """The class comes back, trains as it did, and the same plan makes it of a fresh model."""
    model = kind()
    result = pruned(model)
    assert result.plan.form == "class", result.report.notes
    assert result.report.after["parameters"] < 0.4 * result.report.before["parameters"]
    assert not any("training" in note for note in result.report.notes)
    again = torch.randn(3, 3, 8, 8)
    assert error(forward64(result.model, (again,)), forward64(zeroed(model, result.plan), (again,))) < 1e-12
    for trained in (result.model, result.plan.apply(kind(), (IMAGES,))):
        trained.train()
        outputs = trained(again)
        sum(y.square().mean() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        for name, parameter in trained.named_parameters():
            unread = kind is Unneeded and name.startswith("rest.1")
            assert unread == (parameter.grad is None), name
        assert trained.eval()(again).shape == (3, 4)


def test_what_training_puts_out_stays() -> None:
    class Features(Deep):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.first(x)
            return (self.aux(y), y) if self.training else self.head(self.second(y).mean((2, 3)))

    result = pruned(Features())
    assert {"training output", "graph output"} <= {f.kind for f in result.report.frozen}
    assert result.model.first[0].out_channels == 8
    assert [tuple(y.shape) for y in result.model.train()(IMAGES)] == [(2, 4), (2, 8, 8, 8)]


def test_what_does_not_fit_is_named() -> None:
    result = pruned(Named())
    (note,) = [n for n in result.report.notes if "training" in n]
    assert "test_training_only.py" in note
    assert "shape '[" in note
    assert "exclude" in note
    with pytest.raises(RuntimeError, match="shape"):
        result.model.train()(IMAGES)
    kept = sparsecc.prune(Named().eval(), (IMAGES,), sparsity=0.5, exclude=["first*"])
    assert not [n for n in kept.report.notes if "training" in n]
    kept.model.train()(IMAGES)


def test_a_graph_goes_without_and_says_so() -> None:
    class Literal(Unneeded):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.first(x).reshape(2, 8, 8, 8)[:, :3])

    result = pruned(Literal())
    assert result.plan.form == "graph"
    assert sum(p.numel() for p in result.model.parameters()) == result.report.after["parameters"]
    (note,) = [n for n in result.report.notes if "goes without" in n]
    assert "rest.1.0.weight" in note
    assert "rest.0.0.weight" not in note


def test_positions_that_nobody_reads_do_not_fit() -> None:
    """Export checks no range of indices: the class that comes back is run first."""

    class Picked(nn.Module):
        def __init__(self, places: list[int]) -> None:
            super().__init__()
            self.first, self.head = conv(3, 8), nn.Linear(8, 4)
            self.register_buffer("places", torch.tensor(places))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y.index_select(1, self.places).mean()
            out: Tensor = self.head(y.mean((2, 3)))
            return out

    fits, other = pruned(Picked([0, 2])), pruned(Picked([0, 7]))
    assert fits.plan.form == "class", fits.report.notes
    assert other.plan.form == "graph"
    (note,) = [n for n in other.report.notes if "for nothing" in n]
    assert "test_training_only.py" in note
    for result in (fits, other):
        assert result.model(IMAGES).shape == (2, 4)


def test_training_that_needs_more_than_the_example_changes_nothing() -> None:
    result = pruned(Targets())
    assert result.plan.form == "class"
    frozen = {f.kind for f in result.report.frozen}
    assert "unread" in frozen
    assert result.model.aux[0].num_features == 8


def test_the_model_is_left_as_it_was() -> None:
    model = Deep().train()
    model.first[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = sparsecc.prune(model, (IMAGES,), sparsity=0.5)
    assert [m.training for m in model.modules()] == [m.training for m in result.model.modules()]
    assert not model.first[1].training
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

"""What the zoo found, each as the smallest model that shows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.errors import InvalidOption
from sparsecc.passes import DepthPruning
from sparsecc.verification.check import distance


def pruned(model: nn.Module, *inputs: torch.Tensor) -> sparsecc.Pruned:
    """The verified result of pruning a half, with positions, norms and scales at random."""
    result = sparsecc.prune(model.eval(), inputs, sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    return result


class NegativeRange(nn.Module):
    """ALiBi counts distances from ``1 - length`` (MPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(1 - x.shape[1], 1).to(x.dtype)
        return self.second(self.first(x).relu()) * distance[:, None]


def test_a_range_with_a_negative_start() -> None:
    result = pruned(NegativeRange(), torch.randn(2, 5, 4))
    assert isinstance(result.model, NegativeRange)
    assert result.model.first.weight.shape == (4, 4)


class SpelledRepeat(nn.Module):
    """Groups of states repeated to heads, with the size of the result said in advance (Mamba-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        repeated = self.first(x).repeat_interleave(2, dim=1, output_size=16)
        return self.second(repeated.relu())


def test_a_repeat_that_spells_its_size() -> None:
    result = pruned(SpelledRepeat(), torch.randn(2, 4))
    assert result.model(torch.randn(3, 4)).shape == (3, 3)
    assert result.report.after["parameters"] < result.report.before["parameters"] / 1.5


class ComplexRotation(nn.Module):
    """Rotary positions as products of complex numbers (DeepSeek-V2); one output is complex, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 3)
        angles = torch.rand(40, 1)
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = torch.view_as_complex(self.first(x).unflatten(-1, (16, 2)))
        turned = pairs * self.turn[: x.shape[1]]
        return self.second(torch.view_as_real(turned).flatten(-2)), turned.mean(-1)


def test_complex_values_are_compared_as_numbers() -> None:
    result = sparsecc.prune(ComplexRotation().eval(), (torch.randn(5, 40, 6),), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert result.subject.original(result.subject.inputs(0, 0)[0], torch.float64)[1].dtype == torch.complex128
    off = result.subject.original(result.subject.inputs(0, 0)[0], torch.float64)[1]
    assert distance(off, off + 1e-3j)[0] > 1e-4


class ReadForItsShape(nn.Module):
    """A position taken of the width only to learn the length: nobody reads the values (BART)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.positions = nn.Embedding(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        length = hidden[:, :, -1].shape[1]
        return self.second(hidden + self.positions(torch.arange(length)))


def test_what_nobody_reads_freezes_nothing() -> None:
    result = pruned(ReadForItsShape(), torch.randn(2, 5, 4))
    assert isinstance(result.model, ReadForItsShape)
    assert result.model.first.weight.shape == (4, 4)


class Boxes(nn.Module):
    """Looks up the width of boxes, which must not be negative (LiLT, LayoutLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.widths, self.first, self.second = nn.Embedding(50, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        hidden = self.widths(boxes[..., 2] - boxes[..., 0])
        return self.second(self.first(hidden).relu())


def test_integer_vectors_are_drawn_whole() -> None:
    corner = torch.randint(0, 20, (3, 7, 2))
    pruned(Boxes(), torch.cat([corner, corner + torch.randint(1, 20, (3, 7, 2))], -1))


class Residual(nn.Module):
    """A residual block that computes something which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner(x)
        inner.tanh()
        return x + inner.relu()


def test_blocks_with_what_nobody_reads_are_dropped_from_the_class() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Residual(), Residual(), nn.Linear(8, 3))
    result = sparsecc.prune(model.eval(), (torch.randn(2, 4),), recipe=[DepthPruning(blocks=("1",))])
    assert result.certificate.status == "VERIFIED"
    assert isinstance(result.model, nn.Sequential)


class OwnKernels(nn.Module):
    """Every sample has kernels of its own for every channel (CondConv): groups that grow with the batch."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.convolve = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
        self.first, self.choice, self.last = nn.Conv2d(3, 12, 1), nn.Linear(12, 4), nn.Conv2d(12, 5, 1)
        self.kernels = nn.Parameter(torch.randn(4, 12 * 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        samples, channels, height, width = y.shape
        kernels = self.choice(y.mean((2, 3))).sigmoid() @ self.kernels
        y = self.convolve(
            y.reshape(1, samples * channels, height, width),
            kernels.view(samples * channels, 1, 3, 3),
            padding=1,
            groups=samples * channels,
        )
        return self.last(y.view(samples, channels, height, width))


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_that_grow_with_the_batch(transposed: bool) -> None:
    model = OwnKernels(transposed)
    result = pruned(model, torch.randn(2, 3, 6, 6))
    left = result.report.after["parameters"] / result.report.before["parameters"]
    assert left < (0.9 if transposed else 0.6)
    for samples in (1, 5):
        assert result.model(torch.randn(samples, 3, 6, 6)).shape == (samples, 5, 6, 6)


class Bags(nn.Module):
    """Sums of ranges of rows, whose offsets begin with 0 and rise."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.EmbeddingBag(30, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.table(rows, offsets)).relu())


def test_integers_that_only_the_example_has_right_are_taken_from_it() -> None:
    result = pruned(Bags(), torch.randint(0, 30, (12,)), torch.tensor([0, 4, 9]))
    assert all("offsets: the example" in check.inputs for check in result.certificate.checks)
    with pytest.raises(InvalidOption, match="the model itself fails"):
        pruned(Bags(), torch.randint(0, 30, (12,)), torch.tensor([1, 4, 9]))

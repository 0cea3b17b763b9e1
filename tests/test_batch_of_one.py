"""Examples with a batch of one are captured as two: that has to be the same model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.errors import InvalidOption


class Two(nn.Module):
    """Two layers; how they are called is what differs."""

    shape: tuple[int, ...] = (1, 16)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


class Asks(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x) if x.shape[0] == 1 else self.b(self.a(x))


class Squeezes(Two):
    shape = (1, 4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x.squeeze(0))


class SqueezesAndTurns(Two):
    """The shape of the output alone does not show it."""

    shape = (1, 16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x.squeeze().transpose(0, -1)).reshape(-1)


class Drops(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x)).squeeze() @ self.b.weight.T


class Walks(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.both(row) for row in x])


class Scales(Two):
    """The size is a number in what is computed, and no other path is taken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x) / x.shape[0] + x.sum(0, keepdim=True).mean()


class Counts(Two):
    """Writes into a buffer, also in evaluation mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.both(x)


class Replaces(Two):
    """Puts another buffer in the place of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.both(x)


class Draws(Two):
    """Gives something else every time: nothing can be told."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x + torch.rand_like(x))


STATIC = (Asks, Squeezes, SqueezesAndTurns, Drops, Walks)


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_what_asks_for_the_batch_keeps_it(kind: type[Two], target: str) -> None:
    """The example's own sizes are captured then, with a note; what was given comes out as it did."""
    model, x = kind().eval(), torch.randn(kind.shape)
    compiled = sparsecc.compile(model, (x,), target=target, recipe="ChannelPruning(sparsity=0.01)")
    assert compiled.certificate.status == "VERIFIED"
    assert any("captured with the example's static sizes" in note for note in compiled.report.notes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert [spec.shape for spec in compiled.artifact.signature.inputs] == [tuple(x.shape)]
    with pytest.raises(InvalidOption, match="does not fit"):
        compiled(torch.cat([x, x, x]))


@pytest.mark.parametrize("kind", [Scales, Counts, Replaces, Draws])
def test_other_models_take_any_batch(kind: type[Two]) -> None:
    model, x = kind().eval(), torch.randn(kind.shape)
    result = sparsecc.prune(model, (x,), sparsity=0.5, verify=kind is not Draws)
    assert not any("static sizes" in note for note in result.report.notes)
    assert int(model.calls) == 0, "what runs of the model wrote is taken back"
    state = torch.random.get_rng_state()
    sparsecc.analyze(model, (x,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.model(torch.randn(3, 16)).shape == (3, 8)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_batch_that_is_walked_through_is_refused_in_other_sizes(batch: int) -> None:
    """Its size was a symbol with one value, and everything fitted it."""
    compiled = sparsecc.compile(Walks().eval(), (torch.randn(batch, 16),), target="cpu")
    assert compiled(torch.randn(batch, 16)).shape == (batch, 8)
    with pytest.raises(InvalidOption, match="does not fit"):
        compiled(torch.randn(batch + 1, 16))


@pytest.mark.parametrize("kind", [Asks, Drops])
def test_larger_examples_tell_that_one_was_not_captured(kind: type[Two]) -> None:
    model, x = kind().eval(), torch.randn(4, 16)
    result = sparsecc.prune(model, (x,), recipe="ChannelPruning(sparsity=0.01)")
    assert any("which was not captured: give it two at least" in note for note in result.report.notes)
    plain = sparsecc.prune(Counts().eval(), (x,), sparsity=0.5)
    assert not any("batch of one" in note for note in plain.report.notes)


def test_nothing_is_run_on_the_meta_device() -> None:
    with torch.device("meta"):
        for model in (Scales().eval(), nn.ReLU()):
            analysis = sparsecc.analyze(model, (torch.randn(1, 16),))
            assert any(value.is_dynamic(0) for value in analysis.view.inputs)

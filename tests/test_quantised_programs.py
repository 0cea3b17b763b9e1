"""PyTorch programs with quantisers: pruned as they are, and made by PyTorch's own quantisers (torchao)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import sparsecc
from sparsecc.errors import InvalidOption, UnsupportedModel, VerificationFailed
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.passes import NMPattern
from sparsecc.patterns.nm import NM
from sparsecc.quantization import exported
from tests.oracles import fingerprint
from tests.test_property_torch import check_program, random_keeps

decomposed = torch.ops.quantized_decomposed
TWO_OF_FOUR = NM(2, 4)
INT8 = (-128, 127, torch.int8)


# -- rules -------------------------------------------------------------------------------------------


def dynamic_asymmetric(x: torch.Tensor) -> torch.Tensor:
    scale, zero = decomposed.choose_qparams.tensor(x, -128, 127, 1e-7, torch.int8)
    q = decomposed.quantize_per_tensor.tensor(x, scale, zero, *INT8)
    return decomposed.dequantize_per_tensor.tensor(q, scale, zero, *INT8)  # type: ignore[no-any-return]


def dynamic_symmetric(x: torch.Tensor) -> torch.Tensor:
    scale, zero = decomposed.choose_qparams_symmetric.tensor(x, -127, 127, 1e-7, torch.int8)
    q = decomposed.quantize_per_tensor.tensor(x, scale, zero, *INT8)
    return decomposed.dequantize_per_tensor.tensor(q, scale, zero, *INT8)  # type: ignore[no-any-return]


def by_token(x: torch.Tensor) -> torch.Tensor:
    scale, zero = decomposed.choose_qparams_per_token(x, torch.int8)
    q = decomposed.quantize_per_token(x, scale, zero, *INT8)
    return decomposed.dequantize_per_token(q, scale, zero, *INT8, torch.float32)  # type: ignore[no-any-return]


def by_token_asymmetric(x: torch.Tensor) -> torch.Tensor:
    scale, zero = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    q = decomposed.quantize_per_token(x, scale, zero, *INT8)
    return decomposed.dequantize_per_token(q, scale, zero, *INT8, torch.float32)  # type: ignore[no-any-return]


SCALES, ZEROS = torch.linspace(0.01, 0.05, 16), torch.arange(16) - 8


def by_channel(x: torch.Tensor) -> torch.Tensor:
    return decomposed.fake_quant_per_channel(x, SCALES, ZEROS, 1, -128, 127)  # type: ignore[no-any-return]


def converted(x: torch.Tensor) -> torch.Tensor:
    narrow = decomposed.convert_element_type.no_fuse(x * 8, torch.int8)
    return decomposed.convert_element_type.no_fuse(narrow, torch.float32)  # type: ignore[no-any-return]


class Between(nn.Module):
    """Two layers with a quantiser of activations between them."""

    def __init__(self, quantiser: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.quantiser = quantiser

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.quantiser(torch.sigmoid(self.first(x))))
        return y


@pytest.mark.parametrize(
    "quantiser", [dynamic_asymmetric, dynamic_symmetric, by_token, by_token_asymmetric, by_channel, converted]
)
def test_quantisers_between_layers(quantiser: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Ranges are those of the positions that are kept (and 0), whatever stood in the others."""
    torch.manual_seed(0)
    model, x = Between(quantiser).eval(), (torch.randn(3, 8),)
    subject = TorchSubject(model, x)
    (group,) = subject.analysis.groups
    assert group.size == 16
    for seed in range(6):
        kept = random_keeps(subject, seed)
        check_program(subject, lower(subject.analysis, kept), kept)
    assert sparsecc.prune(model, x, sparsity=0.5).certificate.status == "VERIFIED"


class Grouped(nn.Module):
    """Weights of 4 bits that share a scale among ``group`` inputs."""

    def __init__(self, outputs: int, inputs: int, group: int, seed: int, zeros: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (outputs, inputs // group)
        self.group = group
        weight = torch.randint(-8, 8, (outputs, inputs), generator=generator)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", 0.01 + torch.rand(shape, generator=generator))
        self.register_buffer("zero", torch.zeros(shape, dtype=torch.int8) if zeros else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.is_floating_point():
            weight = decomposed.quantize_per_channel_group(
                weight, self.scale, self.zero, -8, 7, torch.int8, self.group
            )
        weight = decomposed.dequantize_per_channel_group(
            weight, self.scale, self.zero, -8, 7, torch.int8, self.group, torch.float32
        )
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("zeros", [True, False])
def test_scales_of_groups(zeros: bool) -> None:
    """Rows go alone, inputs with all that share their scales; both are ranked by the real numbers."""
    net = nn.Sequential(Grouped(16, 8, 4, 0, zeros), nn.ReLU(), Grouped(4, 16, 4, 1, zeros)).eval()
    x = (torch.randn(3, 8),)
    subject = TorchSubject(net, x)
    assert {f.reason.kind for f in subject.analysis.frozen} == {
        "graph input",
        "graph output",
        "quantisation block",
    }
    assert {(m.weight, m.axis) for g in subject.analysis.groups for m in g.members} >= {("2.weight", 1)}
    for seed in range(4):
        kept = random_keeps(subject, seed)
        check_program(subject, lower(subject.analysis, kept), kept)
    real = net[2].weight * net[2].scale.repeat_interleave(4, dim=1)
    np.testing.assert_allclose(subject.view.weight("2.weight").float().numpy(), real.numpy(), rtol=1e-6)
    result = sparsecc.prune(net, x, recipe=NMPattern())
    assert result.certificate.status == "VERIFIED"
    assert not result.plan.skips
    assert all(TWO_OF_FOUR.holds(result.model[place].weight.numpy(), 1) for place in (0, 2))


def test_weights_that_are_rounded_by_group_when_the_model_runs() -> None:
    net = nn.Sequential(Grouped(16, 8, 4, 0), nn.ReLU(), Grouped(4, 16, 4, 1)).eval()
    for layer in (net[0], net[2]):
        numbers = layer.weight * layer.scale.repeat_interleave(4, dim=1)
        del layer.weight
        layer.weight = nn.Parameter(numbers)
    subject = TorchSubject(net, (torch.randn(3, 8),))
    assert {(m.weight, m.axis) for g in subject.analysis.groups for m in g.members} >= {("2.weight", 1)}
    for seed in range(4):
        kept = random_keeps(subject, seed)
        check_program(subject, lower(subject.analysis, kept), kept)


# -- PyTorch's own quantisers ------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Convolutions with norms that are folded, a residual sum and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.na(self.a(x)))
        x = torch.relu(self.nb(self.b(x))) + torch.relu(self.c(x))
        y: torch.Tensor = self.head(x.mean((2, 3)))
        return y


class Block(nn.Module):
    """A transformer's block, and two outputs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o, self.n = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.n(x)
        q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(a)
        return {"y": x + self.down(nn.functional.gelu(self.up(x))), "h": h}


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (4, 4, 8, 8)),
    "block": (Block, (4, 6, 32)),
}


def quantizer(dynamic: bool = False) -> Any:
    return x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    )


def given(name: str) -> tuple[nn.Module, list[tuple[torch.Tensor]]]:
    make, shape = NETS[name]
    torch.manual_seed(0)
    return make().eval(), [(torch.randn(shape),) for _ in range(4)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NETS)
def test_pruned_then_quantised(name: str, dynamic: bool) -> None:
    model, batches = given(name)
    pruned = sparsecc.prune(model, batches[0], recipe=NMPattern())
    result = sparsecc.quantize_program(pruned, quantizer=quantizer(dynamic), calibration=batches)
    held = [line for line in result.report.layers if "2:4" in line.patterns]
    assert len(held) == len(pruned.plan.patterns) >= 3
    assert {line.dtype for line in held} == {"int8"}
    assert all(line.zeros >= line.size // 2 for line in held)
    assert result.report.activations == (None if dynamic else "uint8")
    assert result.report.bytes_after < result.report.bytes_before / 2
    wanted, got = pruned.model(*batches[3]), result.model(*batches[3])
    wanted, got = (list(v.values()) if isinstance(v, dict) else [v] for v in (wanted, got))
    assert len(result.report.errors) == len(wanted)
    for error, ours, theirs in zip(result.report.errors, wanted, got, strict=True):
        noise = (theirs - ours).double().square().sum() / ours.double().square().sum()
        assert error.relative == pytest.approx(float(noise.sqrt()), rel=1e-6, abs=1e-12)
        assert error.batches == 1
    assert "patterns there: 2:4 in" in str(result.report)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NETS)
def test_quantised_then_pruned(name: str, dynamic: bool) -> None:
    """A quantised graph loses channels with their scales, and half of its integers."""
    model, batches = given(name)
    whole = sparsecc.quantize_program(model, batches[0], quantizer=quantizer(dynamic), calibration=batches)
    subject = TorchSubject(whole.model, batches[0])
    assert {f.reason.kind for f in subject.analysis.frozen} <= {"graph input", "graph output", "kernel"}
    kept = random_keeps(subject, 1)
    assert kept
    check_program(subject, lower(subject.analysis, kept), kept)
    result = sparsecc.prune(whole.model, batches[0], sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert result.report.after["parameters"] < 0.5 * result.report.before["parameters"]
    sparse = sparsecc.prune(whole.model, batches[0], recipe=NMPattern())
    assert sparse.certificate.status == "VERIFIED"
    assert len(sparse.plan.patterns) >= 3


class Twice(nn.Module):
    """Two products with one weight, and one whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.c, self.scale = nn.Linear(16, 16), nn.Parameter(torch.rand(16, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(torch.relu(self.a(x)))
        return nn.functional.linear(y, self.c.weight * self.scale, self.c.bias)


def test_every_product_of_a_weight_is_compared_and_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model, batches = Twice().eval(), [(torch.randn(4, 16),) for _ in range(3)]
    pruned = sparsecc.prune(model, batches[0], recipe=NMPattern(include=("a*", "b*")))
    before = fingerprint(pruned.model)
    result = sparsecc.quantize_program(pruned, quantizer=quantizer(), calibration=batches)
    assert fingerprint(pruned.model) == before
    lines = [line for line in result.report.layers if line.weight == "a.weight"]
    assert lines
    assert all("2:4" in line.patterns and line.dtype == "int8" for line in lines)
    reads = [n for n in result.model.graph.nodes if "dequantize_per_channel" in str(n.target)]
    values = [exported._value(result.model, node) for node in reads]
    assert len({id(v[1]) for v in values if v is not None}) == len(lines)


def test_zeros_that_are_gone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = given("convolutions")
    pruned = sparsecc.prune(model, batches[0], recipe=NMPattern())
    prepare, convert = exported._torchao()

    def wrong(observed: Any) -> Any:
        """A quantiser that moves the smallest numbers away from 0."""
        module = convert(observed)
        for buffer in module.buffers():
            if buffer.dtype == torch.int8:
                buffer[buffer == 0] = 1
        for parameter in module.parameters():
            if parameter.dtype == torch.int8:
                parameter.data[parameter == 0] = 1
        return module

    monkeypatch.setattr(exported, "_torchao", lambda: (prepare, wrong))
    with pytest.raises(VerificationFailed, match=r"zeros of .* are other numbers"):
        sparsecc.quantize_program(pruned, quantizer=quantizer(), calibration=batches)


def test_what_does_not_fit_is_refused() -> None:
    model, batches = given("convolutions")
    with pytest.raises(InvalidOption, match="calibration"):
        sparsecc.quantize_program(model, batches[0], quantizer=quantizer(), calibration=None)
    with pytest.raises(InvalidOption, match="too few"):
        sparsecc.quantize_program(model, batches[0], quantizer=quantizer(), calibration=batches[:1])
    with pytest.raises(UnsupportedModel, match="object does not quantise this model"):
        sparsecc.quantize_program(model, batches[0], quantizer=object(), calibration=batches)
    with pytest.raises(InvalidOption, match=r"x. has shape \[2, 3\]"):
        sparsecc.quantize_program(
            model, batches[0], quantizer=quantizer(), calibration=[(torch.randn(2, 3),)] * 2
        )
    pruned = sparsecc.prune(model, batches[0], sparsity=0.5)
    with pytest.raises(InvalidOption, match="knows those"):
        sparsecc.quantize_program(pruned, batches[0], quantizer=quantizer(), calibration=batches)

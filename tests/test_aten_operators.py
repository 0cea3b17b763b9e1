"""ATen operators one at a time: each stands in one table, and what its rule says is true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecc
from sparsecc.fx.capture import capture
from sparsecc.fx.ops import TABLE, aten_name
from sparsecc.fx.ops_frozen import FROZEN, SCALARS
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.reference.torch_run import ProgramRunner
from tests.oracles import error, leaves, masked64, poisoned
from tests.patterns import CASES
from tests.sampling import every
from tests.test_property_torch import random_keeps

EXACT = 1e-12
Binary = Callable[[Tensor, Tensor], Tensor]


def _core() -> list[str]:
    """Names of the operators that PyTorch tags as its core set."""
    found: set[str] = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        overloads = packet.overloads() if hasattr(packet, "overloads") else ()
        for overload in overloads:
            target = getattr(packet, overload)
            if torch.Tag.core in target.tags:
                found.add(aten_name(target) or name)
    return sorted(found)


def test_every_core_operator_is_in_exactly_one_table() -> None:
    core = _core()
    assert len(core) > 100
    for name in core:
        assert sum(name in table for table in (TABLE, FROZEN, SCALARS)) == 1, name


def test_tables_do_not_overlap_and_name_operators_that_exist() -> None:
    assert not TABLE.keys() & FROZEN.keys()
    assert not SCALARS & (TABLE.keys() | FROZEN.keys())
    for name in (*TABLE, *FROZEN):
        if "." not in name:
            assert hasattr(torch.ops.aten, name) or hasattr(torch.ops.aten, f"{name}_"), name
    assert all(why and not why.endswith(".") for why in FROZEN.values())


class Between(nn.Module):
    """``function`` of two projections x[N,4,8], y[N,4,8], and a projection of the result."""

    def __init__(self, function: Binary) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        with torch.no_grad():
            self.c = nn.Linear(self._between(torch.randn(2, 4, 6)).shape[-1], 3)

    def _between(self, x: Tensor) -> Tensor:
        y = self.function(self.a(x), self.b(x))
        return (y.abs() if y.is_complex() else y).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self._between(x))  # type: ignore[no-any-return]


def _image(x: Tensor) -> Tensor:
    """x[N,4,8] as an image [N,8,4,4]"""
    return x.transpose(1, 2)[..., None].expand(-1, -1, -1, 4)


def _rows(x: Tensor) -> Tensor:
    """An image [N,C,H,W] as rows [N,H*W,C]"""
    return x.flatten(2).transpose(1, 2)


def _put(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.5
    z[:, torch.tensor([0, 2])] = y[:, :2]
    return z


def _put_by_mask(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.5
    z[y.sum(-1) > 0] = 0.25
    return z


def _grids(x: Tensor) -> tuple[Tensor, ...]:
    return torch.meshgrid(x.mean((0, 1)), _T([1.0, 2.0]), indexing="xy")


def _unpooled(x: Tensor) -> Tensor:
    return F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)


_T = torch.tensor

#: operators whose features may go
CARRIED: dict[str, Binary] = {
    "gather": lambda x, y: x.gather(1, y.argsort(1)),
    "gather expanded": lambda x, y: x.gather(1, x.mean(-1, keepdim=True).argsort(1).expand(-1, -1, 8)),
    "take_along_dim": lambda x, y: torch.take_along_dim(x, y.argsort(1), 1),
    "scatter": lambda x, y: x.scatter(1, y.argsort(1), y),
    "scatter a number": lambda x, y: x.scatter(1, y.argsort(1)[:, :2], 0.5),
    "scatter_add": lambda x, y: torch.zeros_like(x).scatter_add(1, y.argsort(1), x),
    "scatter_reduce": lambda x, y: x.scatter_reduce(1, y.argsort(1), y, "amax"),
    "index_add": lambda x, y: x.index_add(1, _T([0, 1, 1, 2]), y),
    "index_copy": lambda x, y: x.index_copy(1, _T([2, 0]), y[:, :2]),
    "index_fill": lambda x, y: x.index_fill(1, _T([2, 0]), 0.5),
    "index_reduce": lambda x, y: x.index_reduce(1, _T([2, 0]), y[:, :2], "amax"),
    "index_put": _put,
    "index_put by mask": _put_by_mask,
    "index twice": lambda x, y: x[_T([0, 1])[:, None], _T([1, 2])],
    "index apart": lambda x, y: x[:, :, None].expand(-1, -1, 3, -1)[_T([0, 1]), :, _T([1, 2])],
    "index by mask": lambda x, y: x[y.sum(-1) > -100],
    "select_scatter": lambda x, y: x.select_scatter(y[:, 0], 1, 2),
    "slice_scatter": lambda x, y: x.slice_scatter(y[:, :2], 1, 1, 3),
    "slice_scatter features": lambda x, y: x.slice_scatter(y[..., :4], 2, 3, 7),
    "slice_scatter of all": lambda x, y: x.slice_scatter(y, 2, 0, 8),
    "diag_embed": lambda x, y: (torch.diag_embed(x) @ y[..., None])[..., 0],
    "diagonal": lambda x, y: torch.diagonal(x.transpose(1, 2) @ y, dim1=1, dim2=2),
    "inner": lambda x, y: torch.inner(x[0], y[0]),
    "vecdot": lambda x, y: torch.linalg.vecdot(x, y)[..., None],
    "tensordot": lambda x, y: torch.tensordot(x, y, dims=([1, 2], [1, 2])),
    "outer": lambda x, y: torch.outer(x.sum((0, 1)), y.sum((0, 1))),
    "multi_dot": lambda x, y: torch.linalg.multi_dot([x[0], y[0].t(), x[0]]),
    "cdist": torch.cdist,
    "cdist by sums": lambda x, y: torch.cdist(x, y, p=1.0),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x[:, :, None], y[:, None], dim=-1),
    "pairwise_distance": lambda x, y: F.pairwise_distance(x, y)[..., None],
    "mse_loss": lambda x, y: x * F.mse_loss(x, y),
    "huber_loss": lambda x, y: x * F.huber_loss(x, y, reduction="sum"),
    "bilinear": lambda x, y: F.bilinear(x, y, x.new_ones(5, 8, 8)),
    "cross": lambda x, y: torch.cross(x[:, :3], y[:, :3], dim=1),
    "kron": lambda x, y: torch.kron(x[0], y[0]),
    "block_diag": lambda x, y: torch.block_diag(x[0], y[0]),
    "meshgrid": lambda x, y: x * torch.stack(_grids(x)).sum((0, 1)),
    "rfft": lambda x, y: torch.fft.rfft(x, dim=1),
    "irfft": lambda x, y: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(y, dim=1), n=4, dim=1),
    "fft2": lambda x, y: _rows(torch.fft.fft2(_image(x)).real),
    "fftshift": lambda x, y: torch.fft.fftshift(x, dim=1),
    "stft": lambda x, y: torch.stft(
        x.transpose(1, 2).flatten(0, 1).repeat(1, 8), 8, return_complex=True, window=torch.ones(8)
    ).abs().unflatten(0, (-1, 8)).flatten(2).transpose(1, 2),
    "unfold": lambda x, y: x.unfold(1, 2, 1).mean(-1),
    "im2col": lambda x, y: F.unfold(_image(x), 2).transpose(1, 2),
    "col2im": lambda x, y: _rows(F.fold(F.unfold(_image(x), 2), (4, 4), 2)),
    "grid_sample": lambda x, y: _rows(
        F.grid_sample(_image(x), torch.tanh(y[:, :, :2, None].expand(-1, -1, -1, 2)), align_corners=False)
    ),
    "affine_grid": lambda x, y: _rows(
        F.grid_sample(
            _image(x),
            F.affine_grid(torch.tanh(y[:, 0, :6]).view(-1, 2, 3), [x.shape[0], 8, 3, 3], align_corners=False),
            align_corners=False,
        )
    ),
    "max_unpool": lambda x, y: _unpooled(x.transpose(1, 2)).transpose(1, 2),
    "polar": lambda x, y: torch.polar(x.abs(), y).imag,
    "complex": lambda x, y: torch.complex(x, y) * torch.complex(y, x).conj(),
    "complex pairs": lambda x, y: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(y[..., :4].abs(), y[..., 4:])
    ).flatten(2),
    "bucketize": lambda x, y: torch.bucketize(x, _T([-0.5, 0.0, 0.5])),
    "isin": lambda x, y: x * torch.isin(y.round(), _T([0.0, 1.0])),
    "rot90": lambda x, y: _rows(torch.rot90(_image(x), 1, [2, 3])),
    "logaddexp": torch.logaddexp,
    "frexp": lambda x, y: torch.frexp(x)[0],
    "aminmax": lambda x, y: x - torch.aminmax(x, dim=-1, keepdim=True)[0],
    "max without positions": lambda x, y: x - x.max(-1, keepdim=True)[0],
    "median without positions": lambda x, y: x - x.median(-1, keepdim=True)[0],
    "count_nonzero": lambda x, y: x * torch.count_nonzero(x > 0, dim=-1)[..., None],
    "nansum": lambda x, y: x - torch.nansum(x, -1, keepdim=True),
    "std_mean": lambda x, y: x - torch.std_mean(x, -1, keepdim=True)[1],
    "var": lambda x, y: x * x.var(dim=(1, 2), keepdim=True, correction=0),
    "linalg.norm": lambda x, y: x / torch.linalg.norm(x, dim=-1, keepdim=True),
    "Frobenius": lambda x, y: x / torch.linalg.matrix_norm(x, keepdim=True),
    "diff": lambda x, y: torch.diff(x, dim=1),
    "movedim": lambda x, y: x.movedim(-1, 0).movedim(0, -1),
    "hstack": lambda x, y: torch.hstack([x, y]),
    "dstack": lambda x, y: torch.dstack([x, y]),
    "cumsum": lambda x, y: x.cumsum(1),
    "softmin": lambda x, y: F.softmin(x, -1),
    "embedding_bag": lambda x, y: x + F.embedding_bag(_T([[0, 1], [2, 3]]), y[0], mode="sum").mean(0),
    "numbers from sizes": lambda x, y: x * x.sum() / x.numel(),
    "a length in the sum": lambda x, y: x + x.flatten().shape[0],
}  # fmt: skip

#: operators whose features stay, and the kind of the reason
KEPT: dict[str, tuple[Binary, str]] = {
    "sort": (lambda x, y: x.sort(-1)[0], "order matters"),
    "max with positions": (lambda x, y: x + x.max(-1, keepdim=True)[1], "order matters"),
    "fft": (lambda x, y: torch.fft.fft(x).abs(), "spatial"),
    "index_fill": (lambda x, y: x.index_fill(2, _T([2, 0]), 0.5), "indexed"),
    "scatter": (lambda x, y: x.scatter(2, y.argsort(2), y), "indexed"),
    "mask": (lambda x, y: x[:, :, _T([True] * 4 + [False] * 4)], "indexed"),
    "as_strided": (lambda x, y: torch.as_strided(x, (2, 4, 4), (32, 8, 2)), "frozen operator"),
    "view as integers": (lambda x, y: x.view(torch.int32).float() * 1e-9 + x, "frozen operator"),
    "nuclear norm": (lambda x, y: x / torch.linalg.matrix_norm(x, "nuc", keepdim=True), "frozen operator"),
    "quantile": (lambda x, y: x - x.quantile(0.5, dim=-1, keepdim=True), "frozen operator"),
    "singular values": (lambda x, y: torch.linalg.svdvals(x)[..., None] * y, "frozen operator"),
    "masked_select": (lambda x, y: x * x.masked_select(x > -99).sum(), "frozen operator"),
    "nonzero": (lambda x, y: x * torch.nonzero(x > 0).shape[0], "frozen operator"),
    "searchsorted": (lambda x, y: torch.searchsorted(x.cumsum(1), y), "frozen operator"),
    "far apart": (lambda x, y: torch.cdist(x, y.repeat(1, 8, 1)), "cancellation"),
}


def _subject(function: Binary) -> TorchSubject:
    torch.manual_seed(0)
    return TorchSubject(Between(function).eval(), (torch.randn(2, 4, 6),))


def _right(subject: TorchSubject) -> None:
    """Two random plans compute masked semantics, whatever stands in removed entries, operator by operator."""
    for seed in range(2):
        kept = random_keeps(subject, seed)
        plan = lower(subject.analysis, kept)
        applied = subject.apply(plan, kept)
        assert applied.program is not None
        for inputs in ((0, 0), (1, 1)):
            flat, _ = subject.inputs(*inputs)
            reference = masked64(subject, kept, flat, poisoned(subject, plan))
            ours = leaves(ProgramRunner(applied.program, dtype=torch.float64).run(flat)[0])
            assert error(ours, reference) <= EXACT
        for check in subject.node_checks(applied, kept, subject.inputs(2, 0)[0]):
            assert check.passed, check


@pytest.mark.parametrize("name", every(2, CARRIED))
def test_features_may_go(name: str) -> None:
    subject = _subject(CARRIED[name])
    assert not [f for f in subject.analysis.frozen if f.reason.kind in ("rule failed", "unknown operator")]
    assert any(m.weight in ("a.weight", "c.weight") for g in subject.analysis.groups for m in g.members)
    _right(subject)


@pytest.mark.parametrize("name", KEPT)
def test_features_stay_and_the_reason_is_told(name: str) -> None:
    function, kind = KEPT[name]
    subject = _subject(function)
    frozen = {f.reason.kind for f in subject.analysis.frozen if (f.weight, f.axis) == ("a.weight", 0)}
    assert frozen == {kind}
    _right(subject)


DECOMPOSED = (
    "conv_bn_relu", "layer_norm_over_images", "layer_norm_channels_last", "group_norm", "instance_norm",
    "rms_norm", "prelu", "attention", "attention_default_scale", "grouped_queries_built_in", "gru_two_layers",
    "vision_transformer", "spatial_gate_max", "message_passing", "rotary_complex", "glu_operator",
    "writes_through_views",
)  # fmt: skip


@pytest.mark.parametrize("name", every(2, DECOMPOSED))
def test_decomposed_programs_are_right(name: str) -> None:
    """The program in PyTorch's core operators, which is what other exporters hand over."""
    model, inputs = CASES[name].make()
    exported = capture(model, inputs).exported
    subject = TorchSubject(exported.run_decompositions())
    assert not [f for f in subject.analysis.frozen if f.reason.kind in ("rule failed", "unknown operator")]
    whole = TorchSubject(exported)
    assert sum(g.size for g in subject.analysis.groups) >= 0.9 * sum(g.size for g in whole.analysis.groups)
    _right(subject)


@pytest.mark.parametrize("name", ["rotary_complex", "spectral_convolution"])
def test_dead_channels_beside_complex_numbers_go_without_loss(name: str) -> None:
    model, inputs = CASES[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[1] = 0
    result = sparsecc.slim(model, inputs)
    assert result.plan
    assert result.certificate.status == "VERIFIED"

"""Gated units, embeddings, mixtures of experts and scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.attention import Grouped, block
from tests.patterns.base import Built, case, tokens


class GLU(nn.Module):
    """A gated layer, fused or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(12, 8) if how == "separate" else nn.Identity()
        self.out = nn.Linear(16 if how == "separate" else 8, 12)
        if how == "separate":
            self.second = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "operator":
            return self.out(F.glu(self.first(x), -1))  # type: ignore[no-any-return]
        if self.how == "separate":
            return self.out(F.silu(self.first(x)) * self.second(x))  # type: ignore[no-any-return]
        gate, value = self.first(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)  # type: ignore[no-any-return]


@case(zeroing=True)
def glu_separate() -> Built:
    return nn.Sequential(nn.Linear(6, 12), GLU("separate"), nn.Linear(12, 3)), (tokens(6),)


@case(zeroing=True)
def glu_fused_chunk() -> Built:
    return nn.Sequential(nn.Linear(6, 12), GLU("chunk"), nn.Linear(12, 3)), (tokens(6),)


@case(zeroing=True)
def glu_operator() -> Built:
    return nn.Sequential(nn.Linear(6, 12), GLU("operator"), nn.Linear(12, 3)), (tokens(6),)


class Language(nn.Module):
    """Token and position embeddings; the head is tied to the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 12), nn.Embedding(6, 12)
        self.layer = block(Grouped(heads=4, kv=2, width=12), 12)[1]
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 11, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        return self.lm_head(self.norm(self.layer(y)))  # type: ignore[no-any-return]


@case()
def tied_embedding() -> Built:
    return Language(), (torch.randint(0, 11, (2, 5)),)


class Experts(nn.Module):
    """A dense mixture: every expert runs, and the router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 12)
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(GLU("separate") for _ in range(3))
        self.tail = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        weights = self.router(y).softmax(-1)
        mixed = torch.stack([e(y) for e in self.experts], -1)
        return self.tail((mixed * weights.unsqueeze(-2)).sum(-1))  # type: ignore[no-any-return]


@case(zeroing=True)
def mixture_of_experts() -> Built:
    return Experts(), (tokens(6),)


class StackedExperts(nn.Module):
    """Experts in one parameter; the best two are picked by their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.router = nn.Linear(6, 8), nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 10) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 10, 8) * 0.3)
        self.tail = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        scores, chosen = self.router(y).softmax(-1).topk(2, -1)
        weights = torch.zeros_like(self.router(y)).scatter(-1, chosen, scores)
        z = torch.einsum("btd,edf->betf", y, self.up).relu()
        z = torch.einsum("betf,efd->betd", z, self.down)
        return self.tail(torch.einsum("betd,bte->btd", z, weights))  # type: ignore[no-any-return]


@case()
def stacked_experts() -> Built:
    return StackedExperts(), (tokens(6),)


class Scan(nn.Module):
    """A selective state-space layer with its recurrence unrolled (Mamba)."""

    def __init__(self, width: int = 6, inner: int = 8, state: int = 4) -> None:
        super().__init__()
        self.state, self.rank = state, 2
        self.project = nn.Linear(width, 2 * inner)
        self.mix = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select = nn.Linear(inner, self.rank + 2 * state)
        self.step = nn.Linear(self.rank, inner)
        self.decay = nn.Parameter(torch.rand(inner, state))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.project(x).chunk(2, -1)
        y = F.silu(self.mix(y.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        low, b, c = self.select(y).split([self.rank, self.state, self.state], -1)
        delta = F.softplus(self.step(low))
        a = torch.exp(-delta.unsqueeze(-1) * self.decay.exp())
        u = delta.unsqueeze(-1) * b.unsqueeze(2) * y.unsqueeze(-1)
        h, outputs = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + u[:, t]
            outputs.append(torch.einsum("bds,bs->bd", h, c[:, t]))
        z = torch.stack(outputs, 1) + self.skip * y
        return self.out(z * F.silu(gate))  # type: ignore[no-any-return]


@case()
def mamba_scan() -> Built:
    return Scan(), (tokens(6, 4),)

"""Parts of published models that fit nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.patterns.attention import Attention, block
from tests.patterns.base import Built, case, conv, head, image, tokens


class CoordinateAttention(nn.Module):
    """Gates a row and a column, from means along either side that share a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.shared = conv(8, 4, 1)
        self.rows = nn.Conv2d(4, 8, 1)
        self.columns = nn.Conv2d(4, 8, 1)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        height, width = x.shape[2:]
        means = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = self.shared(means).split([height, width], 2)
        gate = self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()
        return self.head(x * gate)  # type: ignore[no-any-return]


@case()
def coordinate_attention() -> Built:
    return CoordinateAttention(), (image(),)


class GatedDilated(nn.Module):
    """WaveNet: causal dilated convolutions with gates, residuals, and skips that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 1)
        self.gated = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=d) for d in (1, 2))
        self.residual = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(8, 10, 1) for _ in range(2))
        self.last = nn.Conv1d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total: Any = 0
        for i, (gated, residual, skip) in enumerate(zip(self.gated, self.residual, self.skip, strict=True)):
            value, gate = gated(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(y)
            x = x + residual(y)
        return self.last(F.relu(total)) + x.mean(1, keepdim=True)  # type: ignore[no-any-return]


@case()
def gated_dilated_convolutions() -> Built:
    return GatedDilated(), (torch.randn(2, 4, 12),)


class MessagePassing(nn.Module):
    """A graph network: messages along edges are summed a node, means by degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.message = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
        self.update = nn.Linear(16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.embed(x)
        source, target = edges[0], edges[1]
        messages = self.message(torch.cat([h[source], h[target]], -1))
        degrees = x.new_ones(x.shape[0], 1).index_add(0, target, x.new_ones(edges.shape[1], 1))
        total = torch.zeros_like(h).index_add(0, target, messages) / degrees
        return self.head(F.relu(self.update(torch.cat([h, total], -1))))  # type: ignore[no-any-return]


@case()
def message_passing() -> Built:
    return MessagePassing(), (torch.randn(5, 6), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]))


class SpatialGating(nn.Module):
    """gMLP: a convolution over positions of half of the channels, each of which it carries."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(12)
        self.positions = nn.Conv1d(6, 6, 1)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.gelu(self.up(x)).chunk(2, -1)
        return self.head(x + self.down(left * self.positions(self.norm(right))))  # type: ignore[no-any-return]


@case()
def convolution_over_positions() -> Built:
    return SpatialGating(), (tokens(8, 6),)


class Convolved(SpatialGating):
    """A convolution that slides along the features, which therefore stay."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Conv1d(6, 6, 3, padding=1)


@case()
def convolution_along_features() -> Built:
    return nn.Sequential(Convolved(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (tokens(8, 6),)


class LinearAttention(nn.Module):
    """Attention without softmax: keys and values are multiplied first."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(8, 36)
        self.out = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.fused(x).view(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums = torch.einsum("bhtd,bhte->bhde", k, v)
        scale = 1 / torch.einsum("bhtd,bhd->bht", q, k.sum(2))
        y = torch.einsum("bhtd,bhde,bht->bhte", q, sums, scale)
        return self.head(self.out(y.transpose(1, 2).reshape(n, t, 12)))  # type: ignore[no-any-return]


@case(kept_class=False)
def linear_attention() -> Built:
    return LinearAttention(), (tokens(8, 6),)


class RelativeBias(Attention):
    """Scores get a learned bias a head and distance (T5), and a fixed slope a head (ALiBi)."""

    slopes: Tensor

    def __init__(self, width: int = 12, heads: int = 4, dim: int = 4) -> None:
        super().__init__(width, heads, dim)
        self.table = nn.Embedding(11, heads)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        distance = (places[None] - places[:, None]).clamp(-5, 5)
        bias = self.table(distance + 5).permute(2, 0, 1) - distance.abs() * self.slopes[:, None, None]
        return (q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v  # type: ignore[no-any-return]


@case()
def relative_positions() -> Built:
    return block(RelativeBias()), (tokens(6),)


class ComplexRotary(nn.Module):
    """Rotary positions as products of complex numbers (Llama)."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 12)
        angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles).to(torch.complex128))

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 4, 4) for layer in (self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in (self._turned(q), self._turned(k), v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + self.out(y.transpose(1, 2).reshape(n, t, 16))  # type: ignore[no-any-return]


@case(kept_class=False)
def rotary_complex() -> Built:
    return block(ComplexRotary()), (tokens(6),)


class Spectral(nn.Module):
    """A layer in the Fourier domain (FNO): low frequencies are mixed by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(8, 10, 3, 3, 2) * 0.2)
        self.beside = nn.Conv2d(8, 10, 1)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        low = torch.fft.rfft2(x)[:, :, :3, :3]
        mixed = torch.einsum("bixy,ioxy->boxy", low, torch.view_as_complex(self.weight))
        y = torch.fft.irfft2(mixed, s=x.shape[-2:])
        return self.head(F.gelu(y + self.beside(x)))  # type: ignore[no-any-return]


@case()
def spectral_convolution() -> Built:
    return Spectral(), (image(),)


class Sampled(nn.Module):
    """Features are sampled at learned places (deformable convolutions, spatial transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.offsets = nn.Conv2d(8, 2, 3, padding=1)
        self.body = conv(8, 6)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        places = torch.tanh(self.offsets(x)).permute(0, 2, 3, 1)
        return self.head(self.body(F.grid_sample(x, places, align_corners=False)))  # type: ignore[no-any-return]


@case()
def sampled_features() -> Built:
    return Sampled(), (image(),)


class Windows(nn.Module):
    """Windows are unfolded, mixed and folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.mix = nn.Conv1d(8 * 4, 6 * 4, 1)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(F.unfold(self.stem(x), 2, stride=2))
        return self.head(F.fold(y, x.shape[2:], 2, stride=2))  # type: ignore[no-any-return]


@case()
def unfolded_windows() -> Built:
    return Windows(), (image(),)


class DynamicConv(nn.Module):
    """Every sample has a kernel of its own, a mixture of learned ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.router = nn.Linear(8, 3)
        self.kernels = nn.Parameter(torch.randn(3, 6, 8, 3, 3) * 0.2)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        kernels = self.router(x.mean((2, 3))).softmax(-1) @ self.kernels.flatten(1)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels.view(n * 6, 8, 3, 3), padding=1, groups=n)
        return self.head(y.view(n, 6, h, w))  # type: ignore[no-any-return]


@case(kept_class=False)
def dynamic_convolution() -> Built:
    return DynamicConv(), (image(),)


class Coupling(nn.Module):
    """A normalising flow: halves shift and scale each other."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros_like(x[:, 0])
        for net in self.nets:
            left, right = x.chunk(2, -1)
            scale, shift = net(left).chunk(2, -1)
            x = torch.cat([right * torch.tanh(scale).exp() + shift, left], -1)
            volume = volume + torch.tanh(scale).sum(-1)
        return x, volume


@case()
def coupling_layers() -> Built:
    return Coupling(), (torch.randn(3, 8),)


class TopKExperts(nn.Module):
    """Sparse experts: each works on the tokens that chose it, and adds to their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = torch.zeros_like(self.router(x)).scatter(-1, chosen, scores)
        y = sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.experts))
        return self.head(x + y)  # type: ignore[no-any-return]


@case()
def experts_by_top_k() -> Built:
    return TopKExperts(), (tokens(8, 6),)


class Cached(nn.Module):
    """Keys and values of earlier tokens come in and go out; layers beside them are narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> dict[str, Any]:
        n = x.shape[0]
        q, k, v = (y(x).view(n, -1, 3, 4).transpose(1, 2) for y in (self.q, self.k, self.v))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, 12)
        x = x + self.out(y)
        return {"y": x + self.down(F.silu(self.up(x))), "cache": (k, v)}


@case()
def key_value_cache() -> Built:
    return Cached(), (tokens(8, 5), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))


class Regions(nn.Module):
    """Parts run without gradients, checkpointed, and with autocast switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 10), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            length = x.norm(dim=-1, keepdim=True)
        y = checkpoint(lambda t: self.b(F.relu(self.a(t))), x / length, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            y = F.relu(y)
        return self.c(y)  # type: ignore[no-any-return]


@case()
def regions() -> Built:
    return Regions(), (tokens(8, 6),)

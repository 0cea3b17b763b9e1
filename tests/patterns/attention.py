"""Attention in all spellings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Add, Apply, Built, case, conv, head, image, tokens


class Attention(nn.Module):
    """Separate projections, heads by attributes."""

    def __init__(self, width: int = 12, heads: int = 4, dim: int = 6, kv: int | None = None) -> None:
        super().__init__()
        self.heads, self.dim, self.kv = heads, dim, kv or heads
        self.q = nn.Linear(width, heads * dim)
        self.k, self.v = nn.Linear(width, self.kv * dim), nn.Linear(width, self.kv * dim)
        self.out = nn.Linear(heads * dim, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(*self.split(x)).transpose(1, 2)
        return self.out(y.reshape(x.shape[0], x.shape[1], -1))  # type: ignore[no-any-return]


def block(attention: nn.Module, width: int = 12) -> nn.Sequential:
    """A transformer layer between an embedding and a classifier."""
    mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
    attend = nn.Sequential(nn.LayerNorm(width), attention)
    return nn.Sequential(
        nn.Linear(6, width), Add(nn.Identity(), attend), Add(nn.Identity(), mlp), nn.Linear(width, 3)
    )


@case()
def attention() -> Built:
    return block(Attention()), (tokens(6),)


class DefaultScale(Attention):
    """The scale is read from the head size at run time."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@case(kept_class=False)
def attention_default_scale() -> Built:
    return block(DefaultScale()), (tokens(6),)


class WrittenOut(Attention):
    """Softmax attention by hand, causal, with a scale computed from the head size."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v  # type: ignore[no-any-return]


@case(kept_class=False)
def attention_written_out() -> Built:
    return block(WrittenOut()), (tokens(6),)


class Einsum(Attention):
    """Attention by einsum, without reshaping to heads first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.dim)) for y in (self.q(x), self.k(x), self.v(x)))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))  # type: ignore[no-any-return]


@case()
def attention_einsum() -> Built:
    return block(Einsum()), (tokens(6),)


class Grouped(Attention):
    """Grouped queries by repeating keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = self.heads // self.kv
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


@case()
def grouped_queries_repeated() -> Built:
    return block(Grouped(heads=4, kv=2)), (tokens(6),)


class GroupedExpanded(Attention):
    """Grouped queries by expanding keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, kv, t, d = k.shape
        times = self.heads // self.kv
        k, v = (y[:, :, None].expand(b, kv, times, t, d).reshape(b, kv * times, t, d) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)


@case()
def grouped_queries_expanded() -> Built:
    return block(GroupedExpanded(heads=4, kv=2)), (tokens(6),)


class GroupedBuiltIn(Attention):
    """Grouped queries by the operator itself."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5)


@case()
def grouped_queries_built_in() -> Built:
    return block(GroupedBuiltIn(heads=4, kv=2)), (tokens(6),)


@case()
def multi_query() -> Built:
    return block(GroupedBuiltIn(heads=4, kv=1)), (tokens(6),)


class Fused(nn.Module):
    """One projection for queries, keys and values, taken apart in one of several ways."""

    def __init__(self, how: str, width: int = 12, heads: int = 4, dim: int = 6) -> None:
        super().__init__()
        self.how, self.heads, self.dim = how, heads, dim
        self.qkv = nn.Linear(width, 3 * heads * dim)
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x)
        if self.how == "static":
            q, k, v = y.reshape(b, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        elif self.how == "minus one":
            q, k, v = y.reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = y.chunk(3, -1) if self.how == "chunk" else y.split(self.heads * self.dim, -1)
            q, k, v = (p.reshape(b, t, self.heads, -1).transpose(1, 2) for p in parts)
        z = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(z.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@case()
def fused_qkv_static() -> Built:
    return block(Fused("static")), (tokens(6),)


@case()
def fused_qkv_minus_one() -> Built:
    return block(Fused("minus one")), (tokens(6),)


@case()
def fused_qkv_chunk() -> Built:
    return block(Fused("chunk")), (tokens(6),)


@case()
def fused_qkv_split() -> Built:
    return block(Fused("split")), (tokens(6),)


class SelfAttention(nn.Module):
    """PyTorch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@case(kept_class=False)
def multihead_attention() -> Built:
    return block(SelfAttention()), (tokens(6),)


@case(kept_class=False)
def transformer_encoder_layer() -> Built:
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True)
    return nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 3)), (tokens(6),)


class Rotary(Attention):
    """Rotary positions: halves of a head are turned together."""

    frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", 1 / 100 ** (torch.arange(0, 6, 2) / 6), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * self.frequency
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, scale=0.5)


@case(kept_class=False)
def rotary() -> Built:
    return block(Rotary()), (tokens(6),)


class CrossAttention(nn.Module):
    """Learned queries look at a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 12))
        self.k, self.v, self.out = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(x.shape[0], -1, -1)
        return self.out(F.scaled_dot_product_attention(q, self.k(x), self.v(x))).mean(1)  # type: ignore[no-any-return]


@case(kept_class=False)
def learned_queries() -> Built:
    return CrossAttention(), (tokens(6),)


class Positions(nn.Module):
    """A class token and position embeddings in front of a layer (ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.position = nn.Parameter(torch.randn(1, 5, 12))
        self.attention = Fused("chunk")
        self.norm, self.tail = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.position
        y = y + self.attention(y)
        return self.tail(self.norm(y)[:, 0])  # type: ignore[no-any-return]


@case()
def vision_transformer() -> Built:
    return Positions(), (image(),)


class NonLocal(nn.Module):
    """Attention between the pixels of an image."""

    def __init__(self, channels: int = 8, inner: int = 4) -> None:
        super().__init__()
        self.theta, self.phi = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.g, self.out = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        y = (weights @ v.transpose(1, 2)).transpose(1, 2)
        return x + self.out(y.unflatten(-1, x.shape[-2:]))  # type: ignore[no-any-return]


@case()
def non_local() -> Built:
    return nn.Sequential(conv(3, 8), NonLocal(), head(8)), (image(size=4),)


class WindowAttention(nn.Module):
    """Swin: windows are cut out, attended in with a bias table, shifted and put back."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (4, 4)))
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = torch.roll(x, (-1, -1), (1, 2))
        y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        weights = (q * 0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(y.shape[0], 4, -1))
        y = y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        return torch.roll(y, (1, 1), (1, 2))


@case(kept_class=False)
def swin_window() -> Built:
    last, first = Apply(lambda x: x.permute(0, 2, 3, 1)), Apply(lambda x: x.permute(0, 3, 1, 2))
    inner = Add(nn.Identity(), nn.Sequential(nn.LayerNorm(12), WindowAttention()))
    return nn.Sequential(nn.Conv2d(3, 12, 2, 2), last, inner, first, head(12)), (image(),)

"""Attention as runtimes fuse it (domain ``com.microsoft``): projections, masks, caches, rotation inside."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.attention import default_scale, heads, rotated
from sparsecc.reference.onnx_ops.registry import Ctx, op


def attend(ctx: Ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """q[B,Hq,L,E] k[B,Hk,T,E] v[B,Hk,T,F] bias[*,L,T] -> y[B,L,Hq*F] shares[B,Hq,L,T]"""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (ctx.real("scale") or default_scale(q.shape[3]))
    cap = ctx.real("softcap")
    if cap > 0:
        scores = torch.tanh(scores / cap) * cap
    shares = torch.softmax(scores if bias is None else scores + bias, -1)
    y = (shares @ v).transpose(1, 2)
    return y.reshape(y.shape[0], y.shape[1], -1), shares


def _hidden(ctx: Ctx, keep: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores: 0 where a key may be seen, the node's filter value where not."""
    value = ctx.real("mask_filter_value", -10000.0)
    return torch.zeros(keep.shape, dtype=like.dtype, device=like.device).masked_fill(~keep, value)


def _masks(ctx: Ctx, q: Tensor, keys: int, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """All masks of a node together; ``mask`` is [B], [2B], [B,T] or [B,L,T]."""
    batch, length = q.shape[0], q.shape[2]
    total: Tensor | None = None
    columns = torch.arange(keys, device=q.device)
    if mask is not None:
        if mask.ndim == 1 and mask.shape[0] in (batch, 2 * batch):
            seen = columns < mask[:batch, None]
            if mask.shape[0] == 2 * batch:
                seen = seen & (columns >= mask[batch:, None])
            total = _hidden(ctx, seen, q)[:, None, None]
        elif mask.ndim in (2, 3):
            shown = _hidden(ctx, mask > 0, q)
            total = shown[:, None, None] if mask.ndim == 2 else shown[:, None]
        else:
            raise UnsupportedModel(f"{ctx.node.op_type} with a mask of shape {list(mask.shape)}")
    if ctx.flag("unidirectional"):
        rows = torch.arange(length, device=q.device)[:, None]
        ahead = columns <= rows + (keys - length)
        low = torch.zeros(ahead.shape, dtype=q.dtype, device=q.device).masked_fill(~ahead, float("-inf"))
        total = low if total is None else total + low
    if bias is not None:
        total = bias if total is None else total + bias
    return total


@op("com.microsoft::MultiHeadAttention")
def multi_head_attention(
    ctx: Ctx,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    length: Tensor | None = None,
    beams: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """q[B,L,H*E] k[B,S,H*E] v[B,S,H*F] bias[H*E+H*E+H*F] padding[B,*] mask[*,L,T] past[B,H,P,E|F]
    -> y[B,L,H*F] key[B,H,T,E] value[B,H,T,F] shares[B,H,L,T]"""
    if k is None or v is None or q.ndim != 3 or k.ndim == 5 or length is not None or beams is not None:
        raise UnsupportedModel("MultiHeadAttention on packed operands, or with a cache in a shared buffer")
    count = ctx.integer("num_heads")
    if bias is not None:
        sizes = [q.shape[2], k.shape[2], v.shape[2]] if k.ndim == 3 else [q.shape[2], 0, 0]
        own = torch.split(bias[: sum(sizes)], sizes)
        q = q + own[0]
        k, v = (k + own[1], v + own[2]) if k.ndim == 3 else (k, v)
    q = heads(q, count)
    k, v = (heads(x, count) if x.ndim == 3 else x for x in (k, v))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    y, shares = attend(ctx, q, k, v, _masks(ctx, q, k.shape[2], padding, mask))
    return y, k, v, shares


@op("com.microsoft::Attention")
def attention(
    ctx: Ctx,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    bias: Tensor | None = None,
    length: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x[B,L,D] w[D,H*E+H*E+H*F] b[H*E+H*E+H*F] mask past[2,B,H,P,E] bias[*,L,T]
    -> y[B,L,H*F] present[2,B,H,T,E]"""
    if ctx.flag("do_rotary") or ctx.flag("past_present_share_buffer") or length is not None:
        raise UnsupportedModel("Attention with rotation, or with a cache in a shared buffer")
    return _projected(ctx, x @ w if b is None else x @ w + b, mask, past, bias)


def _projected(
    ctx: Ctx, joint: Tensor, mask: Tensor | None, past: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    sizes = ctx.integers("qkv_hidden_sizes") or [joint.shape[2] // 3] * 3
    q, k, v = (heads(part, ctx.integer("num_heads")) for part in torch.split(joint, sizes, 2))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = attend(ctx, q, k, v, _masks(ctx, q, k.shape[2], mask, bias))
    return (y, torch.stack([k, v])) if ctx.wants(1) else (y,)


@op("com.microsoft::QAttention", kind="raw")
def quantised_attention(
    ctx: Ctx,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    mask: Tensor | None = None,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    past: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x[B,L,D] w[D,3*H*E] as integers, b[3*H*E], scales, mask, zero points, past -> y[B,L,H*E] present"""
    joint = torch.empty(*x.shape[:2], w.shape[1], dtype=b.dtype, device=b.device)
    if not joint.is_meta:
        left, right = x.double(), w.double()
        left = left if x_zero is None else left - x_zero.double()
        right = right if w_zero is None else right - w_zero.double()
        joint = (left @ right).to(b.dtype) * (x_scale * w_scale) + b
    return _projected(ctx, joint, mask, past, None)


@op("com.microsoft::RotaryEmbedding")
def rotary_embedding(ctx: Ctx, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x[B,H,L,E] (or [B,L,H*E]) positions[1] or [B,L] cos[P,R/2] sin[P,R/2] -> y like x"""
    if ctx.flag("is_packed_batching"):
        raise UnsupportedModel("RotaryEmbedding of ragged batches")
    shape, size = x.shape, ctx.integer("rotary_embedding_dim")
    count = ctx.integer("num_heads") or (x.shape[-1] // (2 * cos.shape[1]) if x.ndim == 3 else x.shape[1])
    flat = x.transpose(1, 2) if x.ndim == 4 else x.reshape(*shape[:2], count, -1)
    if not (x.is_meta or positions.is_meta):
        where = positions.long()
        if where.numel() == 1:
            where = where.reshape(1, 1) + torch.arange(flat.shape[1])
        cos, sin = cos[where.expand(flat.shape[:2])], sin[where.expand(flat.shape[:2])]
        flat = rotated(flat, cos, sin, size or 2 * cos.shape[-1], ctx.flag("interleaved"))
    return flat.transpose(1, 2).reshape(shape) if x.ndim == 4 else flat.reshape(shape)


@op("com.microsoft::GroupQueryAttention")
def group_query_attention(
    ctx: Ctx,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    lengths: Tensor,
    total: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    *others: Tensor | None,
) -> tuple[Tensor, ...]:
    """q[B,L,Hq*E] k[B,L,Hk*E] v[B,L,Hk*E] past[B,Hk,P,E] lengths[B] total[] cos[M,R/2] sin[M,R/2]
    positions[B,L] bias[*,L,T] -> y[B,L,Hq*E] key[B,Hk,T,E] value[B,Hk,T,E]"""
    if sink is not None or any(x is not None for x in others) or ctx.flag("smooth_softmax"):
        raise UnsupportedModel("GroupQueryAttention with norms, sinks or a quantised cache")
    queries, keys = ctx.integer("num_heads"), ctx.integer("kv_num_heads")
    if k is None or v is None:
        width = q.shape[2] // (queries + 2 * keys)
        q, k, v = torch.split(q, [queries * width, keys * width, keys * width], 2)
    q4, k4, v4 = heads(q, queries), heads(k, keys), heads(v, keys)
    length, past = q4.shape[2], 0 if past_key is None else past_key.shape[2]
    if q.is_meta:
        full = _total(ctx, total, past, past + length)
        cache = torch.empty(q4.shape[0], keys, full, q4.shape[3], dtype=q.dtype, device="meta")
        return torch.empty(*q.shape[:2], q4.shape[3] * queries, dtype=q.dtype, device="meta"), cache, cache
    full = _total(ctx, total, past, past + length)
    ends = lengths.reshape(-1).long() + 1
    before = (ends - length).clamp(0, full - length) if past else torch.zeros_like(ends)
    where = before[:, None] + torch.arange(length)
    if ctx.flag("do_rotary") and cos is not None and sin is not None:
        turns = where if positions is None else positions.long()
        turns = turns.clamp(0, cos.shape[0] - 1)
        half, interleaved = cos.shape[1], ctx.flag("rotary_interleaved")
        tables = cos[turns], sin[turns]
        q4, k4 = (
            rotated(x.transpose(1, 2), *tables, 2 * half, interleaved).transpose(1, 2) for x in (q4, k4)
        )
    key, value = _cached(past_key, k4, full, where), _cached(past_value, v4, full, where)
    seen = _seen(ctx, where, full)
    hidden = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))
    if bias is not None:
        hidden = hidden + torch.nn.functional.pad(bias, (0, full - bias.shape[-1]))
    return attend(ctx, q4, key, value, hidden)[0], key, value


def _total(ctx: Ctx, total: Tensor, past: int, default: int) -> int:
    """Length of the cache: what the model says if that can be told, at least what goes into it."""
    if total.is_meta and id(total) not in ctx.known:
        return default
    return max(int(ctx.item(total)), past, default - past)


def _cached(past: Tensor | None, new: Tensor, full: int, where: Tensor) -> Tensor:
    """past[B,H,P,E] new[B,H,L,E] -> [B,H,full,E] with the new entries at where[B,L]"""
    out = new.new_zeros(*new.shape[:2], full, new.shape[3])
    if past is not None:
        out[:, :, : past.shape[2]] = past
    return out.scatter(2, where[:, None, :, None].expand(new.shape), new)


def _seen(ctx: Ctx, where: Tensor, full: int) -> Tensor:
    """Which keys a query sees, [B,1,L,T]."""
    columns = torch.arange(full)
    at = where[:, None, :, None]
    seen = columns <= at if ctx.flag("causal", True) else columns <= where.max()
    window = ctx.integer("local_window_size", -1)
    return seen & (columns > at - window) if window >= 0 else seen

"""Attention and rotary position embedding."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op


def heads(x: Tensor, heads: int) -> Tensor:
    """x[N,S,heads*E] -> [N,heads,S,E]"""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def default_scale(width: int) -> float:
    """1/sqrt(E) as the float32 that an attribute would hold, so that spelling it out changes nothing."""
    return float(np.float32(1 / math.sqrt(width)))


@op("Attention")
def attention(
    ctx: Ctx,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """q[N,Hq,S,E] k[N,Hk,T,E] v[N,Hk,T,F] mask[*,S,T] past[N,Hk,P,E|F] lengths[N]
    -> y[N,Hq,S,F] key[N,Hk,P+T,E] value[N,Hk,P+T,F] scores[N,Hq,S,P+T]; or all of it as [N,S,H*E]."""
    flat = q.ndim == 3
    if flat:
        q = heads(q, ctx.integer("q_num_heads"))
        k, v = (heads(x, ctx.integer("kv_num_heads")) for x in (k, v))
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present_key, present_value = k, v
    bias = _bias(ctx, q, k.shape[2], mask, past, lengths)
    if q.shape[1] != k.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = math.sqrt(ctx.real("scale", default_scale(q.shape[3])))
    scores = (q * scale) @ (k.transpose(2, 3) * scale)
    raw = scores
    softcap = ctx.real("softcap", 0.0)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    biased = scores + bias
    hidden = (bias == float("-inf")).all(-1, keepdim=True)
    shares = torch.where(hidden, torch.zeros_like(biased), torch.softmax(biased, -1))
    y = shares @ v
    if flat:
        y = y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
    mode = ctx.integer("qk_matmul_output_mode", 0)
    return y, present_key, present_value, (raw, scores, biased, shares)[mode]


def _bias(ctx: Ctx, q: Tensor, keys: int, mask: Tensor | None, past: int, lengths: Tensor | None) -> Tensor:
    """What is added to the scores: 0 where a key may be seen, -inf where not, or the given mask."""
    queries = q.shape[2]
    bias = q.new_zeros(queries, keys)
    minus = float("-inf")
    if mask is not None:
        if mask.shape[-1] < keys:
            missing = (0, keys - mask.shape[-1])
            if mask.dtype == torch.bool:
                mask = torch.nn.functional.pad(mask.to(torch.uint8), missing).to(torch.bool)
            else:
                mask = torch.nn.functional.pad(mask, missing, value=minus)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, minus)
        bias = bias + mask
    rows = torch.arange(queries, device=q.device)[:, None]
    columns = torch.arange(keys, device=q.device)[None, :]
    shift: Tensor = rows.new_full((1, 1, 1, 1), past)
    if lengths is not None and past == 0:
        shift = (lengths.reshape(-1, 1, 1, 1) - queries).to(rows.dtype)
    ahead = columns - rows - shift  # how far a key lies behind the query's own position
    seen = torch.ones_like(ahead, dtype=torch.bool)
    left, right = ctx.integer("left_window_size", -1), ctx.integer("right_window_size", -1)
    if ctx.flag("is_causal"):
        seen = seen & (ahead <= 0)
    if left >= 0:
        seen = seen & (-ahead <= left)
    if right >= 0:
        seen = seen & (ahead <= right)
    if lengths is not None:
        seen = seen & (columns < lengths.reshape(-1, 1, 1, 1))
    return bias + torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, minus)


@op("RotaryEmbedding")
def rotary_embedding(
    ctx: Ctx, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> Tensor:
    """x[N,H,S,E] (or [N,S,H*E]) cos[P,R/2] sin[P,R/2] positions[N,S] -> y like x"""
    shape = x.shape
    by_heads = x.ndim == 4
    x = x.transpose(1, 2) if by_heads else x.reshape(*shape[:2], ctx.integer("num_heads"), -1)
    size = ctx.integer("rotary_embedding_dim") or x.shape[3]
    if positions is not None:
        if x.is_meta or positions.is_meta:
            cos, sin = (t.new_empty(*positions.shape, t.shape[-1], device="meta") for t in (cos, sin))
        else:
            cos, sin = cos[positions.to(torch.int64)], sin[positions.to(torch.int64)]
    if cos.shape[-1] != size // 2:
        raise ValueError(f"rotary tables of {cos.shape[-1]} columns for {size} rotated dimensions")
    y = rotated(x, cos, sin, size, ctx.flag("interleaved"))
    return y.transpose(1, 2) if by_heads else y.reshape(shape)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool) -> Tensor:
    """x[B,L,H,E] cos[B,L,R/2] sin[B,L,R/2] -> y[B,L,H,E]; the first R = ``size`` turn in pairs"""
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        turned = torch.stack([real, imaginary], -1).reshape(turned.shape)
    else:
        turned = torch.cat([real, imaginary], -1)
    return torch.cat([turned, rest], -1)

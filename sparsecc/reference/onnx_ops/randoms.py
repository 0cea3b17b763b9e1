"""Random operators: deterministic here, from the node's seed or its place in the graph.

Their values agree with no runtime, but are the same for two runs of one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op


def _generator(ctx: Ctx) -> torch.Generator:
    seed = ctx.real("seed", 0.0)
    return torch.Generator().manual_seed(hash((ctx.index, seed)) & 0x7FFFFFFF)


def _draw(ctx: Ctx, shape: list[int], dtype: torch.dtype, normal: bool) -> Tensor:
    if ctx.abstract:
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = _generator(ctx)
    if normal:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers * ctx.real("scale", 1.0) + ctx.real("mean", 0.0)).to(dtype)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
    low, high = ctx.real("low", 0.0), ctx.real("high", 1.0)
    return (numbers * (high - low) + low).to(dtype)


def _type(ctx: Ctx, x: Tensor | None) -> torch.dtype:
    if ctx.has("dtype") or x is None:
        return ctx.need_dtype(ctx.integer("dtype", 1))
    return x.dtype


@op("RandomNormal", kind="raw")
def random_normal(ctx: Ctx) -> Tensor:
    """-> y[*shape]"""
    return _draw(ctx, ctx.integers("shape") or [], _type(ctx, None), True)


@op("RandomUniform", kind="raw")
def random_uniform(ctx: Ctx) -> Tensor:
    """-> y[*shape]"""
    return _draw(ctx, ctx.integers("shape") or [], _type(ctx, None), False)


@op("RandomNormalLike", kind="raw")
def random_normal_like(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return _draw(ctx, list(x.shape), _type(ctx, x), True)


@op("RandomUniformLike", kind="raw")
def random_uniform_like(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S]"""
    return _draw(ctx, list(x.shape), _type(ctx, x), False)


@op("Bernoulli", kind="raw")
def bernoulli(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] probabilities -> y[*S] 0 or 1"""
    draws = _draw(ctx, list(x.shape), torch.float64, False)
    return (draws < x).to(_type(ctx, x))


@op("Multinomial", kind="raw")
def multinomial(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C] log weights -> y[N,sample_size] classes"""
    count = ctx.integer("sample_size", 1)
    dtype = ctx.need_dtype(ctx.integer("dtype", 6))
    if x.is_meta:
        return x.new_empty(x.shape[0], count, dtype=dtype)
    shares = torch.softmax(x.to(torch.float64), -1)
    return torch.multinomial(shares, count, replacement=True, generator=_generator(ctx)).to(dtype)

"""Reading and writing by index, and tensors made of positions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, DataDependent, Value, op, positive_axis


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Indices counted from the front; those outside raise ``IndexError``."""
    index = index.to(torch.int64)
    if index.is_meta or not index.numel():
        return index
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.where(index < 0, index + size, index)  # nothing can be read while a graph is captured
    low, high = int(index.min()), int(index.max())
    if low < -size or high >= size:
        raise IndexError(f"index {low if low < -size else high} is outside of an axis of {size}")
    return torch.where(index < 0, index + size, index) if low < 0 else index


@op("Gather", kind="moves")
def gather(ctx: Ctx, x: Tensor, index: Tensor) -> Tensor:
    """x[*A,n,*B] index[*I] -> y[*A,*I,*B]"""
    axis = positive_axis(ctx.integer("axis", 0), x.ndim)
    shape = [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]]
    if x.is_meta or index.is_meta:
        return x.new_empty(shape, device="meta")
    flat = _wrapped(index, x.shape[axis]).reshape(-1)
    return x.index_select(axis, flat).reshape(shape)


@op("GatherElements", kind="moves")
def gather_elements(ctx: Ctx, x: Tensor, index: Tensor) -> Tensor:
    """x[*S] index[*I] -> y[*I]"""
    axis = positive_axis(ctx.integer("axis", 0), x.ndim)
    if x.is_meta or index.is_meta:
        return x.new_empty(index.shape, device="meta")
    return torch.gather(x, axis, _wrapped(index, x.shape[axis]))


@op("GatherND", "com.microsoft::GatherND", kind="moves")
def gather_nd(ctx: Ctx, x: Tensor, index: Tensor) -> Tensor:
    """x[*B,*I,*S] index[*B,*J,len(I)] -> y[*B,*J,*S]"""
    batch = ctx.integer("batch_dims", 0)
    depth = index.shape[-1]
    shape = [*index.shape[:-1], *x.shape[batch + depth :]]
    if x.is_meta or index.is_meta:
        return x.new_empty(shape, device="meta")
    rows = math.prod(index.shape[:batch])
    flat = x.reshape(rows, *x.shape[batch:])
    wanted = index.reshape(rows, math.prod(index.shape[batch:-1]), depth)
    first = torch.arange(rows)[:, None].expand(rows, wanted.shape[1])
    places = [_wrapped(wanted[..., k], x.shape[batch + k]) for k in range(depth)]
    return flat[(first, *places)].reshape(shape)


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", "Scatter", kind="moves")
def scatter_elements(ctx: Ctx, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """x[*S] index[*I] updates[*I] -> y[*S]"""
    if x.is_meta or index.is_meta or updates.is_meta:
        return x.new_empty(x.shape, device="meta")
    axis = positive_axis(ctx.integer("axis", 0), x.ndim)
    index = _wrapped(index, x.shape[axis])
    how = ctx.text("reduction", "none")
    if how == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCE[how], include_self=True)


@op("ScatterND", kind="moves")
def scatter_nd(ctx: Ctx, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """x[*I,*S] index[*J,len(I)] updates[*J,*S] -> y[*I,*S]"""
    if x.is_meta or index.is_meta or updates.is_meta:
        return x.new_empty(x.shape, device="meta")
    depth = index.shape[-1]
    wanted = index.reshape(math.prod(index.shape[:-1]), depth)
    rows = torch.zeros(len(wanted), dtype=torch.int64)
    for k in range(depth):
        rows = rows * x.shape[k] + _wrapped(wanted[:, k], x.shape[k])
    width = math.prod(x.shape[depth:])
    flat = x.reshape(math.prod(x.shape[:depth]), width)
    values = updates.reshape(len(wanted), width)
    how = ctx.text("reduction", "none")
    if how == "none":
        y = flat.index_copy(0, rows, values)
    else:
        places = rows[:, None].expand_as(values)
        y = flat.scatter_reduce(0, places, values, _REDUCE[how], include_self=True)
    return y.reshape(x.shape)


@op("TensorScatter", kind="moves")
def tensor_scatter(ctx: Ctx, cache: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
    """cache[B,*S] update[B,*S'] starts[B] -> y[B,*S]; writes along ``axis`` from each row's start on."""
    if cache.is_meta or update.is_meta:
        return cache.new_empty(cache.shape, device="meta")
    axis = positive_axis(ctx.integer("axis", -2), cache.ndim)
    begin = torch.zeros(cache.shape[0], dtype=torch.int64) if starts is None else starts.to(torch.int64)
    places = begin[:, None] + torch.arange(update.shape[axis])
    if ctx.text("mode", "linear") == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = places.shape
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)


@op("OneHot", kind="raw")
def one_hot(ctx: Ctx, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """index[*I] depth[] values[2] -> y[*I with depth at axis]"""
    count = int(ctx.item(depth))
    axis = positive_axis(ctx.integer("axis", -1), index.ndim + 1)
    if index.is_meta or values.is_meta:
        shape = [*index.shape[:axis], count, *index.shape[axis:]]
        return values.new_empty(shape, device="meta")
    whole = index.to(torch.int64)
    whole = torch.where(whole < 0, whole + count, whole)
    ladder = torch.arange(count).reshape(-1, *[1] * (index.ndim - axis))
    return torch.where(whole.unsqueeze(axis) == ladder, values[1], values[0])


@op("NonZero", kind="raw")
def non_zero(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> positions[rank,n]"""
    if ctx.hidden(x):
        return torch.empty(x.ndim, ctx.counted(), dtype=torch.int64, device="meta")
    x = ctx.values(x)
    found = torch.nonzero(x.reshape(1) if x.ndim == 0 else x)
    return (found[:, :0] if x.ndim == 0 else found).T.contiguous()


@op("Unique", kind="raw")
def unique(ctx: Ctx, x: Tensor) -> tuple[Tensor, ...]:
    """x[*S] -> values[n] (or slices along the axis) first[n] back[*] counts[n]"""
    axis = positive_axis(ctx.integer("axis"), x.ndim) if ctx.has("axis") else None
    if ctx.hidden(x):
        n, along = ctx.counted(), x.numel() if axis is None else x.shape[axis]
        shape = [n] if axis is None else [*x.shape[:axis], n, *x.shape[axis + 1 :]]
        places = [torch.empty(size, dtype=torch.int64, device="meta") for size in (n, along, n)]
        return torch.empty(shape, dtype=x.dtype, device="meta"), *places
    numbers = (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
    values, first, back, counts = np.unique(numbers, True, True, True, axis=axis)
    order = np.arange(len(first)) if ctx.flag("sorted", True) else np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    found = (values.take(order, axis=axis or 0), first[order], place[back.reshape(-1)], counts[order])
    distinct, *rest = (torch.from_numpy(np.ascontiguousarray(part)).to(x.device) for part in found)
    return distinct.to(x.dtype), *rest


@op("Compress", kind="moves")
def compress(ctx: Ctx, x: Tensor, condition: Tensor) -> Tensor:
    """x[*S] condition[n] -> y[*S with the axis's chosen elements]"""
    places = (
        torch.empty(ctx.counted(), device="meta")
        if ctx.hidden(condition)
        else torch.nonzero(ctx.values(condition)).reshape(-1)
    )
    if not ctx.has("axis"):
        x, axis = x.reshape(-1), 0
    else:
        axis = positive_axis(ctx.integer("axis"), x.ndim)
    if x.is_meta:
        return x.new_empty([*x.shape[:axis], len(places), *x.shape[axis + 1 :]])
    return x.movedim(axis, 0)[places].movedim(0, axis)  # index_select refuses an axis without elements


@op("Trilu")
def trilu(ctx: Ctx, x: Tensor, k: Tensor | None = None) -> Tensor:
    """x[*B,N,M] k[] -> y[*B,N,M]"""
    if x.is_meta:
        return torch.empty_like(x)
    offset = 0 if k is None else int(ctx.item(k))
    offset = max(-x.shape[-2] - 1, min(offset, x.shape[-1] + 1))
    return torch.triu(x, offset) if ctx.flag("upper", True) else torch.tril(x, offset)


@op("EyeLike", kind="raw")
def eye_like(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,M] -> y[N,M]"""
    dtype = ctx.need_dtype(ctx.integer("dtype")) if ctx.has("dtype") else x.dtype
    if x.is_meta:
        return x.new_empty(x.shape, dtype=dtype)
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
    return (columns - rows == ctx.integer("k", 0)).to(dtype)


@op("Range", "com.microsoft::Range", kind="raw")
def range_(ctx: Ctx, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """start[] limit[] delta[] -> y[max(ceil((limit - start) / delta), 0)]"""
    dtype = start.dtype
    low, high, step = ctx.item(start), ctx.item(limit), ctx.item(delta)
    count = max(math.ceil((high - low) / step), 0) if dtype.is_floating_point else len(range(low, high, step))
    if count > 1 << 40:
        raise ValueError(f"Range of {count} elements")
    if ctx.abstract and count > 1 << 16:
        return torch.empty(count, dtype=dtype, device="meta")
    if dtype.is_floating_point:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(count, dtype=wide)
        return torch.add(low, steps * step).to(dtype)
    return torch.add(low, torch.arange(count, dtype=dtype) * step)


@op("ConstantOfShape", kind="raw")
def constant_of_shape(ctx: Ctx, shape: Tensor) -> Value:
    """shape[R] -> y[*shape]"""
    sizes = ctx.int_list(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"ConstantOfShape of {sizes}")
    value = ctx.tensor("value") if ctx.has("value") else ctx.promote(torch.zeros(1))
    if not isinstance(value, Tensor):
        raise DataDependent("ConstantOfShape of a type that torch lacks")
    if ctx.abstract and math.prod(sizes) > 1 << 16:
        return value.new_empty(sizes, device="meta")
    return value.reshape(-1)[0].expand(sizes).clone()

"""Operators that move elements without changing them, and those that ask for shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, Value, broadcast, need, op, positive_axis


@op("Identity", kind="moves")
def identity(ctx: Ctx, x: Value) -> Value:
    """x -> x"""
    return x


@op("Constant", kind="raw")
def constant(ctx: Ctx) -> Value:
    """-> the value in the attribute"""
    from sparsecc.onnxfile.model import constant_attribute

    for attribute in ctx.node.attribute:
        if attribute.name == "value":
            return ctx.tensor("value")
        if attribute.name.startswith("value_"):
            return ctx.constant(constant_attribute(attribute))
    raise ValueError("Constant without a value")


@op("Shape", kind="raw")
def shape(ctx: Ctx, x: Value) -> Tensor:
    """x[*S] -> sizes[end - start]"""
    sizes = list(_shape(x))
    rank = len(sizes)
    start = _clamp(ctx.integer("start", 0), rank)
    end = _clamp(ctx.integer("end", rank), rank)
    return torch.tensor(sizes[start:end], dtype=torch.int64)


@op("Size", kind="raw")
def size(ctx: Ctx, x: Value) -> Tensor:
    """x[*S] -> number of elements[]"""
    return torch.tensor(math.prod(_shape(x)), dtype=torch.int64)


def _shape(x: Value) -> Sequence[int]:
    if x is None or isinstance(x, list):
        raise TypeError("a tensor is needed")
    return x.shape


def _clamp(index: int, rank: int) -> int:
    return max(0, min(rank, index + rank if index < 0 else index))


@op("Reshape", kind="moves")
def reshape(ctx: Ctx, x: Tensor, target: Tensor) -> Tensor:
    """x[*S] target[R] -> y[*target]; 0 copies a size (unless allowzero), -1 is inferred."""
    sizes = ctx.int_list(target)
    if not ctx.flag("allowzero"):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if -1 in sizes and 0 in x.shape:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = 0 if known == 0 else x.numel() // known
    return x.reshape(sizes)


@op("Flatten", kind="moves")
def flatten(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*A,*B] -> y[prod(A),prod(B)]"""
    axis = ctx.integer("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Transpose", kind="moves")
def transpose(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*S] -> y[*S permuted]; without ``perm`` reversed."""
    perm = ctx.integers("perm")
    return x.permute(perm if perm is not None else list(range(x.ndim))[::-1])


def _axes(ctx: Ctx, axes: Tensor | None) -> list[int] | None:
    return ctx.integers("axes") if axes is None else ctx.int_list(axes)


@op("Squeeze", kind="moves")
def squeeze(ctx: Ctx, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """x[*S] axes[A] -> y[*S without those axes], which have to be 1."""
    wanted = _axes(ctx, axes)
    if wanted is None:
        return x.squeeze()
    gone = {positive_axis(axis, x.ndim) for axis in wanted}
    if any(x.shape[axis] != 1 for axis in gone):
        raise ValueError(f"Squeeze of axes {sorted(gone)} of shape {list(x.shape)}, which are not all 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


@op("Unsqueeze", kind="moves")
def unsqueeze(ctx: Ctx, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """x[*S] axes[A] -> y[*S with ones at those axes]"""
    wanted = _axes(ctx, axes) or []
    rank = x.ndim + len(wanted)
    places = {positive_axis(axis, rank) for axis in wanted}
    if len(places) != len(wanted):
        raise ValueError(f"Unsqueeze names an axis twice: {wanted}")
    rest = iter(x.shape)
    return x.reshape([1 if axis in places else next(rest) for axis in range(rank)])


@op("Concat", kind="moves")
def concat(ctx: Ctx, *xs: Tensor) -> Tensor:
    """n inputs[*S] -> y[*S with the axis summed]"""
    axis = positive_axis(ctx.integer("axis"), xs[0].ndim)
    if any(x.ndim != xs[0].ndim for x in xs):
        raise ValueError(f"Concat of ranks {[x.ndim for x in xs]}")
    if any(x.is_meta for x in xs):
        rest = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in xs}
        if len(rest) > 1:
            raise ValueError(f"Concat of shapes {[list(x.shape) for x in xs]} along axis {axis}")
        total = sum(x.shape[axis] for x in xs)
        return xs[0].new_empty([*xs[0].shape[:axis], total, *xs[0].shape[axis + 1 :]])
    return torch.cat(xs, axis)


@op("Split", kind="moves")
def split(ctx: Ctx, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """x[*S] sizes[n] -> n outputs"""
    axis = positive_axis(ctx.integer("axis", 0), x.ndim)
    wanted = ctx.integers("split") if sizes is None else ctx.int_list(sizes)
    if wanted is None:
        parts = ctx.integer("num_outputs", ctx.n_outputs)
        if ctx.opset < 18 and x.shape[axis] % parts:
            raise ValueError(f"Split of {x.shape[axis]} into {parts} equal parts")
        each = -(-x.shape[axis] // parts)
        wanted = [each] * (parts - 1) + [x.shape[axis] - each * (parts - 1)]
    if sum(wanted) != x.shape[axis] or min(wanted, default=0) < 0:
        raise ValueError(f"Split of {x.shape[axis]} into {wanted}")
    return tuple(torch.split(x, wanted, axis))


@op("Slice", kind="moves")
def slice_(
    ctx: Ctx,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """x[*S] starts[A] ends[A] axes[A] steps[A] -> y"""
    first = (ctx.integers("starts") or []) if starts is None else ctx.int_list(starts)
    last = (ctx.integers("ends") or []) if ends is None else ctx.int_list(ends)
    along = _axes(ctx, axes)
    along = list(range(len(first))) if along is None else along
    stride = [1] * len(first) if steps is None else ctx.int_list(steps)
    for start, end, axis, step in zip(first, last, along, stride, strict=True):
        axis = positive_axis(axis, x.ndim)
        place = range(x.shape[axis])[slice(start, end, step)]
        if step > 0:
            x = x[(*[slice(None)] * axis, slice(place.start, max(place.stop, place.start), step))]
        elif len(place) == 0:
            x = x.narrow(axis, 0, 0)
        else:  # torch has no negative steps
            low = place[-1]
            x = x[(*[slice(None)] * axis, slice(low, place[0] + 1, -step))]
            x = x if x.is_meta else x.flip(axis)
    return x


@op("Expand", kind="moves")
def expand(ctx: Ctx, x: Tensor, target: Tensor) -> Tensor:
    """x[*S] target[R] -> y[*broadcast(S, target)]"""
    sizes = ctx.int_list(target)
    return x.expand(broadcast(x.shape, sizes))


@op("Tile", kind="moves")
def tile(ctx: Ctx, x: Tensor, repeats: Tensor) -> Tensor:
    """x[*S] repeats[R] -> y[*S * repeats]"""
    return x.repeat(ctx.int_list(repeats))


@op("Pad", kind="raw")
def pad(
    ctx: Ctx, x: Tensor, pads: Tensor | None = None, value: Value = None, axes: Tensor | None = None
) -> Tensor:
    """x[*S] pads[2A] value[] axes[A] -> y[*S + pads]; negative pads crop."""
    x = need(x)
    amounts = (ctx.integers("pads") or []) if pads is None else ctx.int_list(pads)
    along = list(range(x.ndim)) if axes is None else ctx.int_list(axes)
    count = len(along)
    if len(amounts) != 2 * count:
        raise ValueError(f"{len(amounts)} pads for {count} axes")
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for place, axis in enumerate(along):
        begins[positive_axis(axis, x.ndim)] = amounts[place]
        ends[positive_axis(axis, x.ndim)] = amounts[place + count]
    mode = ctx.text("mode", "constant")
    if mode == "constant":
        return _pad_constant(ctx, x, begins, ends, value)
    for axis in range(x.ndim):
        if begins[axis] or ends[axis]:
            x = x.index_select(
                axis, _padded_places(x.shape[axis], begins[axis], ends[axis], mode).to(x.device)
            )
    return x


def _pad_constant(ctx: Ctx, x: Tensor, begins: list[int], ends: list[int], value: Value) -> Tensor:
    sizes = [max(size + begin + end, 0) for size, begin, end in zip(x.shape, begins, ends, strict=True)]
    if x.is_meta:
        return x.new_empty(sizes)
    if not any(begins) and not any(ends):
        return x
    fill = ctx.real("value", 0.0) if value is None else ctx.item(value)
    if x.dtype == torch.bool or not x.dtype.is_floating_point:
        y = x.new_full(sizes, int(fill))
        spans = list(zip(x.shape, begins, ends, strict=True))
        inner = [slice(max(b, 0), max(b, 0) + s + min(b, 0) + min(e, 0)) for s, b, e in spans]
        outer = [slice(max(-b, 0), s + min(e, 0)) for s, b, e in spans]
        y[tuple(inner)] = x[tuple(outer)]
        return y
    return F.pad(x, [n for pair in reversed(list(zip(begins, ends, strict=True))) for n in pair], value=fill)


def _padded_places(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Which element of an axis stands at every place of the padded axis."""
    places = torch.arange(-begin, size + end)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = places % period
        return torch.where(folded >= size, period - folded, folded)
    raise ValueError(f"Pad mode {mode!r}")


@op("DepthToSpace", kind="moves")
def depth_to_space(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C*b*b,H,W] -> y[N,C,H*b,W*b]"""
    n, c, h, w = x.shape
    b = ctx.integer("blocksize")
    if ctx.text("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth", kind="moves")
def space_to_depth(ctx: Ctx, x: Tensor) -> Tensor:
    """x[N,C,H*b,W*b] -> y[N,b*b*C,H,W]; with mode CRD the channel comes first: y[N,C*b*b,H,W]"""
    n, c, h, w = x.shape
    b = ctx.integer("blocksize")
    order = (0, 1, 3, 5, 2, 4) if ctx.text("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    y = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return y.reshape(n, c * b * b, h // b, w // b)


@op("CenterCropPad", kind="moves")
def center_crop_pad(ctx: Ctx, x: Tensor, target: Tensor) -> Tensor:
    """x[*S] target[A] -> y[*S with those axes cropped or padded with zeros around the centre]"""
    sizes = ctx.int_list(target)
    axes = ctx.integers("axes") or list(range(x.ndim))
    for size, axis in zip(sizes, axes, strict=True):
        axis = positive_axis(axis, x.ndim)
        have = x.shape[axis]
        if size < have:
            x = x.narrow(axis, (have - size) // 2, size)
        elif size > have:
            before = (size - have) // 2
            amounts = [0, 0] * (x.ndim - 1 - axis) + [before, size - have - before]
            x = F.pad(x, amounts)
    return x


@op("ReverseSequence", kind="moves")
def reverse_sequence(ctx: Ctx, x: Tensor, lengths: Tensor) -> Tensor:
    """x[T,N,*S] lengths[N] -> y[T,N,*S]; the first ``length`` elements of each sequence reversed."""
    if x.is_meta:
        return torch.empty_like(x)
    time, batch = ctx.integer("time_axis", 0), ctx.integer("batch_axis", 1)
    steps = torch.arange(x.shape[time])[:, None]
    ends = ctx.values(lengths)[None, :].to(torch.int64)
    source = torch.where(steps < ends, ends - 1 - steps, steps)
    moved = x.movedim((time, batch), (0, 1))
    index = source.reshape(*source.shape, *[1] * (x.ndim - 2)).expand(moved.shape)
    return moved.gather(0, index).movedim((0, 1), (time, batch))

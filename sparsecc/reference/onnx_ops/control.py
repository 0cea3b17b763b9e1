"""Control flow, sequences and optional values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecc.errors import InvalidModel, UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, Value, need, op, positive_axis

MAX_ITERATIONS = 10_000
"""Iterations of one loop; every verification runs it a dozen times."""


@op("If", kind="raw")
def if_(ctx: Ctx, condition: Tensor) -> tuple[Value, ...]:
    """condition[] -> the outputs of the chosen branch"""
    return tuple(ctx.run("then_branch" if ctx.item(condition) else "else_branch", ()))


@op("Loop", kind="raw")
def loop(ctx: Ctx, trips: Tensor | None, condition: Tensor | None, *state: Value) -> tuple[Value, ...]:
    """trips[] condition[] state... -> last state..., stacked outputs..."""
    limit = MAX_ITERATIONS if trips is None else int(ctx.item(trips))
    going = True if condition is None else bool(ctx.item(condition))
    body = ctx.graph("body")
    scanned: list[list[Tensor]] = [[] for _ in range(len(body.output) - 1 - len(state))]
    carried = list(state)
    step = 0
    while going and step < limit:
        if step >= MAX_ITERATIONS:
            raise UnsupportedModel(f"the loop does not end within {MAX_ITERATIONS} iterations")
        outputs = ctx.run("body", [torch.tensor(step), torch.tensor(going), *carried])
        going = bool(ctx.item(outputs[0]))
        carried = outputs[1 : 1 + len(state)]
        for collected, value in zip(scanned, outputs[1 + len(state) :], strict=True):
            collected.append(need(value))
        step += 1
    return (*carried, *(torch.stack(items) if items else torch.empty(0) for items in scanned))


@op("Scan", kind="raw", since=9)
def scan(ctx: Ctx, *values: Value) -> tuple[Value, ...]:
    """state... sequences[T,...]... -> last state..., stacked outputs[T,...]..."""
    count = ctx.integer("num_scan_inputs")
    state, sequences = list(values[: len(values) - count]), [need(v) for v in values[len(values) - count :]]
    body = ctx.graph("body")
    outputs = len(body.output) - len(state)
    in_axes = ctx.integers("scan_input_axes") or [0] * count
    in_back = ctx.integers("scan_input_directions") or [0] * count
    out_axes = ctx.integers("scan_output_axes") or [0] * outputs
    out_back = ctx.integers("scan_output_directions") or [0] * outputs
    moved = [x.movedim(positive_axis(axis, x.ndim), 0) for x, axis in zip(sequences, in_axes, strict=True)]
    steps = moved[0].shape[0]
    collected: list[list[Tensor]] = [[] for _ in range(outputs)]
    for t in range(steps):
        slices = [x[steps - 1 - t if back else t] for x, back in zip(moved, in_back, strict=True)]
        found = ctx.run("body", [*state, *slices])
        state = found[: len(state)]
        for items, value in zip(collected, found[len(state) :], strict=True):
            items.append(need(value))
    stacked = []
    for items, axis, back in zip(collected, out_axes, out_back, strict=True):
        ordered = items[::-1] if back else items
        rank = ordered[0].ndim + 1
        stacked.append(torch.stack(ordered, positive_axis(axis, rank)))
    return (*state, *stacked)


@op("SequenceEmpty", kind="raw")
def sequence_empty(ctx: Ctx) -> list[Value]:
    """-> an empty sequence"""
    return []


@op("SequenceConstruct", kind="raw")
def sequence_construct(ctx: Ctx, *items: Value) -> list[Value]:
    """items... -> sequence"""
    return list(items)


@op("SequenceInsert", kind="raw")
def sequence_insert(ctx: Ctx, items: list[Value], item: Value, place: Tensor | None = None) -> list[Value]:
    """sequence item place[] -> sequence"""
    index = len(items) if place is None else int(ctx.item(place))
    index = index + len(items) if index < 0 else index
    return [*items[:index], item, *items[index:]]


@op("SequenceErase", kind="raw")
def sequence_erase(ctx: Ctx, items: list[Value], place: Tensor | None = None) -> list[Value]:
    """sequence place[] -> sequence"""
    index = positive_axis(-1 if place is None else int(ctx.item(place)), len(items))
    return [*items[:index], *items[index + 1 :]]


@op("SequenceAt", kind="raw")
def sequence_at(ctx: Ctx, items: list[Value], place: Tensor) -> Value:
    """sequence place[] -> item"""
    return items[int(ctx.item(place))]


@op("SequenceLength", kind="raw")
def sequence_length(ctx: Ctx, items: list[Value]) -> Tensor:
    """sequence -> length[]"""
    return torch.tensor(len(items))


@op("ConcatFromSequence", kind="raw")
def concat_from_sequence(ctx: Ctx, items: list[Value]) -> Tensor:
    """sequence of x[*S] -> y[*S joined or stacked at axis]"""
    tensors = [need(item) for item in items]
    axis = ctx.integer("axis")
    return torch.stack(tensors, axis) if ctx.flag("new_axis") else torch.cat(tensors, axis)


@op("SplitToSequence", kind="raw")
def split_to_sequence(ctx: Ctx, x: Tensor, sizes: Tensor | None = None) -> list[Value]:
    """x[*S] sizes[n] -> sequence of parts along the axis"""
    axis = positive_axis(ctx.integer("axis", 0), x.ndim)
    if sizes is None:
        parts = [x.narrow(axis, k, 1) for k in range(x.shape[axis])]
        return list(parts if ctx.flag("keepdims", True) else [part.squeeze(axis) for part in parts])
    wanted = ctx.int_list(sizes)
    return list(torch.split(x, wanted[0] if sizes.ndim == 0 else wanted, axis))


@op("SequenceMap", kind="raw")
def sequence_map(ctx: Ctx, items: list[Value], *others: Value) -> tuple[list[Any], ...]:
    """sequence others... -> one sequence per output of the body"""
    results: list[list[Any]] = [[] for _ in range(ctx.n_outputs)]
    for place, item in enumerate(items):
        args = [other[place] if isinstance(other, list) else other for other in others]
        for result, value in zip(results, ctx.run("body", [item, *args]), strict=True):
            result.append(value)
    return tuple(results)


@op("Optional", kind="raw")
def optional(ctx: Ctx, x: Value = None) -> Value:
    """x -> x"""
    return x


@op("OptionalGetElement", kind="raw")
def optional_get_element(ctx: Ctx, x: Value) -> Value:
    """x -> x"""
    if x is None:
        raise InvalidModel(f"OptionalGetElement {ctx.node.name!r} of an empty optional")
    return x


@op("OptionalHasElement", kind="raw")
def optional_has_element(ctx: Ctx, x: Value = None) -> Tensor:
    """x -> whether there is one[]"""
    return torch.tensor(x is not None)

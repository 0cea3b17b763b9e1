"""What becomes of known entries where operators move data: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from sparsecc.axes.terms import atoms
from sparsecc.constants.known import MAX_ENTRIES, Known, everywhere, joined, ranked
from sparsecc.graph import Call, Value

if TYPE_CHECKING:
    from sparsecc.constants.flow import Constants


def _layout(c: Constants, call: Call) -> Known | None:
    x = c.of(call.inputs[0])
    if x is None:
        return None
    source = call.attrs["source"]
    used = [d for d in source if d is not None]

    def move(t: torch.Tensor) -> torch.Tensor:
        rest = [d for d in range(t.dim()) if d not in used]
        moved = t.permute(*used, *rest).reshape([t.shape[d] for d in used])
        for place, d in enumerate(source):
            if d is None:
                moved = moved.unsqueeze(place)
        return moved

    return x.map(move)


def _reshape(c: Constants, call: Call) -> Known | None:
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if x is None or value is None:
        return None
    shape = list(x.pair()[0].shape)
    target = [1] * len(out.shape)
    for ours, theirs in runs(value.shape, out.shape):
        if all(shape[d] == 1 for d in ours):
            continue
        carried = [d for d in ours if value.shape[d] != 1], [d for d in theirs if out.shape[d] != 1]
        if len(carried[0]) == len(carried[1]) == 1:
            target[carried[1][0]] = shape[carried[0][0]]
            continue
        if any(value.is_dynamic(d) for d in ours) or any(out.is_dynamic(d) for d in theirs):
            return None
        for d in ours:
            shape[d] = value.shape[d]
        for d in theirs:
            target[d] = out.shape[d]
    if math.prod(shape) > MAX_ENTRIES:
        return None
    return x.map(lambda t: t.expand(shape).reshape(target))


def runs(shape: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes with equal products, as (axes of shape, axes of target)."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(target):
        ours: list[int] = []
        theirs: list[int] = []
        have = want = 1
        while not (ours or theirs) or have != want:
            if i < len(shape) and (have <= want or j >= len(target)):
                have *= shape[i]
                ours.append(i)
                i += 1
            elif j < len(target):
                want *= target[j]
                theirs.append(j)
                j += 1
            else:
                return [(list(range(len(shape))), list(range(len(target))))]
        out.append((ours, theirs))
    return out


def _expand(c: Constants, call: Call) -> Known | None:
    x = c.of(call.inputs[0])
    return None if x is None else x.map(lambda t: ranked(t, len(call.outputs[0].shape)))


def _tile(c: Constants, call: Call) -> Known | None:
    x, out = c.of(call.inputs[0]), call.outputs[0]
    if x is None:
        return None
    shape = [1] * (len(out.shape) - x.known.dim()) + list(x.pair()[0].shape)
    if any(n > 1 and out.is_dynamic(d) for d, n in enumerate(shape)):
        return None
    times = [m // n if n > 1 else 1 for n, m in zip(shape, out.shape, strict=True)]
    return x.map(lambda t: t.repeat(times))


def _repeat_interleave(c: Constants, call: Call) -> Known | None:
    x, out = c.of(call.inputs[0]), call.outputs[0]
    if x is None:
        return None
    dim = call.attrs["dim"] % len(out.shape)
    size = x.pair()[0].shape[dim]
    return x if size == 1 else x.map(lambda t: t.repeat_interleave(out.shape[dim] // size, dim))


def _concat(c: Constants, call: Call) -> Known | None:
    out = call.outputs[0]
    dim = call.attrs["dim"] % len(out.shape)
    operands = [v for v in call.inputs if v is not None and len(v.shape) == len(out.shape)]
    return joined([(c.of(v), v.shape[dim]) for v in operands], dim, out)


def _stack(c: Constants, call: Call) -> Known | None:
    out = call.outputs[0]
    dim = call.attrs["dim"] % len(out.shape)
    found = [c.of(v) for v in call.inputs]
    return joined([(k and k.map(lambda t: t.unsqueeze(dim)), 1) for k in found], dim, out)


def _split(c: Constants, call: Call) -> list[Known | None]:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return []
    dim = call.attrs["dim"] % len(value.shape)
    start = 0
    out: list[Known | None] = []
    for part in call.outputs:
        out.append(_cut(x, dim, start, part.shape[dim], 1))
        start += part.shape[dim]
    return out


def _cut(x: Known, dim: int, start: int, count: int, step: int) -> Known:
    if x.pair()[0].shape[dim] == 1:
        return x
    stop = start + (count - 1) * step + 1
    return x.map(lambda t: t[(slice(None),) * dim + (slice(start, stop, step),)])


def _unbind(c: Constants, call: Call) -> list[Known | None]:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return []
    dim = call.attrs["dim"] % len(value.shape)
    return [_cut(x, dim, i, 1, 1).map(lambda t: t.squeeze(dim)) for i in range(len(call.outputs))]


def _select(c: Constants, call: Call) -> Known | None:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return None
    dim = call.attrs["dim"] % len(value.shape)
    return x.alike(dim).map(lambda t: t.squeeze(dim))


def _slice(c: Constants, call: Call) -> Known | None:
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if x is None or value is None:
        return None
    for dim, (start, _, step) in call.attrs["slices"].items():
        if value.is_dynamic(dim) or out.is_dynamic(dim) or step < 1:
            x = x.alike(dim)
        else:
            x = _cut(x, dim, start, out.shape[dim], step)
    return x


def _index(c: Constants, call: Call) -> Known | None:
    """A lookup in a table whose entries are alike."""
    x, value, indices = c.of(call.inputs[0]), call.inputs[0], call.inputs[1]
    if x is None or value is None or indices is None:
        return None
    dim = call.attrs["dim"] % len(value.shape)
    ones = [1] * len(indices.shape)
    return x.alike(dim).map(lambda t: t.reshape(*t.shape[:dim], *ones, *t.shape[dim + 1 :]))


def _pad(c: Constants, call: Call) -> Known | None:
    """Channels may be padded with constants; along other axes only what equals the padding stays known."""
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if value is None or c.semantics is None:
        return None
    constant = call.attrs["mode"] == "constant"
    number = c.semantics.fill(call) if constant else None
    for dim, (before, after) in enumerate(call.attrs["pads"]):
        if not before and not after:
            continue
        if not constant:
            x = None if x is None else x.alike(dim)
        elif number is None or before < 0 or after < 0:
            return None
        elif value.is_dynamic(dim) or not _matters(c, out, dim):
            x = None if x is None else x.alike(dim).only(number)
        else:
            side = everywhere(out, number)
            x = joined([(side, before), (x, value.shape[dim]), (side, after)], dim, out)
    return x


def _matters(c: Constants, value: Value, dim: int) -> bool:
    """Whether positions of an axis can be removed at all."""
    return any(a.frozen is None for a in atoms(c.analysis.axes(value)[dim]))


def _mixed(c: Constants, call: Call) -> Known | None:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None or c.semantics is None:
        return None
    kept = {d % len(value.shape) for d in call.attrs["kept"]}
    for dim in range(len(value.shape)):
        if dim not in kept:
            x = x.alike(dim)
    preserved = c.semantics.preserves(call)
    if preserved == "none":
        return None
    return x.only(0.0) if preserved == "zero" else x


def _moved(c: Constants, call: Call) -> Known | None:
    x = c.of(call.inputs[0])
    for dim in call.attrs["dims"]:
        x = None if x is None else x.alike(dim)
    return x


def _channel_shuffle(c: Constants, call: Call) -> Known | None:
    x, groups = c.of(call.inputs[0]), call.attrs["groups"]
    if x is None or x.pair()[0].shape[1] == 1:
        return x
    return x.map(lambda t: t.unflatten(1, (groups, t.shape[1] // groups)).transpose(1, 2).flatten(1, 2))


def _glu(c: Constants, call: Call) -> Known | None:
    """Zero where the first half is."""
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if x is None or value is None:
        return None
    dim = call.attrs["dim"] % len(value.shape)
    return _cut(x, dim, 0, out.shape[dim], 1).only(0.0)


MOVEMENTS: dict[str, Callable[[Constants, Call], Known | list[Known | None] | None]] = {
    "layout": _layout,
    "reshape": _reshape,
    "expand": _expand,
    "tile": _tile,
    "repeat_interleave": _repeat_interleave,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    "index": _index,
    "pad": _pad,
    "mixed": _mixed,
    "resize": _mixed,
    "roll": _moved,
    "flip": _moved,
    "channel_shuffle": _channel_shuffle,
    "glu": _glu,
}

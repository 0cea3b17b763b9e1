"""Axis rules of operators that only move data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Axes, Solver
from sparsecc.axes.terms import Places, Term, atom, atoms, concat, pick, product, resolve
from sparsecc.graph import Call


@rule("layout")
def layout(s: Solver, c: Call) -> list[Term]:
    """y whose axes are axes of x in another order, with axes of size 1 added or dropped

    Attribute ``spared``: axes that would be dropped if they had size 1.
    """
    x, value = s.of(c, 0), c.inputs[0]
    spared = c.attrs.get("spared", ())
    if value is not None and any(value.is_dynamic(d) for d in spared):
        s.several += [x[d] for d in spared]  # what is dropped is only known when it runs
    return [atom(1) if source is None else x[source] for source in c.attrs["source"]]


@rule("reshape")
def reshape(s: Solver, c: Call) -> list[Term]:
    """x[*S] (like[*T]) -> y[*T] with as many elements; runs of axes are joined and split"""
    x = s.of(c, 0)
    source = c.inputs[0]
    dynamic = (
        [source is not None and source.is_dynamic(d) for d in range(len(x))],
        [c.outputs[0].is_dynamic(d) for d in range(len(c.outputs[0].shape))],
    )
    out = reshaped(s, x, c.outputs[0].shape, dynamic)
    if s.has(c, 1):
        for mine, theirs in zip(out, s.of(c, 1), strict=True):
            s.equal(mine, theirs)
    s.size(c, "shape", [(t,) for t in out])
    return out


@rule("depth_to_space")
def depth_to_space(s: Solver, c: Call) -> list[Term]:
    """x[*,C*r*r,H,W] -> y[*,C,H*r,W*r]"""
    *batch, channels, height, width = s.of(c, 0)
    factor, size = c.attrs["factor"], resolve(channels).size
    if c.attrs.get("mode") == "DCR":  # blocks are the outer factors
        down, right, kept = s.factors(channels, [factor, factor, size // factor**2])
    else:
        kept, down, right = s.factors(channels, [size // factor**2, factor, factor])
    return [*batch, kept, *(_grown(s, *pair) for pair in ((height, down), (width, right)))]


def _grown(s: Solver, axis: Term, inner: Term) -> Term:
    for term in (axis, inner):
        s.freeze(term, "spatial", "moves channels into space")
    return product([axis, inner])


@rule("space_to_depth")
def space_to_depth(s: Solver, c: Call) -> list[Term]:
    """x[*,C,H*r,W*r] -> y[*,C*r*r,H,W]"""
    *batch, channels, height, width = s.of(c, 0)
    factor = c.attrs["factor"]
    outer, inner = [], []
    for axis in (height, width):
        s.freeze(axis, "spatial", "moves space into channels")
        left, right = s.factors(axis, [resolve(axis).size // factor, factor])
        outer.append(left)
        inner.append(right)
    blocks_first = c.attrs.get("mode") == "DCR"
    return [*batch, product([*inner, channels] if blocks_first else [channels, *inner]), *outer]


@rule("channel_shuffle")
def channel_shuffle(s: Solver, c: Call) -> list[Term]:
    """x[N,G*C,*S] -> y[N,C*G,*S]"""
    x, groups = list(s.of(c, 0)), c.attrs["groups"]
    lead, inner = s.factors(x[1], [groups, resolve(x[1]).size // groups])
    s.size(c, "groups", (lead,))
    x[1] = product([inner, lead])
    return x


@rule("glu")
def glu(s: Solver, c: Call) -> list[Term]:
    """x[*,D+D,*] -> y[*,D,*], the first half times the sigmoid of the second"""
    x = list(s.of(c, 0))
    dim = c.attrs["dim"] % len(x)
    half = resolve(x[dim]).size // 2
    value, gate = s.pieces(x[dim], [half, half])
    x[dim] = s.equal(value, gate)
    return x


def _varying(term: Term) -> list[Term]:
    """The atoms that make the size of an axis vary, or all where that is not known."""
    return [a for a in atoms(term) if a.varies] or atoms(term)


def _cuts(varying: Sequence[Term], parts: Sequence[Term], dynamic: Sequence[bool]) -> bool:
    """Whether a dynamic axis was cut, or is part of a static one: another size would be cut elsewhere."""
    if any(resolve(t).kind != "atom" for t in varying):
        return True
    moved = set(varying)
    return any(moved.intersection(atoms(p)) for p, varies in zip(parts, dynamic, strict=True) if not varies)


def reshaped(
    s: Solver, x: Axes, shape: Sequence[int], dynamic: tuple[Sequence[bool], Sequence[bool]]
) -> list[Term]:
    """Axes of ``x`` seen in another shape: the shortest runs with equal products are matched."""
    sizes = [resolve(t).size for t in x]
    out: list[Term] = []
    i = j = 0
    while j < len(shape):
        have, want = 1, shape[j]
        first, start = i, j
        j += 1
        while have != want:
            if have < want:
                if i >= len(sizes):
                    raise ValueError(f"{tuple(sizes)} cannot be seen as {tuple(shape)}")
                have *= sizes[i]
                i += 1
            else:
                if j >= len(shape):
                    raise ValueError(f"{tuple(sizes)} cannot be seen as {tuple(shape)}")
                want *= shape[j]
                j += 1
        if i - first == j - start == 1 and resolve(x[first]).kind == "atom":
            out.append(x[first])
            continue
        varying = [a for k in range(first, i) if dynamic[0][k] for a in _varying(x[k])]
        parts = s.factors(product(x[first:i]), shape[start:j])
        if i - first > 1 and _cuts(varying, parts, dynamic[1][start:j]):
            for term in x[first:i]:
                s.freeze(term, "dynamic", "cuts a dynamic axis together with others")
        out.extend(parts)
    if any(size != 1 for size in sizes[i:]):
        raise ValueError(f"{tuple(sizes)} cannot be seen as {tuple(shape)}")
    return out


@rule("expand")
def expand(s: Solver, c: Call) -> list[Term]:
    """x[*] -> y[*], axes of size 1 repeated"""
    x, shape = s.of(c, 0), c.outputs[0].shape
    out: list[Term] = []
    for dim, size in enumerate(shape):
        k = dim - len(shape) + len(x)
        grows = c.outputs[0].is_dynamic(dim) and k >= 0 and not _sized(c, k)
        carried = k >= 0 and resolve(x[k]).size == size and not grows
        out.append(x[k] if carried else s._fresh(c.outputs[0])[dim])
    s.size(c, "shape", [(t,) for t in out])
    return out


def _sized(c: Call, dim: int) -> bool:
    """Whether an axis of the first operand has the size that the inputs have."""
    return c.inputs[0] is not None and c.inputs[0].is_dynamic(dim)


@rule("repeat_interleave")
def repeat_interleave(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] -> y[*,D*r,*], each position r times in a row"""
    x = list(s.of(c, 0))
    dim = c.attrs["dim"] % len(x)
    times = atom(c.outputs[0].shape[dim] // resolve(x[dim]).size, f"{c.name}.repeats")
    s.size(c, "repeats", (times,))
    x[dim] = product([x[dim], times])
    if c.attrs.get("spelled"):  # torch's caller may say the new size, so that it need not be computed
        s.size(c, "output_size", (x[dim],))
    return x


@rule("tile")
def tile(s: Solver, c: Call) -> list[Term]:
    """x[*] -> y[*], whole axes repeated"""
    x, shape = s.of(c, 0), c.outputs[0].shape
    padded = [atom(1)] * (len(shape) - len(x)) + list(x)
    out: list[Term] = []
    for term, size in zip(padded, shape, strict=True):
        have = resolve(term).size
        if have == size:
            out.append(term)
        else:
            out.append(product([s.frozen(size // have, "repeated", "repeats its input"), term]))
    return out


@rule("concat")
def concatenate(s: Solver, c: Call) -> list[Term]:
    """x[*,D1,*] y[*,D2,*] ... -> z[*,D1+D2+...,*]"""
    operands = [s.of(c, i) for i in range(len(c.inputs))]
    rank = len(c.outputs[0].shape)
    dim = c.attrs["dim"] % rank
    operands = [a for a in operands if len(a) == rank]  # torch ignores empty vectors
    out = list(operands[0])
    for axes in operands[1:]:
        for d in range(rank):
            if d != dim:
                s.equal(out[d], axes[d])
    out[dim] = concat([axes[dim] for axes in operands])
    return out


@rule("stack")
def stack(s: Solver, c: Call) -> list[Term]:
    """x[*] y[*] ... -> z[*,n,*]"""
    out = list(s.of(c, 0))
    for index in range(1, len(c.inputs)):
        for mine, theirs in zip(out, s.of(c, index), strict=True):
            s.equal(mine, theirs)
    dim = c.attrs["dim"] % (len(out) + 1)
    out.insert(dim, s.frozen(len(c.inputs), "stacked", "stacks tensors along this axis"))
    return out


@rule("split")
def split(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,D,*] -> y1[*,D1,*] y2[*,D2,*] ..."""
    x = s.of(c, 0)
    dim = c.attrs["dim"] % len(x)
    parts = s.pieces(x[dim], [v.shape[dim] for v in c.outputs])
    s.size(c, "sizes", [(p,) for p in parts])
    return [[*x[:dim], part, *x[dim + 1 :]] for part in parts]


@rule("unbind")
def unbind(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,n,*] -> n times y[*,*]"""
    x = s.of(c, 0)
    dim = c.attrs["dim"] % len(x)
    s.freeze(x[dim], "selected", "takes single positions of this axis")
    return [[*x[:dim], *x[dim + 1 :]] for _ in c.outputs]


@rule("select")
def select(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] -> y[*,*] at one position"""
    x = s.of(c, 0)
    dim = c.attrs["dim"] % len(x)
    s.freeze(x[dim], "selected", "takes a single position of this axis")
    return [*x[:dim], *x[dim + 1 :]]


@rule("slice")
def slice_(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] -> y[*,D',*]; ``attrs['slices']`` maps a dim to (start, stop, step), but for whole ones"""
    x = list(s.of(c, 0))
    for dim, (start, stop, step) in c.attrs["slices"].items():
        x[dim] = _cut(s, c, x[dim], dim, start, stop, step)
    return x


def endless(stop: object) -> bool:
    """Whether a slice ends where its axis does, however long that is: ``x[start:]`` as exporters write it."""
    return isinstance(stop, int) and stop >= 2**31 - 1


def _cut(s: Solver, c: Call, term: Term, dim: int, start: int, stop: int, step: int) -> Term:
    size, want = resolve(term).size, c.outputs[0].shape[dim]
    dynamic = c.inputs[0] is not None and c.inputs[0].is_dynamic(dim)
    if (start, step) == (0, 1) and want == size and not dynamic:
        s.size(c, f"stop{dim}", (term,))
        return term
    if dynamic or c.outputs[0].is_dynamic(dim):
        s.freeze(term, "dynamic", "slices a dynamic axis")
        return s.frozen(want, "dynamic", "slices a dynamic axis")
    if step == 1:
        before, inside, _ = s.pieces(term, [start, want, size - start - want])
        s.size(c, f"start{dim}", (before,))
        s.size(c, f"stop{dim}", (before, inside))
        return inside
    if step > 1 and size % step == 0 and 0 <= start < step and want == size // step:
        outer, inner = s.factors(term, [want, step])
        s.freeze(inner, "strided", f"takes one position in {step}")
        if start:  # may be counted from the end
            s.size(c, f"start{dim}", (s.frozen(start, "strided", "skips these positions"),))
        s.size(c, f"stop{dim}", (term,))
        return outer
    s.freeze(term, "strided", "takes positions with a stride")
    return s.frozen(want, "strided", "takes positions with a stride")


@rule("index")
def index(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] indices[*I] -> y[*,*I,*] (gather, embedding, index_select)

    A constant list of positions picks them; its numbers follow what is removed.
    """
    x, indices = s.of(c, 0), s.of(c, 1)
    dim = c.attrs["dim"] % len(x)
    picked = _picked(s, c, x[dim]) if len(indices) == 1 else None
    if picked is None:
        _look_up(s, c, x[dim])
        return [*x[:dim], *indices, *x[dim + 1 :]]
    return [*x[:dim], picked, *x[dim + 1 :]]


def _picked(s: Solver, c: Call, term: Term) -> Term | None:
    """The positions of an axis that operand 1, a constant list, names; None where it is no constant."""
    chosen = None if s.varies(term) else s.known(c, 1)
    if chosen is None:
        return None
    size = resolve(term).size
    if not ((chosen >= -size) & (chosen < size)).all():
        raise ValueError(f"looks up positions outside of an axis of {size}")
    picked = s.equal(pick(term, chosen.reshape(-1) % size), s.of(c, 1)[0])
    s.positions(c, 1, term)
    return picked


def _look_up(s: Solver, c: Call, term: Term) -> None:
    """Positions that are found while the model runs follow the axis; any others pin it."""
    held = s.places.followed(c, 1)
    if held is not None and resolve(held).size == resolve(term).size:
        s.equal(term, held)
        return
    s.freeze(term, "indexed", "looks up positions of this axis")
    if held is not None:
        s.freeze(held, "indexed", "looks up positions of another axis")


@rule("roll")
def roll(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] -> y[*,D,*]: the last ``shifts[i]`` positions of axis ``dims[i]`` come first"""
    x = list(s.of(c, 0))
    sizes: list[tuple[Term, ...]] = []
    for dim, shift in zip(c.attrs["dims"], c.attrs["shifts"], strict=True):
        size = resolve(x[dim]).size
        places = np.roll(np.arange(size), shift)
        sizes.append((_moved(s, x[dim], places[: shift % size]),))
        x[dim] = _moved(s, x[dim], places)
    s.size(c, "shifts", sizes)
    return x


@rule("flip")
def flip(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] -> y[*,D,*] with the positions of the axes ``dims`` in reverse order"""
    x = list(s.of(c, 0))
    for dim in c.attrs["dims"]:
        x[dim] = _moved(s, x[dim], np.arange(resolve(x[dim]).size)[::-1])
    return x


def _moved(s: Solver, term: Term, places: Places) -> Term:
    """Chosen positions of an axis, which stays whole where its size varies."""
    if not s.varies(term):
        return pick(term, places)
    s.freeze(term, "dynamic", "moves positions of a dynamic axis")
    return s.frozen(len(places), "dynamic", "moves positions of a dynamic axis")


@rule("gather_nd")
def gather_nd(s: Solver, c: Call) -> list[Term]:
    """x[*B,*D,*R] indices[*B,*I,len(D)] -> y[*B,*I,*R], entries of the axes D looked up

    A constant list of positions of the first axis picks them.
    """
    x, indices = s.of(c, 0), s.of(c, 1)
    batch = c.attrs["batch_dims"]
    looked_up = batch + resolve(indices[-1]).size
    picked = _picked(s, c, x[0]) if (batch, looked_up, len(indices)) == (0, 1, 2) else None
    if picked is not None:
        return [picked, *x[1:]]
    for term in x[batch:looked_up]:
        s.freeze(term, "indexed", "looks up positions of this axis")
    for mine, theirs in zip(x[:batch], indices[:batch], strict=True):
        s.equal(mine, theirs)
    return [*indices[:-1], *x[looked_up:]]


@rule("pad")
def pad(s: Solver, c: Call) -> list[Term]:
    """x[*] -> y[*] with ``attrs['pads']`` = (before, after) per axis"""
    x = list(s.of(c, 0))
    for dim, (before, after) in enumerate(c.attrs["pads"]):
        if not before and not after:
            continue
        if c.attrs["mode"] == "constant" and before >= 0 and after >= 0:
            sides = [s.frozen(n, "padded", "pads this axis") for n in (before, after)]
            x[dim] = concat([sides[0], x[dim], sides[1]])
        else:
            s.freeze(x[dim], "padded", f"pads this axis ({c.attrs['mode']})")
            x[dim] = s.frozen(c.outputs[0].shape[dim], "padded", "pads this axis")
    return x


@rule("mixed")
def mixed(s: Solver, c: Call) -> list[list[Term]]:
    """x[*K,*M] -> y[*K,*M']; positions of the axes M are mixed, those of ``attrs['kept']`` carried

    Pooling, interpolation, rolls and flips: what happens along M depends on neighbours.
    """
    x = s.of(c, 0)
    kept = {d % len(x) for d in c.attrs["kept"]}
    for dim, term in enumerate(x):
        if dim not in kept:
            s.freeze(term, "spatial", "mixes neighbours along this axis")
    return [
        [
            x[d] if d in kept else s.frozen(n, "spatial", "mixes neighbours along this axis")
            for d, n in enumerate(v.shape)
        ]
        for v in c.outputs
    ]


@rule("resize")
def resize(s: Solver, c: Call) -> list[Term]:
    """x[*K,*M] -> y[*K,*M'] whose sizes may be spelled out"""
    out: list[Term] = mixed(s, c)[0]
    s.size(c, "shape", [(t,) for t in out])
    return out


@rule("measured")
def measured(s: Solver, c: Call) -> list[list[Term]]:
    """x[*] -> no tensor; the sizes of ``attrs['dims']`` become numbers that the model computes with"""
    x = s.of(c, 0)
    for dim in c.attrs["dims"]:
        s.freeze(x[dim], "sizes", "computes with the size of this axis")
    return []

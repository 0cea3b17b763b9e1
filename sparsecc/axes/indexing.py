"""Axis rules of operators that read and write by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Axes, Solver
from sparsecc.axes.terms import Term, atom, concat, resolve
from sparsecc.graph import Call


def _size(term: Term) -> int:
    return resolve(term).size


def _freeze_all(s: Solver, terms: Iterable[Term], text: str) -> None:
    for term in terms:
        if _size(term) > 1:
            s.freeze(term, "indexed", text)


def _beside(s: Solver, axes: Sequence[Axes], dim: int, text: str) -> None:
    """Couple the axes of tensors that are read side by side, all but ``dim``."""
    for d, terms in enumerate(zip(*axes, strict=True)):
        if d == dim or len({_size(t) for t in terms}) > 1:
            _freeze_all(s, terms, text)
        else:
            for term in terms[1:]:
                s.equal(terms[0], term)


@rule("gather_elements")
def gather_elements(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,*B] indices[*A,I,*B] -> y[*A,I,*B]"""
    x, indices = s.of(c, 0), s.of(c, 1)
    dim = c.attrs["dim"] % len(x)
    for d, (mine, theirs) in enumerate(zip(x, indices, strict=True)):
        if d == dim:
            _follow(s, c, mine, "looks up positions of this axis")
        elif _size(mine) == _size(theirs):
            s.equal(mine, theirs)
        else:  # entry i of the indices reads at i, so neither may lose positions
            _freeze_all(s, (mine, theirs), "reads a part of this axis")
    return list(indices)


@rule("scatter_elements")
def scatter_elements(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,*B] indices[*A,I,*B] (updates[*A,I,*B]) -> y[*A,D,*B]"""
    axes = [s.of(c, i) for i in range(len(c.inputs)) if s.has(c, i)]
    dim, text = c.attrs["dim"] % len(axes[0]), "writes to positions of this axis"
    _follow(s, c, axes[0][dim], text)
    _freeze_all(s, (a[dim] for a in axes[1:]), text)
    _beside(s, [(*a[:dim], *a[dim + 1 :]) for a in axes], -1, text)
    return list(axes[0])


def _follow(s: Solver, c: Call, term: Term, text: str) -> None:
    """Positions that are found while the model runs follow the axis; any others pin it."""
    held = s.places.followed(c, 1)
    if held is not None and _size(held) == _size(term):
        s.equal(term, held)
        return
    _freeze_all(s, (term,) if held is None else (term, held), text)


@rule("index_write")
def index_write(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,*B] indices[I] (source[*A,I,*B]) -> y[*A,D,*B] (index_add, index_copy, index_fill)"""
    x = s.of(c, 0)
    dim = c.attrs["dim"] % len(x) if x else 0
    _freeze_all(s, s.of(c, 1), "says where to write")
    if s.has(c, 2) and s.of(c, 2):
        _beside(s, [x, s.of(c, 2)], dim, "writes to positions of this axis")
    elif x:
        s.freeze(x[dim], "indexed", "writes to positions of this axis")
    return list(x)


def _looked_up(s: Solver, c: Call, first: int) -> tuple[list[int], int, list[Term]]:
    """Indexed dims of operand 0, where their result stands, and its axes.

    ``attrs['places']`` holds the first dim that each index looks up (a mask looks up several),
    ``attrs['widths']`` how many, ``attrs['shape']`` the broadcast shape of the indices.
    """
    places, widths, shape = c.attrs["places"], c.attrs["widths"], c.attrs["shape"]
    dims = [d for at, n in zip(places, widths, strict=True) for d in range(at, at + n)]
    together = dims == list(range(dims[0], dims[-1] + 1))
    if shape is None:  # a mask selects positions of one new axis
        at = dims[0] if together else 0
        shape = c.outputs[0].shape[at : at + 1]
    operands = [
        s.of(c, first + k) for k, n in enumerate(widths) if not c.attrs["masks"][k] and s.has(c, first + k)
    ]
    for k, masked in enumerate(c.attrs["masks"]):
        if masked:
            _freeze_all(s, s.of(c, first + k), "selects by a mask along this axis")
    if any(c.attrs["masks"]):
        found = [s.frozen(n, "indexed", "puts out as many positions as a mask selects") for n in shape]
        for axes in operands:
            _freeze_all(s, axes, "looks up positions beside a mask")
    else:
        found = s.broadcast(c, operands, shape)
    return dims, dims[0] if together else 0, found


@rule("index_many")
def index_many(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,E,*B] indices[*I] indices[*I] -> y[*A,*I,*B] (first where D and E are not neighbours)"""
    x = s.of(c, 0)
    dims, at, found = _looked_up(s, c, 1)
    _freeze_all(s, (x[d] for d in dims), "looks up positions of this axis")
    rest = [t for d, t in enumerate(x) if d not in dims]
    return [*rest[:at], *found, *rest[at:]]


@rule("index_put")
def index_put(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,E,*B] values[*A,*I,*B] indices[*I] indices[*I] -> y[*A,D,E,*B]; values broadcast"""
    x, values = s.of(c, 0), s.of(c, 1)
    dims, at, found = _looked_up(s, c, 2)
    _freeze_all(s, (*(x[d] for d in dims), *found), "writes to positions of this axis")
    rest = [t for d, t in enumerate(x) if d not in dims]
    target = (*rest[:at], *found, *rest[at:])
    s.broadcast(c, [target, values], [_size(t) for t in target])
    return list(x)


@rule("select_write")
def select_write(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,*B] source[*A,*B] -> y[*A,D,*B], one position of D replaced"""
    x = s.of(c, 0)
    dim = c.attrs["dim"] % len(x)
    s.freeze(x[dim], "selected", "replaces a single position of this axis")
    rest = [t for d, t in enumerate(x) if d != dim]
    for mine, theirs in zip(rest, s.of(c, 1), strict=True):
        s.equal(mine, theirs)
    return list(x)


@rule("slice_write")
def slice_write(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,*B] source[*A,D',*B] -> y[*A,D,*B], a slice of D replaced"""
    x, source = list(s.of(c, 0)), s.of(c, 1)
    ((dim, (start, _, step)),) = c.attrs["slices"].items()
    size, want = _size(x[dim]), _size(source[dim])
    for d, (mine, theirs) in enumerate(zip(x, source, strict=True)):
        if d != dim:
            s.equal(mine, theirs)
    varies = any(v is not None and v.is_dynamic(dim) for v in c.inputs[:2])
    if want == size and not varies:
        s.size(c, f"stop{dim}", (x[dim],))
        s.equal(x[dim], source[dim])
    elif step != 1 or varies:
        _freeze_all(s, (x[dim], source[dim]), "replaces a slice of this axis")
    else:
        before, inside, after = s.pieces(x[dim], [start, want, size - start - want])
        s.equal(inside, source[dim])
        s.size(c, f"start{dim}", (before,))
        s.size(c, f"stop{dim}", (before, inside))
        x[dim] = concat([before, inside, after])
    return x


@rule("diagonal")
def diagonal(s: Solver, c: Call) -> list[Term]:
    """x[*A,D,*B,D,*C] -> y[*A,*B,*C,D]"""
    x, want = s.of(c, 0), c.outputs[0].shape[-1]
    first, second = (d % len(x) for d in c.attrs["dims"])
    rest = [t for d, t in enumerate(x) if d not in (first, second)]
    if c.attrs["offset"] == 0 and _size(x[first]) == _size(x[second]):
        return [*rest, s.equal(x[first], x[second])]
    for dim in (first, second):
        s.freeze(x[dim], "diagonal", "takes a diagonal of this axis")
    return [*rest, s.frozen(want, "diagonal", "takes a diagonal")]


@rule("diagonal_embed")
def diagonal_embed(s: Solver, c: Call) -> list[Term]:
    """x[*,D] -> y[*,D,D], zero beside the diagonal"""
    *rest, last = s.of(c, 0)
    rank = len(c.outputs[0].shape)
    dims = sorted(d % rank for d in c.attrs["dims"])
    out = list(rest)
    square = c.attrs["offset"] == 0
    if not square:
        s.freeze(last, "diagonal", "moves this axis beside the diagonal")
    for dim in dims:
        size = c.outputs[0].shape[dim]
        out.insert(dim, last if square else s.frozen(size, "diagonal", "puts out a diagonal"))
    return out


@rule("block_diagonal")
def block_diagonal(s: Solver, c: Call) -> list[Term]:
    """x[M1,N1] y[M2,N2] ... -> z[M1+M2+...,N1+N2+...], zero beside the blocks"""
    blocks = [s.of(c, i) for i in range(len(c.inputs))]
    full = [(*(atom(1) for _ in range(2 - len(b))), *b) for b in blocks]
    return [concat([b[d] for b in full]) for d in (0, 1)]


@rule("grid")
def grid(s: Solver, c: Call) -> list[list[Term]]:
    """x[M] y[N] ... -> one z[M,N,...] an operand (meshgrid)"""
    axes = [(s.of(c, i) or (atom(1),))[0] for i in range(len(c.inputs))]
    if c.attrs["swapped"] and len(axes) > 1:
        axes[:2] = axes[1], axes[0]
    return [list(axes) for _ in c.outputs]


@rule("embedding_bag")
def embedding_bag(s: Solver, c: Call) -> list[list[Term]]:
    """table[V,D] indices[I] (offsets, weights) -> y[B,D] and bookkeeping"""
    table = s.of(c, 0)
    s.freeze(table[0], "indexed", "looks up positions of this axis")
    for index in range(1, len(c.inputs)):
        if s.has(c, index):
            _freeze_all(s, s.of(c, index), "says which rows to sum")

    def axes(shape: Sequence[int], carried: bool) -> list[Term]:
        fresh: list[Term] = [s.frozen(n, "indexed", "puts out bags") for n in shape]
        return [*fresh[:-1], table[1]] if carried else fresh

    width = _size(table[1])
    return [
        axes(v.shape, i == 0 or (len(v.shape) == 2 and v.shape[-1] == width)) for i, v in enumerate(c.outputs)
    ]

"""Axis rules of products and distances between vectors."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, product, resolve
from sparsecc.graph import Call


@rule("cdist")
def cdist(s: Solver, c: Call) -> list[Term]:
    """x[*,P,D] y[*,R,D] -> z[*,P,R], the p-norms of differences over D

    Where differences are taken by a matrix product, small ones are not exact: D stays whole.
    """
    x, y = s.of(c, 0), s.of(c, 1)
    s.equal(x[-1], y[-1])
    if c.attrs["by_product"]:
        s.freeze(x[-1], "cancellation", "subtracts squared norms over this axis, which rounds differently")
    else:
        s.contract(c, 0, -1)
        s.contract(c, 1, -1)
    batch = s.broadcast(c, [x[:-2], y[:-2]], c.outputs[0].shape[:-2])
    return [*batch, x[-2], y[-2]]


@rule("pdist")
def pdist(s: Solver, c: Call) -> list[Term]:
    """x[N,D] -> y[N(N-1)/2], the p-norms of differences of all pairs"""
    x = s.of(c, 0)
    s.freeze(x[0], "order matters", "lists pairs of this axis")
    s.contract(c, 0, 1)
    return [s.frozen(c.outputs[0].shape[0], "order matters", "lists pairs")]


@rule("cosine_similarity")
def cosine_similarity(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] y[*,D,*] -> z[*,*], products of normalised vectors along D"""
    x, y = s.of(c, 0), s.of(c, 1)
    rank = max(len(x), len(y))
    dim = c.attrs["dim"] % rank
    shape = [0] * rank
    for axes in (x, y):
        for d, term in enumerate(axes, rank - len(axes)):
            shape[d] = max(shape[d], resolve(term).size)
    full = s.broadcast(c, [x, y], shape)
    for index, axes in enumerate((x, y)):
        place = dim - rank + len(axes)
        if place < 0 or resolve(axes[place]).size != shape[dim]:
            s.freeze(full[dim], "broadcast", "repeats one vector along this axis")
        else:
            s.contract(c, index, place)
    return [t for d, t in enumerate(full) if d != dim]


@rule("paired_reduce")
def paired_reduce(s: Solver, c: Call) -> list[Term]:
    """x[*,*D,*] y[*,*D,*] -> z[*,*], a reduction of something elementwise (losses, distances)"""
    x, y = s.of(c, 0), s.of(c, 1)
    rank = max(len(x), len(y))
    shape = c.attrs["shape"]
    full = s.broadcast(c, [x, y], shape)
    dims = {d % rank for d in c.attrs["dims"]}
    for dim in sorted(dims):
        for index, axes in enumerate((x, y)):
            place = dim - rank + len(axes)
            if place >= 0 and resolve(axes[place]).size == shape[dim] > 1:
                s.reduce(c, index, place)
    keepdim = c.attrs["keepdim"]
    return [t if d not in dims else product([]) for d, t in enumerate(full) if keepdim or d not in dims]


@rule("bilinear")
def bilinear(s: Solver, c: Call) -> list[Term]:
    """x[*,I] y[*,J] w[O,I,J] b[O] -> z[*,O]"""
    x, y, w = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    s.equal(x[-1], w[1])
    s.equal(y[-1], w[2])
    s.contract(c, 0, -1)
    s.contract(c, 1, -1)
    for mine, theirs in zip(x[:-1], y[:-1], strict=True):
        s.equal(mine, theirs)
    if s.has(c, 3):
        s.equal(s.of(c, 3)[0], w[0])
    return [*x[:-1], w[0]]


@rule("kron")
def kron(s: Solver, c: Call) -> list[Term]:
    """x[M,N] y[P,Q] -> z[M*P,N*Q]"""
    x, y = s.of(c, 0), s.of(c, 1)
    rank = len(c.outputs[0].shape)
    return [
        product([axes[d - rank + len(axes)] for axes in (x, y) if d - rank + len(axes) >= 0])
        for d in range(rank)
    ]

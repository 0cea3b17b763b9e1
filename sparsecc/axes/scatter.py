"""Axis rules of operators that read or write single entries, and of those that nothing can be said of."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.axes.conv import conv
from sparsecc.axes.layout import mixed
from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, resolve
from sparsecc.graph import Call


@rule("opaque")
def opaque(s: Solver, c: Call) -> list[list[Term]]:
    """any operands -> any results; ``attrs['why']`` says why every axis stays"""
    why = c.attrs["why"]
    for index in range(len(c.inputs)):
        if s.has(c, index):
            for term in s.of(c, index):
                s.freeze(term, "opaque", why)
    return [[s.frozen(n, "opaque", why) for n in v.shape] for v in c.outputs]


@rule("mixed_by")
def mixed_by(s: Solver, c: Call) -> list[list[Term]]:
    """x[*K,*M] by[*] ... -> y[*K,*M'], as ``mixed``, told by operands that stay whole"""
    for index in range(1, len(c.inputs)):
        for term in s.of(c, index) if s.has(c, index) else ():
            s.freeze(term, "position", "tells what becomes of single positions")
    out: list[list[Term]] = mixed(s, c)
    return out


@rule("scatter_nd")
def scatter_nd(s: Solver, c: Call) -> list[Term]:
    """x[*D,*R] indices[*I,len(D)] updates[*I,*R] -> y[*D,*R], rows written at D"""
    x, indices, updates = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    depth = resolve(indices[-1]).size
    for term in (*x[:depth], *indices, *updates[: len(indices) - 1]):
        s.freeze(term, "indexed", "writes to positions of this axis")
    _all_equal(s, updates[len(indices) - 1 :], x[depth:])
    return list(x)


@rule("tensor_scatter")
def tensor_scatter(s: Solver, c: Call) -> list[Term]:
    """cache[B,*,T,*] update[B,*,L,*] index[B] -> y[B,*,T,*]"""
    cache, update = s.of(c, 0), s.of(c, 1)
    dim = c.attrs["dim"] % len(cache)
    for d, (mine, theirs) in enumerate(zip(cache, update, strict=True)):
        if d == dim:
            for term in (mine, theirs):
                s.freeze(term, "indexed", "writes to positions of this axis")
        else:
            s.equal(mine, theirs)
    if s.has(c, 2):
        s.equal(s.of(c, 2)[0], cache[0])
    return list(cache)


def _all_equal(s: Solver, left: Sequence[Term], right: Sequence[Term]) -> None:
    for mine, theirs in zip(left, right, strict=True):
        s.equal(mine, theirs)


@rule("sampled")
def sampled(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] places -> y[N' or R,C,*S'], values of x at computed places; channels are carried"""
    x = s.of(c, 0)
    for index in range(len(c.inputs)):
        for dim, term in enumerate(s.of(c, index) if s.has(c, index) else ()):
            if (index, dim) != (0, 1):
                s.freeze(term, "spatial", "takes samples at computed places")
    out = [s.frozen(n, "spatial", "takes samples at computed places") for n in c.outputs[0].shape]
    out[1] = x[1]
    return out


@rule("col2im")
def col2im(s: Solver, c: Call) -> list[Term]:
    """x[N,C*K,L] -> y[N,C,*S], K the positions of a kernel"""
    batch, columns, places = s.of(c, 0)
    kernel = c.attrs["kernel"]
    channels, inside = s.factors(columns, [resolve(columns).size // kernel, kernel])
    for term in (inside, places):
        s.freeze(term, "spatial", "adds up neighbours along this axis")
    spatial = c.outputs[0].shape[2:]
    return [batch, channels, *(s.frozen(n, "spatial", "adds up neighbours along this axis") for n in spatial)]


@rule("deform_conv")
def deform_conv(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] w[O,C/g,*K] b[O] offset[N,2*K,*S'] mask[N,K,*S'] -> y[N,O,*S']"""
    for index in (3, 4):
        for term in s.of(c, index) if s.has(c, index) else ():
            s.freeze(term, "spatial", "takes samples at computed places")
    if c.attrs["offset_groups"] > 1:
        s.freeze(s.of(c, 0)[1], "offset groups", "gives groups of channels offsets of their own")
    out: list[Term] = conv(s, c)
    return out


@rule("depthwise_causal")
def depthwise_causal(s: Solver, c: Call) -> list[list[Term]]:
    """x[N,C,L] w[C,1,K] b[C] past[N,C,K-1] -> y[N,C,L] state[N,C,K-1]"""
    x, w = s.of(c, 0), s.of(c, 1)
    s.equal(w[0], x[1])
    for term in (x[2], w[2]):
        s.freeze(term, "kernel", "slides its kernel along this axis")
    if s.has(c, 2):
        s.equal(s.of(c, 2)[0], x[1])
    if s.has(c, 3):
        _all_equal(s, s.of(c, 3)[:2], x[:2])
        s.freeze(s.of(c, 3)[2], "kernel", "keeps a state of its kernel")
    return [
        [x[0], x[1], x[2] if place == 0 else s.frozen(v.shape[2], "kernel", "keeps a state of its kernel")]
        for place, v in zip(c.attrs["outputs"], c.outputs, strict=True)
    ]

"""Axis rules of transforms, windows and samplers, which work along some axes and carry the rest."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, product, resolve
from sparsecc.graph import Call


@rule("carried")
def carried(s: Solver, c: Call) -> list[list[Term]]:
    """x[*] ... -> y[*]; ``attrs['source']`` names the axis of x that is each axis of y, None for new ones

    Axes of x that are not named, and all axes of other operands, stay whole.
    """
    x, source = s.of(c, 0), c.attrs["source"]
    others = [t for i in range(1, len(c.inputs)) if s.has(c, i) for t in s.of(c, i)]
    for term in (*(t for d, t in enumerate(x) if d not in source), *others):
        if resolve(term).size > 1:
            s.freeze(term, "mixed", "works along this axis as a whole")
    return [
        [
            s.frozen(n, "mixed", "puts out this axis") if d is None else x[d]
            for d, n in zip(source, value.shape, strict=True)
        ]
        for value in c.outputs
    ]


@rule("along")
def along(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] y[*,D,*] ... -> z[*,D,*], broadcast; positions of ``attrs['dims']`` are read by place"""
    operands = [s.of(c, i) for i in range(len(c.inputs)) if s.has(c, i)]
    out = s.broadcast(c, operands, c.outputs[0].shape)
    for dim in c.attrs["dims"]:
        s.freeze(out[dim], "order matters", "reads positions along this axis")
    return out


@rule("per_channel")
def per_channel(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,C,*] and vectors[C] -> y[*,C,*] (quantisation a channel)"""
    x = s.of(c, 0)
    channels = x[c.attrs["dim"] % len(x)]
    for index in range(1, len(c.inputs)):
        if s.has(c, index):
            s.equal(s.of(c, index)[0], channels)
    return [list(x) for _ in c.outputs]


@rule("windows")
def windows(s: Solver, c: Call) -> list[Term]:
    """x[N,C,H,W] -> y[N,C*kh*kw,L], or without N (im2col)"""
    *batch, channels, height, width = s.of(c, 0)
    for term in (height, width):
        s.freeze(term, "spatial", "cuts windows along this axis")
    inside = c.outputs[0].shape[-2] // resolve(channels).size
    places = s.frozen(c.outputs[0].shape[-1], "spatial", "puts out windows")
    return [*batch, product([channels, s.frozen(inside, "kernel", "puts windows into channels")]), places]


@rule("from_windows")
def from_windows(s: Solver, c: Call) -> list[Term]:
    """x[N,C*kh*kw,L] -> y[N,C,H,W], or without N (col2im)"""
    *batch, rows, places = s.of(c, 0)
    channels, height, width = c.outputs[0].shape[-3:]
    kept, inside = s.factors(rows, [channels, resolve(rows).size // channels])
    for term in (inside, places):
        s.freeze(term, "spatial", "adds windows along this axis")
    return [*batch, kept, *(s.frozen(n, "spatial", "puts out this axis") for n in (height, width))]


@rule("grid_sample")
def grid_sample(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] grid[N,*T,len(S)] -> y[N,C,*T]"""
    x, places = s.of(c, 0), s.of(c, 1)
    s.equal(x[0], places[0])
    for term in (*x[2:], places[-1]):
        s.freeze(term, "spatial", "samples between positions of this axis")
    return [x[0], x[1], *places[1:-1]]


@rule("unpool")
def unpool(s: Solver, c: Call) -> list[Term]:
    """x[*,C,*S] places[*,C,*S] -> y[*,C,*T]"""
    x, count = s.of(c, 0), c.attrs["spatial"]
    for mine, theirs in zip(x, s.of(c, 1), strict=True):
        s.equal(mine, theirs)
    for term in x[len(x) - count :]:
        s.freeze(term, "spatial", "writes to positions of this axis")
    shape = c.outputs[0].shape
    return [*x[: len(x) - count], *(s.frozen(n, "spatial", "puts out this axis") for n in shape[-count:])]

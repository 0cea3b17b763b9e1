"""Axis rules of convolutions."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, product, resolve
from sparsecc.graph import Call


@rule("conv")
def conv(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] w[O,C/g,*K] b[O] -> y[N,O,*S']"""
    x, w = s.of(c, 0), s.of(c, 1)
    at = len(x) - len(w) + 1
    groups = c.attrs["groups"]
    channels = resolve(x[at]).size
    if groups == 1:
        s.equal(x[at], w[1])
    else:
        ours = s.factors(x[at], [groups, channels // groups])
        theirs = s.factors(w[0], [groups, resolve(w[0]).size // groups])
        s.equal(ours[0], theirs[0])
        s.equal(ours[1], w[1])
        s.size(c, "groups", (ours[0],))
    if channels != groups:
        s.contract(c, 0, at)
    return _finish(s, c, x[:at], w, w[0])


@rule("conv_transpose")
def conv_transpose(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] w[C,O/g,*K] b[O] -> y[N,O,*S']"""
    x, w = s.of(c, 0), s.of(c, 1)
    at = len(x) - len(w) + 1
    groups = c.attrs["groups"]
    channels = resolve(x[at]).size
    s.equal(x[at], w[0])
    out = w[1]
    if groups > 1:
        lead = s.factors(x[at], [groups, channels // groups])[0]
        s.size(c, "groups", (lead,))
        out = product([lead, w[1]])
    if channels != groups:
        s.contract(c, 0, at)
    return _finish(s, c, x[:at], w, out)


def _finish(s: Solver, c: Call, batch: tuple[Term, ...], w: tuple[Term, ...], out: Term) -> list[Term]:
    for term in w[2:]:
        s.freeze(term, "kernel", "slides its kernel along this axis")
    if s.has(c, 2):
        s.equal(s.of(c, 2)[0], out)
    spatial = c.outputs[0].shape[len(batch) + 1 :]
    return [*batch, out, *(s.frozen(n, "spatial", "puts out this spatial axis") for n in spatial)]

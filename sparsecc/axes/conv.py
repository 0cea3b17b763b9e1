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
        s.contract(c, 0, at, (1, 1))
    return _finish(s, c, x, w, w[0])


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
    return _finish(s, c, x, w, out)


def _finish(s: Solver, c: Call, x: tuple[Term, ...], w: tuple[Term, ...], out: Term) -> list[Term]:
    """Spatial axes stay whole, unless ``attrs['pointwise']`` says that no position meets another one."""
    for term in w[2:]:
        s.freeze(term, "kernel", "slides its kernel along this axis")
    if s.has(c, 2):
        s.equal(s.of(c, 2)[0], out)
    at = len(x) - len(w) + 1
    pointwise = c.attrs.get("pointwise", (False,) * len(w[2:]))
    spatial: list[Term] = []
    for term, size, alone in zip(x[at + 1 :], c.outputs[0].shape[at + 1 :], pointwise, strict=True):
        if not alone:
            s.freeze(term, "spatial", "slides its kernel along this axis")
        spatial.append(term if alone else s.frozen(size, "spatial", "puts out this spatial axis"))
    return [*x[:at], out, *spatial]

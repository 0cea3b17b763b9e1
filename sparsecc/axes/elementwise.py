"""Axis rules of operators that treat every position alike."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term
from sparsecc.graph import Call


@rule("elementwise")
def elementwise(s: Solver, c: Call) -> list[list[Term]]:
    """x[*] y[*] ... -> z[*], broadcast"""
    operands = [s.of(c, i) for i in range(len(c.inputs)) if s.has(c, i)]
    return [s.broadcast(c, operands, value.shape) for value in c.outputs]


@rule("prelu")
def prelu(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] slope[C] or slope[1] -> y[N,C,*S]"""
    x, slope = s.of(c, 0), s.of(c, 1)
    if len(slope) == 1 and slope[0].size > 1 and len(x) > 1:
        s.equal(slope[0], x[1])
    return list(x)


@rule("create")
def create(s: Solver, c: Call) -> list[Term]:
    """sizes -> y[*sizes], every position alike (zeros, ones, full)"""
    value = c.outputs[0]
    terms = list(s._fresh(value))
    s.size(c, "shape", [(t,) for t in terms])
    return terms


@rule("positions")
def positions(s: Solver, c: Call) -> list[list[Term]]:
    """y whose values say where they stand (arange, one_hot, tril, eye)"""
    return [[s.frozen(n, "position", "puts positions into data") for n in v.shape] for v in c.outputs]

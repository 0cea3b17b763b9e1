"""Axis rules of operators that send rows to experts by position."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver, unknown_operator
from sparsecc.axes.terms import Term, resolve
from sparsecc.graph import Call


@rule("topk")
def topk(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,D,*] -> values[*,k,*] places[*,k,*]; the places are positions of D"""
    x, dim, count = s.of(c, 0), c.attrs["dim"], c.attrs["count"]
    s.route(c, 0, dim, count, c.outputs[1])
    picked = s.frozen(count, "order matters", "puts out this axis")
    return [[*x[:dim], picked, *x[dim + 1 :]] for _ in c.outputs]


@rule("one_hot")
def one_hot(s: Solver, c: Call) -> list[Term]:
    """places[*I] -> y[*I,D]"""
    held, size = s.places.followed(c, 0), c.outputs[0].shape[-1]
    if held is None or resolve(held).size != size:
        if held is not None:
            s.freeze(held, "position", "counts more positions than this axis has")
        return [s.frozen(n, "position", "puts positions into data") for n in c.outputs[0].shape]
    s.size(c, "num_classes", (held,))
    return [*s.of(c, 0), held]


@rule("histogram")
def histogram(s: Solver, c: Call) -> list[Term]:
    """places[*I] -> counts[D], one bin a position of D"""
    held, bins = s.places.followed(c, 0), c.attrs["bins"]
    if held is None or (bins, c.attrs["min"], c.attrs["max"]) != (resolve(held).size, 0, bins - 1):
        if held is not None:
            s.freeze(held, "position", "counts in other bins than one a position")
        s.give_up(c, "frozen operator", unknown_operator(c))
        return list(s.axes[c.outputs[0]])
    for term in s.of(c, 0):
        s.freeze(term, "position", "is counted")
    s.size(c, "bins", (held,))
    s.size(c, "last_bin", (held,))
    s.places.counted.add(c.outputs[0])
    return [held]

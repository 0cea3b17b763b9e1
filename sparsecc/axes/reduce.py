"""Axis rules of reductions, softmax and operators that return or depend on positions."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, atom, resolve
from sparsecc.graph import Call


@rule("reduce")
def reduce(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,*D,*] -> y[*,*] or y[*,1,*] (sum, mean, max, var, norms, logsumexp)"""
    x = s.of(c, 0)
    dims = {d % len(x) for d in c.attrs["dims"]} if x else set()
    for dim in sorted(dims):
        if resolve(x[dim]).size > 1:
            s.reduce(c, 0, dim)
    keepdim = c.attrs["keepdim"]
    return [
        [atom(1) if d in dims else t for d, t in enumerate(x) if keepdim or d not in dims] for _ in c.outputs
    ]


@rule("softmax")
def softmax(s: Solver, c: Call) -> list[Term]:
    """x[*,D,*] -> y[*,D,*], normalised over D (softmax, log_softmax, l2 normalisation)"""
    x = s.of(c, 0)
    for dim in c.attrs["dims"]:
        if resolve(x[dim]).size > 1:
            s.reduce(c, 0, dim)
            s.places.shares.append(x[dim])
    return list(x)


@rule("ordered")
def ordered(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,D,*] -> y along whose D order matters (cumsum, sort, argmax)

    A running sum of how often positions occur is the same without those that never do, and sorted positions
    are positions.
    """
    x = s.of(c, 0)
    function = s.view.semantics.function(c) if s.view.semantics is not None else ""
    if function == "cumsum" and c.inputs[0] in s.places.counted:
        s.places.counted.update(c.outputs)
        return [list(x)]
    if function in ("sort", "argsort") and (held := s.places.followed(c, 0)) is not None:
        s.places.holds.update({v: held for v in c.outputs[:1] if function == "sort"})
    dims = {d % len(x) for d in c.attrs["dims"]} if x else set()
    for dim in dims:
        s.order(c, x[dim])
    out: list[list[Term]] = []
    for value in c.outputs:
        same_rank = len(value.shape) == len(x)
        rest = list(x) if same_rank else [t for d, t in enumerate(x) if d not in dims]
        out.append(
            [
                t if resolve(t).size == n else s.frozen(n, "order matters", "puts out this axis")
                for t, n in zip(rest, value.shape, strict=True)
            ]
        )
    return out

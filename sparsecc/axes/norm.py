"""Axis rules of normalisations."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, atom, product, resolve
from sparsecc.graph import Call


def _with_statistics(s: Solver, c: Call, y: list[Term], statistics: list[Term]) -> list[list[Term]]:
    """Axes of y, and of the means and deviations that some forms put out as well (or leave empty)."""
    empty: list[Term] = [s.frozen(0, "empty", "puts out nothing")]
    return [y, *(empty if value.shape == (0,) else statistics for value in c.outputs[1:])]


@rule("batch_norm")
def batch_norm(s: Solver, c: Call) -> list[list[Term]]:
    """x[N,C,*S] and per-channel operands [C] -> y[N,C,*S] (running statistics)"""
    x = s.of(c, 0)
    for index in range(1, len(c.inputs)):
        if s.has(c, index):
            s.equal(s.of(c, index)[0], x[1])
    return _with_statistics(s, c, list(x), [x[1]])


@rule("instance_norm")
def instance_norm(s: Solver, c: Call) -> list[list[Term]]:
    """x[N,C,*S] weight[C] bias[C] -> y[N,C,*S]; statistics over S, or ``attrs['dims']``"""
    x = s.of(c, 0)
    for index in range(1, len(c.inputs)):
        if s.has(c, index):
            s.equal(s.of(c, index)[0], x[1])
    for dim in c.attrs.get("dims", range(2, len(x))):
        s.reduce(c, 0, dim)
    return _with_statistics(s, c, list(x), [x[1]])


@rule("layer_norm")
def layer_norm(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,*D] weight[*D] bias[*D] -> y[*,*D]; statistics over D"""
    x = s.of(c, 0)
    dims = c.attrs["dims"]
    for index in range(1, len(c.inputs)):
        if s.has(c, index):
            _couple_trailing(s, s.of(c, index), x)
    for dim in dims:
        s.reduce(c, 0, dim)
    s.size(c, "normalized_shape", [(x[dim],) for dim in dims])
    return _with_statistics(s, c, list(x), [atom(1) if d in dims else t for d, t in enumerate(x)])


def _couple_trailing(s: Solver, operand: tuple[Term, ...], x: tuple[Term, ...]) -> None:
    for mine, theirs in zip(reversed(operand), reversed(x), strict=False):
        if resolve(mine).size == resolve(theirs).size:
            s.equal(mine, theirs)


@rule("group_norm")
def group_norm(s: Solver, c: Call) -> list[list[Term]]:
    """x[N,G*D,*S] weight[G*D] bias[G*D] -> y[N,G*D,*S]; statistics over D and S

    ``attrs['affine']`` is "channel", or "group" where weight and bias have one entry per group.
    """
    x = s.of(c, 0)
    groups = c.attrs["groups"]
    lead, inner = s.factors(x[1], [groups, resolve(x[1]).size // groups])
    target = lead if c.attrs.get("affine") == "group" else product([lead, inner])
    for index in (1, 2):
        if s.has(c, index):
            s.equal(s.of(c, index)[0], target)
    s.size(c, "groups", (lead,))
    if c.attrs.get("spelled"):
        s.size(c, "channels", (x[1],))
    for dim in range(1, len(x)):
        s.reduce(c, 0, dim)
    return _with_statistics(s, c, list(x), [x[0], lead])


@rule("weight_norm")
def weight_norm(s: Solver, c: Call) -> list[list[Term]]:
    """v[*,D,*] g[*,D,*] -> w[*,D,*] (norms[*,D,*]); over all axes but ``attrs['dim']`` (-1: over all)"""
    v, g = s.of(c, 0), s.of(c, 1)
    for dim, term in enumerate(v):
        if dim == c.attrs["dim"]:
            s.equal(term, g[dim])
        else:
            s.derive(c, term, "takes norms over this axis of parameters")
    return [list(axes) for axes in (v, g)[: len(c.outputs)]]

"""Axis rules of fused attention."""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Attention, Solver
from sparsecc.axes.terms import Term, resolve
from sparsecc.graph import Call


@rule("attention")
def attention(s: Solver, c: Call) -> list[list[Term]]:
    """q[*,H,L,E] k[*,Hk,S,E] v[*,Hk,S,F] mask[*,L,S] -> y[*,H,L,F] (and sums[*,H,L] or weights[*,H,L,S])

    The default scale 1/sqrt(E) is read from the tensor at run time, so it is pinned.
    """
    q, k, v = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    s.equal(q[-1], k[-1])
    s.equal(k[-2], v[-2])
    if c.attrs.get("one_width"):
        s.equal(q[-1], v[-1])
    batch: list[Term] = []
    for mine, key, value in zip(q[:-2], k[:-2], v[:-2], strict=True):
        s.equal(key, value)
        ours, theirs = resolve(mine).size, resolve(key).size
        if ours == theirs:
            s.equal(mine, key)
            batch.append(mine)
        elif theirs == 1:
            batch.append(mine)
        else:
            shared, _ = s.factors(mine, [theirs, ours // theirs])
            s.equal(shared, key)
            batch.append(mine)
    if s.has(c, 3):
        s.broadcast(c, [(*batch, q[-2], k[-2]), s.of(c, 3)], (*c.outputs[0].shape[:-1], resolve(k[-2]).size))
    s.contract(c, 0, -1)
    if resolve(k[-2]).size > 1:
        s.freeze(k[-2], "sequence", "attends along this axis")
    if c.attrs.get("causal") and resolve(q[-2]).size > 1:
        s.freeze(q[-2], "sequence", "masks by position along this axis")
    if c.attrs["scale"] is None:
        s.pin(c, "scale", resolve(q[-1]).size ** -0.5, q[-1])
    s.attentions.append(Attention(tuple(batch), q[-1], v[-1]))
    rows = [*batch, q[-2]]
    weights = [*rows, k[-2]]
    return [[*rows, v[-1]], *(weights[: len(o.shape)] for o in c.outputs[1:])]

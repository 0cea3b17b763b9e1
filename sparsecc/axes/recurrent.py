"""Axis rules of recurrent layers: gates are the leading factor of the weights' rows.

All layers and directions of one operator share their hidden positions, because the operator has
one hidden size and stacks its states.
"""

from __future__ import annotations

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import Term, atom, concat, product, resolve
from sparsecc.graph import Call


@rule("recurrent_torch")
def recurrent_torch(s: Solver, c: Call) -> list[list[Term]]:
    """x[T,B,I] h0[L*D,B,P] (c0[L*D,B,H]) weights -> y[T,B,D*P] h[L*D,B,P] (c[L*D,B,H])

    ``attrs``: gates, layers, directions, states (1 or 2), per (weights a layer and direction),
    biased.  The weights of a layer and direction are w_ih[G*H,I] w_hh[G*H,P] (b_ih b_hh) (w_hr[P,H]).
    """
    a = c.attrs
    states, per = a["states"], a["per"]
    x = s.of(c, 0)
    hidden_size = c.inputs[1 + states + 1].shape[0] // a["gates"]
    projected = per == (5 if a["biased"] else 3)
    hidden = atom(hidden_size, f"{c.name}.hidden")
    out = atom(c.outputs[1].shape[-1], f"{c.name}.projection") if projected else hidden
    if projected:
        s.differ(c, out, hidden)  # the operator has no other sign of a projection
    gates = s.frozen(a["gates"], "gates", "stacks its gates")
    current: Term = x[-1]
    for term in x[:-1]:
        if resolve(term).size > 1:
            s.freeze(term, "sequence", "runs along this axis, or along the one beside it")
    at = 1 + states
    for _ in range(a["layers"]):
        for _ in range(a["directions"]):
            rows = product([gates, hidden])
            w_ih, w_hh = s.of(c, at), s.of(c, at + 1)
            s.equal(w_ih[0], rows)
            s.equal(w_ih[1], current)
            s.equal(w_hh[0], rows)
            s.equal(w_hh[1], out)
            s.contract(c, at, 1)
            s.contract(c, at + 1, 1)
            if a["biased"]:
                s.equal(s.of(c, at + 2)[0], rows)
                s.equal(s.of(c, at + 3)[0], rows)
            if projected:
                w_hr = s.of(c, at + per - 1)
                s.equal(w_hr[0], out)
                s.equal(w_hr[1], hidden)
                s.contract(c, at + per - 1, 1)
            at += per
        current = concat([out] * a["directions"])
    count = a["layers"] * a["directions"]
    stacked = s.frozen(count, "stacked", "stacks layers and directions")
    for index, term in zip(range(1, 1 + states), (out, hidden), strict=False):
        s.equal(s.of(c, index)[-1], term)
        s.equal(s.of(c, index)[0], stacked)
    batch = s.of(c, 1)[-2:-1] if len(c.outputs[1].shape) == 3 else ()
    finals = [[stacked, *batch, term] for term in (out, hidden)[:states]]
    return [[*x[:-1], current], *finals]


@rule("recurrent_cell")
def recurrent_cell(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,I] h[*,H] (c[*,H]) w_ih[G*H,I] w_hh[G*H,H] b_ih[G*H] b_hh[G*H] -> h'[*,H] (c'[*,H])"""
    states = c.attrs["states"]
    x, at = s.of(c, 0), 1 + states
    w_ih, w_hh = s.of(c, at), s.of(c, at + 1)
    hidden = w_hh[1]
    rows = product([s.frozen(c.attrs["gates"], "gates", "stacks its gates"), hidden])
    s.equal(w_ih[0], rows)
    s.equal(w_hh[0], rows)
    s.equal(w_ih[1], x[-1])
    for index in (at + 2, at + 3):
        if s.has(c, index):
            s.equal(s.of(c, index)[0], rows)
    for index in range(1, at):
        s.equal(s.of(c, index)[-1], hidden)
        for mine, theirs in zip(s.of(c, index)[:-1], x[:-1], strict=True):
            s.equal(mine, theirs)
    s.contract(c, at, 1)
    s.contract(c, at + 1, 1)
    return [[*x[:-1], hidden] for _ in c.outputs]


@rule("recurrent_onnx")
def recurrent_onnx(s: Solver, c: Call) -> list[list[Term]]:
    """X[T,B,I] W[D,G*H,I] R[D,G*H,H] B[D,2*G*H] lens[B] h0[D,B,H] c0[D,B,H] P[D,3*H] -> Y[T,D,B,H] Yh Yc

    With layout 1 the batch comes first in X, h0, c0 and the outputs.
    """
    a = c.attrs
    x, w, r = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    hidden = atom(c.inputs[2].shape[-1], f"{c.name}.hidden")  # type: ignore[union-attr]
    gates = s.frozen(a["gates"], "gates", "stacks its gates")
    rows = product([gates, hidden])
    directions = s.frozen(c.inputs[1].shape[0], "stacked", "stacks directions")  # type: ignore[union-attr]
    for axes, row in ((w, rows), (r, rows)):
        s.equal(axes[0], directions)
        s.equal(axes[1], row)
    s.equal(w[2], x[2])
    s.equal(r[2], hidden)
    s.contract(c, 1, 2)
    s.contract(c, 2, 2)
    batch_first = a["layout"] == 1
    time, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    biases = product([s.frozen(2, "gates", "stacks its biases"), gates, hidden])
    peepholes = product([s.frozen(3, "gates", "stacks its peepholes"), hidden])
    state = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    rest = {3: (directions, biases), 4: (batch,), 5: state, 6: state, 7: (directions, peepholes)}
    for index, axes in rest.items():
        if s.has(c, index):
            for mine, theirs in zip(s.of(c, index), axes, strict=True):
                s.equal(mine, theirs)
    if resolve(time).size > 1:
        s.freeze(time, "sequence", "runs along this axis")
    s.size(c, "hidden_size", (hidden,))
    sequence = [batch, time, directions, hidden] if batch_first else [time, directions, batch, hidden]
    final = [batch, directions, hidden] if batch_first else [directions, batch, hidden]
    return [sequence if value == 0 else list(final) for value in a["outputs"]]

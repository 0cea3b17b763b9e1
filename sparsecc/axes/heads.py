"""Axis rules of attention whose heads are packed into one axis or counted by an attribute, and of rotation.

The default scale 1/sqrt(E) follows from a size, so it is pinned (as the float32 that an attribute holds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Attention, Axes, Solver
from sparsecc.axes.terms import Term, concat, product, resolve
from sparsecc.graph import Call


@dataclass(slots=True)
class _Heads:
    """Axes of attention: batch, lengths, query and key-value heads, inner and value dimensions."""

    batch: Term
    queries: Term
    keys: Term
    q: Term
    kv: Term
    inner: Term
    carried: Term
    past: Term | None = None

    @property
    def total(self) -> Term:
        return self.keys if self.past is None else concat([self.past, self.keys])


@rule("attention_onnx")
def attention_onnx(s: Solver, c: Call) -> list[list[Term]]:
    """q[B,Hq,L,E] k[B,Hk,S,E] v[B,Hk,S,F] mask[*,L,T] past[B,Hk,P,E|F] lengths[B]
    -> y[B,Hq,L,F] key[B,Hk,T,E] value[B,Hk,T,F] scores[B,Hq,L,T]; q, k, v and y also as [B,L,H*E]
    """
    a = c.attrs
    packed = len(s.of(c, 0)) == 3
    q, k, v = (
        _unpacked(s, s.of(c, i), count)
        for i, count in ((0, a["q_heads"]), (1, a["kv_heads"]), (2, a["kv_heads"]))
    )
    h = _joined(s, q, k, v)
    _attend(s, c, h, scale=a["scale"], causal=a["causal"])
    s.contract(c, 0, -1)
    _mask(s, c, 3, h)
    _past(s, c, (4, 5), h)
    if s.has(c, 6):
        s.equal(s.of(c, 6)[0], h.batch)
    if packed:
        _counts(s, c, h)
    return _results(c, h, packed)


@rule("multi_head_attention")
def multi_head_attention(s: Solver, c: Call) -> list[list[Term]]:
    """q[B,L,H*E] k[B,S,H*E] v[B,S,H*F] bias[H*E+H*E+H*F] padding[B,S] mask[*,L,T] past[B,H,P,E|F]
    -> y[B,L,H*F] key[B,H,T,E] value[B,H,T,F] scores[B,H,L,T]; k and v also as [B,H,S,E]
    """
    a = c.attrs
    q, k, v = (_unpacked(s, s.of(c, i), a["heads"]) for i in (0, 1, 2))
    h = _joined(s, q, k, v)
    _attend(s, c, h, scale=a["scale"], causal=a["causal"])
    s.contract(c, 0, -1)
    if s.has(c, 3):
        _fused_bias(s, s.of(c, 3)[0], h)
        s.contract(c, 3, 0)
    _padding(s, c, 4, h)
    _mask(s, c, 5, h)
    _past(s, c, (6, 7), h)
    _counts(s, c, h)
    return _results(c, h, packed=True)


@rule("self_attention")
def self_attention(s: Solver, c: Call) -> list[list[Term]]:
    """x[B,L,D] w[D,H*E+H*E+H*F] b[H*E+H*E+H*F] padding[B,*] past[2,B,H,P,E] mask[*,L,T]
    and, quantised, x_zero[] w_zero[] or w_zero[H*E+H*E+H*F], and scales alike
    -> y[B,L,H*F] present[2,B,H,T,E]

    The products of queries and keys sum over E inside, so removed columns of w and b are zeros.
    """
    a, x, w = c.attrs, s.of(c, 0), s.of(c, 1)
    s.equal(x[2], w[0])
    widths = a["widths"]
    parts = s.pieces(w[1], widths)
    (q, inner), (k, other), (v, carried) = (
        s.factors(part, [a["heads"], width // a["heads"]]) for part, width in zip(parts, widths, strict=True)
    )
    heads = s.equal(s.equal(q, k), v)
    h = _Heads(x[0], x[1], x[1], heads, heads, s.equal(inner, other), carried)
    _attend(s, c, h, scale=a["scale"], causal=a["causal"])
    for index, dim in ((0, 2), (1, 1)):
        s.contract(c, index, dim)
    if s.has(c, 2):
        s.equal(s.of(c, 2)[0], w[1])
        s.contract(c, 2, 0)
    for index in (7, 9):
        if s.has(c, index) and any(resolve(t).size > 1 for t in s.of(c, index)):
            s.equal(s.of(c, index)[0], w[1])
    _padding(s, c, 3, h)
    _stacked_past(s, c, h)
    _mask(s, c, 5, h)
    _counts(s, c, h)
    s.size(c, "qkv_hidden_sizes", [(product([h.q, t]),) for t in (h.inner, h.inner, h.carried)])
    shapes = {
        0: [h.batch, h.queries, product([h.q, h.carried])],
        1: [s.frozen(2, "stacked", "stacks keys and values"), h.batch, h.q, h.total, h.inner],
    }
    return [shapes[i] for i in a["outputs"]]


def _stacked_past(s: Solver, c: Call, h: _Heads) -> None:
    if s.has(c, 4):
        _, batch, heads, h.past, inner = s.of(c, 4)
        for mine, theirs in ((batch, h.batch), (heads, h.q), (inner, h.inner)):
            s.equal(mine, theirs)
        s.freeze(h.past, "sequence", "attends along this axis")
    if s.has(c, 4) or 1 in c.attrs["outputs"] or c.attrs["one_width"]:
        s.equal(h.inner, h.carried)


@rule("group_query_attention")
def group_query_attention(s: Solver, c: Call) -> list[list[Term]]:
    """q[B,L,Hq*E] k[B,L,Hk*E] v[B,L,Hk*E] past[B,Hk,P,E] x 2, lengths[B] total[] cos[M,R/2] sin[M,R/2]
    positions[B,L] mask[*,L,T] sink[Hq] norms[E] x 2
    -> y[B,L,Hq*E] key[B,Hk,T,E] value[B,Hk,T,E]; q also as [B,L,(Hq+2Hk)*E] without k and v

    Runtimes take no other head sizes than multiples of 8 (16 where they rotate), so E stays.
    """
    a, x = c.attrs, s.of(c, 0)
    if s.has(c, 1):
        q, k, v = (
            _unpacked(s, s.of(c, i), count)
            for i, count in ((0, a["q_heads"]), (1, a["kv_heads"]), (2, a["kv_heads"]))
        )
    else:
        counts = (a["q_heads"], a["kv_heads"], a["kv_heads"])
        width = resolve(x[2]).size // sum(counts)
        parts = s.pieces(x[2], [n * width for n in counts])
        q, k, v = (_unpacked(s, (*x[:2], p), n) for p, n in zip(parts, counts, strict=True))
    h = _joined(s, q, k, v)
    s.equal(h.inner, h.carried)
    _attend(s, c, h, scale=a["scale"], causal=True)
    s.contract(c, 0, -1)
    for term in (h.batch, h.queries):
        s.freeze(term, "sequence", "attends along this axis")
    _past(s, c, (3, 4), h)
    for index in (7, 8):
        for term in s.of(c, index) if s.has(c, index) else ():
            s.freeze(term, "head size", "takes head sizes that are multiples of 8 only")
    s.freeze(h.inner, "head size", "takes head sizes that are multiples of 8 only")
    _mask(s, c, 10, h)
    if s.has(c, 11):
        s.equal(s.of(c, 11)[0], h.q)
    for index in (12, 13):
        if s.has(c, index):
            s.equal(s.of(c, index)[0], h.inner)
    _counts(s, c, h)
    shapes = {0: [h.batch, h.queries, product([h.q, h.carried])]}
    for place in (1, 2):
        shapes[place] = [h.batch, h.kv, _present(s, c, place, h), h.inner]
    return [shapes[i] for i in a["outputs"]]


def _present(s: Solver, c: Call, place: int, h: _Heads) -> Term:
    """The length of a cache: past and present, or the buffer that both share."""
    if place not in c.attrs["outputs"]:
        return h.keys
    size = c.outputs[c.attrs["outputs"].index(place)].shape[2]
    return h.total if resolve(h.total).size == size else s.frozen(size, "sequence", "caches this axis")


@rule("rotary_embedding")
def rotary_embedding(s: Solver, c: Call) -> list[Term]:
    """x[B,H,L,E] cos[*,R/2] sin[*,R/2] positions[B,L] -> y[B,H,L,E]; x also as [B,L,H*E]

    The first R dimensions are pairs, which go together; E and R may differ.
    """
    a, x = c.attrs, s.of(c, 0)
    if len(x) == 3:
        heads, inner = s.factors(x[2], [a["heads"], resolve(x[2]).size // a["heads"]])
        length = x[1]
    else:
        heads, inner, length = x[1], x[3], x[2]
    s.size(c, "num_heads", (heads,))
    turned = _rotate(s, c, inner, (1, 2), interleaved=a["interleaved"])
    s.size(c, "rotary_embedding_dim", (turned,))
    for term in (x[0], length):
        s.freeze(term, "sequence", "turns by position along this axis")
    for index in (1, 2, 3):
        for term in s.of(c, index)[: -1 if index < 3 else None] if s.has(c, index) else ():
            s.freeze(term, "position", "turns by position along this axis")
    return list(x)


def _rotate(s: Solver, c: Call, inner: Term, tables: tuple[int, int], *, interleaved: bool) -> Term:
    """Pairs of dimensions with a column of the tables each; the axis that is turned."""
    half, size = resolve(s.of(c, tables[0])[-1]).size, resolve(inner).size
    turned, _ = s.pieces(inner, [2 * half, size - 2 * half]) if size > 2 * half else (inner, None)
    factors = [half, 2] if interleaved else [2, half]
    parts = s.factors(turned, factors)
    pair, columns = (parts[1], parts[0]) if interleaved else (parts[0], parts[1])
    s.freeze(pair, "rotation", "turns pairs of dimensions")
    for index in tables:
        s.equal(s.of(c, index)[-1], columns)
    return turned


# -- what the rules share ----------------------------------------------------------------------------


def _unpacked(s: Solver, x: Axes, heads: int | None) -> tuple[Term, Term, Term, Term]:
    """Batch, heads, length and inner dimension of [B,H,L,E] or [B,L,H*E]."""
    if len(x) == 4:
        return x[0], x[1], x[2], x[3]
    batch, length, wide = x
    if not heads:
        raise ValueError("the number of heads is not given")
    lead, inner = s.factors(wide, [heads, resolve(wide).size // heads])
    return batch, lead, length, inner


def _joined(
    s: Solver,
    q: tuple[Term, Term, Term, Term],
    k: tuple[Term, Term, Term, Term],
    v: tuple[Term, Term, Term, Term],
) -> _Heads:
    """What queries, keys and values have in common; several query heads may read one key head."""
    batch = s.equal(s.equal(q[0], k[0]), v[0])
    kv = s.equal(k[1], v[1])
    keys, inner = s.equal(k[2], v[2]), s.equal(q[3], k[3])
    ours, theirs = resolve(q[1]).size, resolve(kv).size
    lead = q[1] if ours == theirs else s.factors(q[1], [theirs, ours // theirs])[0]
    s.equal(lead, kv)
    return _Heads(batch, q[2], keys, q[1], kv, inner, v[3])


def _attend(s: Solver, c: Call, h: _Heads, *, scale: float | None, causal: bool) -> None:
    if resolve(h.keys).size > 1:
        s.freeze(h.keys, "sequence", "attends along this axis")
    if causal and resolve(h.queries).size > 1:
        s.freeze(h.queries, "sequence", "masks by position along this axis")
    if scale is None:
        s.pin(c, "scale", float(np.float32(resolve(h.inner).size ** -0.5)), h.inner)
    s.attentions.append(Attention((h.q,), h.inner, h.carried))


def _counts(s: Solver, c: Call, h: _Heads) -> None:
    s.size(c, "q_num_heads", (h.q,))
    s.size(c, "kv_num_heads", (h.kv,))


def _mask(s: Solver, c: Call, index: int, h: _Heads) -> None:
    """What is added to the scores, broadcast to [B,H,L,T]; a short one covers the first keys."""
    if not s.has(c, index):
        return
    for mine, theirs in zip(reversed(s.of(c, index)), (h.total, h.queries, h.q, h.batch), strict=False):
        if resolve(mine).size == resolve(theirs).size and resolve(mine).size > 1:
            s.equal(mine, theirs)
        elif resolve(mine).size > 1:
            s.freeze(mine, "sequence", "masks by position along this axis")


def _padding(s: Solver, c: Call, index: int, h: _Heads) -> None:
    """A mask of keys or lengths by sample: nothing of it goes, nor any sample."""
    if s.has(c, index):
        for term in (*s.of(c, index), h.batch):
            s.freeze(term, "sequence", "masks by position along this axis")


def _past(s: Solver, c: Call, places: tuple[int, int], h: _Heads) -> None:
    for index, inner in zip(places, (h.inner, h.carried), strict=True):
        if s.has(c, index):
            batch, heads, length, last = s.of(c, index)
            h.past = length if h.past is None else s.equal(h.past, length)
            for mine, theirs in ((batch, h.batch), (heads, h.kv), (last, inner)):
                s.equal(mine, theirs)
            s.freeze(length, "sequence", "attends along this axis")


def _fused_bias(s: Solver, bias: Term, h: _Heads) -> None:
    wanted = [product([h.q, h.inner]), product([h.kv, h.inner]), product([h.kv, h.carried])]
    for part, term in zip(s.pieces(bias, [t.size for t in wanted]), wanted, strict=True):
        s.equal(part, term)


def _results(c: Call, h: _Heads, packed: bool) -> list[list[Term]]:
    y: Sequence[Term] = (
        [h.batch, h.queries, product([h.q, h.carried])] if packed else [h.batch, h.q, h.queries, h.carried]
    )
    shapes = {
        0: list(y),
        1: [h.batch, h.kv, h.total, h.inner],
        2: [h.batch, h.kv, h.total, h.carried],
        3: [h.batch, h.q, h.queries, h.total],
    }
    return [shapes[i] for i in c.attrs["outputs"]]

"""Axis rules of operators that runtimes fuse: a product with what follows, a sum with its normalisation."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecc.axes.conv import conv
from sparsecc.axes.linear import gemm
from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Attention, Solver
from sparsecc.axes.terms import Term, resolve
from sparsecc.graph import Call, Value

rule("fused_gemm")(gemm)


@rule("fused_conv")
def fused_conv(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] w[O,C/g,*K] b[O] z[N,O,*S'] -> activation(conv + z)[N,O,*S']"""
    out: list[Term] = conv(s, c)
    if s.has(c, 3):
        for mine, theirs in zip(out, s.of(c, 3), strict=True):
            s.equal(mine, theirs)
    return out


@rule("fused_matmul")
def fused_matmul(s: Solver, c: Call) -> list[Term]:
    """a[*,M,K] b[*,K,N], either transposed, scaled -> y[*,M,N]"""
    a, b = s.of(c, 0), s.of(c, 1)
    if len(a) < 2 or len(b) < 2:
        raise ValueError("a vector among the factors")
    rows, inner = (-1, -2) if c.attrs["trans_a"] else (-2, -1)
    other, columns = (-1, -2) if c.attrs["trans_b"] else (-2, -1)
    s.equal(a[inner], b[other])
    s.contract(c, 0, inner, (1, other))
    batch = s.broadcast(c, [a[:-2], b[:-2]], c.outputs[0].shape[:-2])
    if batch and all(v is not None and v.kind == "node" for v in c.inputs[:2]):
        s.attentions.append(Attention(tuple(batch), a[inner], b[columns]))
    return [*batch, a[rows], b[columns]]


@rule("skip_layer_norm")
def skip_layer_norm(s: Solver, c: Call) -> list[list[Term]]:
    """x[*,D] skip[*,D] weight[D] shift[D] bias[D] -> y[*,D] mean[*,1] inverse[*,1] sum[*,D]"""
    x = s.of(c, 0)
    for index in range(1, len(c.inputs)):
        if s.has(c, index):
            s.broadcast(c, [x, s.of(c, index)], [resolve(t).size for t in x])
    s.reduce(c, 0, len(x) - 1)
    return [list(x) if place in (0, 3) else [*x[:-1], s._fresh(v)[-1]] for place, v in _placed(c)]


@rule("embed_layer_norm")
def embed_layer_norm(s: Solver, c: Call) -> list[list[Term]]:
    """ids[B,L] kinds[B,L] words[V,D] positions[P,D] segments[T,D] weight[D] shift[D] mask[B,L] places[*,L]
    -> y[B,L,D] lengths[B] sum[B,L,D]
    """
    ids, width = s.of(c, 0), s.of(c, 2)[1]
    for index in (3, 4):
        if s.has(c, index):
            s.equal(s.of(c, index)[1], width)
    for index in (5, 6):
        s.equal(s.of(c, index)[0], width)
    for index in (2, 3, 4):
        if s.has(c, index):
            s.freeze(s.of(c, index)[0], "indexed", "looks up positions of this axis")
    for index in (0, 1, 7, 8):
        for term in s.of(c, index) if s.has(c, index) else ():
            s.freeze(term, "indexed", "looks up positions along this axis")
    s.reduce(c, 2, 1)
    return [[ids[0]] if place == 1 else [*ids, width] for place, _ in _placed(c)]


def _placed(c: Call) -> Iterator[tuple[int, Value]]:
    """Outputs that have a name, with their places."""
    return zip(c.attrs["outputs"], c.outputs, strict=True)


@rule("split_gate")
def split_gate(s: Solver, c: Call) -> list[Term]:
    """x[*,D+D] bias[D+D] -> y[*,D], one half times a function of the other"""
    x = list(s.of(c, 0))
    if s.has(c, 1):
        s.equal(s.of(c, 1)[0], x[-1])
    half = resolve(x[-1]).size // 2
    left, right = s.pieces(x[-1], [half, half])
    return [*x[:-1], s.equal(left, right)]

"""Axis rules of quantised operators: integers with scales and zero points.

``attrs['zeros']`` maps an operand to the operand that holds its zero point: the integer that stands
for 0, and so what a removed position of a contraction holds.
"""

from __future__ import annotations

from sparsecc.axes import layout, reduce
from sparsecc.axes.conv import conv
from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Axes, Solver
from sparsecc.axes.terms import Term, atom, resolve
from sparsecc.graph import Call

# the same axes as their counterparts, but results are requantised, so constants do not pass unchanged
rule("qconcat")(layout.concatenate)
rule("qmixed")(layout.mixed)
rule("qsoftmax")(reduce.softmax)


@rule("quantize")
def quantize(s: Solver, c: Call) -> list[Term]:
    """x[*] scale zero -> y[*], both ways; scale[] or scale[D] along an axis or scale[*,D/block,*]"""
    x, block = s.of(c, 0), c.attrs["block"]
    axis = c.attrs["axis"] % len(x) if x else 0
    for index in (1, 2):
        if not s.has(c, index):
            continue
        scale = s.of(c, index)
        if block:
            _blocked(s, x, scale, axis, block)
        elif len(scale) == 1 and resolve(scale[0]).size > 1:
            s.equal(scale[0], x[axis])
    return list(x)


def _blocked(s: Solver, x: Axes, scale: Axes, axis: int, block: int) -> None:
    """Whole blocks of the axis may go, with their scales."""
    for dim, (mine, theirs) in enumerate(zip(x, scale, strict=True)):
        if dim != axis:
            s.equal(mine, theirs)
        elif resolve(mine).size == resolve(theirs).size * block:
            lead, inner = s.factors(mine, [resolve(theirs).size, block])
            s.freeze(inner, "quantisation block", "shares a scale among the positions of a block")
            s.equal(lead, theirs)
        else:
            s.freeze(mine, "quantisation block", "has a last block that is not full")
            s.freeze(theirs, "quantisation block", "has a last block that is not full")


@rule("dynamic_quantize")
def dynamic_quantize(s: Solver, c: Call) -> list[list[Term]]:
    """x[*] -> y[*] scale[] zero[], from the smallest and the largest entry"""
    x = _ranged(s, c)
    return [list(x) if place == 0 else [] for place in c.attrs["outputs"]]


@rule("quantisation_range")
def quantisation_range(s: Solver, c: Call) -> list[list[Term]]:
    """x[*] -> scale[1] zero[1], from the smallest and the largest entry"""
    _ranged(s, c)
    return [[atom(1)] for _ in c.outputs]


def _ranged(s: Solver, c: Call) -> Axes:
    """The axes of operand 0, whose smallest and largest entries are looked for."""
    x = s.of(c, 0)
    for dim, term in enumerate(x):
        if resolve(term).size > 1:
            s.reduce(c, 0, dim)
    return x


@rule("dynamic_quantize_matmul")
def dynamic_quantize_matmul(s: Solver, c: Call) -> list[Term]:
    """a[*,M,K] b[K,N] scale[N] zero[N] bias[N] -> y[*,M,N]; a is quantised by its range"""
    a, b = s.of(c, 0), s.of(c, 1)
    s.equal(a[-1], b[-2])
    _along(s, c, (2, 3, 4), b[-1])
    for dim, term in enumerate(a):
        if resolve(term).size > 1:
            s.reduce(c, 0, dim)
    return [*a[:-1], b[-1]]


@rule("qconv")
def qconv(s: Solver, c: Call) -> list[Term]:
    """x[N,C,*S] w[O,C/g,*K] b[O], zeros and scales of x[], w[] or w[O], y[] -> y[N,O,*S']

    Operands: x w b x_zero w_zero x_scale w_scale y_scale y_zero.
    """
    out: list[Term] = conv(s, c)
    _along(s, c, (4, 6), s.of(c, 1)[0])
    return out


@rule("qmatmul")
def qmatmul(s: Solver, c: Call) -> list[Term]:
    """a[*,M,K] b[*,K,N] bias[N], zeros and scales of a[], b[] or b[N], y[] -> y[*,M,N]

    Operands: a b bias a_zero b_zero a_scale b_scale y_scale y_zero; ``trans_a`` and ``trans_b`` say
    which operand is stored transposed.
    """
    a, b = s.of(c, 0), s.of(c, 1)
    rows, inner = (-1, -2) if c.attrs.get("trans_a") else (-2, -1)
    other, columns = (-1, -2) if c.attrs.get("trans_b") else (-2, -1)
    if len(a) < 2 or len(b) < 2:
        raise ValueError("a vector among the factors")
    s.equal(a[inner], b[other])
    s.contract(c, 0, inner)
    _along(s, c, (2, 4, 6), b[columns])
    for index in (3, 5, 7, 8):
        if s.has(c, index) and any(resolve(t).size > 1 for t in s.of(c, index)):
            for term in (*s.of(c, index), *a):
                s.freeze(term, "quantised by row", "has scales or zero points of rows")
    shape = c.outputs[0].shape[:-2]
    return [*s.broadcast(c, [a[:-2], b[:-2]], shape), a[rows], b[columns]]


def _along(s: Solver, c: Call, operands: tuple[int, ...], term: Term) -> None:
    """Operands with one entry a position of ``term`` (in their last axis that is not 1)."""
    for index in operands:
        wide = [t for t in s.of(c, index) if resolve(t).size > 1] if s.has(c, index) else []
        if len(wide) > 1:
            raise ValueError(f"operand {index} has more than one axis")
        if wide:
            s.equal(wide[0], term)


@rule("matmul_nbits")
def matmul_nbits(s: Solver, c: Call) -> list[Term]:
    """a[*,K] b[N,K/block,bytes] scales[N,K/block] zeros[N,...] g_idx[K] bias[N] -> y[*,N]

    Only whole blocks of K can go, and where several zero points share a byte, only all of their blocks.
    """
    a, b = s.of(c, 0), s.of(c, 1)
    rows, blocks, size = b[0], b[1], c.attrs["block"]
    s.freeze(b[2], "packed", "packs several numbers into a byte")
    if resolve(a[-1]).size == resolve(blocks).size * size:
        lead, inner = s.factors(a[-1], [resolve(blocks).size, size])
        s.freeze(inner, "quantisation block", "shares a scale among the positions of a block")
        s.equal(lead, blocks)
    else:
        for term in (a[-1], blocks):
            s.freeze(term, "quantisation block", "has a last block that is not full")
    s.contract(c, 0, -1)
    s.size(c, "K", (a[-1],))
    s.size(c, "N", (rows,))
    _by_block(s, s.of(c, 2), rows, blocks)
    if s.has(c, 3):
        _zero_points(s, c, rows, blocks)
    if s.has(c, 4):
        for term in (*s.of(c, 4), a[-1]):
            s.freeze(term, "indexed", "assigns positions of this axis to groups by number")
    if s.has(c, 5):
        s.equal(s.of(c, 5)[0], rows)
    return [*a[:-1], rows]


def _by_block(s: Solver, axes: Axes, rows: Term, blocks: Term) -> None:
    """Axes that hold an entry for every row and block, in one axis or two."""
    sizes = [resolve(rows).size, resolve(blocks).size]
    first, second = axes if len(axes) == 2 else s.factors(axes[0], sizes)
    s.equal(first, rows)
    s.equal(second, blocks)


def _zero_points(s: Solver, c: Call, rows: Term, blocks: Term) -> None:
    count, shared = resolve(blocks).size, 8 // c.attrs["bits"]
    if not c.attrs["packed_zeros"] or shared == 1:
        _by_block(s, s.of(c, 3), rows, blocks)
        return
    if count % shared == 0:
        lead, inner = s.factors(blocks, [count // shared, shared])
        s.freeze(inner, "packed", "packs the zero points of several blocks into a byte")
    else:
        s.freeze(blocks, "packed", "packs the zero points of several blocks into a byte")
        lead = s.frozen(-(-count // shared), "packed", "packs the zero points of several blocks into a byte")
    _by_block(s, s.of(c, 3), rows, lead)

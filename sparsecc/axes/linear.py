"""Axis rules of matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.axes.registry import rule
from sparsecc.axes.solver import Attention, Solver
from sparsecc.axes.terms import Term, atom, resolve
from sparsecc.graph import Call


@rule("linear")
def linear(s: Solver, c: Call) -> list[Term]:
    """x[*,I] w[O,I] b[O] -> y[*,O]"""
    x, w = s.of(c, 0), s.of(c, 1)
    if len(w) == 1:
        s.equal(x[-1], w[0])
        s.contract(c, 0, -1)
        return list(x[:-1])
    s.equal(x[-1], w[1])
    s.contract(c, 0, -1, (1, 1))
    if s.has(c, 2):
        s.equal(s.of(c, 2)[0], w[0])
    return [*x[:-1], w[0]]


@rule("matmul")
def matmul(s: Solver, c: Call) -> list[Term]:
    """a[*,M,K] b[*,K,N] -> y[*,M,N] (vectors as in numpy)"""
    a, b = s.of(c, 0), s.of(c, 1)
    inner = b[-2] if len(b) > 1 else b[-1]
    s.equal(a[-1], inner)
    s.contract(c, 0, -1, (1, -2 if len(b) > 1 else -1))
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    rank = len(c.outputs[0].shape) - len(rows) - len(columns)
    batch = s.broadcast(c, [a[:-2], b[:-2]], c.outputs[0].shape[:rank])
    _note_attention(s, c, batch, a[-1], columns)
    return [*batch, *rows, *columns]


@rule("addmm")
def addmm(s: Solver, c: Call) -> list[Term]:
    """bias[*] a[*,M,K] b[*,K,N] -> y[*,M,N]"""
    bias, a, b = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    s.equal(a[-1], b[-2])
    s.contract(c, 1, -1, (2, -2))
    batch = s.broadcast(c, [a[:-2], b[:-2]], c.outputs[0].shape[:-2])
    return s.broadcast(c, [(*batch, a[-2], b[-1]), bias], c.outputs[0].shape)


@rule("affine_vector")
def affine_vector(s: Solver, c: Call) -> list[Term]:
    """bias[M] a[M,K] x[K] -> y[M]"""
    bias, a, x = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    s.equal(a[1], x[0])
    s.contract(c, 1, 1, (2, 0))
    return s.broadcast(c, [(a[0],), bias], c.outputs[0].shape)


@rule("gemm")
def gemm(s: Solver, c: Call) -> list[Term]:
    """a[M,K] b[K,N] c[M,N], either transposed -> y[M,N]"""
    a, b = s.of(c, 0), s.of(c, 1)
    rows, inner = (a[1], a[0]) if c.attrs["trans_a"] else (a[0], a[1])
    other, columns = (b[1], b[0]) if c.attrs["trans_b"] else (b[0], b[1])
    s.equal(inner, other)
    s.contract(c, 0, 0 if c.attrs["trans_a"] else 1, (1, 1 if c.attrs["trans_b"] else 0))
    out: list[Term] = [rows, columns]
    if s.has(c, 2):
        out = s.broadcast(c, [out_axes(out), s.of(c, 2)], c.outputs[0].shape)
    return out


@rule("grouped_matmul")
def grouped_matmul(s: Solver, c: Call) -> list[Term]:
    """x[S,K] w[E,K,N] ends[E] -> y[S,N], rows sorted by expert (mixtures of experts)"""
    x, w, ends = s.of(c, 0), s.of(c, 1), s.of(c, 2)
    if len(x) != 2 or len(w) != 3 or (s.has(c, 3) and c.inputs[3] is not None):
        raise ValueError("only rows [S,K] by matrices [E,K,N] are covered")
    s.equal(x[1], w[1])
    s.contract(c, 0, -1, (1, 1))
    s.multiples += [(term, c.attrs.get("multiple", 1), c) for term in (w[1], w[2])]
    s.freeze(x[0], "expert", "gives rows to experts by position")
    if c.inputs[2] in s.places.counted:
        s.equal(w[0], ends[0])
    else:
        for term in (w[0], ends[0]):
            s.freeze(term, "expert", "gives rows to experts by position")
    return [x[0], w[2]]


def out_axes(axes: Sequence[Term]) -> tuple[Term, ...]:
    """Axes as the tuple that ``broadcast`` takes."""
    return tuple(axes)


@rule("einsum")
def einsum(s: Solver, c: Call) -> list[Term]:
    """operands with labelled axes -> y; equal labels are equal axes, absent ones are summed"""
    inputs, output = parse_einsum(c.attrs["equation"], [len(s.of(c, i)) for i in range(len(c.inputs))])
    shared: dict[str, Term] = {}
    summed = _summed_once(inputs, output)
    for index, labels in enumerate(inputs):
        axes = s.of(c, index)
        for dim, label in enumerate(labels):
            if resolve(axes[dim]).size == 1:
                continue
            if labels.count(label) > 1:
                s.freeze(axes[dim], "diagonal", "takes a diagonal along this axis")
            if label in shared:
                s.equal(shared[label], axes[dim])
            else:
                shared[label] = axes[dim]
                if label not in output:
                    twin = inputs[1].index(label) if label in summed and index == 0 else None
                    s.contract(c, index, dim, None if twin is None else (1, twin))
    _note_einsum(s, c, inputs, output, shared)
    return [shared.get(label) or atom(1) for label in output]


def _summed_once(inputs: Sequence[Sequence[str]], output: Sequence[str]) -> set[str]:
    """Labels over which two operands are multiplied and summed, where it is one label: a matrix product."""
    if len(inputs) != 2:
        return set()
    left, right = inputs
    both = (set(left) & set(right)) - set(output)
    alone = set(left) ^ set(right)
    twice = len(left) != len(set(left)) or len(right) != len(set(right))
    return both if len(both) == 1 and alone <= set(output) and not twice else set()


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Labels of every operand axis and of the result; an ellipsis becomes labels of its own.

    Raises ValueError where the equation does not fit the ranks.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ValueError(f"equation {equation!r} has {len(terms)} operands, not {len(ranks)}")
    widest = max((rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)), default=0)
    dots = [f"...{i}" for i in range(max(widest, 0))]

    def labels(term: str, rank: int | None) -> list[str]:
        head, ellipsis, tail = term.partition("...")
        count = (len(dots) if rank is None else rank - len(head) - len(tail)) if ellipsis else 0
        return [*head, *(dots[len(dots) - count :] if count else []), *tail]

    inputs = [labels(t, rank) for t, rank in zip(terms, ranks, strict=True)]
    for found, rank in zip(inputs, ranks, strict=True):
        if len(found) != rank:
            raise ValueError(f"equation {equation!r} does not fit operands of rank {list(ranks)}")
    if arrow:
        return inputs, labels(right, None)
    flat = [label for found in inputs for label in found]
    single = sorted({label for label in flat if flat.count(label) == 1 and not label.startswith(".")})
    return inputs, [*dots, *single]


def _note_attention(s: Solver, c: Call, batch: list[Term], inner: Term, columns: list[Term]) -> None:
    if batch and columns and all(v is not None and v.kind == "node" for v in c.inputs[:2]):
        s.attentions.append(Attention(tuple(batch), inner, columns[0]))


def _note_einsum(
    s: Solver, c: Call, inputs: list[list[str]], output: list[str], shared: dict[str, Term]
) -> None:
    if len(inputs) != 2 or any(v is None or v.kind != "node" for v in c.inputs):
        return
    both = [x for x in inputs[0] if x in inputs[1] and x in shared]
    batch = tuple(shared[x] for x in both if x in output)
    inner = [shared[x] for x in both if x not in output]
    columns = [shared[x] for x in inputs[1] if x not in inputs[0] and x in output and x in shared]
    if batch and len(inner) == 1 and columns:
        s.attentions.append(Attention(batch, inner[0], columns[-1]))

"""Axis terms: what an axis of a tensor is made of, and how two axes become one.

An axis is an atom (n independently removable positions), a product (outer to inner, as in a
reshape that joins axes) or a concatenation.  Operators state that two axes are equal; ``unify``
refines both to a common form, as unification does in type inference.  Sizes make an occurs check
unnecessary: a composite is strictly larger than every part of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Keep = npt.NDArray[np.bool_]
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why positions may not be removed: a short kind for tables, and the whole story."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


class Term:
    """A node of an axis term; ``resolve`` follows the links that unification leaves behind."""

    __slots__ = ("frozen", "kind", "label", "link", "parts", "serial", "size")

    def __init__(
        self,
        kind: Literal["atom", "product", "concat"],
        size: int,
        parts: tuple[Term, ...] = (),
        label: str = "",
    ) -> None:
        self.kind = kind
        self.size = size
        self.parts = parts
        self.label = label
        self.link: Term | None = None
        self.frozen: Reason | None = None
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return show(self)


def atom(size: int, label: str = "") -> Term:
    """A fresh axis of ``size`` independently removable positions."""
    return Term("atom", size, (), label)


def resolve(term: Term) -> Term:
    """The term that stands for ``term`` after unification (with path compression)."""
    root = term
    while root.link is not None:
        root = root.link
    while term.link is not None:
        term.link, term = root, term.link
    return root


def _flatten(parts: Sequence[Term], kind: str) -> list[Term]:
    flat: list[Term] = []
    for part in parts:
        root = resolve(part)
        if root.kind == kind:
            flat.extend(_flatten(root.parts, kind))
        else:
            flat.append(root)
    return flat


def factors(term: Term) -> list[Term]:
    """What an axis is the product of, outer to inner: the axis alone where it is no product."""
    return _flatten([term], "product")


def product(parts: Sequence[Term]) -> Term:
    """The axis whose positions are tuples of positions of ``parts``, the last varying fastest."""
    flat = [p for p in _flatten(parts, "product") if p.size != 1]
    if not flat:
        return atom(1)
    if len(flat) == 1:
        return flat[0]
    return Term("product", math.prod(p.size for p in flat), tuple(flat))


def concat(parts: Sequence[Term]) -> Term:
    """The axis that holds the positions of ``parts`` one after another."""
    real = [resolve(p) for p in parts if p.size]
    if not real:
        return atom(0)
    if len(real) == 1:
        return real[0]
    return Term("concat", sum(p.size for p in real), tuple(real))


def freeze(term: Term, reason: Reason) -> None:
    """Forbid removal of any position of ``term``; the first reason given is kept."""
    stack = [term]
    while stack:
        root = resolve(stack.pop())
        if root.frozen is not None:
            continue
        root.frozen = reason
        stack.extend(root.parts)


def _bind(source: Term, target: Term) -> None:
    """Let the atom ``source`` stand for ``target`` from now on."""
    if source is target:
        return
    if source.frozen is not None:
        freeze(target, source.frozen)
    if target.kind == "atom" and target.frozen is None and not target.label:
        target.label = source.label
    source.link = target


def split_product(term: Term, sizes: Sequence[int]) -> list[Term] | None:
    """Refine ``term`` to a product with factors of the given sizes, outer to inner.

    Returns one term per size, or None where no refinement exists (``sizes`` must multiply to
    ``term.size``).
    """
    root = resolve(term)
    if math.prod(sizes) != root.size:
        return None
    real = [size for size in sizes if size != 1]
    if len(real) != len(sizes):
        inner = split_product(root, real) if real else []
        if inner is None:
            return None
        rest = iter(inner)
        return [atom(1) if size == 1 else next(rest) for size in sizes]
    if len(sizes) == 1:
        return [root]
    if root.kind == "atom":
        parts = [atom(size, root.label) for size in sizes]
        _bind(root, product(parts))
        return parts
    if root.kind == "product":
        return _regroup(root, sizes)
    return _split_product_of_concat(root, sizes)


def _regroup(root: Term, sizes: Sequence[int]) -> list[Term] | None:
    queue = _flatten(root.parts, "product")
    out: list[Term] = []
    for size in sizes:
        got: list[Term] = []
        have = 1
        while have < size:
            if not queue:
                return None
            head = resolve(queue[0])
            if head.kind == "product":
                queue[:1] = _flatten([head], "product")
                continue
            if size % (have * head.size) == 0:
                got.append(queue.pop(0))
                have *= head.size
                continue
            need = size // have
            if size % have or head.size % need:
                return None
            pair = split_product(head, [need, head.size // need])
            if pair is None:
                return None
            got.append(pair[0])
            queue[0] = pair[1]
            have *= need
        out.append(product(got))
    return out


def _split_product_of_concat(root: Term, sizes: Sequence[int]) -> list[Term] | None:
    inner = math.prod(sizes[1:])
    if any(p.size % inner for p in root.parts):
        return None
    rows = [split_product(p, [p.size // inner, *sizes[1:]]) for p in root.parts]
    done = [row for row in rows if row is not None]
    if len(done) != len(rows):
        return None
    first = done[0]
    for row in done[1:]:
        for mine, other in zip(first[1:], row[1:], strict=True):
            if not unify(mine, other):
                return None
    return [concat([row[0] for row in done]), *first[1:]]


def split_concat(term: Term, sizes: Sequence[int]) -> list[Term] | None:
    """Refine ``term`` to a concatenation with pieces of the given sizes, or None."""
    root = resolve(term)
    if sum(sizes) != root.size:
        return None
    if 0 in sizes:
        inner = split_concat(root, [size for size in sizes if size])
        if inner is None:
            return None
        rest = iter(inner)
        return [atom(0) if size == 0 else next(rest) for size in sizes]
    if len(sizes) == 1:
        return [root]
    if root.kind == "atom":
        parts = [atom(size, root.label) for size in sizes]
        _bind(root, concat(parts))
        return parts
    if root.kind == "concat":
        return _resegment(root, sizes)
    lead, *rest_parts = root.parts
    inner_size = root.size // resolve(lead).size
    if any(size % inner_size for size in sizes):
        return None
    heads = split_concat(lead, [size // inner_size for size in sizes])
    if heads is None:
        return None
    return [product([head, *rest_parts]) for head in heads]


def _resegment(root: Term, sizes: Sequence[int]) -> list[Term] | None:
    queue = list(reversed(root.parts))
    out: list[Term] = []
    for size in sizes:
        got: list[Term] = []
        have = 0
        while have < size:
            head = resolve(queue.pop())
            if head.kind == "concat":
                queue.extend(reversed(head.parts))
            elif have + head.size <= size:
                got.append(head)
                have += head.size
            else:
                need = size - have
                pair = split_concat(head, [need, head.size - need])
                if pair is None:
                    return None
                got.append(pair[0])
                queue.append(pair[1])
                have = size
        out.append(concat(got))
    return out


def unify(left: Term, right: Term) -> bool:
    """Make two axes equal; False where they have no common refinement.

    On failure the caller must freeze both: what was refined on the way stays refined, which
    restricts what may be removed but never makes it wrong.
    """
    a, b = resolve(left), resolve(right)
    if a is b:
        return True
    if a.size != b.size:
        return False
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        if b.kind == "atom" and b.serial > a.serial:
            a, b = b, a
        _bind(a, b)
        return True
    if a.kind == "concat" and b.kind == "concat":
        return _unify_concats(a, b)
    if a.kind == "product" and b.kind == "product":
        return _unify_products(a, b)
    return _unify_mixed(a, b) if a.kind == "concat" else _unify_mixed(b, a)


def _unify_concats(a: Term, b: Term) -> bool:
    ours, theirs = list(reversed(a.parts)), list(reversed(b.parts))
    while ours:
        p, q = resolve(ours.pop()), resolve(theirs.pop())
        if p.size == q.size:
            if not unify(p, q):
                return False
        elif p.kind == "concat" and p.size > q.size:
            ours.extend(reversed(p.parts))
            theirs.append(q)
        elif q.kind == "concat" and q.size > p.size:
            theirs.extend(reversed(q.parts))
            ours.append(p)
        else:
            big, small, stack = (p, q, ours) if p.size > q.size else (q, p, theirs)
            pieces = split_concat(big, [small.size, big.size - small.size])
            if pieces is None or not unify(pieces[0], small):
                return False
            stack.append(pieces[1])
    return True


def _unify_products(a: Term, b: Term) -> bool:
    ours, theirs = list(reversed(a.parts)), list(reversed(b.parts))
    while ours and theirs:
        p, q = resolve(ours.pop()), resolve(theirs.pop())
        if p.size == q.size:
            if not unify(p, q):
                return False
        elif p.kind == "product":
            ours.extend(reversed(p.parts))
            theirs.append(q)
        elif q.kind == "product":
            theirs.extend(reversed(q.parts))
            ours.append(p)
        else:
            big, small, stack = (p, q, ours) if p.size > q.size else (q, p, theirs)
            if big.size % small.size:
                return False
            factors = split_product(big, [small.size, big.size // small.size])
            if factors is None or not unify(factors[0], small):
                return False
            stack.append(factors[1])
    return not ours and not theirs


def _unify_mixed(cat: Term, prod: Term) -> bool:
    """A concatenation equals a product: the product's leading factor is concatenated."""
    lead, *rest = _flatten(prod.parts, "product")
    inner = prod.size // lead.size
    if any(p.size % inner for p in cat.parts):
        return False
    heads = split_concat(lead, [p.size // inner for p in cat.parts])
    if heads is None:
        return False
    met = [unify(p, product([head, *rest])) for p, head in zip(cat.parts, heads, strict=True)]
    return all(met)


def atoms(term: Term) -> list[Term]:
    """The atoms of a term in order of first appearance, without duplicates."""
    seen: dict[int, Term] = {}
    stack = [term]
    while stack:
        root = resolve(stack.pop())
        if root.kind == "atom":
            seen.setdefault(root.serial, root)
        else:
            stack.extend(reversed(root.parts))
    return list(seen.values())


def keep_mask(term: Term, keeps: Mapping[Term, Keep], memo: dict[int, Keep | None]) -> Keep | None:
    """Which positions of an axis stay, given what stays of each atom; None means all.

    A product keeps the positions all of whose coordinates stay.  ``memo`` is shared between calls
    for one ``keeps``.
    """
    root = resolve(term)
    key = root.serial
    if key in memo:
        return memo[key]
    result: Keep | None
    if root.kind == "atom":
        result = keeps.get(root)
    else:
        parts = [keep_mask(p, keeps, memo) for p in root.parts]
        if all(p is None for p in parts):
            result = None
        else:
            full = [
                p if p is not None else np.ones(t.size, bool) for p, t in zip(parts, root.parts, strict=True)
            ]
            result = np.concatenate(full) if root.kind == "concat" else _outer(full)
    memo[key] = result
    return result


def expand_mask(term: Term, keeps: Mapping[Term, Keep], sizes: Mapping[Term, int]) -> Keep:
    """``keep_mask`` as a full mask, with atoms of other sizes than their own where ``sizes`` has them."""
    root = resolve(term)
    if root.kind == "atom":
        found = keeps.get(root)
        return np.ones(sizes.get(root, root.size), bool) if found is None else found
    parts = [expand_mask(p, keeps, sizes) for p in root.parts]
    return np.concatenate(parts) if root.kind == "concat" else _outer(parts)


def _outer(parts: Sequence[Keep]) -> Keep:
    mask = parts[0]
    for part in parts[1:]:
        mask = (mask[:, None] & part[None, :]).reshape(-1)
    return mask


def fold(term: Term, values: npt.NDArray[np.float64], into: dict[Term, npt.NDArray[np.float64]]) -> None:
    """Add ``values`` (one per position of the axis) to the positions of every atom of the term."""
    root = resolve(term)
    if root.kind == "atom":
        if root in into:
            into[root] = into[root] + values
        else:
            into[root] = values
    elif root.kind == "concat":
        start = 0
        for part in root.parts:
            fold(part, values[start : start + part.size], into)
            start += part.size
    else:
        grid = values.reshape([p.size for p in root.parts])
        for i, part in enumerate(root.parts):
            fold(part, grid.sum(axis=tuple(k for k in range(grid.ndim) if k != i)), into)


def show(term: Term) -> str:
    """A term as text: ``(3 * 12 * 64)``, ``[64 + 32]``."""
    root = resolve(term)
    if root.kind == "atom":
        return f"{root.size}{'!' if root.frozen else ''}"
    mark = " * " if root.kind == "product" else " + "
    body = mark.join(show(p) for p in root.parts)
    return f"({body})" if root.kind == "product" else f"[{body}]"

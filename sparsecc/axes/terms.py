"""Axis terms: what an axis of a tensor is made of.

An axis is an atom (n independently removable positions), a product (outer to inner, as in a
reshape that joins axes), a concatenation, or a pick: chosen positions of another axis, each of them
any number of times.  Operators state that two axes are equal; ``sparsecc.axes.unify`` refines both to
a common form, as unification does in type inference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Keep = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
#: a choice of positions: a mask, or the kept positions in their new order
Kept = Keep | Places
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why positions may not be removed: a short kind for tables, and the whole story."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


class Term:
    """A node of an axis term; ``resolve`` follows the links that unification leaves behind.

    ``places`` are the chosen positions of a pick, ``picked`` marks atoms that a pick chooses from, and
    ``varies`` atoms whose size depends on the sizes of the graph's inputs.
    """

    __slots__ = ("frozen", "kind", "label", "link", "parts", "picked", "places", "serial", "size", "varies")

    def __init__(
        self,
        kind: Literal["atom", "product", "concat", "pick"],
        size: int,
        parts: tuple[Term, ...] = (),
        label: str = "",
        places: Places | None = None,
    ) -> None:
        self.kind = kind
        self.size = size
        self.parts = parts
        self.label = label
        self.places = places
        self.link: Term | None = None
        self.frozen: Reason | None = None
        self.picked = False
        self.varies = False
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


def flatten(parts: Sequence[Term], kind: str) -> list[Term]:
    """Parts with those of the same kind taken apart."""
    flat: list[Term] = []
    for part in parts:
        root = resolve(part)
        if root.kind == kind:
            flat.extend(flatten(root.parts, kind))
        else:
            flat.append(root)
    return flat


def factors(term: Term) -> list[Term]:
    """What an axis is the product of, outer to inner: the axis alone where it is no product."""
    return flatten([term], "product")


def product(parts: Sequence[Term]) -> Term:
    """The axis whose positions are tuples of positions of ``parts``, the last varying fastest."""
    flat = [p for p in flatten(parts, "product") if p.size != 1]
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


def pick(base: Term, places: Iterable[int]) -> Term:
    """The axis whose position ``j`` is position ``places[j]`` of ``base``, which may come several times."""
    root, chosen = resolve(base), np.asarray(places, np.intp)
    while root.kind == "pick":
        chosen, root = places_of(root)[chosen], resolve(root.parts[0])
    if not len(chosen):
        return atom(0)
    if len(chosen) == root.size and np.array_equal(chosen, np.arange(root.size)):
        return root
    inside = atoms(root)
    for part in inside:
        part.picked = True
    reasons = [part.frozen for part in inside]
    if all(reason is not None for reason in reasons):
        whole = atom(len(chosen))
        whole.frozen = reasons[0]
        return whole
    if root.kind == "concat":
        return _pick_of_parts(root, chosen)
    return Term("pick", len(chosen), (root,), places=chosen)


def _pick_of_parts(root: Term, chosen: Places) -> Term:
    """Runs of positions that lie in one part of a concatenation become picks of that part alone."""
    ends = np.cumsum([p.size for p in root.parts])
    owner = np.searchsorted(ends, chosen, side="right")
    runs = np.split(np.arange(len(chosen)), np.flatnonzero(np.diff(owner)) + 1)
    if len(runs) > 4 * len(root.parts):
        return Term("pick", len(chosen), (root,), places=chosen)
    owners = [int(owner[run[0]]) for run in runs]
    return concat(
        [
            pick(root.parts[o], chosen[run] - (ends[o] - root.parts[o].size))
            for o, run in zip(owners, runs, strict=True)
        ]
    )


def places_of(root: Term) -> Places:
    """The chosen positions of a pick."""
    if root.places is None:
        raise ValueError(f"a {root.kind} picks no positions")
    return root.places


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


def holds_pick(term: Term) -> bool:
    """Whether a pick is part of the term."""
    root = resolve(term)
    return root.kind == "pick" or (root.kind != "atom" and any(holds_pick(p) for p in root.parts))


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
    elif root.kind == "pick":
        base = keep_mask(root.parts[0], keeps, memo)
        picked = None if base is None else base[places_of(root)]
        result = None if picked is None or picked.all() else picked
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
    if root.kind == "pick":
        return expand_mask(root.parts[0], keeps, sizes)[places_of(root)]
    parts = [expand_mask(p, keeps, sizes) for p in root.parts]
    return np.concatenate(parts) if root.kind == "concat" else _outer(parts)


def as_mask(kept: Kept, size: int) -> Keep:
    """A choice of positions as a mask."""
    array: npt.NDArray[Any] = np.asarray(kept)
    if array.dtype == np.bool_:
        return array
    mask = np.zeros(size, bool)
    mask[array] = True
    return mask


def as_order(kept: Kept) -> Places | None:
    """The order that a choice gives to the positions that it keeps; None where they stay in theirs."""
    array: npt.NDArray[Any] = np.asarray(kept)
    if array.dtype == np.bool_ or bool((array[1:] > array[:-1]).all()):
        return None
    return array.astype(np.intp)


def is_reordered(term: Term, orders: Mapping[Term, Places]) -> bool:
    """Whether some atom of an axis has its positions in another order."""
    return bool(orders) and any(part in orders for part in atoms(term))


def kept_places(
    term: Term, keeps: Mapping[Term, Keep], orders: Mapping[Term, Places], sizes: Mapping[Term, int]
) -> Places:
    """The positions of an axis that stay, in their new order.

    A product goes through its factors in their new orders, a concatenation through its parts.  What a pick
    chooses stays in the order of the pick.  ``sizes`` as in ``expand_mask``.
    """
    root = resolve(term)
    if root.kind == "atom" and root in orders:
        return orders[root]
    if root.kind in ("atom", "pick") or not is_reordered(root, orders):
        return np.flatnonzero(expand_mask(root, keeps, sizes))
    parts = [kept_places(p, keeps, orders, sizes) for p in root.parts]
    lengths = [len(expand_mask(p, keeps, sizes)) for p in root.parts]
    if root.kind == "concat":
        starts = np.cumsum([0, *lengths[:-1]])
        return np.concatenate([p + at for p, at in zip(parts, starts, strict=True)])
    found = parts[0]
    for part, length in zip(parts[1:], lengths[1:], strict=True):
        found = (found[:, None] * length + part[None, :]).reshape(-1)
    return found


def _outer(parts: Sequence[Keep]) -> Keep:
    mask = parts[0]
    for part in parts[1:]:
        mask = (mask[:, None] & part[None, :]).reshape(-1)
    return mask


def fold(
    term: Term,
    values: npt.NDArray[np.float64],
    into: dict[Term, npt.NDArray[np.float64]],
    *,
    largest: bool = False,
) -> None:
    """Add ``values`` (one per position of the axis) to the positions of every atom of the term.

    ``largest`` takes the largest of several values instead of their sum; then they must not be negative.
    """
    root = resolve(term)
    join: np.ufunc = np.maximum if largest else np.add
    if root.kind == "atom":
        into[root] = join(into[root], values) if root in into else values
    elif root.kind == "concat":
        start = 0
        for part in root.parts:
            fold(part, values[start : start + part.size], into, largest=largest)
            start += part.size
    elif root.kind == "pick":
        gathered = np.zeros(resolve(root.parts[0]).size)
        join.at(gathered, places_of(root), values)
        fold(root.parts[0], gathered, into, largest=largest)
    else:
        grid = values.reshape([p.size for p in root.parts])
        for i, part in enumerate(root.parts):
            others = tuple(k for k in range(grid.ndim) if k != i)
            fold(part, join.reduce(grid, axis=others), into, largest=largest)


def show(term: Term) -> str:
    """A term as text: ``(3 * 12 * 64)``, ``[64 + 32]``, ``5 of (3 * 4)``."""
    root = resolve(term)
    if root.kind == "atom":
        return f"{root.size}{'!' if root.frozen else ''}"
    if root.kind == "pick":
        return f"{root.size} of {show(root.parts[0])}"
    mark = " * " if root.kind == "product" else " + "
    body = mark.join(show(p) for p in root.parts)
    return f"({body})" if root.kind == "product" else f"[{body}]"

"""Makes axes equal: refines terms to a common form, by structure where they have one, else by element.

Sizes make an occurs check unnecessary but for picks: other composites are strictly larger than
every part of them.  Nothing here fails but for sizes that differ or vary: where two structures
do not fit, the positions that have to go together are joined one by one (``_align``), and what is left
without a choice is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from sparsecc.axes.terms import (
    Places,
    Reason,
    Term,
    atom,
    atoms,
    concat,
    flatten,
    pick,
    places_of,
    product,
    resolve,
)

#: tells why positions are frozen where two axes do not fit
Why = Callable[[], Reason]


def _misfit() -> Reason:
    return Reason("no common refinement", "joins axes of different structure")


# -- freezing and binding ------------------------------------------------------------------------------


def freeze(term: Term, reason: Reason) -> None:
    """Forbid removal of any position of ``term``; the first reason given is kept.

    Of an axis that a pick chooses from, only the chosen positions are frozen.
    """
    stack = [term]
    while stack:
        root = resolve(stack.pop())
        if root.frozen is not None:
            continue
        if root.kind == "pick":
            if all(part.frozen is not None for part in atoms(root)):
                continue
            still = atom(root.size)
            still.frozen = reason
            if not _align(root, still, lambda: reason):
                stack.extend(root.parts)
            continue
        root.frozen = reason
        stack.extend(root.parts)


def vary(term: Term) -> None:
    """Mark an axis whose size depends on the sizes of the graph's inputs."""
    for part in atoms(term):
        part.varies = True


def _bind(source: Term, target: Term) -> None:
    """Let the atom ``source`` stand for ``target`` from now on."""
    if source is target:
        return
    if source.varies:
        vary(target)
    if source.picked:
        for part in atoms(target):
            part.picked = True
    if target.kind == "atom" and target.frozen is None and not target.label:
        target.label = source.label
    source.link = target
    if source.frozen is not None:
        freeze(target, source.frozen)


# -- taking axes apart ---------------------------------------------------------------------------------


def split_product(term: Term, sizes: Sequence[int], why: Why = _misfit) -> list[Term] | None:
    """Refine ``term`` to a product with factors of the given sizes, outer to inner.

    Returns one term per size, or None where ``sizes`` do not multiply to ``term.size`` or the size varies
    and has no such factors.
    """
    root = resolve(term)
    if math.prod(sizes) != root.size:
        return None
    real = [size for size in sizes if size != 1]
    if len(real) != len(sizes):
        inner = split_product(root, real, why) if real else []
        if inner is None:
            return None
        rest = iter(inner)
        return [atom(1) if size == 1 else next(rest) for size in sizes]
    if len(sizes) == 1:
        return [root]
    parts: list[Term] | None = None
    if root.kind == "product":
        parts = _regroup(root, sizes, why)
    elif root.kind == "concat":
        parts = _split_product_of_concat(root, sizes, why)
    if parts is None:
        parts = [atom(size, root.label) for size in sizes]
        return parts if unify(product(parts), root, why) else None
    return parts


def _regroup(root: Term, sizes: Sequence[int], why: Why) -> list[Term] | None:
    queue = flatten(root.parts, "product")
    out: list[Term] = []
    for size in sizes:
        got: list[Term] = []
        have = 1
        while have < size:
            if not queue:
                return None
            head = resolve(queue[0])
            if head.kind == "product":
                queue[:1] = flatten([head], "product")
                continue
            if size % (have * head.size) == 0:
                got.append(queue.pop(0))
                have *= head.size
                continue
            need = size // have
            if size % have or head.size % need:
                return None
            pair = split_product(head, [need, head.size // need], why)
            if pair is None:
                return None
            got.append(pair[0])
            queue[0] = pair[1]
            have *= need
        out.append(product(got))
    return out


def _split_product_of_concat(root: Term, sizes: Sequence[int], why: Why) -> list[Term] | None:
    inner = math.prod(sizes[1:])
    if any(p.size % inner for p in root.parts):
        return None
    rows = [split_product(p, [p.size // inner, *sizes[1:]], why) for p in root.parts]
    done = [row for row in rows if row is not None]
    if len(done) != len(rows):
        return None
    first = done[0]
    for row in done[1:]:
        for mine, other in zip(first[1:], row[1:], strict=True):
            if not unify(mine, other, why):
                return None
    return [concat([row[0] for row in done]), *first[1:]]


def split_concat(term: Term, sizes: Sequence[int], why: Why = _misfit) -> list[Term] | None:
    """Refine ``term`` to a concatenation with pieces of the given sizes.

    None where ``sizes`` do not add up to ``term.size``, or the size varies and cannot be cut there.
    """
    root = resolve(term)
    if sum(sizes) != root.size:
        return None
    if 0 in sizes:
        inner = split_concat(root, [size for size in sizes if size], why)
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
        return _resegment(root, sizes, why)
    if root.kind == "product":
        lead, *rest_parts = root.parts
        inner_size = root.size // resolve(lead).size
        if not any(size % inner_size for size in sizes):
            heads = split_concat(lead, [size // inner_size for size in sizes], why)
            return None if heads is None else [product([head, *rest_parts]) for head in heads]
    return None if varies(root) else list(_ranges(root, sizes))


def _ranges(root: Term, sizes: Iterable[int]) -> Iterator[Term]:
    """Consecutive stretches of an axis."""
    start = 0
    for size in sizes:
        yield pick(root, range(start, start + size))
        start += size


def _resegment(root: Term, sizes: Sequence[int], why: Why) -> list[Term] | None:
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
                pair = split_concat(head, [need, head.size - need], why)
                if pair is None:
                    return None
                got.append(pair[0])
                queue.append(pair[1])
                have = size
        out.append(concat(got))
    return out


# -- unification by structure --------------------------------------------------------------------------


def unify(left: Term, right: Term, why: Why = _misfit) -> bool:
    """Make two axes equal; False where their sizes differ, or vary and have no common structure.

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
        if a.picked and b.kind != "atom" and any(part is a for part in atoms(b)):
            return _align(a, b, why)
        _bind(a, b)
        return True
    if "concat" in (a.kind, b.kind):
        return _unify_concats(a, b, why)
    if "pick" in (a.kind, b.kind):
        return _same_pick(a, b) or _align(a, b, why)
    return _unify_products(a, b, why)


def _same_pick(a: Term, b: Term) -> bool:
    if a.kind != b.kind or resolve(a.parts[0]) is not resolve(b.parts[0]):
        return False
    return np.array_equal(places_of(a), places_of(b))


def _unify_concats(a: Term, b: Term, why: Why) -> bool:
    """Piece by piece, between the cuts of both."""
    if a.kind == b.kind:
        cuts = sorted({0, *_ends(a), *_ends(b)})
        ours = split_concat(a, [n - m for m, n in pairwise(cuts)], why)
        theirs = split_concat(b, [n - m for m, n in pairwise(cuts)], why)
    else:
        cat, other = (a, b) if a.kind == "concat" else (b, a)
        ours, theirs = [*cat.parts], split_concat(other, [p.size for p in cat.parts], why)
    if ours is None or theirs is None:
        return False
    met = [unify(p, q, why) for p, q in zip(ours, theirs, strict=True)]
    return all(met)


def _ends(root: Term) -> list[int]:
    return list(accumulate(p.size for p in root.parts))


def _unify_products(a: Term, b: Term, why: Why) -> bool:
    ours, theirs = list(reversed(a.parts)), list(reversed(b.parts))
    while ours and theirs:
        p, q = resolve(ours.pop()), resolve(theirs.pop())
        if p.size == q.size:
            if not unify(p, q, why):
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
                return _align(product([p, *reversed(ours)]), product([q, *reversed(theirs)]), why)
            factors = split_product(big, [small.size, big.size // small.size], why)
            if factors is None or not unify(factors[0], small, why):
                return False
            stack.append(factors[1])
    return not ours and not theirs


# -- unification by element ----------------------------------------------------------------------------


def varies(*terms: Term) -> bool:
    """Whether the size of an axis depends on the sizes of the graph's inputs."""
    return any(part.varies for term in terms for part in atoms(term))


#: which factor of a product carries the choice, where the others have to stay whole
_CARRIERS: tuple[Callable[[Sequence[Term]], int], ...] = (
    lambda factors: 0,
    lambda factors: len(factors) - 1,
    lambda factors: int(np.argmax([f.size for f in factors])),
)


def _align(a: Term, b: Term, why: Why) -> bool:
    """Make two axes of static size equal element by element: what has to go together is one position.

    In every product one factor keeps its freedom and the others are frozen; of the choices the one with
    the most positions left is taken.  False where sizes vary.
    """
    if varies(a, b):
        return False
    found = [_Joined(_Carried(a, ours), _Carried(b, theirs)) for ours in _CARRIERS for theirs in _CARRIERS]
    best = max(found, key=lambda j: (j.free, tuple(-j.pattern)))
    best.settle(why)
    return True


class _Carried:
    """Which position of which atom carries every position of an axis, and the atoms that must stay."""

    def __init__(self, term: Term, carrier: Callable[[Sequence[Term]], int]) -> None:
        self.carrier = carrier
        self.whole: list[Term] = []
        self.atoms: dict[Term, int] = {}
        self.owner, self.place = self._walk(term)

    def _walk(self, term: Term) -> tuple[npt.NDArray[np.intp], Places]:
        root = resolve(term)
        if root.kind == "atom":
            index = self.atoms.setdefault(root, len(self.atoms))
            return np.full(root.size, index, np.intp), np.arange(root.size)
        if root.kind == "pick":
            owner, place = self._walk(root.parts[0])
            return owner[places_of(root)], place[places_of(root)]
        if root.kind == "concat":
            parts = [self._walk(p) for p in root.parts]
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        return self._walk_product(root)

    def _walk_product(self, root: Term) -> tuple[npt.NDArray[np.intp], Places]:
        factors = flatten(root.parts, "product")
        open_ = [f for f in factors if any(p.frozen is None and p.size > 1 for p in atoms(f))]
        chosen = open_[self.carrier(open_)] if open_ else factors[0]
        at = next(i for i, f in enumerate(factors) if f is chosen)
        self.whole += [f for i, f in enumerate(factors) if i != at]
        before = math.prod(f.size for f in factors[:at])
        after = math.prod(f.size for f in factors[at + 1 :])
        owner, place = self._walk(chosen)
        return np.tile(np.repeat(owner, after), before), np.tile(np.repeat(place, after), before)


class _Joined:
    """Positions of atoms joined into classes by two axes that are to be equal.

    ``pattern`` names the class of every element of the axes by its first one, ``free`` counts the classes
    that may still go.
    """

    def __init__(self, left: _Carried, right: _Carried) -> None:
        self.whole = [*left.whole, *right.whole]
        self.atoms = list(dict.fromkeys([*left.atoms, *right.atoms]))
        sizes = [a.size for a in self.atoms]
        self.starts = dict(zip(self.atoms, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        ours, theirs = self._nodes(left), self._nodes(right)
        self.label = _components(sum(sizes), ours, theirs)
        frozen = {p for w in self.whole for p in atoms(w)}
        still = [a.frozen is not None or a in frozen or a.size == 1 for a in self.atoms]
        stays = np.repeat(still, sizes)
        self.stays = np.zeros(sum(sizes), bool)
        self.stays[self.label[stays]] = True
        classes, first, inverse = np.unique(self.label[ours], return_index=True, return_inverse=True)
        self.pattern = first[inverse]
        self.free = int((~self.stays[classes]).sum())

    def _nodes(self, carried: _Carried) -> npt.NDArray[np.intp]:
        starts = np.array([self.starts[a] for a in carried.atoms], np.intp)
        return starts[carried.owner] + carried.place

    def settle(self, why: Why) -> None:
        """Let every atom pick its positions from the classes."""
        for term in self.whole:
            for part in atoms(term):
                freeze(part, why())
        classes = np.unique(self.label)
        open_, shut = classes[~self.stays[classes]], classes[self.stays[classes]]
        base = concat([atom(len(open_)), self._shut(len(shut), why)])
        place = np.empty(len(self.label), np.intp)
        place[open_], place[shut] = np.arange(len(open_)), len(open_) + np.arange(len(shut))
        for part, start in self.starts.items():
            if part.frozen is None and part.size > 1:
                _bind(part, pick(base, place[self.label[start : start + part.size]]))

    def _shut(self, size: int, why: Why) -> Term:
        known = next((a.frozen for a in self.atoms if a.frozen is not None), None)
        term = atom(size)
        term.frozen = known or why()
        return term


def _components(count: int, left: npt.NDArray[np.intp], right: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The smallest node that each of ``count`` nodes is connected to by edges ``left[i] - right[i]``."""
    label = np.arange(count)
    while True:
        low = np.minimum(label[left], label[right])
        new = label.copy()
        np.minimum.at(new, left, low)
        np.minimum.at(new, right, low)
        np.minimum.at(new, label[left], low)
        np.minimum.at(new, label[right], low)
        new = new[new]
        if np.array_equal(new, label):
            return label
        label = new

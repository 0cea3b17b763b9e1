"""Axis terms against brute force: an axis is a tuple of labels, one for every position.

Every law is checked through labels: a term of atoms stands for a tuple in which position i is named
by its coordinates in the atoms, and two axes are equal when their labels are.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.axes.terms import (
    Reason,
    Term,
    atom,
    atoms,
    concat,
    expand_mask,
    fold,
    keep_mask,
    pick,
    places_of,
    product,
    resolve,
    show,
)
from sparsecc.axes.unify import freeze, split_concat, split_product, unify

Label = frozenset[tuple[int, int]]

# -- the brute-force model -----------------------------------------------------------------------------


def labels(term: Term) -> tuple[Label, ...]:
    """What every position is made of: {(atom, place in it), ...}; what is never removed is left out."""
    root = resolve(term)
    if root.kind == "atom":
        fixed = root.size == 1 or root.frozen is not None
        return tuple(frozenset(() if fixed else {(root.serial, i)}) for i in range(root.size))
    parts = [labels(p) for p in root.parts]
    if root.kind == "pick":
        return tuple(parts[0][i] for i in places_of(root))
    if root.kind == "concat":
        return tuple(itertools.chain(*parts))
    return tuple(frozenset().union(*combination) for combination in itertools.product(*parts))


def always(term: Term) -> Label:
    """Places that are an axis of their own somewhere in the term, and so never removed."""
    root = resolve(term)
    inner = frozenset[tuple[int, int]]().union(*(always(p) for p in root.parts))
    return inner | labels(root)[0] if root.kind == "pick" and root.size == 1 else inner


def same(left: Term, right: Term) -> bool:
    """Whether two axes have the same positions, whatever is removed."""
    fixed = always(left) | always(right)
    return [p - fixed for p in labels(left)] == [p - fixed for p in labels(right)]


def chosen(term: Term, seed: int) -> dict[Term, np.ndarray]:
    """A random keep mask for every atom that is not frozen."""
    generator = np.random.default_rng(seed)
    return {a: generator.random(a.size) < 0.6 for a in atoms(term) if a.frozen is None and a.size > 1}


def brute_mask(term: Term, keeps: dict[Term, np.ndarray]) -> np.ndarray:
    """A position stays if everything that it is made of stays."""
    kept = {a.serial: m for a, m in keeps.items()}
    return np.array([all(kept[s][i] for s, i in label if s in kept) for label in multilabels(term)], bool)


shapes = st.lists(st.sampled_from([1, 2, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def terms(draw: st.DrawFn, depth: int = 3) -> Term:
    """Random terms with some atoms used twice."""
    if depth == 0 or draw(st.booleans()):
        return atom(draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])))
    parts = [draw(terms(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 5)) == 0:
        parts.append(parts[0])
    result = (product if draw(st.booleans()) else concat)(parts)
    if result.size > 300:
        return parts[0]
    if draw(st.integers(0, 3)) == 0:
        return pick(result, draw(st.lists(st.integers(0, result.size - 1), min_size=1, max_size=12)))
    return result


@st.composite
def factorisations(draw: st.DrawFn, size: int) -> list[int]:
    """Factors with the product ``size``."""
    out = []
    while size > 1:
        factor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        out.append(factor)
        size //= factor
    if draw(st.booleans()):
        out.insert(draw(st.integers(0, len(out))), 1)
    return out or [1]


@st.composite
def compositions(draw: st.DrawFn, size: int) -> list[int]:
    """Summands of ``size``."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    return [b - a for a, b in itertools.pairwise([0, *cuts, size])]


# -- construction --------------------------------------------------------------------------------------


def test_products_are_flat_and_without_ones() -> None:
    a, b, c = atom(2), atom(3), atom(4)
    assert show(product([product([a, atom(1)]), product([b, c])])) == "(2 * 3 * 4)"
    assert product([a, atom(1)]) is a
    assert product([atom(1), atom(1)]).size == 1


def test_concatenations_keep_their_order_and_drop_empty_parts() -> None:
    a, b = atom(2), atom(3)
    assert show(concat([a, atom(0), b])) == "[2 + 3]"
    assert concat([a]) is a
    assert concat([]).size == 0


@given(terms())
def test_size_is_the_number_of_positions(term: Term) -> None:
    assert len(labels(term)) == resolve(term).size


def test_the_first_reason_is_kept() -> None:
    a = atom(6)
    split_product(a, [2, 3])
    freeze(a, Reason("first", "because"))
    freeze(a, Reason("second", "no"))
    assert {p.frozen.kind for p in atoms(a) if p.frozen} == {"first"}


def test_refining_a_frozen_atom_freezes_its_parts() -> None:
    a = atom(6)
    freeze(a, Reason("kind", "text"))
    parts = split_product(a, [2, 3])
    assert parts is not None
    assert all(p.frozen is not None for p in parts)
    pieces = split_concat(parts[1], [1, 2])
    assert pieces is not None
    assert all(p.frozen is not None for p in pieces)


# -- masks ---------------------------------------------------------------------------------------------


@given(terms(), st.integers(0, 99))
def test_masks_are_those_of_brute_force(term: Term, seed: int) -> None:
    keeps = chosen(term, seed)
    mask = keep_mask(term, keeps, {})
    full = np.ones(resolve(term).size, bool) if mask is None else mask
    assert np.array_equal(full, brute_mask(term, keeps))
    assert np.array_equal(expand_mask(term, keeps, {}), full)


@given(shapes, st.integers(0, 99))
def test_mask_of_a_joined_axis_is_the_outer_product(shape: list[int], seed: int) -> None:
    parts = [atom(n) for n in shape]
    keeps = {p: np.random.default_rng(seed + i).random(p.size) < 0.5 for i, p in enumerate(parts)}
    expected = np.ones([], bool)
    for part in parts:
        expected = expected[..., None] & keeps[part] if part.size > 1 else expected[..., None]
    mask = keep_mask(product(parts), {p: m for p, m in keeps.items() if p.size > 1}, {})
    assert np.array_equal(np.ones(math.prod(shape), bool) if mask is None else mask, expected.reshape(-1))


def test_other_sizes_stretch_only_what_is_kept_whole() -> None:
    batch, heads = atom(7), atom(3)
    keeps = {heads: np.array([True, False, True])}
    assert expand_mask(product([batch, heads]), keeps, {batch: 2}).tolist() == [True, False, True] * 2


@given(terms())
def test_fold_adds_up_what_every_atom_position_takes_part_in(term: Term) -> None:
    values = np.arange(1.0, resolve(term).size + 1)
    found: dict[Term, np.ndarray] = {}
    fold(term, values, found)
    expected: dict[tuple[int, int], float] = {}
    for value, label in zip(values, multilabels(term), strict=True):
        for place in label:
            expected[place] = expected.get(place, 0.0) + value
    for part, sums in found.items():
        assert sums.tolist() == [expected.get((part.serial, i), 0.0) for i in range(part.size)]


def multilabels(term: Term) -> list[list[tuple[int, int]]]:
    """Labels with repetitions."""
    root = resolve(term)
    if root.kind == "atom":
        return [[(root.serial, i)] for i in range(root.size)]
    parts = [multilabels(p) for p in root.parts]
    if root.kind == "pick":
        return [parts[0][i] for i in places_of(root)]
    if root.kind == "concat":
        return [x for part in parts for x in part]
    return [list(itertools.chain(*combination)) for combination in itertools.product(*parts)]


# -- refinement ----------------------------------------------------------------------------------------


@given(st.data(), terms())
def test_split_product_gives_factors_of_the_same_axis(data: st.DataObject, term: Term) -> None:
    sizes = data.draw(factorisations(resolve(term).size))
    parts = split_product(term, sizes)
    assert parts is not None
    assert [resolve(p).size for p in parts] == sizes
    assert same(product([*parts]), term)


@given(st.data(), terms())
def test_split_concat_gives_pieces_of_the_same_axis(data: st.DataObject, term: Term) -> None:
    sizes = data.draw(compositions(resolve(term).size))
    parts = split_concat(term, sizes)
    assert parts is not None
    assert [resolve(p).size for p in parts] == sizes
    assert same(concat(parts), term)


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert split_product(atom(6), [4, 2]) is None
    assert split_concat(atom(6), [4, 3]) is None
    assert not unify(atom(2), atom(3))


def test_a_product_regroups_where_factors_divide() -> None:
    heads, dim = atom(4), atom(6)
    parts = split_product(product([heads, dim]), [2, 2, 3, 2])
    assert parts is not None
    assert show(heads) == "(2 * 2)"
    assert show(dim) == "(3 * 2)"


def test_a_product_is_cut_along_its_leading_factor() -> None:
    stacked, width = atom(3), atom(4)
    parts = split_concat(product([stacked, width]), [4, 8])
    assert parts is not None
    assert [show(p) for p in parts] == ["4", "(2 * 4)"]


def test_an_unaligned_cut_of_a_product_keeps_all_of_its_freedom() -> None:
    lead, inner = atom(3), atom(4)
    parts = split_concat(product([lead, inner]), [5, 7])
    assert parts is not None
    assert [show(p) for p in parts] == ["5 of (3 * 4)", "7 of (3 * 4)"]
    assert labels(concat(parts)) == labels(product([lead, inner]))
    assert lead.frozen is None
    assert inner.frozen is None


# -- unification ---------------------------------------------------------------------------------------


@given(terms(), terms())
def test_unified_axes_have_the_same_positions(left: Term, right: Term) -> None:
    before = resolve(left).size, resolve(right).size
    assert unify(left, right) == (before[0] == before[1])
    if before[0] == before[1]:
        assert same(left, right)
    assert (resolve(left).size, resolve(right).size) == before


@st.composite
def twins(draw: st.DrawFn, depth: int = 3) -> tuple[Term, Term]:
    """Two copies of a random term without common atoms."""
    if depth == 0 or draw(st.booleans()):
        size = draw(st.sampled_from([2, 3, 4, 6, 12]))
        return atom(size), atom(size)
    pairs = [draw(twins(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    make = product if draw(st.booleans()) else concat
    left, right = make([p[0] for p in pairs]), make([p[1] for p in pairs])
    return (left, right) if left.size <= 300 else pairs[0]


@given(st.data(), twins(), twins())
def test_unification_does_not_depend_on_the_order_of_its_arguments(
    data: st.DataObject, first: tuple[Term, Term], second: tuple[Term, Term]
) -> None:
    (a, a2), (b, b2) = first, second
    assert unify(a, b) == unify(b2, a2)
    if a.size == b.size:
        assert partition(a, b) == partition(a2, b2)


def partition(a: Term, b: Term) -> list[list[int]]:
    """Which positions of two axes are tied to which, without names."""
    numbers: dict[tuple[int, int], int] = {}
    return [
        sorted(numbers.setdefault(p, len(numbers)) for p in sorted(label)) for label in labels(a) + labels(b)
    ]


@given(terms())
def test_an_axis_equals_itself_and_unifying_again_changes_nothing(term: Term) -> None:
    before = labels(term)
    assert unify(term, term)
    assert labels(term) == before
    other = atom(resolve(term).size)
    assert unify(term, other)
    assert same(other, term)
    assert unify(other, term)
    assert same(term, other)


def test_frozen_positions_stay_frozen_through_unification() -> None:
    a, b = atom(6), atom(6)
    freeze(a, Reason("kind", "text"))
    assert unify(a, b)
    assert resolve(b).frozen is not None
    c, d = product([atom(2), atom(3)]), atom(6)
    freeze(d, Reason("kind", "text"))
    assert unify(c, d)
    assert all(p.frozen is not None for p in atoms(c))


@pytest.mark.parametrize(
    ("left", "right", "merged"),
    [
        ((concat, 4, 8), (product, 3, 4), 2),
        ((concat, 4, 4), (concat, 2, 6), 3),
        ((product, 4, 3), (product, 2, 6), 3),
    ],
)
def test_terms_of_different_form_meet_in_their_common_refinement(left: Any, right: Any, merged: int) -> None:
    a, b = (make([atom(n) for n in sizes]) for make, *sizes in (left, right))
    assert unify(a, b)
    assert labels(a) == labels(b)
    assert sum(part.size > 1 for part in atoms(a)) == merged


# -- chains of reshapes --------------------------------------------------------------------------------


@given(st.data())
def test_chains_of_reshapes_and_transposes_follow_every_element(data: st.DataObject) -> None:
    """A slimmed tensor through the same chain, with sizes from terms, holds the kept elements in order."""
    shape = data.draw(shapes)
    first = axes = [atom(n) for n in shape]
    tensor = np.arange(math.prod(shape)).reshape(shape)
    steps: list[tuple[list[int] | None, list[Term]]] = []
    full = tensor
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(axes))))
            axes, full = [axes[i] for i in order], full.transpose(order)
            steps.append((order, axes))
        else:
            sizes = data.draw(factorisations(full.size))
            parts = split_product(product(axes), sizes)
            if parts is not None:
                axes, full = parts, full.reshape(sizes)
                steps.append((None, axes))
    keeps = chosen(product(first), data.draw(st.integers(0, 9)))
    slim = tensor[np.ix_(*(expand_mask(t, keeps, {}) for t in first))]
    for order, terms_then in steps:
        counts = [int(expand_mask(t, keeps, {}).sum()) for t in terms_then]
        slim = slim.reshape(counts) if order is None else slim.transpose(order)
        assert list(slim.shape) == counts
    assert np.array_equal(slim, full[np.ix_(*(expand_mask(t, keeps, {}) for t in axes))])

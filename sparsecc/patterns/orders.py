"""Which groups may come in another order, and the order of each in which a pattern keeps more.

Positions of a group are permuted everywhere at once, by the terms of the axes that hold them, so the
function stays what it is.  What a layer keeps depends on the order of an atom where the atom varies
fastest along the layer's contraction axis; the scores of all such places (of every layer, head, part of a
concatenation) are rows of one matrix, whose columns are to be ordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.terms import Kept, Places, Term, as_mask, as_order, atoms, resolve
from sparsecc.lowering import reorderable
from sparsecc.patterns.nm import NM, Array
from sparsecc.patterns.permutation import BUDGET, retained, search
from sparsecc.patterns.survey import Site, Survey
from sparsecc.selection import selected

#: elements that the searches of one plan may compare in all
_TOTAL = 4e10


def better_orders(analysis: Analysis, found: Survey, *, exclude: tuple[str, ...] = ()) -> dict[str, Kept]:
    """Orders of groups in which the layers of ``found`` keep more than in the order that they have.

    Groups stay that hold positions of excluded weights or of weights that earlier passes masked, and those
    along which a layer has its pattern already.
    """
    pattern, open_ = found.pattern, [site for site in found.sites if not site.has]
    tables = {site.layer.weight: _table(site) for site in open_}
    axes = {site.layer.weight: _axis(analysis, site) for site in open_}
    choices = list(_choices(analysis, open_, axes, pattern, _locked(analysis, found, exclude)))
    budget = min(BUDGET, _TOTAL / max(1, len(choices)))
    orders: dict[str, Kept] = {}
    for choice in choices:
        rows = [tables[site.layer.weight][:, columns] for site, columns in choice.columns]
        order = choice.kept[search(np.concatenate(rows), pattern, budget=budget)]
        tried = {**orders, choice.group.name: order}
        before, after = (_total(analysis, choice.readers, axes, tables, pattern, o) for o in (orders, tried))
        if after > before:
            orders = tried
    return orders


@dataclass(frozen=True, eq=False)
class _Choice:
    """A group that may be reordered, the layers that it matters to, and where its positions stand there."""

    group: Group
    kept: Places
    readers: list[Site]
    columns: list[tuple[Site, Places]]


def _choices(
    analysis: Analysis, sites: list[Site], axes: Mapping[str, Term], pattern: NM, locked: set[Term]
) -> Iterator[_Choice]:
    for group in analysis.groups:
        part = resolve(group.term)
        if part in locked or not reorderable(group):
            continue
        readers = [site for site in sites if part in atoms(axes[site.layer.weight])]
        kept = _kept_places(analysis, group)
        columns = [
            (site, found)
            for site in readers
            for found in _columns(site, axes[site.layer.weight], part, kept, pattern)
        ]
        if columns:
            yield _Choice(group, kept, readers, columns)


def with_orders(analysis: Analysis, orders: Mapping[str, Kept]) -> Analysis:
    """The analysis as it is once these groups are reordered."""
    return analysis.after(replace(analysis.given, kept={**analysis.given.kept, **orders}))


def _locked(analysis: Analysis, found: Survey, exclude: tuple[str, ...]) -> set[Term]:
    view, chosen = analysis.view, selected(analysis, (), exclude)
    there = [_axis(analysis, site) for site in found.sites if site.has]
    fixed = [n for n in view.weights if n in analysis.given.masks or chosen(n)]
    left = [t for n in fixed for t in analysis.solver.axes[view.weights[n]]]
    return {part for term in (*there, *left) for part in atoms(term)}


def _axis(analysis: Analysis, site: Site) -> Term:
    return analysis.solver.axes[analysis.view.weights[site.layer.weight]][site.layer.axis]


def _table(site: Site) -> Array:
    """The scores of a layer as [everything else, contraction axis]."""
    moved = np.moveaxis(site.scores, site.layer.axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _kept_places(analysis: Analysis, group: Group) -> Places:
    """Positions of a group that stay, in the order that they have so far."""
    choice = analysis.given.kept.get(group.name)
    if choice is None:
        return np.arange(group.size)
    order = as_order(choice)
    return np.flatnonzero(as_mask(choice, group.size)) if order is None else order


def _columns(site: Site, axis: Term, part: Term, kept: Places, pattern: NM) -> Iterator[Places]:
    """Where the kept positions of an atom stand side by side along an axis, in whole groups."""
    if not pattern.fits(len(kept)):
        return
    at = _stand(site, resolve(axis).size)
    for start in _starts(axis, part, 0):
        columns = at[start + kept]
        whole = columns[0] >= 0 and columns[0] % pattern.m == 0
        if whole and np.array_equal(columns, np.arange(columns[0], columns[0] + len(kept))):
            yield columns


def _stand(site: Site, size: int) -> Places:
    """Where every position of a contraction axis stands once positions are removed; -1 for those."""
    places = site.indices[site.layer.axis]
    places = np.arange(size) if places is None else places
    at = np.full(size, -1)
    at[places] = np.arange(len(places))
    return at


def _starts(term: Term, part: Term, start: int) -> Iterator[int]:
    """Where runs of all positions of an atom begin along an axis."""
    root = resolve(term)
    if root is part:
        yield start
    elif root.kind == "concat":
        for piece in root.parts:
            yield from _starts(piece, part, start)
            start += piece.size
    elif root.kind == "product":
        inner = resolve(root.parts[-1])
        if part in atoms(inner):
            for outer in range(root.size // inner.size):
                yield from _starts(inner, part, start + outer * inner.size)


def _total(
    analysis: Analysis,
    sites: list[Site],
    axes: Mapping[str, Term],
    tables: Mapping[str, Array],
    pattern: NM,
    orders: Mapping[str, Kept],
) -> float:
    """What the layers keep under some orders."""
    keeps = analysis.keeps({**analysis.given.kept, **orders})
    total = 0.0
    for site in sites:
        term, name = axes[site.layer.weight], site.layer.weight
        places = keeps.indices(term)
        columns = None if places is None else _stand(site, resolve(term).size)[places]
        total += retained(tables[name], pattern, columns)
    return total

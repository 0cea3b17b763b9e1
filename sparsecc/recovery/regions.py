"""Parts of a graph that can be trained one after the other: only the last call of each gives on anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.calibration.readings import Readings
from sparsecc.graph import Call, Value
from sparsecc.patterns.layers import FLOATS, readers_of

#: products in a row that a region has at least, and at most where its end lost positions
_SHORTEST, _LONGEST = 2, 4


@dataclass(frozen=True, eq=False)
class Region:
    """Calls in a row, those of them that depend on weights read here, and what later calls read of these.

    ``weights``: float parameters that nothing outside reads.  ``shared``: those that something does.
    """

    calls: tuple[Call, ...]
    dependent: frozenset[Call]
    targets: tuple[Value, ...]
    weights: tuple[str, ...]
    shared: tuple[str, ...]

    @property
    def last(self) -> Call:
        """The call that ends it."""
        return self.calls[-1]


def regions(analysis: Analysis, products: Readings, keeps: Keeps) -> Iterator[Region]:
    """The whole graph as regions, in order.

    A region ends behind two products in a row (attention and its output, both layers of a feed-forward
    network, two convolutions) where nothing but what its last call gives depends on its weights and is read
    later, and where that lost no positions, unless four products came.  A dense block is one region, and so
    is a whole graph with skips from end to end.
    """
    view = analysis.view
    readers = readers_of(view)
    place = {call: i for i, call in enumerate(view.calls)}
    last = {value: max(place[c] for c, _ in every) for value, every in readers.items()}
    last.update(dict.fromkeys(view.outputs, len(place)))
    start = 0
    moved: dict[Value, int] = {}  # what depends on weights and is read later -> products in a row before it
    dependent: set[Call] = set()
    for at, call in enumerate(view.calls):
        if any(v is not None and (v in moved or _trainable(analysis, v)) for v in call.inputs):
            dependent.add(call)
            depth = max((moved.get(v, 0) for v in call.inputs if v is not None), default=0)
            moved.update(dict.fromkeys(call.outputs, depth + (call in products.at)))
        moved = {v: depth for v, depth in moved.items() if last.get(v, -1) > at}
        if at + 1 == len(view.calls) or (moved.keys() <= set(call.outputs) and _ends(moved, keeps)):
            yield _region(analysis, readers, view.calls[start : at + 1], dependent, tuple(moved))
            start, moved, dependent = at + 1, {}, set()


def _ends(moved: dict[Value, int], keeps: Keeps) -> bool:
    depth = max(moved.values(), default=0)
    axes = keeps.analysis.solver.axes
    whole = all(mask is None for v in moved for mask in keeps.masks(axes.get(v, ())))
    return depth >= (_SHORTEST if whole else _LONGEST)


def _region(
    analysis: Analysis,
    readers: dict[Value, list[tuple[Call, int]]],
    calls: list[Call],
    dependent: set[Call],
    targets: tuple[Value, ...],
) -> Region:
    inside = set(calls)
    read = {v: None for c in calls for v in c.inputs if v is not None and _trainable(analysis, v)}
    own = {v: all(c in inside for c, _ in readers[v]) for v in read}
    return Region(
        tuple(calls),
        frozenset(dependent),
        targets,
        tuple(str(v.weight) for v in read if own[v]),
        tuple(str(v.weight) for v in read if not own[v]),
    )


def _trainable(analysis: Analysis, value: Value) -> bool:
    return value.weight in analysis.view.parameters and value.dtype in FLOATS

"""From a choice of kept positions to the actions that make a model of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecc.axes.analysis import Analysis, Group, Keeps
from sparsecc.axes.solver import Facts
from sparsecc.axes.terms import Kept, Places, Term, as_mask, as_order, atoms, resolve
from sparsecc.blocks import dropped
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.graph import Call
from sparsecc.plan import Action, Decision, Pattern, Plan, Renumber, SetAttr, SetShape, Skip, Take


def lower(
    analysis: Analysis,
    kept: Mapping[str, Kept],
    *,
    by: Mapping[str, str] | str = "",
    extra: Sequence[Action] = (),
    skips: Sequence[Skip] = (),
    patterns: Sequence[Pattern] = (),
    recipe: str = "",
    mode: str = "prune",
) -> Plan:
    """The plan that keeps ``kept[group]`` of every named group (a mask, or indices in their new order).

    Raises InvalidOption for a mask of the wrong length, an order of positions that must keep theirs, one
    that is empty or that leaves an axis without positions (``Analysis.feasible`` makes a choice that does
    not), KeyError for an unknown group, PlanConflict where sizes that an operator tells apart become equal.
    """
    for name, mask in kept.items():
        _check_kept(analysis.group(name), np.asarray(mask))
    keeps = analysis.keeps(kept)
    empty = next(analysis.emptied(keeps), None)
    if empty is not None:
        raise InvalidOption(f"an axis {empty!r} would keep none of its positions; keep at least one")
    _check_distinct(analysis, keeps)
    gone = dropped(analysis.view, extra)
    cuts = (*_takes(analysis, keeps), *_constant_actions(analysis, keeps))
    takes = [t for t in cuts if t.weight not in gone.weights]
    sizes = [a for a in _node_actions(analysis, keeps) if a.node not in gone.calls]
    actions = [*extra, *takes, *sizes]
    named = {a.weight for a in actions if hasattr(a, "weight")}
    return Plan(
        dialect=analysis.view.dialect,
        mode="slim" if mode == "slim" else "prune",
        actions=tuple(actions),
        decisions=tuple(
            Decision(n, analysis.group(n).size, places, by if isinstance(by, str) else by.get(n, ""))
            for n, m in kept.items()
            if (places := keeps.indices(analysis.group(n).term)) is not None
        ),
        skips=tuple(skips),
        patterns=tuple(patterns),
        shapes=_shapes_of(analysis, named),
        recipe=recipe,
    )


def _check_kept(group: Group, kept: npt.NDArray[Any]) -> None:
    name, size = group.name, group.size
    if kept.dtype == np.bool_ and len(kept) != size:
        raise InvalidOption(f"{name}: a mask of {len(kept)} for a group of {size}")
    count = int(kept.sum()) if kept.dtype == np.bool_ else len(kept)
    if not count:
        raise InvalidOption(f"{name}: at least one position must stay")
    if count < group.least:
        raise InvalidOption(f"{name}: {group.least} of its positions have to stay, and {count} would")
    if count % group.multiple:
        raise InvalidOption(
            f"{name}: what stays has to be a multiple of {group.multiple} positions, and {count} would"
        )
    if kept.dtype == np.bool_:
        return
    if len(np.unique(kept)) != len(kept) or kept.min() < 0 or kept.max() >= size:
        raise InvalidOption(f"{name}: an order holds every kept position of its {size} once")
    if as_order(kept) is not None and not reorderable(group):
        raise InvalidOption(f"{name}: operators pick positions of it by number, so they keep their order")


def reorderable(group: Group) -> bool:
    """Whether the positions of a group may come in any order: no operator picks them by number."""
    return not any(part.picked or part.varies for part in atoms(group.term))


def _check_distinct(analysis: Analysis, keeps: Keeps) -> None:
    for call, facts in analysis.solver.facts.items():
        for left, right in facts.distinct:
            if keeps.count(left) == keeps.count(right):
                raise PlanConflict(
                    f"{call.describe()} tells two axes apart by their sizes, and of both "
                    f"{keeps.count(left)} positions would stay",
                    axes=[left if keeps.mask(left) is not None else right],
                )


def kept_of(plan: Plan) -> dict[str, Kept]:
    """The choice that a plan's decisions record: masks, and orders where positions change places."""
    found = ((d, as_order(d.kept)) for d in plan.decisions)
    return {d.group: as_mask(d.kept, d.size) if order is None else order for d, order in found}


def _shapes_of(analysis: Analysis, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Original shapes of parameters and constants."""
    found = {n: v.shape for n, v in analysis.view.weights.items() if n in names}
    missing = names - found.keys()
    if missing:
        operands = (v for call in analysis.view.calls for v in call.inputs if v is not None)
        found.update((v.weight, v.shape) for v in operands if v.weight in missing)
    return {n: found[n] for n in sorted(names)}


def _takes(analysis: Analysis, keeps: Keeps) -> list[Take]:
    takes: list[Take] = []
    for name, value in analysis.view.weights.items():
        for axis, term in enumerate(analysis.solver.axes[value]):
            places = keeps.indices(term)
            if places is not None:
                takes.append(Take(name, axis, resolve(term).size, places))
    return takes


@dataclass(frozen=True)
class _Use:
    """What one use of a constant becomes: kept positions, and new numbers where they are positions."""

    call: Call
    operand: int
    sizes: list[int]
    places: list[Places | None]
    values: npt.NDArray[np.int64] | None

    @property
    def changed(self) -> bool:
        """Whether it is another constant than it was."""
        return any(part is not None for part in (*self.places, self.values))

    def same(self, other: _Use) -> bool:
        """Whether two uses need the same constant."""
        return all(
            (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
            for a, b in zip((*self.places, self.values), (*other.places, other.values), strict=True)
        )

    def actions(self, name: str, use: tuple[str, int] | None) -> Iterator[Take | Renumber]:
        """The actions that make the constant of it."""
        if self.values is not None:
            yield Renumber(name, self.values, use)
        for axis, (size, places) in enumerate(zip(self.sizes, self.places, strict=True)):
            if places is not None:
                yield Take(name, axis, size, places, use)


def _constant_actions(analysis: Analysis, keeps: Keeps) -> list[Take | Renumber]:
    """Constants have axes of their own at every use; where all uses agree there is one version."""
    uses: dict[str, list[_Use]] = {}
    for (call, index), axes in analysis.solver.operands.items():
        value = call.inputs[index]
        if value is not None and value.weight is not None:
            sizes, places = [resolve(t).size for t in axes], [keeps.indices(t) for t in axes]
            found = _Use(call, index, sizes, places, _renumbered(analysis, call, index, keeps))
            uses.setdefault(value.weight, []).append(found)
    cut = {name: every for name, every in uses.items() if any(use.changed for use in every)}
    if not cut:
        return []
    readers = Counter(v.weight for call in analysis.view.calls for v in call.inputs if v is not None)
    readers.update(v.weight for v in analysis.view.outputs)
    actions: list[Take | Renumber] = []
    for name, every in cut.items():
        agreed = len(every) == readers[name] and all(every[0].same(use) for use in every[1:])
        for use in every[:1] if agreed else every:
            actions.extend(use.actions(name, None if agreed else (use.call.name, use.operand)))
    return actions


def _renumbered(analysis: Analysis, call: Call, index: int, keeps: Keeps) -> npt.NDArray[np.int64] | None:
    """New numbers of an operand that holds positions of an axis which changes; None where they stay."""
    facts = analysis.solver.facts.get(call)
    term = None if facts is None else facts.indices.get(index)
    places = None if term is None else keeps.indices(term)
    if term is None or places is None:
        return None
    before = analysis.solver.known(call, index)
    assert before is not None  # the rule read it
    size = resolve(term).size
    number = np.zeros(size, np.int64)  # of what goes: any valid number
    number[places] = np.arange(len(places))
    return np.asarray(number[before % size], np.int64)


def _node_actions(analysis: Analysis, keeps: Keeps) -> list[SetShape | SetAttr]:
    actions: list[SetShape | SetAttr] = []
    for call, facts in analysis.solver.facts.items():
        actions.extend(_call_actions(call, facts, keeps))
    return [*actions, *_squeezes(analysis, keeps)]


def _call_actions(call: Call, facts: Facts, keeps: Keeps) -> list[SetShape | SetAttr]:
    actions: list[SetShape | SetAttr] = []
    for name, spec in facts.sizes.items():
        groups = spec if isinstance(spec, list) else [spec]
        if all(keeps.mask(t) is None for terms in groups for t in terms) and not _is_bound(call, name, keeps):
            continue
        if name == "shape":
            actions.append(SetShape(call.name, _sizes(call, [terms[0] for terms in groups], keeps)))
        else:
            counts = [sum(keeps.count(t) for t in terms) for terms in groups]
            actions.append(SetAttr(call.name, name, counts if isinstance(spec, list) else counts[0]))
    for name, (value, term) in facts.pins.items():
        if keeps.mask(term) is not None:
            actions.append(SetAttr(call.name, name, value))
    return actions


def _squeezes(analysis: Analysis, keeps: Keeps) -> Iterator[SetAttr]:
    """What squeezes drop, where an axis that they spare is left with one position.

    Raises PlanConflict where another one may have size 1 when the model runs.
    """
    for call in analysis.solver.view.calls:
        spared = call.attrs.get("spared", ()) if call.op == "layout" else ()
        axes = analysis.solver.of(call, 0) if spared else ()
        if any(keeps.mask(axes[d]) is not None and keeps.count(axes[d]) == 1 for d in spared):
            value = call.inputs[0]
            if value is not None and any(value.is_dynamic(d) for d in spared):
                raise PlanConflict(
                    f"{call.describe()} drops axes of size 1, and another may have it, when the model runs"
                )
            gone = [d for d in range(len(axes)) if d not in call.attrs["source"]]
            yield SetAttr(call.name, "squeezed", gone)


def _is_bound(call: Call, name: str, keeps: Keeps) -> bool:
    """Whether an attribute is a bound on an axis that shrinks: it may be counted from the axis' end."""
    dim = name.removeprefix("start").removeprefix("stop")
    if dim == name or not dim.isdecimal():
        return False
    return keeps.mask(keeps.analysis.solver.of(call, 0)[int(dim)]) is not None


def _sizes(call: Call, terms: Sequence[Term], keeps: Keeps) -> tuple[int | None, ...]:
    """New sizes of a spelled-out shape; -1 for a dynamic entry that shrinks."""
    out: list[int | None] = []
    value = call.outputs[0]
    for dim, term in enumerate(terms):
        count = keeps.count(term)
        if count == resolve(term).size:
            out.append(None)
        else:
            out.append(-1 if value.is_dynamic(dim) else count)
    return tuple(out)

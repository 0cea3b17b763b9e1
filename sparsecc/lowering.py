"""From a choice of kept positions to the actions that make a model of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.axes.solver import Facts
from sparsecc.axes.terms import Keep, Term, resolve
from sparsecc.blocks import dropped
from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.graph import Call
from sparsecc.plan import Action, Bypass, Decision, Plan, SetAttr, SetShape, Skip, Take


def lower(
    analysis: Analysis,
    kept: Mapping[str, Keep],
    *,
    by: Mapping[str, str] | str = "",
    extra: Sequence[Action] = (),
    skips: Sequence[Skip] = (),
    recipe: str = "",
    mode: str = "prune",
) -> Plan:
    """The plan that keeps ``kept[group]`` of every named group (boolean masks).

    Raises InvalidOption for a mask of the wrong length or an empty one, KeyError for an unknown
    group, PlanConflict where sizes that an operator tells apart become equal.
    """
    for name, mask in kept.items():
        group = analysis.group(name)
        if len(mask) != group.size:
            raise InvalidOption(f"{name}: a mask of {len(mask)} for a group of {group.size}")
        if not np.any(mask):
            raise InvalidOption(f"{name}: at least one position must stay")
    keeps = analysis.keeps(kept)
    _check_distinct(analysis, keeps)
    gone = dropped(analysis.view, (a for a in extra if isinstance(a, Bypass)))
    takes = [t for t in _takes(analysis, keeps) if t.weight not in gone.weights]
    sizes = [a for a in _node_actions(analysis, keeps) if a.node not in gone.calls]
    actions = [*extra, *takes, *sizes]
    named = {a.weight for a in actions if hasattr(a, "weight")}
    return Plan(
        dialect=analysis.view.dialect,
        mode="slim" if mode == "slim" else "prune",
        actions=tuple(actions),
        decisions=tuple(
            Decision(n, len(m), np.flatnonzero(m), by if isinstance(by, str) else by.get(n, ""))
            for n, m in kept.items()
            if not np.all(m)
        ),
        skips=tuple(skips),
        shapes=_shapes_of(analysis, named),
        recipe=recipe,
    )


def _check_distinct(analysis: Analysis, keeps: Keeps) -> None:
    for call, facts in analysis.solver.facts.items():
        for left, right in facts.distinct:
            if keeps.count(left) == keeps.count(right):
                raise PlanConflict(
                    f"{call.describe()} tells two axes apart by their sizes, and of both "
                    f"{keeps.count(left)} positions would stay",
                    axes=[left if keeps.mask(left) is not None else right],
                )


def kept_of(analysis: Analysis, plan: Plan) -> dict[str, Keep]:
    """The choice that a plan's decisions record, for an analysis of the same model."""
    out: dict[str, Keep] = {}
    for decision in plan.decisions:
        mask = np.zeros(decision.size, bool)
        mask[decision.kept] = True
        out[decision.group] = mask
    return out


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
        for axis, mask in enumerate(keeps.masks(analysis.solver.axes[value])):
            if mask is not None:
                takes.append(Take(name, axis, len(mask), np.flatnonzero(mask)))
    takes.extend(_constant_takes(analysis, keeps))
    return takes


def _constant_takes(analysis: Analysis, keeps: Keeps) -> list[Take]:
    """Constants have axes of their own at every use; where all uses agree there is one cut."""
    uses: dict[str, list[tuple[Call, int, list[Keep | None]]]] = {}
    for (call, index), axes in analysis.solver.operands.items():
        value = call.inputs[index]
        if value is not None and value.weight is not None:
            uses.setdefault(value.weight, []).append((call, index, keeps.masks(axes)))
    takes: list[Take] = []
    for name, found in uses.items():
        if all(m is None for _, _, masks in found for m in masks):
            continue
        agreed = all(_same(found[0][2], masks) for _, _, masks in found[1:])
        for call, index, masks in found[:1] if agreed else found:
            use = None if agreed else (call.name, index)
            takes.extend(
                Take(name, axis, len(m), np.flatnonzero(m), use)
                for axis, m in enumerate(masks)
                if m is not None
            )
    return takes


def _same(ours: Sequence[Keep | None], theirs: Sequence[Keep | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def _node_actions(analysis: Analysis, keeps: Keeps) -> list[SetShape | SetAttr]:
    actions: list[SetShape | SetAttr] = []
    for call, facts in analysis.solver.facts.items():
        actions.extend(_call_actions(call, facts, keeps))
    return actions


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

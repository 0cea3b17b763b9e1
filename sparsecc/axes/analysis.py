"""What follows from the solved axis terms: coupled groups, frozen axes, and what a choice entails."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsecc.axes.solver import Solver
from sparsecc.axes.terms import (
    Keep,
    Kept,
    Places,
    Reason,
    Term,
    as_mask,
    as_order,
    atoms,
    expand_mask,
    factors,
    fold,
    holds_pick,
    is_reordered,
    keep_mask,
    kept_places,
    resolve,
)
from sparsecc.axes.unify import freeze
from sparsecc.errors import PlanConflict, UnsupportedModel
from sparsecc.graph import Call, Value, View
from sparsecc.memory import without_collecting
from sparsecc.plan import Action

GroupKind = Literal["channel", "head", "head_dim", "expert"]


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of one parameter that holds positions of a group."""

    weight: str
    axis: int

    def __str__(self) -> str:
        return f"{self.weight}[{self.axis}]"


@dataclass(frozen=True, slots=True)
class Group:
    """Positions that can only be removed together, in every parameter that holds them.

    ``residual``: later layers write to positions that earlier layers have read already (residual sums,
    squeeze-and-excitation gates).  ``least``: how many have to stay (a router picks that many, or a
    squeeze would drop an axis of one), and ``multiple``: of what their number has to be a multiple (an
    operator wants its rows at such places in memory).
    """

    name: str
    size: int
    kind: GroupKind
    members: tuple[Member, ...]
    term: Term = field(repr=False, compare=False)
    residual: bool = False
    least: int = 1
    multiple: int = 1

    def __str__(self) -> str:
        return f"{self.name}: {self.size} {self.kind} positions in {', '.join(map(str, self.members))}"


@dataclass(frozen=True, slots=True)
class Frozen:
    """Positions of a parameter that stay, and why."""

    weight: str
    axis: int
    size: int
    reason: Reason

    def __str__(self) -> str:
        return f"{self.weight}[{self.axis}] ({self.size}): {self.reason}"


@dataclass(frozen=True)
class Given:
    """What earlier passes of a recipe decided: kept positions, masks of weights, weights that are gone.

    ``actions`` are all that they want done besides.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    masks: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    actions: tuple[Action, ...] = ()


class Analysis:
    """Coupled groups and frozen axes of a captured model.

    ``groups`` lists what may be removed, ``frozen`` what may not, with reasons.  ``given`` is what earlier
    passes of a recipe decided.  Printing an analysis shows groups and frozen axes as tables.
    """

    given: Given = Given()

    @without_collecting()
    def __init__(self, view: View) -> None:
        self.view = view
        self.solver = Solver(view)
        self._known_atoms: dict[Term, list[Term]] = {}
        self.groups, self.frozen = self._collect()
        self._by_name = {group.name: group for group in self.groups}

    def group(self, name: str) -> Group:
        """The group of that name; KeyError lists the names there are."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no group {name!r}; there are: {', '.join(self._by_name)}") from None

    def restricted(self, groups: Iterable[Group]) -> Analysis:
        """The same analysis with only some of its groups."""
        out = copy.copy(self)
        out.groups = list(groups)
        return out

    def after(self, given: Given) -> Analysis:
        """The same analysis for a pass that follows others."""
        out = copy.copy(self)
        out.given = given
        return out

    def freeze(self, groups: Iterable[Group], reason: Reason) -> None:
        """Let whole groups stay, for a reason that only showed when a graph was made of a plan."""
        gone = {g.name for g in groups}
        for group in (g for g in self.groups if g.name in gone):
            freeze(group.term, reason)
            self.frozen += [Frozen(m.weight, m.axis, group.size, reason) for m in group.members]
        self.groups = [g for g in self.groups if g.name not in gone]
        self._by_name = {g.name: g for g in self.groups}

    @cached_property
    def read(self) -> frozenset[Value]:
        """Values that some call reads, or that the graph puts out."""
        return frozenset({v for call in self.view.calls for v in call.inputs if v is not None}).union(
            self.view.outputs
        )

    @cached_property
    def unread(self) -> frozenset[str]:
        """Weights that no output depends on, which a graph leaves out."""
        return frozenset(n for n, v in self.view.weights.items() if v not in self.read)

    @cached_property
    def dynamic(self) -> frozenset[Term]:
        """Atoms whose size depends on the sizes of the graph's inputs."""
        varying = [
            resolve(term)
            for value, axes in self.solver.axes.items()
            for dim, term in enumerate(axes)
            if value.is_dynamic(dim)
        ]
        alone = {t for t in varying if t.kind == "atom"}
        hidden = [found for t in varying if alone.isdisjoint(found := atoms(t))]
        return frozenset(alone.union(*hidden))

    def _atoms(self, term: Term) -> list[Term]:
        """The atoms of an axis; many weights share one."""
        root = resolve(term)
        found = self._known_atoms.get(root)
        if found is None:
            found = self._known_atoms[root] = atoms(root)
        return found

    def _multiples(self) -> dict[Term, int]:
        """What the lengths of atoms have to be multiples of; atoms that are none stay whole."""
        found: dict[Term, int] = {}
        for term, multiple, call in self.solver.multiples:
            for part in atoms(resolve(term)) if multiple > 1 else ():
                found[part] = math.lcm(multiple, found.get(part, 1))
                if part.size % found[part] or holds_pick(resolve(term)):
                    text = f"{call.describe()} takes widths that are multiples of {multiple}"
                    freeze(part, Reason("aligned", text))
        return found

    def _collect(self) -> tuple[list[Group], list[Frozen]]:
        multiples = self._multiples()
        members: dict[Term, list[Member]] = {}
        names: dict[Term, str] = {}
        frozen: list[Frozen] = []
        for weight, value in self.view.weights.items():
            if weight not in self.view.parameters:
                continue
            for axis, term in enumerate(self.solver.axes[value]):
                found = [a for a in self._atoms(term) if a.size > 1]
                for place, part in enumerate(found):
                    if part.frozen is not None:
                        frozen.append(Frozen(weight, axis, part.size, part.frozen))
                        continue
                    if part not in members:
                        members[part] = []
                        names[part] = f"{weight}[{axis}]" + (f".{place}" if len(found) > 1 else "")
                    members[part].append(Member(weight, axis))
        kinds = self._kinds()
        residual = self._residual()
        several = {a for term in self.solver.several for a in self._atoms(term)}
        groups = [
            Group(
                names[t],
                t.size,
                kinds.get(t, "channel"),
                tuple(found),
                t,
                t in residual,
                max(self.solver.places.least(t), 2 if t in several else 1),
                multiples.get(t, 1),
            )
            for t, found in members.items()
        ]
        return groups, frozen

    def _kinds(self) -> dict[Term, GroupKind]:
        """Heads are free batch positions of products of activations; head dims run inside them.

        Experts are matrices in one parameter, among which a router chooses or weighs.
        """
        kinds: dict[Term, GroupKind] = {}
        for note in self.solver.attentions:
            heads = [a for t in note.batch for a in self._atoms(t) if a.frozen is None and a.size > 1]
            if not heads:
                continue
            for inner in (*self._atoms(note.contracted), *self._atoms(note.carried)):
                kinds.setdefault(inner, "head_dim")
            for head in heads:
                kinds[head] = "head"
        kinds.update(dict.fromkeys(self.solver.places.experts(self.view, self.solver.axes), "expert"))
        return kinds

    @cached_property
    def routers(self) -> frozenset[tuple[str, int]]:
        """(weight, axis) of parameters that hold positions which a router picks or weighs."""
        places = self.solver.places
        routed = {a for t in (*(r.term for r in places.routes), *places.shares) for a in self._atoms(t)}
        return frozenset(
            (name, axis)
            for name, value in self.view.weights.items()
            if name in self.view.parameters
            for axis, term in enumerate(self.solver.axes[value])
            if routed.intersection(self._atoms(term))
        )

    def _residual(self) -> set[Term]:
        """Atoms that some contraction reads before another one writes them."""
        read: dict[Term, int] = {}
        written: dict[Term, int] = {}
        solver = self.solver
        for place, call in enumerate(self.view.calls):
            facts = solver.facts.get(call)
            if facts is None or not facts.contractions:
                continue
            for index, dim in facts.contractions:
                for part in self._atoms(solver.of(call, index)[dim]):
                    read.setdefault(part, place)
            carried = {
                a
                for v in call.inputs
                if v is not None and not solver.static(v)
                for t in solver.axes[v]
                for a in self._atoms(t)
            }
            for value in call.outputs:
                for term in solver.axes[value]:
                    written.update((part, place) for part in self._atoms(term) if part not in carried)
        return {part for part, place in written.items() if read.get(part, place) < place}

    # -- consequences of a choice --------------------------------------------------------------

    def keeps(self, kept: Mapping[str, Kept]) -> Keeps:
        """The choice ``group name -> mask or order`` as something that axes can be asked about."""
        groups = {name: self.group(name) for name in kept}
        masks = {resolve(g.term): as_mask(kept[n], g.size) for n, g in groups.items()}
        orders = {resolve(g.term): as_order(kept[n]) for n, g in groups.items()}
        return Keeps(self, masks, {t: order for t, order in orders.items() if order is not None})

    @cached_property
    def _picked(self) -> list[Term]:
        """Axes that a choice may empty although it keeps part of every group."""
        solver = self.solver
        every = dict.fromkeys(chain(*solver.axes.values(), *solver.operands.values()))
        return [root for root in dict.fromkeys(map(resolve, every)) if holds_pick(root)]

    def emptied(self, keeps: Keeps) -> Iterator[Term]:
        """Axes that would keep no position."""
        return (term for term in self._picked if keeps.count(term) == 0)

    def feasible(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """The choice with positions put back: every group keeps enough, and every axis at least one."""
        out: dict[str, Kept] = dict(kept)
        self._put_back(out)
        names = {resolve(g.term): g.name for g in self.groups}
        for term in self._picked:
            if self.keeps(out).count(term):
                continue
            first = np.zeros(resolve(term).size)
            first[0] = 1
            found: dict[Term, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
            fold(term, first, found)
            for part, hit in found.items():
                if names.get(part) in out:
                    out[names[part]] = as_mask(out[names[part]], part.size) | (hit > 0)
        self._put_back(out)
        return out

    def _put_back(self, kept: dict[str, Kept]) -> None:
        """The first positions that went come back where a group keeps too few, or no multiple."""
        for group in self.groups:
            if (group.least > 1 or group.multiple > 1) and group.name in kept:
                mask = as_mask(kept[group.name], group.size).copy()
                count = int(mask.sum())
                wanted = -(-max(count, group.least) // group.multiple) * group.multiple
                if wanted > count:
                    mask[np.flatnonzero(~mask)[: wanted - count]] = True
                    kept[group.name] = mask

    def axes(self, value: Value) -> tuple[Term, ...]:
        """Axis terms of a value (fresh per use for constants: see ``operand``)."""
        return self.solver.axes[value]

    def __str__(self) -> str:
        from sparsecc.report import analysis_text

        return analysis_text(self)


class Keeps:
    """Kept positions of every axis, given kept positions of some groups."""

    def __init__(
        self, analysis: Analysis, chosen: dict[Term, Keep], orders: Mapping[Term, Places] | None = None
    ) -> None:
        self.analysis = analysis
        self.chosen = {t: m for t, m in chosen.items() if not m.all()}
        self.orders = orders or {}
        self._memo: dict[int, Keep | None] = {}
        self._counts: dict[int, int] = {}
        self._indices: dict[int, Places | None] = {}
        self._sizes: dict[Term, int] = {}

    def mask(self, term: Term) -> Keep | None:
        """Kept positions of an axis, or None where all stay."""
        return keep_mask(term, self.chosen, self._memo)

    def count(self, term: Term) -> int:
        """How many positions of an axis stay."""
        root = resolve(term)
        found = self._counts.get(root.serial)
        if found is None:
            mask = self.mask(root)
            found = self._counts[root.serial] = root.size if mask is None else int(np.count_nonzero(mask))
        return found

    def indices(self, term: Term) -> Places | None:
        """Kept positions of an axis in their new order, or None where all stay where they are."""
        root = resolve(term)
        if root.serial not in self._indices:
            self._indices[root.serial] = self._found(root)
        return self._indices[root.serial]

    def _found(self, root: Term) -> Places | None:
        if is_reordered(root, self.orders):
            return kept_places(root, self.chosen, self.orders, self._sizes)
        mask = self.mask(root)
        return None if mask is None else mask.nonzero()[0]

    def masks(self, axes: Iterable[Term]) -> list[Keep | None]:
        """Masks of several axes."""
        return [self.mask(t) for t in axes]

    def operand(self, call: Call, index: int, shape: Sequence[int] | None = None) -> list[Keep | None]:
        """Masks of an operand of a call; with ``shape``, for a tensor of these actual sizes."""
        value = call.inputs[index]
        if value is None or (value.kind != "const" and value not in self.analysis.solver.axes):
            return []
        if value.unranked:
            return [None] * len(shape or ())
        return self.fitted(self.analysis.solver.of(call, index), shape)

    def value(self, value: Value, shape: Sequence[int] | None = None) -> list[Keep | None]:
        """Masks of a computed value; with ``shape``, for a tensor of these actual sizes."""
        if value.unranked:
            return [None] * len(shape or ())
        return self.fitted(self.analysis.solver.axes[value], shape)

    def operand_places(self, call: Call, index: int, shape: Sequence[int]) -> list[Kept | None]:
        """Kept positions of an operand of these actual sizes: masks, or indices in their new order."""
        masks = self.operand(call, index, shape)
        value = call.inputs[index]
        ranked = value is not None and not value.unranked and masks
        return self._reordered(self.analysis.solver.of(call, index), masks) if ranked else list(masks)

    def value_places(self, value: Value, shape: Sequence[int]) -> list[Kept | None]:
        """Kept positions of a computed value of these actual sizes."""
        masks = self.value(value, shape)
        return list(masks) if value.unranked else self._reordered(self.analysis.solver.axes[value], masks)

    def _reordered(self, axes: Sequence[Term], masks: Sequence[Keep | None]) -> list[Kept | None]:
        """Masks of axes, and indices in the place of those that come in another order."""
        if not self.orders or len(axes) != len(masks):
            return list(masks)
        return [
            kept_places(t, self.chosen, self.orders, self._sizes) if is_reordered(t, self.orders) else m
            for t, m in zip(axes, masks, strict=True)
        ]

    # -- actual sizes: those of dynamic axes differ from the view's ------------------------------

    def fitted(self, axes: Sequence[Term], shape: Sequence[int] | None) -> list[Keep | None]:
        """Masks of the axes of a tensor, which also tells how long dynamic axes are in this run.

        Raises PlanConflict where a pruned axis has dynamic factors that no tensor showed alone.
        """
        if shape is None:
            return self.masks(axes)
        if not axes:  # also a value whose shape nobody knew before it ran: nothing of it is pruned
            return [None] * len(shape)
        if len(axes) != len(shape):
            raise UnsupportedModel(
                f"a value has {len(shape)} axes in this run, and {len(axes)} in the graph; the shapes that "
                "the model declares are wrong, export it again"
            )
        for term, size in zip(axes, shape, strict=True):
            if resolve(term).size != size:
                self._learn(term, size)
        return [self._fitted(t, n) for t, n in zip(axes, shape, strict=True)]

    def _learn(self, term: Term, size: int) -> None:
        """Read the size of a dynamic atom off an axis of which it is the only dynamic factor."""
        parts = factors(term)
        varying = [p for p in parts if p in self.analysis.dynamic] if len(parts) > 1 else parts
        rest = math.prod(p.size for p in parts if p not in varying)
        if len(varying) == 1 and all(p.kind == "atom" for p in parts) and size % rest == 0:
            self._sizes[varying[0]] = size // rest

    def _fitted(self, term: Term, size: int) -> Keep | None:
        mask = self.mask(term)
        if mask is None or len(mask) == size:
            return mask
        full = expand_mask(term, self.chosen, self._sizes)
        if len(full) != size:
            raise PlanConflict(
                f"an axis {resolve(term)!r} of {size} positions is pruned, but the sizes of its dynamic "
                "factors are not known; capture the model with static sizes, or exclude the groups on this "
                "axis",
                axes=[term],
            )
        return full


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name matches a glob such as ``layer1.*`` or is below it.

    ``*`` stands for any run of characters; a pattern also matches everything inside what it names.  ``=name``
    is that very name.
    """
    return any(_compiled(p).fullmatch(name) is not None for p in patterns)


_CACHE: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("="):
        return re.compile(re.escape(pattern[1:]))
    if pattern not in _CACHE:
        body = ".*".join(re.escape(part) for part in pattern.split("*"))
        _CACHE[pattern] = re.compile(rf"{body}(\..*|/.*|\[.*)?")
    return _CACHE[pattern]

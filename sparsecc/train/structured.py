"""Soft masks on coupled groups: channels, heads and whatever else goes together.

While training goes on, the positions of a group that are to go are zero in every parameter that holds
them.  That must be the same as leaving them out, so groups over which something is averaged or
normalised are left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from sparsecc.allocation import ALLOCATIONS, allocate
from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.terms import Keep, Term, as_mask, atoms, places_of, resolve
from sparsecc.errors import InvalidOption
from sparsecc.lowering import lower
from sparsecc.pipeline import settle
from sparsecc.plan import Skip
from sparsecc.saliency import Criterion, Saliency
from sparsecc.saliency.magnitude import L2, Scores
from sparsecc.selection import select
from sparsecc.subject import Subject
from sparsecc.train.choosing import Chosen, Pattern, Update
from sparsecc.transform import Choice, Pass, check_count
from sparsecc.verification.check import FLOAT64_BOUND, distance

KINDS = ("channel", "head", "head_dim")


@dataclass(frozen=True)
class Structured(Pattern):
    """Whole positions of coupled groups go; afterwards ``Sparsifier.slim`` takes them out.

    Saliency, allocation and rounding are those of ``ChannelPruning``.  ``kinds``: ``channel``, ``head``,
    ``head_dim``.  ``residual``: whether widths that residual sums share may shrink.
    """

    allocation: str = "uniform"
    multiple_of: int = 1
    min_keep: int = 1
    kinds: tuple[str, ...] = ("channel",)
    residual: bool = True
    structured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise InvalidOption(
                f"allocation={self.allocation!r} is not known; there are {', '.join(ALLOCATIONS)}"
            )
        check_count("multiple_of", self.multiple_of)
        check_count("min_keep", self.min_keep)
        if isinstance(self.kinds, str) or not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InvalidOption(f"kinds={self.kinds!r}: give a tuple of {', '.join(KINDS)}")

    def choose(self, update: Update) -> Chosen:
        """The least salient positions of every group."""
        analysis = update.analysis
        assert analysis is not None
        found = allocate(
            analysis.groups,
            _Live(analysis, update),
            update.sparsity,
            allocation="global" if self.allocation == "global" else "uniform",
            multiple_of=self.multiple_of,
            min_keep=self.min_keep,
        )
        kept = {g.name: found.get(g.name, np.ones(g.size, bool)) for g in analysis.groups}
        kept = {n: as_mask(m, len(m)) for n, m in analysis.feasible(kept).items()}
        masks = {}
        for name, mask in spread(analysis, kept, update.scores).items():
            masks[name] = torch.from_numpy(mask).to(update.scores[name].device)
        return Chosen(masks, kept)


class _Total(Criterion):
    """Sums of scores that may be negative."""

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores]:
        """Sums over all other axes."""
        wide = weight.detach().double().cpu().numpy()
        return [wide.sum(tuple(d for d in range(wide.ndim) if d != axis)) for axis in axes]


class _Live(Saliency):
    """Saliency from the present scores of elements; positions that are gone come last."""

    def __init__(self, analysis: Analysis, update: Update) -> None:
        super().__init__(analysis, _Total() if update.signed else L2())
        self.update = update

    def of(self, group: Group) -> Scores:
        """Minus infinity for what is gone."""
        live = self.update.groups.get(group.name)
        found = super().of(group)
        return found if live is None else np.where(live, found, -np.inf)

    def _tensor(self, weight: str) -> Any:
        return self.update.scores[weight]


def spread(analysis: Analysis, kept: Mapping[str, Keep], names: Iterable[str]) -> dict[str, Keep]:
    """Element masks of parameters: an element stays where its position along every axis does."""
    keeps, weights = analysis.keeps(kept), analysis.view.weights
    out: dict[str, Keep] = {}
    for name in names:
        mask = np.ones(weights[name].shape, bool)
        for axis, along in enumerate(keeps.masks(analysis.solver.axes[weights[name]])):
            if along is not None:
                mask &= along.reshape([-1 if d == axis else 1 for d in range(mask.ndim)])
        out[name] = mask
    return out


def members(groups: Iterable[Group]) -> list[str]:
    """Parameters that hold positions of groups."""
    return list(dict.fromkeys(m.weight for g in groups for m in g.members))


# -- which groups can be masked ------------------------------------------------------------------------


def soft(
    analysis: Analysis,
    pattern: Structured,
    include: Sequence[str],
    exclude: Sequence[str],
    subject: Subject | None = None,
) -> tuple[Analysis, list[Skip]]:
    """The analysis with the groups that zeros can stand for, and the others with the reason.

    With a ``subject`` both halves of that are tried out: that zeros compute what removal computes, and
    that there is a graph without half of each group.
    """
    chosen = select(analysis, pattern.kinds, include=include, exclude=exclude, residual=pattern.residual)
    skips, groups = list(chosen.skips), list(chosen.groups)
    for group in chosen.groups:
        reader = _reduced(analysis, group)
        if reader:
            skips.append(Skip(group.name, f"{reader} reads every position of it, so zeros are not nothing"))
            groups.remove(group)
    if subject is not None and groups:
        settle(subject, [_Halves(names=tuple(g.name for g in groups))], verify=False)
        named = {g.name for g in analysis.groups}
        frozen = {f"{f.weight}[{f.axis}]": f.reason for f in analysis.frozen}
        for group in [g for g in groups if g.name not in named]:
            skips.append(Skip(group.name, str(frozen.get(group.name, "there is no graph without it"))))
            groups.remove(group)
        if groups and not _same(subject, groups):
            for group in [g for g in groups if not _same(subject, [g])]:
                skips.append(Skip(group.name, "zeros in its place do not compute what removing it does"))
                groups.remove(group)
    return analysis.restricted(groups), skips


def _reduced(analysis: Analysis, group: Group) -> str:
    """A call that reduces over positions of the group, or ''."""
    part = resolve(group.term)
    for call, facts in analysis.solver.facts.items():
        for index, dim in facts.reductions:
            axes = analysis.solver.of(call, index)
            if axes and part in atoms(axes[dim % len(axes)]):
                return call.describe()
    return ""


@dataclass(frozen=True, kw_only=True)
class _Halves(Pass):
    """Every second position of some groups."""

    names: tuple[str, ...]

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Those of the groups that are left."""
        return Choice({g.name: _half(g) for g in analysis.groups if g.name in self.names})


def _half(group: Group) -> Keep:
    half: Keep = np.arange(group.size) % 2 == 0
    return half


def _same(subject: Subject, groups: Sequence[Group]) -> bool:
    """Whether zeros in half of the groups compute in float64 what leaving them out does."""
    from sparsecc.fx.subject import TorchSubject
    from sparsecc.reference.torch_run import ProgramRunner

    assert isinstance(subject, TorchSubject)
    analysis, weights = subject.analysis, subject.program.weights
    kept = analysis.feasible({g.name: _half(g) for g in groups})
    masks = {n: as_mask(m, analysis.group(n).size) for n, m in kept.items()}
    zeroed = {
        n: weights[n].detach().masked_fill(~torch.from_numpy(m).to(weights[n].device), 0)
        for n, m in spread(analysis, masks, members(groups)).items()
    }
    inputs, _ = subject.inputs(0, 0)
    left = subject.masked(lower(analysis, kept), kept, inputs, torch.float64)
    zeros = ProgramRunner(subject.program, dtype=torch.float64, overrides=zeroed).run(inputs)[0]
    for a, b in zip(left, zeros, strict=True):
        if isinstance(a, torch.Tensor):
            error, scale = distance(a, b)
            if not error <= FLOAT64_BOUND * scale:
                return False
    return True


# -- where the positions of a group lie in parameters ----------------------------------------------------


def places(term: Term, part: Term) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    """Maps from positions of an axis to positions of an atom of it, -1 where they hold none.

    There are several where the atom is several factors of the axis.
    """
    root = resolve(term)
    if root.kind == "atom":
        return [np.arange(root.size)] if root is part else []
    if root.kind == "pick":
        return [found[places_of(root)] for found in places(root.parts[0], part)]
    sizes = [p.size for p in root.parts]
    out: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    start = 0
    for i, factor in enumerate(root.parts):
        for found in places(factor, part):
            if root.kind == "concat":
                whole = np.full(root.size, -1, np.int64)
                whole[start : start + factor.size] = found
            else:
                shape = [-1 if k == i else 1 for k in range(len(sizes))]
                whole = np.broadcast_to(found.reshape(shape), sizes).reshape(-1)
            out.append(whole)
        start += factor.size
    return out


@dataclass(frozen=True, eq=False)
class GroupMap:
    """A coupled group as (parameter, axis, position of the group behind each position of the axis)."""

    name: str
    size: int
    members: tuple[tuple[str, int, torch.Tensor], ...]

    def sums(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sums of values of elements over each position of the group, shape ``[size]``."""
        total: torch.Tensor | None = None
        for weight, axis, at in self.members:
            value = values[weight]
            others = [d for d in range(value.dim()) if d != axis]
            along = value.sum(others) if others else value
            held = at.to(value.device)
            there = held >= 0
            zero = torch.zeros(self.size, dtype=along.dtype, device=along.device)
            found = zero.index_add(0, held[there], along[there])
            total = found if total is None else total + found
        assert total is not None
        return total

    def scale(self, values: Mapping[str, torch.Tensor], factors: torch.Tensor) -> None:
        """Multiply every element, in place, by the factor of its position."""
        for weight, axis, at in self.members:
            value = values[weight]
            held = at.to(value.device)
            along = torch.where(held >= 0, factors[held.clamp_min(0)], torch.ones_like(factors[:1]))
            value.mul_(along.reshape([-1 if d == axis else 1 for d in range(value.dim())]))


def group_maps(analysis: Analysis) -> list[GroupMap]:
    """Every group of an analysis with the places of its positions."""
    out = []
    for group in analysis.groups:
        part = resolve(group.term)
        found = []
        for member in group.members:
            term = analysis.solver.axes[analysis.view.weights[member.weight]][member.axis]
            found += [(member.weight, member.axis, torch.from_numpy(at.copy())) for at in places(term, part)]
        out.append(GroupMap(group.name, group.size, tuple(found)))
    return out


__all__ = ["GroupMap", "Structured", "group_maps", "members", "places", "soft", "spread"]

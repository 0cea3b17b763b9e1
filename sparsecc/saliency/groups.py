"""From scores of weight positions to saliency of group positions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecc.axes.analysis import Analysis, Group, Member
from sparsecc.axes.terms import Term, fold, resolve
from sparsecc.errors import InvalidOption
from sparsecc.plan import Skip
from sparsecc.saliency.magnitude import L2, Criterion, Scores
from sparsecc.saliency.scales import norm_scales

#: how the saliencies that a group has in its several weights become one
REDUCTIONS: dict[str, Callable[[Any], Scores]] = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0),
    "product": lambda rows: rows.prod(0),
}


def _lamp(scores: Scores) -> Scores:
    """LAMP (Lee et al., 2021, eq. 4): each squared score over the sum of those not smaller than it."""
    squares = scores**2
    order = np.argsort(squares, kind="stable")
    tail = np.cumsum(squares[order][::-1])[::-1]
    out = np.empty_like(squares)
    out[order] = squares[order] / np.maximum(tail, np.finfo(np.float64).tiny)
    return out


def _over(divisor: Callable[[Scores], Any]) -> Callable[[Scores], Scores]:
    def normalise(scores: Scores) -> Scores:
        value = float(divisor(scores))
        return scores / value if value > 0 else scores

    return normalise


#: how saliencies of different groups become comparable
NORMALISERS: dict[str, Callable[[Scores], Scores]] = {
    "none": lambda scores: scores,
    "mean": _over(np.mean),
    "max": _over(np.max),
    "lamp": _lamp,
}


class Saliency:
    """Saliency of the positions of every group, computed once and kept.

    Magnitude-like criteria read the weights with two or more axes; biases and norm parameters
    count only where a group has nothing else.
    """

    def __init__(
        self,
        analysis: Analysis,
        criterion: Criterion | None = None,
        *,
        reduction: str = "sum",
        normaliser: str = "none",
        statistics: Any = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise InvalidOption(f"reduction {reduction!r} is not known; there are {', '.join(REDUCTIONS)}")
        if normaliser not in NORMALISERS:
            raise InvalidOption(f"normaliser {normaliser!r} is not known; there are {', '.join(NORMALISERS)}")
        self.analysis = analysis
        self.criterion = criterion or L2()
        self.reduction = reduction
        self.normaliser = normaliser
        if self.criterion.needs_data and statistics is None:
            raise InvalidOption(
                f"{type(self.criterion).__name__} needs data: give calibration=[...], inputs to run on, "
                "or CalibrationData(batches, inputs=..., loss=...)"
            )
        if self.criterion.moments:
            statistics.collect(self.criterion.moments)
        self.statistics = statistics
        self._folded: dict[tuple[str, int], dict[Term, Scores] | None] = {}
        self._axes: defaultdict[str, set[int]] = defaultdict(set)
        for group in analysis.groups:
            for member in group.members:
                self._axes[member.weight].add(member.axis)

    def of(self, group: Group) -> Scores:
        """Saliency of the group's positions, shape ``[group.size]``, after reduction and normaliser.

        Raises InvalidOption for a group that the criterion does not know.
        """
        found = [self._row(m.weight, m.axis, group.term) for m in self._members(group)]
        rows = [row for row in found if row is not None]
        if not rows:
            raise InvalidOption(f"{group.name}: {self.criterion.unknown}")
        if self.criterion.joint:
            return NORMALISERS[self.normaliser](self.criterion.finish(np.sum(rows, axis=0)))
        finished = np.array([self.criterion.finish(row) for row in rows])
        return NORMALISERS[self.normaliser](REDUCTIONS[self.reduction](finished))

    def knows(self, group: Group) -> bool:
        """Whether the criterion says anything about the positions of a group."""
        return any(self._row(m.weight, m.axis, group.term) is not None for m in self._members(group))

    def rankable(self, groups: Iterable[Group]) -> tuple[list[Group], list[Skip]]:
        """Groups that the criterion can rank, and the others with the reason."""
        known = [g for g in groups if self.knows(g)]
        names = {g.name for g in known}
        return known, [Skip(g.name, self.criterion.unknown) for g in groups if g.name not in names]

    def _members(self, group: Group) -> list[Member]:
        """Axes of weights that are scored."""
        if self.criterion.reads == "scales":
            return [m for m in group.members if m.weight in self._scales]
        return [m for m in group.members if self._rank(m.weight) > 1] or list(group.members)

    @cached_property
    def _scales(self) -> frozenset[str]:
        return norm_scales(self.analysis.view)

    def elements(self, weight: str) -> npt.NDArray[Any]:
        """Scores of the single elements of a weight, in its shape; of two, the higher one is kept."""
        return self.criterion.elements(weight, self.analysis.view.weight(weight), self.statistics)

    def _rank(self, weight: str) -> int:
        return len(self.analysis.view.weights[weight].shape)

    def _tensor(self, weight: str) -> Any:
        if self.criterion.needs_values:
            return self.analysis.view.weight(weight)
        import torch

        return torch.empty(self.analysis.view.weights[weight].shape, device="meta")

    def _row(self, weight: str, axis: int, term: Term) -> Scores | None:
        if (weight, axis) not in self._folded:
            self._fold(weight, {axis, *self._axes[weight]})
        folded = self._folded[weight, axis]
        return None if folded is None else folded[resolve(term)]

    def _fold(self, weight: str, chosen: set[int]) -> None:
        """Score a weight along all axes that groups have on it, so that it is read once."""
        order = sorted(chosen)
        found = self.criterion.scores(weight, self._tensor(weight), order, self.statistics)
        axes = self.analysis.solver.axes[self.analysis.view.weights[weight]]
        for axis, scores in zip(order, found, strict=True):
            if scores is None:
                self._folded[weight, axis] = None
                continue
            folded: dict[Term, Scores] = {}
            fold(axes[axis], scores, folded, largest=self.criterion.join == "max")
            self._folded[weight, axis] = folded


def group_scores(analysis: Analysis, groups: Sequence[Group], saliency: Saliency) -> dict[str, Scores]:
    """Saliency by group name."""
    return {group.name: saliency.of(group) for group in groups}

"""What passes share that remove the least salient positions of groups."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from sparsecc.allocation import MEASURED, Allocation, Shares, allocate, by_shares, check_allocation
from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.terms import Keep
from sparsecc.errors import InvalidOption
from sparsecc.plan import Skip
from sparsecc.probing.measure import Probe, measured, tried
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import Selected, check_options
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class RemovalPass(Pass):
    """``sparsity`` of the positions go, those that matter least.

    ``allocation``: ``uniform``, ``global`` or ``isomorphic``; ``sensitivity``, ``sensitivity:kl`` or
    ``sensitivity:loss``, which measure on calibration data by how much the outputs, the distributions that
    they are logits of, or the data's loss change when a group alone loses up to twice ``sparsity``, and
    remove ``sparsity`` of the groups' parameters where the sum of that is least; or the share to remove of
    every group by its name, as ``Sensitivity.shares`` gives them, in the place of ``sparsity``.
    ``multiple_of``: widths are rounded up to it.  ``min_keep``: positions that every group keeps.
    ``include`` and ``exclude``: name patterns of weights or modules.
    """

    sparsity: float = 0.5
    allocation: str | Shares | Mapping[str, float] = "uniform"
    multiple_of: int = 1
    min_keep: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(
            self.sparsity, self.multiple_of, self.min_keep, self.allocation, self.include, self.exclude
        )
        object.__setattr__(self, "allocation", check_allocation(self.allocation))

    def removed(self, analysis: Analysis, saliency: Saliency | None, chosen: Selected) -> Choice:
        """Least salient positions of the groups that may be touched; others with the reason."""
        ranking = saliency or Saliency(analysis)
        groups, unknown = ranking.rankable(chosen.groups)
        kept, left = self._kept(analysis, ranking, groups)
        return Choice(kept, (), (*chosen.skips, *unknown, *left))

    def _kept(
        self, analysis: Analysis, ranking: Saliency, groups: Sequence[Group]
    ) -> tuple[dict[str, Keep], list[Skip]]:
        rounding = {"multiple_of": self.multiple_of, "min_keep": self.min_keep}
        if self.allocation in MEASURED:
            return self._by_sensitivity(analysis, ranking, groups)
        if isinstance(self.allocation, str):
            named = cast(Allocation, self.allocation)
            return allocate(groups, ranking, self.sparsity, allocation=named, **rounding), []
        shares = dict(self.allocation)
        _check_groups(shares, analysis)
        left = [Skip(g.name, "the allocation does not name it") for g in groups if g.name not in shares]
        known = {group.name for group in groups}
        left += [
            Skip(name, "no group of that name may lose positions here")
            for name in shares
            if name not in known
        ]
        return by_shares(groups, ranking, shares, **rounding), left

    def _by_sensitivity(
        self, analysis: Analysis, ranking: Saliency, groups: Sequence[Group]
    ) -> tuple[dict[str, Keep], list[Skip]]:
        statistics = needed(ranking, f"allocation={self.allocation!r}")
        groups = [g for g in groups if g.name not in analysis.given.kept]
        if not groups or self.sparsity == 0:
            return {}, []
        probe = Probe(MEASURED[str(self.allocation)], tried(self.sparsity))
        found = measured(statistics, analysis, ranking, groups, probe)
        sparsity = min(self.sparsity, found.most)  # no more can go, whatever is asked for
        shares = found.shares(sparsity, multiple_of=self.multiple_of, min_keep=self.min_keep)
        kept = by_shares(groups, ranking, shares, multiple_of=self.multiple_of, min_keep=self.min_keep)
        return kept, [Skip(line.group, line.why) for line in found.lines if line.why]


def _check_groups(shares: Mapping[str, float], analysis: Analysis) -> None:
    """Raise InvalidOption for a name that no group of the model can have."""
    for name in shares:
        if name.partition("[")[0] not in analysis.view.weights:
            near = difflib.get_close_matches(name, [g.name for g in analysis.groups], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidOption(f"allocation: the model has no group {name!r}{hint}")

"""Which positions of which groups go: allocation of a share of removal over groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from sparsecc.axes.analysis import Group
from sparsecc.axes.terms import Keep
from sparsecc.errors import InvalidOption
from sparsecc.graph import View
from sparsecc.saliency import Saliency
from sparsecc.saliency.magnitude import Scores
from sparsecc.transform import check_share, keep_count

Allocation = Literal["uniform", "global", "isomorphic"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "global", "isomorphic")

#: allocations that measure by how much a loss rises -> the loss that they measure
MEASURED = {"sensitivity": "error", "sensitivity:kl": "kl", "sensitivity:loss": "loss"}

#: the share to remove of every group, by name
Shares = tuple[tuple[str, float], ...]


def allocate(
    groups: Sequence[Group],
    saliency: Saliency,
    sparsity: float,
    *,
    allocation: Allocation = "uniform",
    multiple_of: int = 1,
    min_keep: int = 1,
) -> dict[str, Keep]:
    """Kept positions of every group.

    ``uniform`` removes ``sparsity`` of each group; ``global`` ranks the positions of all groups
    together and removes the least salient ones until that share of all positions is gone, never
    leaving a group with fewer than ``min_keep``; ``isomorphic`` does so among groups of one signature
    (``signatures``), whose saliencies are of one kind (Fang et al., "Isomorphic Pruning for Vision Models",
    2024, section 3).  Ties are broken by position.
    """
    if allocation not in ALLOCATIONS:
        raise InvalidOption(f"allocation {allocation!r} is not known; there are {', '.join(ALLOCATIONS)}")
    if not groups or sparsity == 0:
        return {}
    scores = {g.name: saliency.of(g) for g in groups}
    counts: dict[str, int] = {}
    for some in _compared(groups, saliency, allocation):
        counts |= _counts(some, scores, sparsity, multiple_of, min_keep)
    return {g.name: top(scores[g.name], counts[g.name]) for g in groups}


def check_allocation(allocation: object) -> str | Shares:
    """An allocation's name as it is, and shares by group as pairs; InvalidOption for anything else."""
    if isinstance(allocation, str):
        names = (*ALLOCATIONS, *MEASURED)
        if allocation not in names:
            raise InvalidOption(f"allocation={allocation!r} is not known; there are {', '.join(names)}")
        return allocation
    try:
        pairs = allocation.items() if isinstance(allocation, Mapping) else allocation
        shares: dict[Any, Any] = dict(pairs)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise InvalidOption(
            f"allocation={allocation!r:.200}: give a name, or the share to remove of every group by its name "
            "(Sensitivity.shares(sparsity) does)"
        ) from None
    for name, share in shares.items():
        if not isinstance(name, str):
            raise InvalidOption(f"allocation: {name!r} is no name of a group")
        check_share(f"allocation[{name!r}]", share)
    return tuple(shares.items())


def by_shares(
    groups: Sequence[Group],
    saliency: Saliency,
    shares: Mapping[str, float],
    *,
    multiple_of: int = 1,
    min_keep: int = 1,
) -> dict[str, Keep]:
    """Kept positions of the groups that ``shares`` names: the most salient ones."""
    return {
        g.name: top(
            saliency.of(g),
            staying(g, shares[g.name], multiple_of, min_keep),
        )
        for g in groups
        if shares.get(g.name)
    }


def _compared(
    groups: Sequence[Group], saliency: Saliency, allocation: Allocation
) -> Iterable[Sequence[Group]]:
    """Groups that are ranked together."""
    if allocation == "uniform":
        return ([group] for group in groups)
    if allocation == "global":
        return [groups]
    found: defaultdict[object, list[Group]] = defaultdict(list)
    for group, signature in zip(groups, signatures(saliency.analysis.view, groups), strict=True):
        found[signature].append(group)
    return found.values()


def signatures(view: View, groups: Sequence[Group]) -> Iterator[tuple[object, ...]]:
    """What makes groups comparable: their kind, and operators, axis and rank of every member."""
    readers: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for call in view.calls:
        for index, value in enumerate(call.inputs):
            if value is not None and value.weight is not None:
                readers[value.weight].append((call.op, index))
    for group in groups:
        members = [
            (*sorted(readers[m.weight]), m.axis, len(view.weights[m.weight].shape)) for m in group.members
        ]
        yield (group.kind, *sorted(members, key=repr))


def top(scores: Scores, count: int) -> Keep:
    """The ``count`` most salient positions; among equals the first ones."""
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-scores, kind="stable")[:count]] = True
    return keep


def _counts(
    groups: Sequence[Group], scores: Mapping[str, Scores], sparsity: float, multiple_of: int, min_keep: int
) -> dict[str, int]:
    """How many positions every group keeps; one group alone loses its share."""
    if len(groups) == 1:
        return {groups[0].name: staying(groups[0], sparsity, multiple_of, min_keep)}
    removable = []
    for group in groups:
        ranked = np.sort(scores[group.name], kind="stable")
        spare = group.size - staying(group, 1 - 1e-12, multiple_of, min_keep)
        removable.append(ranked[:spare])
    owner = np.repeat(np.arange(len(groups)), [len(r) for r in removable])
    order = np.argsort(np.concatenate(removable), kind="stable")
    budget = int(np.floor(sum(g.size for g in groups) * sparsity + 1e-9))
    removed = np.bincount(owner[order[:budget]], minlength=len(groups))
    return {g.name: staying(g, removed[i] / g.size, multiple_of, min_keep) for i, g in enumerate(groups)}


def staying(group: Group, share: float, multiple_of: int = 1, min_keep: int = 1) -> int:
    """How many positions a group keeps that loses ``share`` of them."""
    return keep_count(
        group.size,
        share,
        multiple_of=math.lcm(multiple_of, group.multiple),
        min_keep=max(min_keep, group.least),
    )

"""Which groups a structural pass may touch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sparsecc.allocation import check_allocation
from sparsecc.axes.analysis import Analysis, Group, GroupKind, matches
from sparsecc.errors import InvalidOption
from sparsecc.plan import Skip
from sparsecc.transform import check_count, check_share

#: kinds of groups
KINDS: tuple[GroupKind, ...] = ("channel", "head", "head_dim", "expert")


@dataclass(frozen=True)
class Selected:
    """Groups to work on, and those left alone with the reason."""

    groups: tuple[Group, ...]
    skips: tuple[Skip, ...]


def check_options(
    sparsity: float,
    multiple_of: int,
    min_keep: int,
    allocation: object = "uniform",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> None:
    """Raise InvalidOption for options outside their domains."""
    check_share("sparsity", sparsity)
    check_count("multiple_of", multiple_of)
    check_count("min_keep", min_keep)
    check_allocation(allocation)
    check_names(include, exclude)


def check_names(include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise InvalidOption where these are no tuples of name patterns."""
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(p, str) and p for p in patterns):
            raise InvalidOption(f"{name}={patterns!r}: give a tuple of name patterns, such as ('layer1.*',)")


def select(
    analysis: Analysis,
    kinds: Sequence[str | GroupKind],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    residual: bool = True,
) -> Selected:
    """Groups of the given kinds that the name patterns allow.

    A group is included if one of its weights matches ``include`` (or that is empty), and left
    alone if any of its weights matches ``exclude``: excluded weights keep their shapes.  Tied weights
    go by all of their names.  Raises InvalidOption for a pattern that matches no weight of the model.
    """
    aliases = _aliases(analysis)
    known = {*analysis.view.weights, *analysis.view.tied}
    _check_matched("include", include, known)
    _check_matched("exclude", exclude, known)
    groups: list[Group] = []
    skips: list[Skip] = []
    for group in analysis.groups:
        if group.kind not in kinds:
            continue
        names = [n for m in group.members for n in aliases.get(m.weight, (m.weight,))]
        hit = next((n for n in names if matches(n, exclude)), None)
        if hit is not None:
            skips.append(Skip(group.name, f"{hit} is excluded"))
        elif include and not any(matches(n, include) for n in names):
            skips.append(Skip(group.name, "not included"))
        elif not residual and group.residual:
            skips.append(Skip(group.name, "its width is shared by several producers (residual=False)"))
        else:
            groups.append(group)
    return Selected(tuple(groups), tuple(skips))


def selected(
    analysis: Analysis, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Callable[[str], str]:
    """A function from a weight's name to why it is left alone, or '' where the name patterns allow it.

    Raises InvalidOption for a pattern that matches no weight of the model.
    """
    aliases = _aliases(analysis)
    known = {*analysis.view.weights, *analysis.view.tied}
    _check_matched("include", include, known)
    _check_matched("exclude", exclude, known)

    def why_not(weight: str) -> str:
        names = aliases.get(weight, [weight])
        if any(matches(n, exclude) for n in names):
            return "excluded"
        return "not included" if include and not any(matches(n, include) for n in names) else ""

    return why_not


def _aliases(analysis: Analysis) -> dict[str, list[str]]:
    """Canonical name -> all names, for weights that have several."""
    found: dict[str, list[str]] = {}
    for alias, name in analysis.view.tied.items():
        found.setdefault(name, [name]).append(alias)
    return found


def _check_matched(option: str, patterns: Sequence[str], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            near = difflib.get_close_matches(pattern, _places(names), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(names)[:5])}, ..."
            raise InvalidOption(f"{option}: no parameter of the model matches {pattern!r}; {hint}")


def _places(names: Collection[str]) -> list[str]:
    """Names of weights, and of the modules that hold them."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)})

"""Which layers lack the pattern that a target asks for, and which of them would gain by it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from sparsecc.axes.analysis import matches
from sparsecc.patterns.layers import layers
from sparsecc.patterns.nm import NM
from sparsecc.patterns.present import magnitudes
from sparsecc.patterns.survey import survey
from sparsecc.pipeline import given
from sparsecc.plan import Plan
from sparsecc.report import Report
from sparsecc.subject import Subject

_LISTED = 5


def lacking(subject: Subject, plan: Plan, pattern: NM) -> list[str]:
    """Weights that could have the pattern, and have it neither before nor after the plan."""
    analysis = subject.analysis.after(given(subject.analysis, subject.kept(plan), plan.actions))
    found = survey(analysis, pattern, lambda weight: magnitudes(analysis, weight))
    return [site.layer.weight for site in found.sites if not site.has]


def lacking_note(subject: Subject, plan: Plan, pattern: str | None) -> Iterator[str]:
    """The note that names them, where there are any."""
    names = [] if pattern is None else lacking(subject, plan, NM.parse(pattern))
    if names:
        yield (
            f"the recipe leaves {len(names)} layers without the pattern {pattern} of the target: "
            f"{listed(names)}; add NMPattern(pattern='{pattern}') to it"
        )


def without_gain(subject: Subject, gaining: Mapping[str, str]) -> dict[str, str]:
    """Weights that a pattern could be put into, and why a target would not use it there."""
    view = subject.analysis.view
    names: dict[str, list[str]] = {}
    for alias, name in view.tied.items():
        names.setdefault(name, []).append(alias)
    found: dict[str, str] = {}
    for layer in layers(subject.analysis):
        if layer.why:
            continue
        why = [gaining.get(name, _UNREAD) for name in (layer.weight, *names.get(layer.weight, ()))]
        if all(why):
            found[layer.weight] = next((reason for reason in why if reason != _UNREAD), _UNREAD)
    return found


_UNREAD = "none of its products reads it as it is stored"


def excluded(without: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Name patterns of the first that match none of the others of all ``names``."""
    others = [name for name in names if name not in without]
    return tuple(w if not any(matches(n, (w,)) for n in others) else f"={w}" for w in without)


def spared(report: Report, without: Mapping[str, str], pattern: str) -> Report:
    """A report that says why weights keep all of their numbers which a target would not run faster."""
    if not without:
        return report
    first, why = next(iter(without.items()))
    note = (
        f"layers that this target would not run faster with {pattern} keep all of their weights: "
        f"{listed(list(without))} ({first}: {why})"
    )
    skips = tuple((where, without.get(where, reason)) for where, reason in report.skips)
    return replace(report, skips=skips, notes=(*report.notes, note))


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"

"""Which layers of a result lack the pattern that a target asks for."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecc.patterns.nm import NM
from sparsecc.patterns.present import magnitudes
from sparsecc.patterns.survey import survey
from sparsecc.pipeline import given
from sparsecc.plan import Plan
from sparsecc.subject import Subject

_LISTED = 5


def lacking(subject: Subject, plan: Plan, pattern: NM) -> list[str]:
    """Weights that could have the pattern, and have it neither before nor after the plan."""
    analysis = subject.analysis.after(given(subject.analysis, subject.kept(plan), plan.actions))
    found = survey(analysis, pattern, lambda weight: magnitudes(analysis, weight))
    return [site.layer.weight for site in found.sites if not site.has]


def lacking_note(subject: Subject, plan: Plan, pattern: str) -> Iterator[str]:
    """The note that names them, where there are any."""
    names = lacking(subject, plan, NM.parse(pattern))
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        yield (
            f"the recipe leaves {len(names)} layers without the pattern {pattern} of the target: "
            f"{', '.join(names[:_LISTED])}{more}; add NMPattern(pattern='{pattern}') to it"
        )

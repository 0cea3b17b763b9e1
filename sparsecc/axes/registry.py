"""The table of axis rules; families fill it, the solver reads it.  Imports nothing of sparsecc."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[[Any, Any], Any]

#: canonical operator name -> rule
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the axis rule of the canonical operators ``names``.

    A rule takes ``(solver, call)``, states equalities through the solver and returns the axes of
    the first output, or a list of axes per output.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register

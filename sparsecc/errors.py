"""Every error that sparsecc raises on purpose.

A message says what is wrong, where (node, parameter, source line or file) and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def summary(error: BaseException | str, limit: int = 400) -> str:
    """What another library said, as part of a message: one line of printable text, not without an end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = "".join(c if c.isprintable() else "?" for c in lines[0])
    return text if len(text) <= limit else f"{text[:limit]} ..."


class SparseccError(Exception):
    """Base of all errors raised by sparsecc; nothing was written and no input was changed."""


class UnsupportedModel(SparseccError):
    """The model is valid, but sparsecc cannot capture or represent it."""


class InvalidOption(SparseccError, ValueError):
    """An option has a value outside its domain."""


class InvalidModel(SparseccError, ValueError):
    """A model file or graph is malformed, truncated or hostile."""


class PlanConflict(SparseccError):
    """A plan does not fit the model that it is applied to, or no graph expresses it.

    ``axes`` (terms) and ``node`` (a call's name) tell which axes should have stayed whole, where that is
    known: the pipeline freezes them and plans again.
    """

    def __init__(self, *message: object, axes: Iterable[Any] = (), node: str = "") -> None:
        super().__init__(*message)
        self.axes = tuple(axes)
        self.node = node


class TargetRefused(SparseccError):
    """The target exists, but cannot run this model; every refusal is listed."""


class TargetUnavailable(SparseccError):
    """The target is unknown, or what it needs is not installed."""


class VerificationFailed(SparseccError):
    """The result does not compute what it should; nothing was written."""

"""The base of all passes: a pass decides, and never edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.terms import Kept
from sparsecc.errors import InvalidOption
from sparsecc.lowering import lower
from sparsecc.plan import Action, Pattern, Plan, Skip

if TYPE_CHECKING:
    from sparsecc.pipeline import Pruned
    from sparsecc.saliency import Saliency


@dataclass(frozen=True)
class Choice:
    """What a pass wants: kept positions by group name, further actions, and what it left alone.

    ``kept`` has masks, or the kept positions in a new order.  ``patterns`` tells what weights have.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    actions: Sequence[Action] = ()
    skips: Sequence[Skip] = ()
    patterns: Sequence[Pattern] = ()


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A frozen set of options with a pure ``choose``.

    Subclasses are frozen dataclasses; their fields are their options.  ``mode`` says what the
    result must equal: ``prune`` the masked original, ``slim`` the original.  ``turn`` orders the passes of
    a recipe: those that remove positions (0), those that choose single elements of weights (1), those that
    change the values of what is left (2).
    """

    mode: ClassVar[Literal["prune", "slim"]] = "prune"
    turn: ClassVar[int] = 0

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Decide, given coupled groups and (where the pass ranks) their saliency."""
        raise NotImplementedError(f"{type(self).__name__} does not define choose()")

    def plan(self, analysis: Analysis, saliency: Saliency | None = None) -> Plan:
        """The plan of this pass alone."""
        choice = self.choose(analysis, saliency)
        return lower(
            analysis,
            analysis.feasible(choice.kept),
            by=type(self).__name__,
            extra=choice.actions,
            skips=choice.skips,
            patterns=choice.patterns,
            recipe=str(self),
            mode=self.mode,
        )

    def __call__(self, model: Any, example_inputs: Any = None, *, verify: bool = True) -> Pruned:
        """Capture, plan, edit and verify: the pass as a function of models.

        Works on an nn.Module (with ``example_inputs``), a GraphModule, an ExportedProgram or an
        ONNX model; raises as ``sparsecc.prune`` does.
        """
        from sparsecc.pipeline import run

        return run(model, example_inputs, [self], verify=verify)

    def __str__(self) -> str:
        """Text form: the class and the options that differ from their defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def keep_count(size: int, sparsity: float, *, multiple_of: int = 1, min_keep: int = 1) -> int:
    """How many of ``size`` positions stay: ``sparsity`` of them go, rounded so that no more do.

    The count is rounded up to ``multiple_of`` (or stays ``size`` where no multiple fits).
    """
    keep = size - int(np.floor(size * sparsity + 1e-9))
    keep = max(keep, min(min_keep, size), 1)
    return min(size, -(-keep // multiple_of) * multiple_of)


def check_share(name: str, value: float) -> None:
    """Raise InvalidOption unless ``value`` is a share in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InvalidOption(f"{name}={value!r}: give the share of positions to remove, 0 <= {name} < 1")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise InvalidOption unless ``value`` is one of those that are known."""
    if value not in known:
        raise InvalidOption(f"{name}={value!r}: give {' or '.join(map(repr, known))}")


def check_count(name: str, value: int) -> None:
    """Raise InvalidOption unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidOption(f"{name}={value!r}: give a positive integer")

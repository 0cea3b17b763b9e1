"""What the pipeline and the verification need of a captured model, whichever dialect it is in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.terms import Kept
from sparsecc.errors import PlanConflict
from sparsecc.graph import Call, View
from sparsecc.lowering import kept_of
from sparsecc.plan import Plan
from sparsecc.reference.masked import Masked
from sparsecc.reference.nudged import masking, rounds

Inputs = Any
Outputs = list[Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One call of the view about to run: ``run`` computes its outputs from operands in canonical order.

    ``whole`` does so without masks, where ``run`` has some.
    """

    call: Call
    operands: list[Any]
    run: Callable[[list[Any]], tuple[Any, ...]]
    whole: Callable[[list[Any]], tuple[Any, ...]] | None = None


#: yields every call before it runs, takes its outputs, and ends with the flat outputs of the model
Stepping = Generator[Step, tuple[Any, ...], Outputs]


def real(y: Any) -> Any:
    """A complex tensor as pairs of real numbers, anything else as it is."""
    return torch.view_as_real(y.resolve_conj()) if isinstance(y, torch.Tensor) and y.is_complex() else y


@dataclass(frozen=True)
class NodeCheck:
    """One operator of the result against the masked original, fed with the same activations."""

    node: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound (NaN is not)."""
        return self.error <= self.bound


@dataclass
class Applied(ABC):
    """A plan applied to a copy of a model.

    ``model`` is of the kind that the user gave; ``plan`` is the plan with what applying it found
    out (module attributes); ``notes`` tells the user what happened on the way.
    """

    model: Any
    plan: Plan
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def run(self, inputs: Inputs, dtype: torch.dtype | None = None) -> Outputs:
        """Flat outputs; with ``dtype`` every float is promoted to it."""

    @abstractmethod
    def timed(self, arguments: Arguments) -> AbstractContextManager[Callable[[], object]]:
        """A call of the result as its users run it: the module itself, or onnxruntime."""


#: by how much of its largest entry an output may move where tensors are rounded to 8 bits: four steps
ROUNDING_STEP = 4 / 255


class Subject(ABC):
    """A captured model: its view, its original and masked semantics, and its editor."""

    dialect: Literal["torch", "onnx"]
    notes: list[str]

    @property
    def step(self) -> float:
        """By how much of its largest entry a few roundings to integers may move an output; 0 without any.

        Only the model's own dtype is compared so: in float64 hardly anything is so near to a middle.
        """
        return ROUNDING_STEP if any(rounds(self.view, call) for call in self.view.calls) else 0.0

    @property
    @abstractmethod
    def view(self) -> View:
        """The graph."""

    @cached_property
    def analysis(self) -> Analysis:
        """Groups and frozen axes."""
        return Analysis(self.view)

    @abstractmethod
    def inputs(self, seed: int, variant: int) -> tuple[Inputs, str]:
        """Inputs for a check, and their description; variant 1 has other dynamic sizes than 0."""

    def example(self) -> Inputs:
        """The inputs that the user gave, or some that can be made."""
        return self.inputs(0, 0)[0]

    def semantics(
        self, kept: Mapping[str, Kept], nudge: int | None = None, dtype: torch.dtype | None = None
    ) -> Masked:
        """Masked semantics of single calls; ``nudge`` and ``dtype`` as for ``masked``."""
        return masking(self.analysis.keeps(kept), nudge, dtype)

    def hold_integers(self) -> bool:
        """Let ``inputs`` take integers from the example alone; False where that changes nothing.

        For models that fail on others: offsets that begin with 0, lengths in falling order.
        """
        return False

    @abstractmethod
    def arguments(self, inputs: Inputs) -> Arguments:
        """The positional and keyword arguments of a call of the user's model with ``inputs``."""

    @abstractmethod
    def timed(self, arguments: Arguments) -> AbstractContextManager[Callable[[], object]]:
        """A call of the original as its users run it: the module itself, or onnxruntime."""

    @abstractmethod
    def original(self, inputs: Inputs, dtype: torch.dtype | None = None) -> Outputs:
        """Outputs of the original model."""

    @abstractmethod
    def masked(
        self,
        plan: Plan,
        kept: Mapping[str, Kept],
        inputs: Inputs,
        dtype: torch.dtype | None = None,
        *,
        nudge: int | None = None,
    ) -> Outputs:
        """Outputs of the original graph under masked semantics.

        With ``nudge``, a seed, what quantisers read is off by a unit in the last place, at random; in float64
        all sums are.
        """

    @abstractmethod
    def stepping(
        self,
        inputs: Inputs,
        *,
        weights: Mapping[str, torch.Tensor] | None = None,
        plan: Plan | None = None,
    ) -> Stepping:
        """The original in its own dtype, call by call, with ``weights`` in the place of its own.

        With ``plan`` every call runs under masked semantics.  Gradients are the caller's affair.
        """

    @abstractmethod
    def bound(self, example_inputs: Any) -> Inputs:
        """Inputs given as ``example_inputs`` are, for a run; raises InvalidOption where they do not fit."""

    @abstractmethod
    def structured(self, outputs: Outputs) -> Any:
        """Flat outputs in the form in which the model gives them (ONNX: a dict by name)."""

    @abstractmethod
    def apply(self, plan: Plan, kept: Mapping[str, Kept]) -> Applied:
        """The plan applied to a copy of the model."""

    @abstractmethod
    def adopt(self, result: Any, plan: Plan) -> Applied:
        """A model that came from elsewhere as the result of ``plan`` (structure is not trusted)."""

    def kept(self, plan: Plan) -> dict[str, Kept]:
        """The plan's decisions; raises PlanConflict for groups that this model lacks."""
        known = {g.name: g.size for g in self.analysis.groups}
        for decision in plan.decisions:
            if known.get(decision.group) != decision.size:
                raise PlanConflict(
                    f"the plan was made for another model: it keeps part of a group {decision.group!r} of "
                    f"{decision.size} positions, which this model does not have"
                )
            if decision.kept.size and not 0 <= decision.kept.min() <= decision.kept.max() < decision.size:
                raise PlanConflict(f"the plan keeps positions of {decision.group!r} which it does not have")
        return kept_of(plan)

    @abstractmethod
    def node_checks(self, applied: Applied, kept: Mapping[str, Kept], inputs: Inputs) -> Iterator[NodeCheck]:
        """Every operator of the result, teacher-forced, in the model's own dtype."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the model's graph and weights."""

    @property
    @abstractmethod
    def output_names(self) -> Sequence[str]:
        """Names of the flat outputs."""

"""What the analysis sees of a captured graph, whichever dialect it came from.

A view holds no weights: values have shapes, calls have canonical operator names, and weights
are read through ``View.weight`` only by what needs numbers.  Both readers (torch.export and
ONNX) build the same structure, so every axis rule is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Kind = Literal["input", "weight", "const", "node"]


@dataclass(slots=True, eq=False)
class Value:
    """One tensor of the graph.

    ``shape`` holds representative sizes: a dynamic dimension is given a distinctive number, and
    ``dynamic`` marks it.  ``weight`` is the name of the parameter, buffer or initializer behind
    the value; ``data`` holds small integer constants that are known at capture.  ``example`` holds
    the sizes of the example input where they differ from ``shape``.  ``unranked`` marks values whose
    number of axes is not known before they are computed; ``shape`` then is empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = "node"
    dynamic: tuple[bool, ...] = ()
    weight: str | None = None
    data: Any = None
    example: tuple[int, ...] = ()
    unranked: bool = False

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape for the example input."""
        return self.example or self.shape

    def is_dynamic(self, dim: int) -> bool:
        """Whether the size of ``dim`` depends on the sizes of the graph's inputs."""
        return bool(self.dynamic) and self.dynamic[dim]


@dataclass(slots=True, eq=False)
class Call:
    """One operator application, by canonical name.

    ``inputs`` are in the canonical order of the operator (absent ones are None), ``attrs`` are
    plain Python data, ``where`` is the source line or node index, ``raw`` the dialect's node and
    ``refs`` its handle for every operand (an FX node, an ONNX input index).
    """

    op: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    raw: Any = None
    refs: tuple[Any, ...] = ()

    def describe(self) -> str:
        """How messages name this call: ``conv 'layer1.conv' (model.py:12)``."""
        return f"{self.op} {self.name!r}" + (f" ({self.where})" if self.where else "")


class Semantics(Protocol):
    """What single calls compute, for those who need numbers and not only axes.

    Where a dialect does not know, it answers None, ``"none"`` or the cautious boolean.
    """

    def function(self, call: Call) -> str:
        """The operator's own name in lower case: ``relu``, ``mul``, ``add``."""

    def constant(self, value: Value) -> torch.Tensor | None:
        """The numbers of a weight or constant; None for what is computed or depends on input sizes."""

    def deterministic(self, call: Call) -> bool:
        """Whether the outputs are a function of the operands (no dropout, no random numbers)."""

    def evaluate(
        self, call: Call, operands: Sequence[torch.Tensor | None], *, promoted: bool = True
    ) -> tuple[torch.Tensor, ...] | None:
        """The outputs for these operands; operands may have axes of size 1 instead.

        Floats are float64; without ``promoted`` in the dtypes of the model.
        """

    def settled(self, call: Call) -> bool:
        """Whether the outputs follow from the operands and nothing that depends on the inputs' sizes."""

    def fill(self, call: Call) -> float | None:
        """The number that a pad or create call puts in."""

    def offset(self, call: Call) -> torch.Tensor | None:
        """The zero points of a call that decodes integers; 0 without any, None where they are computed."""

    def zero_padded(self, call: Call) -> bool:
        """Whether a convolution sees zeros beyond the borders of its input."""

    def factors(self, call: Call) -> tuple[float, float] | None:
        """(alpha, beta) of ``alpha a @ b + beta c``, and (alpha, 1) of ``x + alpha y``."""

    def preserves(self, call: Call) -> Literal["constants", "zero", "none"]:
        """What a pool or resize puts out unchanged where its input holds it everywhere."""

    def overwritten(self, *, read_later: bool = True) -> frozenset[Value]:
        """Values that are changed in place and read afterwards, so that they have no single content.

        Without ``read_later`` all that are changed in place.
        """


@dataclass(slots=True, eq=False)
class View:
    """A captured graph in topological order.

    ``tied`` maps every name of a weight to its canonical name (parameters that share storage are
    one parameter).  ``weight(name)`` returns the tensor without copying it; it raises
    ``UnsupportedModel`` where the model has no values (meta device).  ``semantics`` says what single
    calls compute; without it nothing but weights counts as known.  ``names()`` are taken.  ``beside`` is
    what runs on the same weights and is not part of the graph, because no output depends on it or because
    only training runs it: its axes are coupled and frozen, and nothing of it is edited.
    """

    dialect: Literal["torch", "onnx"]
    calls: list[Call]
    inputs: list[Value]
    outputs: list[Value]
    weights: dict[str, Value]
    weight: Callable[[str], torch.Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    semantics: Semantics | None = None
    names: Callable[[], Iterable[str]] = tuple
    beside: tuple[View, ...] = ()

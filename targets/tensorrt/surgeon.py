"""What every edit of a graph needs: names, new constants, new nodes around the one at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.targets.tensorrt.stored import Array, Stored, moved_axis, normal, stored

if TYPE_CHECKING:
    from sparsecc.onnxfile.shapes import Shapes


@dataclass(eq=False)
class Surgeon:
    """A graph under edit; ``dtype`` is the type that products will be computed in.

    ``before`` and ``after`` collect the nodes that go around the one at hand.  ``notes`` say by
    output of the original product what was done to it, or why something was not.
    """

    file: OnnxFile
    graph: gs.Graph
    dtype: str | None = None
    before: list[gs.Node] = field(default_factory=list)
    after: list[gs.Node] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    _constants: dict[tuple[str, str], list[gs.Constant]] = field(default_factory=dict)
    _made: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names = set(self.graph.tensors()) | {n.name for n in self.graph.nodes}
        for body in self.graph.subgraphs(recursive=True):
            self.names |= set(body.tensors()) | {n.name for n in body.nodes}

    @cached_property
    def shapes(self) -> Shapes:
        from sparsecc.onnxfile.shapes import infer

        return infer(self.file)

    def rank(self, tensor: gs.Tensor) -> int | None:
        """The number of axes of a value of the original graph; None where it is not known."""
        shape = self.shapes.get(tensor.name).shape
        return None if shape is None else len(shape)

    def stored(self, operand: gs.Tensor) -> Stored | None:
        """What an operand is made of, also where that was made here."""
        if isinstance(operand, gs.Constant) and operand.name in self._made:
            return Stored(operand.name, operand.values)
        return stored(self.file, operand)

    def note(self, output: str, text: str) -> None:
        self.notes.setdefault(output, []).append(text)

    def name(self, wanted: str) -> str:
        """A name that nothing in the model has."""
        found, count = wanted, 1
        while found in self.names:
            count += 1
            found = f"{wanted}_{count}"
        self.names.add(found)
        return found

    def constant(self, source: str, what: str, values: Array) -> gs.Constant:
        """A new stored tensor; one for all products that need the same values of the same weight."""
        wanted = normal(values)
        made = self._constants.setdefault((source, what), [])
        for constant in made:
            if _same(constant.values, wanted):
                return constant
        made.append(gs.Constant(self.name(f"{source}.{what}"), wanted))
        self._made.add(made[-1].name)
        return made[-1]

    def operand(self, weight: Stored, what: str) -> gs.Tensor:
        """The operand with everything folded: a constant, or quantizers directly on one."""
        tensor: gs.Tensor = self.constant(weight.name, what, weight.values)
        for node, order in zip(weight.quantizers, weight.orders, strict=True):
            attrs = dict(node.attrs)
            if self.file.opset >= 13:  # before, there is one scale
                attrs["axis"] = moved_axis(node, order)
            tensor = self.node(node.op, [tensor, *node.inputs[1:]], f"{node.outputs[0].name}.{what}", **attrs)
        return tensor

    def node(self, op: str, inputs: Sequence[gs.Tensor], output: str, **attrs: Any) -> gs.Tensor:
        """A new node before the one at hand, and the value that it gives."""
        found = gs.Variable(self.name(output))
        self.before.append(gs.Node(op, self.name(f"{output}.{op.lower()}"), attrs, list(inputs), [found]))
        return found

    def finish(
        self, op: str, node: gs.Node, inner: str, extra: Sequence[gs.Tensor] = (), **attrs: Any
    ) -> None:
        """Let a new node behind ``node`` give what that gave; ``inner`` is in the name of what it gives."""
        output = node.outputs[0]
        between = gs.Variable(self.name(f"{output.name}.{inner}"))
        node.outputs = [between]
        name = self.name(f"{output.name}.{op.lower()}")
        self.after.insert(0, gs.Node(op, name, attrs, [between, *extra], [output]))


def _same(one: Array, other: Array) -> bool:
    """Whether two arrays are the same to the last bit."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))

"""A node as entries of the operator tables see it, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, NodeProto

from sparsecc.onnxfile.shapes import Shapes
from sparsecc.onnxfile.strides import Tracer


class Spec(NamedTuple):
    """A canonical call: operands are input indices of the node, None where absent."""

    op: str
    operands: Sequence[int | None]
    attrs: dict[str, Any] = {}  # noqa: RUF012


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node as plain Python data (bytes as text)."""
    return _plain(next((a for a in node.attribute if a.name == name), None), default)


def _plain(found: AttributeProto | None, default: Any) -> Any:
    if found is None:
        return default
    value = onnx.helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value


class Site:
    """One node, as table entries see it."""

    def __init__(self, node: NodeProto, shapes: Shapes, opset: int, tracer: Tracer) -> None:
        self.tracer = tracer
        self.node = node
        self.shapes = shapes
        self.opset = opset
        self.attributes = {a.name: a for a in node.attribute}

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute as plain Python data (bytes as text)."""
        return _plain(self.attributes.get(name), default)

    def has(self, index: int) -> bool:
        """Whether input ``index`` is given."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def given(self, *indices: int) -> list[int | None]:
        """Input indices in the order of a canonical operator, None where absent."""
        return [i if self.has(i) else None for i in indices]

    def outputs(self) -> list[int]:
        """Places of the outputs that have a name."""
        return [i for i, name in enumerate(self.node.output) if name]

    def present(self) -> list[int]:
        """Indices of the inputs that are given."""
        return [i for i in range(len(self.node.input)) if self.node.input[i]]

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of an input; ValueError where it is not known."""
        found = self.shapes.get(self.node.input[index]).shape
        if found is None:
            raise ValueError(f"the shape of {self.node.input[index]!r} is not known")
        return found

    def out(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an output; ValueError where it is not known."""
        found = self.shapes.get(self.node.output[index]).shape
        if found is None:
            raise ValueError(f"the shape of {self.node.output[index]!r} is not known")
        return found

    def known(self, index: int) -> npt.NDArray[Any] | None:
        """Values of an input that follows from sizes and constants; None where it does not."""
        return self.shapes.get(self.node.input[index]).known if self.has(index) else None

    def ints(self, name: str, index: int) -> list[int] | None:
        """An integer list that older opsets keep in an attribute and newer ones in an input."""
        if name in self.attributes:
            return [int(v) for v in self.attr(name)]
        if not self.has(index):
            return None
        known = self.known(index)
        if known is None:
            raise ValueError(f"{name} is computed from data")
        return [int(v) for v in np.atleast_1d(known)]


Entry = Callable[[Site], Spec]

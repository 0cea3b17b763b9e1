"""Element types of a strongly typed network: casts around products, with weights stored in the shorter type.

    y = MatMul(x, w)        y = Cast(MatMul(Cast(x), w'))      w' is w rounded to the type

Values between products keep the type that they have, and so do inputs and outputs.  A cast back that the
next product would undo is left out, also across operators that only move or pick elements (a Relu between
convolutions, which TensorRT can then fuse): that changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx import helper

from sparsecc.targets.tensorrt.stored import SUMMED, Array, Stored, has_pattern, is_standard
from sparsecc.targets.tensorrt.surgeon import Surgeon

#: products with float32 weights that have the pattern are computed in fp16, all others as they are
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Element:
    """A type to compute products in; ``first_opset`` by operator where ONNX allows it only from there on."""

    numpy: np.dtype[np.generic]
    torch: torch.dtype
    onnx: int
    first_opset: Mapping[str, int] = field(default_factory=dict)


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        "fp16": Element(np.dtype(np.float16), torch.float16, 10),
        "bf16": Element(
            np.dtype(ml_dtypes.bfloat16),
            torch.bfloat16,
            16,
            MappingProxyType({"MatMul": 13, "Gemm": 13, "Conv": 22}),
        ),
    }
)
_FLOATS = ("float32", "float16", "bfloat16")
_ALL = ("Concat",)
_MOVES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("Clip", "Flatten", "Identity", "Relu", "Reshape", "Slice", "Squeeze"), 13),
        **dict.fromkeys(("Concat", "DepthToSpace", "Expand", "SpaceToDepth", "Transpose", "Unsqueeze"), 13),
        "MaxPool": 22,
    }
)
"""Operators whose results are elements of their first operand (Concat: of all), zeros or bounds, and the
opset from which they take bfloat16."""


@dataclass(frozen=True, eq=False)
class _Back:
    """A value that is a cast back: the type before, the value before, and the ONNX type that it has."""

    kind: str
    source: gs.Tensor
    to: int


@dataclass(eq=False)
class Typing:
    """Which products are computed in which type; ``rounds`` collects those whose operands are rounded."""

    asked: str | None
    rounds: dict[str, str] = field(default_factory=dict)
    _cast: dict[tuple[str, str], gs.Tensor] = field(default_factory=dict)
    _back: dict[str, _Back] = field(default_factory=dict)

    def narrow(self, surgeon: Surgeon, node: gs.Node, output: str) -> None:
        """Compute one product (whose original output is ``output``) in the type that was asked for."""
        if self.asked is None or node.op not in SUMMED or not is_standard(node):
            return
        weight = surgeon.stored(node.inputs[1])
        if weight is None or weight.quantized or weight.values.dtype.name not in _FLOATS:
            return
        wanted = self._wanted(node, weight.values)
        if wanted is None or ELEMENTS[wanted].numpy == weight.values.dtype:
            return
        refusal = _refusal(surgeon, node, weight.values, wanted)
        if refusal:
            surgeon.note(output, refusal)
            return
        self._apply(surgeon, node, weight, wanted)
        self.rounds[output] = wanted
        surgeon.note(output, f"computed in {wanted}")

    def _wanted(self, node: gs.Node, values: Array) -> str | None:
        if self.asked != AUTO:
            return self.asked
        return "fp16" if values.dtype == np.float32 and has_pattern(node, values) else None

    def _apply(self, surgeon: Surgeon, node: gs.Node, weight: Stored, wanted: str) -> None:
        element = ELEMENTS[wanted]
        before = int(helper.np_dtype_to_tensor_dtype(weight.values.dtype))
        short = surgeon.constant(weight.name, wanted, weight.values.astype(element.numpy))
        rest = [self._operand(surgeon, tensor, wanted) for tensor in node.inputs[2:]]
        node.inputs = [self._operand(surgeon, node.inputs[0], wanted), short, *rest]
        self._finish(surgeon, node, wanted, before)

    def _finish(self, surgeon: Surgeon, node: gs.Node, kind: str, to: int) -> None:
        """Cast back what a node gives in the shorter type."""
        output = node.outputs[0]
        surgeon.finish("Cast", node, kind, to=to)
        self._back[output.name] = _Back(kind, node.outputs[0], to)

    def follow(self, surgeon: Surgeon, node: gs.Node) -> None:
        """Let an operator that moves elements move them before they are cast back, if a product follows."""
        if node.op not in _MOVES or not is_standard(node) or len(node.outputs) != 1:
            return
        if not _leads_to_product(node):
            return
        count = len(node.inputs) if node.op in _ALL else 1
        backs = [self._back.get(tensor.name) for tensor in node.inputs[:count]]
        known = [back for back in backs if back is not None]
        if not known or len(known) < count:  # all are of the one type that products are computed in
            return
        kind, to = known[0].kind, known[0].to
        rest = node.inputs[count:]
        if kind == "bf16" and surgeon.file.opset < _MOVES[node.op]:
            return
        if node.op == "Clip":
            bounds = [_exact(surgeon, bound, kind) for bound in rest]
            rest = [bound for bound in bounds if bound is not None]
            if len(rest) < len(bounds):
                return
        node.inputs = [*(back.source for back in known), *rest]
        self._finish(surgeon, node, kind, to)

    def _operand(self, surgeon: Surgeon, tensor: gs.Tensor, wanted: str) -> gs.Tensor:
        """An operand in the type: stored so, the value before a cast back, or behind a new cast."""
        if not tensor.name:
            return tensor
        back = self._back.get(tensor.name)
        if back is not None and back.kind == wanted:
            return back.source
        element = ELEMENTS[wanted]
        known = surgeon.stored(tensor)
        if known is not None and known.values.dtype.name in _FLOATS:
            return surgeon.constant(known.name, wanted, known.values.astype(element.numpy))
        key = (tensor.name, wanted)
        if key not in self._cast:
            self._cast[key] = surgeon.node("Cast", [tensor], f"{tensor.name}.{wanted}", to=element.onnx)
        return self._cast[key]


def _refusal(surgeon: Surgeon, node: gs.Node, values: Array, wanted: str) -> str:
    """Why a product keeps its type."""
    first = ELEMENTS[wanted].first_opset.get(node.op, 0)
    if surgeon.file.opset < first:
        return (
            f"it keeps its type: {node.op} takes {wanted} from opset {first} on, and the model has "
            f"{surgeon.file.opset}"
        )
    biases = (surgeon.stored(tensor) for tensor in node.inputs[2:] if tensor.name)
    for stored in (values, *(bias.values for bias in biases if bias is not None)):
        with np.errstate(over="ignore"):
            short = stored.astype(ELEMENTS[wanted].numpy)
        if not np.array_equal(np.isfinite(short), np.isfinite(stored)):
            return f"it keeps its type: {wanted} cannot hold its weights"
    return ""


def _leads_to_product(node: gs.Node) -> bool:
    """Whether a product reads what a node gives, at once or through operators that move elements."""
    stack, seen = [node], {id(node)}
    while stack:
        for reader in (reader for value in stack.pop().outputs for reader in value.outputs):
            if reader.op in SUMMED:
                return True
            if reader.op in _MOVES and id(reader) not in seen:
                seen.add(id(reader))
                stack.append(reader)
    return False


def _exact(surgeon: Surgeon, bound: gs.Tensor, kind: str) -> gs.Tensor | None:
    """A bound in the shorter type; None where that would be another bound, or it is not stored."""
    if not bound.name:
        return bound
    known = surgeon.stored(bound)
    if known is None or known.values.dtype.name not in _FLOATS:
        return None
    short = known.values.astype(ELEMENTS[kind].numpy)
    same = np.array_equal(short.astype(np.float64), known.values.astype(np.float64))
    return surgeon.constant(known.name, kind, short) if same else None

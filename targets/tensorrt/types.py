"""Element types of a strongly typed network: casts around products, with weights stored in the shorter type.

    y = MatMul(x, w)        y = Cast(MatMul(Cast(x), w'))      w' is w rounded to the type

Values between products keep the type that they have, and so do inputs and outputs.  A cast back that the
next product would undo is left out, which changes no bit.
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

from sparsecc.targets.tensorrt.stored import SUMMED, Array, Stored, has_pattern
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


@dataclass(eq=False)
class Typing:
    """Which products are computed in which type; ``rounds`` collects those whose operands are rounded."""

    asked: str | None
    rounds: dict[str, str] = field(default_factory=dict)
    _cast: dict[tuple[str, str], gs.Tensor] = field(default_factory=dict)
    _back: dict[str, tuple[str, gs.Tensor]] = field(default_factory=dict)

    def narrow(self, surgeon: Surgeon, node: gs.Node, output: str) -> None:
        """Compute one product (whose original output is ``output``) in the type that was asked for."""
        if self.asked is None or node.op not in SUMMED:
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
        output = node.outputs[0]
        surgeon.finish("Cast", node, wanted, to=before)
        self._back[output.name] = wanted, node.outputs[0]

    def _operand(self, surgeon: Surgeon, tensor: gs.Tensor, wanted: str) -> gs.Tensor:
        """An operand in the type: stored so, the value before a cast back, or behind a new cast."""
        if not tensor.name:
            return tensor
        kind, source = self._back.get(tensor.name, ("", tensor))
        if kind == wanted:
            return source
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
    with np.errstate(over="ignore"):
        short = values.astype(ELEMENTS[wanted].numpy)
    if not np.array_equal(np.isfinite(short), np.isfinite(values)):
        return f"it keeps its type: {wanted} cannot hold its weights"
    return ""

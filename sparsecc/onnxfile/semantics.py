"""What single ONNX calls compute: the numbers behind a view of an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import NodeProto

from sparsecc.errors import SparseccError
from sparsecc.graph import Call, Value
from sparsecc.onnxfile.model import OnnxFile, subgraphs, to_torch
from sparsecc.onnxfile.shapes import Shapes
from sparsecc.reference.onnx_ops import Ctx, DataDependent, find
from sparsecc.reference.onnx_run import execute

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
_PRESERVE_ALL = frozenset({"MaxPool", "GlobalMaxPool", "GlobalAveragePool", "Upsample"})


class ModelSemantics:
    """Answers of an ONNX model; see ``sparsecc.graph.Semantics``."""

    def __init__(self, model: OnnxFile, shapes: Shapes) -> None:
        self.model = model
        self.shapes = shapes

    def _node(self, call: Call) -> NodeProto:
        node: NodeProto = self.model.proto.graph.node[call.raw]
        return node

    def _attribute(self, call: Call, name: str, default: Any) -> Any:
        found = next((a for a in self._node(call).attribute if a.name == name), None)
        if found is None:
            return default
        value = onnx.helper.get_attribute_value(found)
        return value.decode() if isinstance(value, bytes) else value

    def _named(self, name: str) -> torch.Tensor | None:
        """An initializer, a Constant, or what follows from constants alone."""
        if name in self.model.initializers or name in self.model.constants:
            array = self.model.array(name)
            return to_torch(array) if array.dtype.kind != "O" else None
        info = self.shapes.get(name)
        if info.known is None or (info.varies is not None and bool(np.any(info.varies))):
            return None
        return to_torch(np.asarray(info.known))

    def function(self, call: Call) -> str:
        """``mul`` for Mul; a Sum of two is an ``add``."""
        name = self._node(call).op_type
        return "add" if name == "Sum" and len(call.inputs) == 2 else name.lower()

    def constant(self, value: Value) -> torch.Tensor | None:
        """Initializers, Constant nodes, and known numbers that do not depend on the inputs' sizes."""
        return self._named(value.name if value.weight is None else value.weight)

    def deterministic(self, call: Call) -> bool:
        """Dropout counts where it is not told to train."""
        node = self._node(call)
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            training = self._named(node.input[2])
            return training is not None and not bool(training.any())
        return node.op_type not in _RANDOM

    def evaluate(
        self, call: Call, operands: Sequence[torch.Tensor | None], *, promoted: bool = True
    ) -> tuple[torch.Tensor, ...] | None:
        """The node by the executable reference, floats promoted unless it is told not to."""
        node = self._node(call)
        if not self.deterministic(call):
            return None
        given = dict(zip(call.refs, operands, strict=True))
        args: list[Any] = []
        for index, name in enumerate(node.input):
            found = given[index] if index in given else (self._named(name) if name else None)
            if name and found is None:
                return None
            wide = promoted and found is not None and found.is_floating_point()
            args.append(found.double() if wide and found is not None else found)
        opset = self.model.opset
        version = opset if node.domain in ("", "ai.onnx") else self.model.opsets.get(node.domain, 1)
        wide_type = torch.float64 if promoted else None
        context = Ctx(node, opset, index=call.raw, dtype=wide_type, read=self.model.read)
        try:
            results = execute(find(node.domain, node.op_type, version), context, args)
        except (SparseccError, DataDependent, RuntimeError, TypeError, ValueError, IndexError):
            return None  # an operator that does not run on operands with axes of size 1
        named = [r for r, name in zip(results, node.output, strict=False) if name]
        return tuple(named) if all(isinstance(r, torch.Tensor) for r in named) else None

    def settled(self, call: Call) -> bool:
        """What it reads beside its operands is stored, it has no body, and callers can feed none of it.

        Before version 4 of the format every initializer had to be named as an input.
        """
        node = self._node(call)
        proto = self.model.proto
        if proto.ir_version >= 4 and any(v.name in node.input for v in proto.graph.input):
            return False
        beside = [n for i, n in enumerate(node.input) if n and i not in call.refs]
        stored = (n in self.model.initializers or n in self.model.constants for n in beside)
        return all(stored) and not subgraphs(node)

    def fill(self, call: Call) -> float | None:
        """The value of Pad and of ConstantOfShape."""
        node = self._node(call)
        if node.op_type == "ConstantOfShape":
            stored = self._attribute(call, "value", None)
            return 0.0 if stored is None else float(np.asarray(self.model.read(stored)).reshape(-1)[0])
        if node.op_type != "Pad":
            return None
        if len(node.input) < 3 or not node.input[2]:
            return 0.0
        value = self._named(node.input[2])
        return None if value is None or value.numel() != 1 else float(value)

    def offset(self, call: Call) -> torch.Tensor | None:
        """The third input of DequantizeLinear."""
        node = self._node(call)
        if len(node.input) < 3 or not node.input[2]:
            return torch.zeros(())
        return self._named(node.input[2])

    def zero_padded(self, call: Call) -> bool:
        """From ``pads`` and ``auto_pad``; a kernel of one position is never padded automatically."""
        if self._attribute(call, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
            weight = call.inputs[1]
            return weight is None or any(n > 1 for n in weight.shape[2:])
        return any(n != 0 for n in self._attribute(call, "pads", ()))

    def factors(self, call: Call) -> tuple[float, float] | None:
        """Those of Gemm; everything else adds as it is."""
        return float(self._attribute(call, "alpha", 1.0)), float(self._attribute(call, "beta", 1.0))

    def preserves(self, call: Call) -> Literal["constants", "zero", "none"]:
        """All pools keep zero; resizing keeps constants unless it extrapolates."""
        name = self._node(call).op_type
        if name in _PRESERVE_ALL:
            return "constants"
        if name == "Resize":
            mode = self._attribute(call, "coordinate_transformation_mode", "half_pixel")
            return "none" if mode == "tf_crop_and_resize" else "constants"
        if name == "AveragePool":
            padded = self._attribute(call, "auto_pad", "NOTSET") != "NOTSET" or any(
                self._attribute(call, "pads", ())
            )
            return "zero" if padded and self._attribute(call, "count_include_pad", 0) else "constants"
        return "zero" if name.endswith("Pool") else "none"

    def overwritten(self, *, read_later: bool = True) -> frozenset[Value]:
        """Nothing is changed in place."""
        return frozenset()

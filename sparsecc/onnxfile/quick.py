"""Shortcuts of abstract execution: what single operators put out, or move, told without running them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.onnxfile.cells import Cell
from sparsecc.onnxfile.model import TORCH_DTYPES
from sparsecc.reference.onnx_ops.elementwise import ELEMENTWISE
from sparsecc.reference.onnx_ops.registry import Ctx, broadcast
from sparsecc.reference.onnx_run import Step

GROWING = frozenset(
    {"Tile", "Pad", "OneHot", "Resize", "Upsample", "EyeLike", "Expand", "CenterCropPad", "DFT", "Col2Im"}
)
_COMPARISONS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN"}
)
_LIKE_FIRST = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "HardSigmoid", "HardSwish", "Softplus",
        "Softsign", "ThresholdedRelu", "Gelu", "Mish", "Swish", "Shrink", "Softmax", "LogSoftmax", "Hardmax",
        "Dropout", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
        "RMSNormalization", "LpNormalization", "LRN", "MeanVarianceNormalization", "CumSum", "CumProd",
    }
)  # fmt: skip
"""Operators whose first output is like their first input."""


def moved_inputs(kind: str, count: int, ctx: Ctx) -> list[int] | None:
    """Which inputs' elements an operator moves; None for the usual: the first."""
    if kind == "Concat":
        return list(range(count))
    if kind == "Where":
        return [1, 2]
    if kind in ("ScatterElements", "ScatterND", "Scatter", "TensorScatter"):
        return [0, 2] if ctx.text("reduction", "none") == "none" and kind != "TensorScatter" else None
    return None


def quick(step: Step, given: Sequence[Cell | None]) -> torch.Tensor | None:
    """The result of the commonest operators without asking torch, which is slow at that."""
    kind = step.node.op_type
    if kind in ELEMENTWISE:
        return _broadcast(step, given)
    first = given[0].value if given and given[0] is not None else None
    if not isinstance(first, torch.Tensor) or any(step.node.output[1:]):
        return None
    if kind in _LIKE_FIRST:
        return torch.empty(first.shape, dtype=first.dtype, device="meta")
    if kind in ("GlobalAveragePool", "GlobalMaxPool") and first.ndim > 2:
        return torch.empty((*first.shape[:2], *[1] * (first.ndim - 2)), dtype=first.dtype, device="meta")
    return None


def _broadcast(step: Step, given: Sequence[Cell | None]) -> torch.Tensor | None:
    """The result of an elementwise operator, without asking torch; None where that is not plain."""
    tensors = [c.value for c in given if c is not None and isinstance(c.value, torch.Tensor)]
    if not tensors or len(tensors) != sum(cell is not None for cell in given):
        return None
    shapes: list[Sequence[int]] = [tensor.shape for tensor in tensors]
    kind = step.node.op_type
    if kind == "Clip":
        shapes = shapes[:1]
    shape = shapes[0]
    for another in shapes[1:]:
        if another != shape:
            shape = broadcast(shape, another)
    if kind in _COMPARISONS:
        dtype = torch.bool
    elif kind == "Cast":
        dtype = TORCH_DTYPES.get(step.ctx.integer("to"), torch.int8)
    else:
        dtype = tensors[1 if kind == "Where" else 0].dtype
    return torch.empty(shape, dtype=dtype, device="meta")

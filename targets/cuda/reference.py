"""``sparsecc::SparseMatMul``: the ONNX node that stands for a generated kernel, and what it computes.

    SparseMatMul(x, values, metadata, scale?, bias?, residual?) -> y

In float64 it is the exact product with the stored weights; in the model's own types it is the operator
that runs, ``torch.ops.sparsecc.sparse_matmul``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx import NodeProto, helper
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op
from sparsecc.targets.cuda.operator import Operands, computed, output_shape, result_type, rounded_to
from sparsecc.targets.cuda.pack import Packed, unpack

DOMAIN, KIND, VERSION = "sparsecc", "SparseMatMul", 1


@op(f"{DOMAIN}::{KIND}", kind="raw")
def sparse_product(
    ctx: Ctx,
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x[*,K] -> y[*,out], or x[N,C,H,W] -> y[N,out,H',W'] with the attribute ``conv``."""
    given = Operands(
        x,
        values,
        metadata,
        scale,
        bias,
        residual,
        out=ctx.integer("out"),
        k=ctx.integer("k"),
        dtype=ctx.text("dtype"),
        activation=ctx.text("activation", "none"),
        conv=ctx.integers("conv") or [],
        kernels=",".join(ctx.texts("kernels") or []),
    )
    if x.is_meta:
        return torch.empty(output_shape(x.shape, given.out, given.conv), dtype=result_type(x), device="meta")
    if ctx.dtype is not None:
        weight = unpack(Packed(values.cpu().numpy(), metadata.cpu().numpy(), given.out, given.k, given.dtype))
        return computed(given, weight, rounded=None, wide=ctx.dtype)
    result: Tensor = torch.ops.sparsecc.sparse_matmul(*(getattr(given, name) for name in Operands.__slots__))
    return result


#: roundings between exact sums and an output, with room for those of an activation
_ROUNDINGS = 16


def rounding_bound(node: NodeProto, given: Sequence[Any]) -> float:
    """By how much a product of int8 may differ from the exact one: roundings of float32 to its terms.

    ``given`` are the node's inputs.  The terms are scale * |W| |x|, with the largest |x| for all, bias and
    residual.
    """
    numbers = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, values, metadata, scale, bias, residual = (*given, None, None, None)[:6]
    size = numbers["out"], numbers["k"]
    weight = unpack(Packed(values.cpu().numpy(), metadata.cpu().numpy(), *size, "int8"))
    most = float(rounded_to(x, torch.int8).double().abs().amax()) if x.numel() else 0.0
    terms = most * weight.double().abs().sum(1).to(scale.device) * scale.double().abs()
    if bias is not None:
        terms = terms + bias.double().abs()
    largest = float(terms.amax()) + (0.0 if residual is None else float(residual.double().abs().amax()))
    return _ROUNDINGS * torch.finfo(torch.float32).eps / 2 * largest

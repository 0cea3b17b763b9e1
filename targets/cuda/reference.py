"""``sparsecc::SparseMatMul``: the ONNX node that stands for a generated kernel, and what it computes.

    SparseMatMul(x, values, metadata, scale?, bias?, residual?) -> y

In float64 it is the exact product with the stored weights; in the model's own types it is the operator
that runs, ``torch.ops.sparsecc.sparse_matmul``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op
from sparsecc.targets.cuda.operator import Operands, computed, output_shape
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
        return torch.empty(output_shape(x.shape, given.out, given.conv), dtype=x.dtype, device="meta")
    if ctx.dtype is not None:
        weight = unpack(Packed(values.cpu().numpy(), metadata.cpu().numpy(), given.out, given.k, given.dtype))
        return computed(given, weight, rounded=None, wide=ctx.dtype)
    result: Tensor = torch.ops.sparsecc.sparse_matmul(*(getattr(given, name) for name in Operands.__slots__))
    return result

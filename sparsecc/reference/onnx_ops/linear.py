"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, broadcast, op


@op("MatMul")
def matmul(ctx: Ctx, a: Tensor, b: Tensor) -> Tensor:
    """a[*B,M,K] b[*B,K,N] -> y[*B,M,N]"""
    if a.is_meta or b.is_meta:
        return torch.empty(_product_shape(a.shape, b.shape), dtype=a.dtype, device="meta")
    return torch.matmul(a, b)


def _product_shape(a: Sequence[int], b: Sequence[int]) -> list[int]:
    left, right = [1, *a] if len(a) == 1 else [*a], [*b, 1] if len(b) == 1 else [*b]
    if not a or not b or left[-1] != right[-2]:
        raise ValueError(f"a product of shapes {list(a)} and {list(b)}")
    rows, columns = [left[-2]] if len(a) > 1 else [], [right[-1]] if len(b) > 1 else []
    return [*broadcast(left[:-2], right[:-2]), *rows, *columns]


@op("Gemm")
def gemm(ctx: Ctx, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """a[M,K] b[K,N] c[M,N] -> y[M,N]; transA and transB say which operand is stored transposed."""
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"Gemm needs matrices, got ranks {a.ndim} and {b.ndim}")
    if ctx.flag("transA"):
        a = a.T
    if ctx.flag("transB"):
        b = b.T
    alpha, beta = ctx.real("alpha", 1.0), ctx.real("beta", 1.0)
    if a.is_meta or b.is_meta:
        y = torch.empty(_product_shape(a.shape, b.shape), dtype=a.dtype, device="meta")
        if c is not None and broadcast(y.shape, c.shape) != [*y.shape]:
            raise ValueError(f"a bias of shape {list(c.shape)} for a product of shape {list(y.shape)}")
        return y
    y = a @ b
    if alpha != 1:
        y = (y * alpha).to(a.dtype)
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else (c * beta).to(c.dtype))


@op("Einsum")
def einsum(ctx: Ctx, *operands: Tensor) -> Tensor:
    """Any contraction, by equation."""
    return torch.einsum(ctx.text("equation").replace(" ", ""), *operands)


@op("Det")
def det(ctx: Ctx, x: Tensor) -> Tensor:
    """x[*B,M,M] -> y[*B]"""
    y: Tensor = torch.linalg.det(x)
    return y

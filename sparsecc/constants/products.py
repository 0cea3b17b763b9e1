"""Contractions as sums of products with known weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparsecc.axes.linear import parse_einsum
from sparsecc.graph import Call

if TYPE_CHECKING:
    from sparsecc.constants.flow import Constants


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A sum of products with known weights: ``y[g, o] += sum(weights[g, o, c, t] * x[g, c])``.

    ``x`` is the other operand, ``dim`` its contracted axis, ``out`` the axis of the output that holds
    (g, o), ``bias`` the operand that is added.  ``even`` says that a constant along ``dim`` adds the
    same everywhere (no zero padding).  The product is scaled by ``alpha``, the bias by ``beta``.
    """

    x: int
    dim: int
    weights: torch.Tensor
    out: int | None
    bias: int | None = None
    even: bool = True
    alpha: float = 1.0
    beta: float = 1.0

    def touches(self, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Whether the kept outputs read each position at all, shape [g * c]."""
        groups, outputs, inputs, _ = self.weights.shape
        if kept is None or bool(kept.all()):
            return any_nonzero(self.weights.transpose(1, 2)).reshape(-1)
        rows = kept.reshape(groups, outputs)
        if groups == 1:
            return any_nonzero(self.weights[:, rows[0]].transpose(1, 2)).reshape(-1)
        nonzero = (self.weights != 0).any(-1) & rows[:, :, None]
        return nonzero.any(1).reshape(groups * inputs)

    def sums(self, constants: torch.Tensor) -> torch.Tensor:
        """What ``constants`` (float64, one per position, 0 where there is none) add to every output."""
        groups, outputs, inputs, _ = self.weights.shape
        grid = constants.reshape(groups, inputs)
        used = (grid != 0).any(0)
        kernel = self.weights[:, :, used].double().sum(-1)
        return self.alpha * torch.einsum("goc,gc->go", kernel, grid[:, used]).reshape(groups * outputs)


def well_formed(product: Product, call: Call) -> bool:
    """Whether the sizes fit; those of a damaged model need not."""
    x, (groups, _, inputs, _) = call.inputs[product.x], product.weights.shape
    return (
        x is not None
        and -len(x.shape) <= product.dim < len(x.shape)
        and x.shape[product.dim] == groups * inputs
    )


def any_nonzero(weights: torch.Tensor) -> torch.Tensor:
    """Over the last two axes."""
    flat = weights.flatten(2)
    if not flat.shape[-1]:
        return torch.zeros(flat.shape[:2], dtype=torch.bool)
    return (flat != 0).any(-1)


def _linear_product(c: Constants, call: Call) -> Product | None:
    w = c.full(call.inputs[1])
    if w is None:
        return None
    bias = 2 if len(call.inputs) > 2 and call.inputs[2] is not None else None
    if w.dim() == 1:
        return Product(0, -1, w.reshape(1, 1, -1, 1), None, bias)
    return Product(0, -1, w.reshape(1, *w.shape, 1), -1, bias)


def _conv_product(c: Constants, call: Call) -> Product | None:
    w, x = c.full(call.inputs[1]), call.inputs[0]
    if w is None or x is None or c.semantics is None:
        return None
    at, groups = len(x.shape) - w.dim() + 1, call.attrs["groups"]
    grid = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    return Product(0, at, grid, at, _bias(call), even=not c.semantics.zero_padded(call))


def _conv_transpose_product(c: Constants, call: Call) -> Product | None:
    """Outputs near borders and between strides see fewer positions of the kernel: never even."""
    w, x = c.full(call.inputs[1]), call.inputs[0]
    if w is None or x is None:
        return None
    at, groups = len(x.shape) - w.dim() + 1, call.attrs["groups"]
    grid = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).transpose(1, 2)
    return Product(0, at, grid, at, _bias(call), even=False)


def _bias(call: Call) -> int | None:
    return 2 if len(call.inputs) > 2 and call.inputs[2] is not None else None


def _matmul_product(c: Constants, call: Call) -> Product | None:
    left, right = c.full(call.inputs[0]), c.full(call.inputs[1])
    if right is not None and right.dim() == 2:
        return Product(0, -1, right.t().reshape(1, right.shape[1], right.shape[0], 1), -1)
    if left is not None and left.dim() == 2 and call.inputs[1] is not None and len(call.inputs[1].shape) > 1:
        return Product(1, -2, left.reshape(1, *left.shape, 1), -2)
    return None


def _addmm_product(c: Constants, call: Call) -> Product | None:
    right, factors = c.full(call.inputs[2]), c.semantics.factors(call) if c.semantics else None
    if right is None or right.dim() != 2 or factors is None:
        return None
    weights = right.t().reshape(1, right.shape[1], right.shape[0], 1)
    return Product(1, -1, weights, -1, 0, True, *factors)


def _gemm_product(c: Constants, call: Call) -> Product | None:
    right, factors = c.full(call.inputs[1]), c.semantics.factors(call) if c.semantics else None
    if right is None or factors is None:
        return None
    weights = right if call.attrs["trans_b"] else right.t()
    dim = 0 if call.attrs["trans_a"] else 1
    return Product(0, dim, weights.reshape(1, *weights.shape, 1), 1, _bias(call), True, *factors)


def _einsum_product(c: Constants, call: Call) -> Product | None:
    """``...c,oc->...o``, in any order: a known matrix, one label summed, and nothing else."""
    if len(call.inputs) != 2 or any(v is None for v in call.inputs):
        return None
    ranks = [len(v.shape) for v in call.inputs if v is not None]
    inputs, output = parse_einsum(call.attrs["equation"], ranks)
    for other, index in ((0, 1), (1, 0)):
        w, theirs, ours = c.full(call.inputs[index]), inputs[other], inputs[index]
        summed = set(ours) & set(theirs) - set(output)
        carried = set(ours) & set(output) - set(theirs)
        if w is None or w.dim() != 2 or not len(summed) == len(carried) == 1:
            continue
        (s,), (o,) = summed, carried
        if theirs.count(s) == 1 and set(output) == set(theirs) - {s} | {o}:
            weights = w if ours == [o, s] else w.t()
            return Product(other, theirs.index(s), weights.reshape(1, *weights.shape, 1), output.index(o))
    return None


PRODUCTS: dict[str, Callable[[Constants, Call], Product | None]] = {
    "linear": _linear_product,
    "conv": _conv_product,
    "conv_transpose": _conv_transpose_product,
    "matmul": _matmul_product,
    "addmm": _addmm_product,
    "gemm": _gemm_product,
    "einsum": _einsum_product,
}

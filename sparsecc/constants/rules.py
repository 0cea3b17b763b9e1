"""What operators make of known entries, one rule an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from sparsecc.constants.known import MAX_ENTRIES, Known, either, everywhere, ranked
from sparsecc.constants.movement import MOVEMENTS
from sparsecc.constants.products import PRODUCTS, Product, any_nonzero
from sparsecc.graph import Call

if TYPE_CHECKING:
    from sparsecc.constants.flow import Constants

Result = Known | list[Known | None] | None

# -- elementwise -------------------------------------------------------------------------------------

_WRITTEN = frozenset({"zeros_like", "ones_like", "full_like", "fill", "zero"})


def _elementwise(c: Constants, call: Call) -> Known | list[Known | None] | None:
    assert c.semantics is not None
    function = c.semantics.function(call)
    if function in _WRITTEN:
        return _created(c, call)
    operands = [c.of(v) for v in call.inputs]
    if function == "mul" and len(operands) == 2:
        return _multiplied(c, call, *operands)
    return _computed(c, call, operands)


def _computed(c: Constants, call: Call, operands: Sequence[Known | None]) -> list[Known | None]:
    """Known where every operand is; the operator itself says what."""
    assert c.semantics is not None
    present = [k for k, v in zip(operands, call.inputs, strict=True) if v is not None]
    if not present or any(k is None or not bool(k.known.any()) for k in present):
        return []
    if math.prod(torch.broadcast_shapes(*(k.value.shape for k in present if k is not None))) > MAX_ENTRIES:
        return []
    results = c.semantics.evaluate(call, [None if k is None else k.value for k in operands])
    if results is None:
        return []
    known = torch.ones((), dtype=torch.bool)
    for k in present:
        assert k is not None
        known = known & k.known
    return [Known(ranked(known, r.dim()), r) for r in results]


def _multiplied(c: Constants, call: Call, left: Known | None, right: Known | None) -> Known | None:
    """A product is also known where one factor is zero."""
    rank = len(call.outputs[0].shape)
    both = _computed(c, call, [left, right])
    parts = [k for k in both if k is not None]
    for factor in (left, right):
        if factor is not None:
            zero = factor.only(0.0).known
            if bool(zero.any()):
                parts.append(Known(ranked(zero, rank), torch.zeros([1] * rank, dtype=torch.float64)))
    return either(parts)


def _created(c: Constants, call: Call) -> Known | None:
    assert c.semantics is not None
    number = c.semantics.fill(call)
    return None if number is None else everywhere(call.outputs[0], number)


def _prelu(c: Constants, call: Call) -> list[Known | None]:
    x, slope = c.of(call.inputs[0]), c.of(call.inputs[1])
    if x is None or slope is None:
        return []
    value = call.inputs[0]
    assert value is not None
    if slope.value.numel() > 1 and len(value.shape) > 1:
        x = x.at(1, value.shape[1])
    found = _computed(c, call, [x, Known(torch.ones(1, dtype=torch.bool), slope.value)])
    return found if bool(slope.known.all()) else []


# -- products ----------------------------------------------------------------------------------------


def _product(c: Constants, call: Call) -> Known | None:
    """Known where every position that is read is known (and, beside zero padding, zero)."""
    product = c.product(call)
    if product is None:
        return _zero_product(c, call) if call.op == "matmul" else None
    known, numbers = c.vector(call.inputs[product.x], product.dim)
    if not product.even:
        known = known & (numbers == 0)
    groups, outputs, inputs, _ = product.weights.shape
    weights = product.weights
    if bool(known.any()):
        unknown = ~known.reshape(groups, 1, inputs)
        rows = ~((weights != 0).any(-1) & unknown).any(-1).reshape(-1)
    else:
        rows = ~any_nonzero(weights).reshape(-1)
    if not bool(rows.any()):
        return None
    value = product.sums(torch.where(known, numbers, torch.zeros((), dtype=torch.float64)))
    rank = len(call.outputs[0].shape)
    shape = [1] * rank
    if product.out is not None:
        shape[product.out] = groups * outputs
    out = Known(rows.reshape(shape), value.reshape(shape))
    return out if product.bias is None else _biased(c, call, product, out)


def _biased(c: Constants, call: Call, product: Product, out: Known) -> Known | None:
    assert product.bias is not None
    operand = call.inputs[product.bias]
    bias = c.of(operand)
    if bias is None or operand is None:
        return None
    known, value = bias.pair()
    rank = out.value.dim()
    if len(operand.shape) == 1 and product.out is not None:
        shape = [1] * rank
        shape[product.out] = -1
        known, value = known.expand(operand.shape).reshape(shape), value.expand(operand.shape).reshape(shape)
    else:
        known, value = ranked(known, rank), ranked(value, rank)
    return Known(out.known & known, out.value + product.beta * value.double())


def _zero_product(c: Constants, call: Call) -> Known | None:
    """Zero columns of the right factor and zero rows of the left one give zeros."""
    rank = len(call.outputs[0].shape)
    parts = []
    if any(v is None or len(v.shape) < 2 for v in call.inputs):
        return None
    for index, dim in ((0, -1), (1, -2)):
        value, found = call.inputs[index], c.of(call.inputs[index])
        if found is None or value is None:
            continue
        zero = found.alike(dim % len(value.shape)).only(0.0).known
        parts.append(Known(ranked(zero, rank), torch.zeros([1] * rank, dtype=torch.float64)))
    return either(parts)


def _attention(c: Constants, call: Call) -> Known | None:
    """Weights that add up to one leave a constant as it is; a masked row may see nothing but zeros."""
    value, out = call.inputs[2], call.outputs[0]
    found = c.of(value)
    if found is None or value is None or c.semantics is None:
        return None
    found = found.alike(len(value.shape) - 2)
    if call.inputs[3] is not None or not c.semantics.deterministic(call):
        found = found.only(0.0)
    heads = len(value.shape) - 3
    if heads >= 0 and out.shape[heads] != value.shape[heads] and found.pair()[0].shape[heads] > 1:
        times = out.shape[heads] // value.shape[heads]
        found = found.map(lambda t: t.repeat_interleave(times, heads))
    return found


# -- normalisations ----------------------------------------------------------------------------------


def _batch_norm(c: Constants, call: Call) -> Known | None:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    assert value is not None
    silent = _silenced(c, call, 1, (1,))
    if x is None:
        return silent
    operands = [x.at(1, value.shape[1]), *(c.of(v) for v in call.inputs[1:])]
    computed = _computed(c, call, operands) if all(_vector(k) for k in operands[1:]) else []
    return either([silent, *computed[:1]])


def _vector(k: Known | None) -> bool:
    return k is None or bool(k.known.all())


def _silenced(c: Constants, call: Call, weight: int, dims: Sequence[int]) -> Known | None:
    """Where the scale is zero the shift is all that comes out; ``dims`` are those of the scale."""
    rank = len(call.outputs[0].shape)
    if len(call.inputs) <= weight or call.inputs[weight] is None:
        return None
    scale = c.full(call.inputs[weight])
    if scale is None or not bool((scale == 0).any()):
        return None
    shift: torch.Tensor | None = torch.zeros(scale.shape, dtype=torch.float64)
    if len(call.inputs) > weight + 1 and call.inputs[weight + 1] is not None:
        shift = c.full(call.inputs[weight + 1])
    if shift is None or shift.shape != scale.shape or scale.dim() != len(dims):
        return None
    shape = [1] * rank
    for dim, n in zip(dims, scale.shape, strict=True):
        shape[dim] = n
    return Known((scale == 0).reshape(shape), shift.double().reshape(shape))


def _layer_norm(c: Constants, call: Call) -> Known | None:
    rank = len(call.outputs[0].shape)
    scale = call.inputs[1] if len(call.inputs) > 1 else None
    if scale is None:
        return None
    return _silenced(c, call, 1, range(rank - len(scale.shape), rank))


def _channel_norm(c: Constants, call: Call) -> Known | None:
    if call.attrs.get("affine") == "group":
        return None
    return _silenced(c, call, 1, (1,))


# -- reductions --------------------------------------------------------------------------------------


def _reduce(c: Constants, call: Call) -> Known | None:
    """Means and extrema of alike numbers are that number, sums are so many times it."""
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return None
    dims = sorted({d % len(value.shape) for d in call.attrs["dims"]})
    for dim in dims:
        x = x.alike(dim)
    kind = call.attrs["kind"]
    if kind in ("sum", "norm"):
        count = math.prod(value.shape[d] for d in dims)
        varies = any(value.is_dynamic(d) for d in dims)
        x = x.only(0.0) if varies or kind == "norm" else Known(x.known, x.value.double() * count)
    elif kind not in ("mean", "amax", "amin"):
        return None
    if call.attrs["keepdim"]:
        return x
    keep = [d for d in range(len(value.shape)) if d not in dims]
    return x.map(lambda t: t.reshape([t.shape[d] for d in keep]))


#: operators that move data: their rules copy nothing, so constants go through them as well
MOVES = frozenset(
    {"layout", "reshape", "expand", "split", "slice", "concat", "unbind", "create", "positions"}
)

RULES: dict[str, Callable[[Constants, Call], Result]] = {
    "elementwise": _elementwise,
    "create": _created,
    "prelu": _prelu,
    **dict.fromkeys(PRODUCTS, _product),
    "attention": _attention,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _channel_norm,
    "instance_norm": _channel_norm,
    "reduce": _reduce,
    **MOVEMENTS,
}

"""Which positions of which axes hold the same number for every input.

A forward dataflow over a view.  It starts at the weights: a filter of zeros puts out its bias, a
BatchNorm with gamma 0 its beta, and what operators make of known numbers is computed by running
them in float64.  What is not certain is not known.  Inputs with infinite or undefined entries are
not considered (0 * inf is NaN), as everywhere in pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.terms import atoms
from sparsecc.graph import Call, Value

#: tensors with more entries than this are not computed
MAX_ENTRIES = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Known entries of a tensor and their values.

    Both tensors have the rank of the value, and broadcast to its shape: along an axis of size 1 all
    positions are alike.  Where ``known`` is False ``value`` holds anything.
    """

    known: torch.Tensor
    value: torch.Tensor

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors at their common shape."""
        known, value = torch.broadcast_tensors(self.known, self.value)
        return known, value

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Known:
        """The same movement of data on both."""
        known, value = self.pair()
        return Known(function(known), function(value))

    def alike(self, dim: int) -> Known:
        """Known along ``dim`` only where all positions are known and equal; the axis gets size 1."""
        known, value = self.pair()
        first = value.narrow(dim, 0, 1)
        return Known(known.all(dim, keepdim=True) & (value == first).all(dim, keepdim=True), first)

    def at(self, dim: int, size: int) -> Known:
        """With ``size`` positions spelled out along ``dim``."""
        return self.map(
            lambda t: t.expand(*t.shape[:dim], size, *t.shape[dim + 1 :]) if t.shape[dim] != size else t
        )

    def only(self, value: float) -> Known:
        """Known only where the number is ``value``."""
        return Known(self.known & (self.value == value), self.value)


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
            return _any_nonzero(self.weights.transpose(1, 2)).reshape(-1)
        rows = kept.reshape(groups, outputs)
        if groups == 1:
            return _any_nonzero(self.weights[:, rows[0]].transpose(1, 2)).reshape(-1)
        nonzero = (self.weights != 0).any(-1) & rows[:, :, None]
        return nonzero.any(1).reshape(groups * inputs)

    def sums(self, constants: torch.Tensor) -> torch.Tensor:
        """What ``constants`` (float64, one per position, 0 where there is none) add to every output."""
        groups, outputs, inputs, _ = self.weights.shape
        grid = constants.reshape(groups, inputs)
        used = (grid != 0).any(0)
        kernel = self.weights[:, :, used].double().sum(-1)
        return self.alpha * torch.einsum("goc,gc->go", kernel, grid[:, used]).reshape(groups * outputs)


def _attempted(rule: Callable[[Constants, Call], Any], c: Constants, call: Call) -> Any:
    """What a rule finds; nothing where the operands of a damaged model have other ranks and sizes."""
    try:
        return rule(c, call)
    except (LookupError, ValueError, ArithmeticError, RuntimeError):
        return None


def _multiplies(product: Product, call: Call) -> bool:
    """Whether the sizes fit; those of a damaged model need not."""
    x, (groups, _, inputs, _) = call.inputs[product.x], product.weights.shape
    return (
        x is not None
        and -len(x.shape) <= product.dim < len(x.shape)
        and x.shape[product.dim] == groups * inputs
    )


def _any_nonzero(weights: torch.Tensor) -> torch.Tensor:
    """Over the last two axes."""
    flat = weights.flatten(2)
    if not flat.shape[-1]:
        return torch.zeros(flat.shape[:2], dtype=torch.bool)
    return (flat != 0).any(-1)


class Constants:
    """Known entries of every value of a view."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.view = analysis.view
        self.semantics = analysis.view.semantics
        self._found: dict[Value, Known | None] = {}
        self._products: dict[Call, Product | None] = {}
        self._static: set[Value] = set()
        if self.semantics is not None:
            self._run()

    def of(self, value: Value | None) -> Known | None:
        """What is known of a value; None where nothing is."""
        if value is None:
            return None
        if value not in self._found:
            self._found[value] = self._constant(value)
        return self._found[value]

    def vector(self, value: Value | None, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Known positions along ``dim``, alike along all other axes, and their values in float64."""
        assert value is not None
        dim %= len(value.shape)
        size = value.shape[dim]
        found = self.of(value)
        if found is None:
            return torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64)
        for other in range(len(value.shape)):
            if other != dim:
                found = found.alike(other)
        known, numbers = found.pair()
        known, numbers = known.reshape(-1).expand(size), numbers.reshape(-1).double().expand(size)
        return known, torch.where(known, numbers, torch.zeros((), dtype=torch.float64))

    def full(self, value: Value | None) -> torch.Tensor | None:
        """All numbers of a value that does not depend on the inputs; weights in their own dtype."""
        found = self.of(value)
        if value is None or found is None or any(value.dynamic) or not bool(found.known.all()):
            return None
        return found.value.expand(value.shape)

    def product(self, call: Call) -> Product | None:
        """The call as a product with known weights, if it is one."""
        if call not in self._products:
            rule = _PRODUCTS.get(call.op)
            found = None if rule is None else _attempted(rule, self, call)
            self._products[call] = found if found is None or _multiplies(found, call) else None
        return self._products[call]

    # -- the run ------------------------------------------------------------------------------------

    def _constant(self, value: Value) -> Known | None:
        if self.semantics is None or value.kind not in ("weight", "const"):
            return None
        numbers = self.semantics.constant(value)
        if numbers is None or tuple(numbers.shape) != tuple(value.shape):
            return None
        self._static.add(value)
        return Known(torch.ones([1] * numbers.dim(), dtype=torch.bool), numbers)

    def _run(self) -> None:
        assert self.semantics is not None
        overwritten = self.semantics.overwritten()
        for call in self.view.calls:
            found = self._outputs(call)
            for place, value in enumerate(call.outputs):
                known = found[place] if place < len(found) and value not in overwritten else None
                self._found[value] = known if known is None or _fits(known, value) else None

    def _outputs(self, call: Call) -> Sequence[Known | None]:
        for value in call.inputs:
            self.of(value)
        if all(v in self._static for v in call.inputs if v is not None):
            self._static.update(call.outputs)
            folded = None if call.op in _MOVES else self._folded(call)
            if folded is not None:
                return folded
        rule = _RULES.get(call.op)
        if rule is None:
            return ()
        found = _attempted(rule, self, call)
        return found if isinstance(found, list) else [found]

    def _folded(self, call: Call) -> list[Known] | None:
        """A call on constants alone, run as it is."""
        assert self.semantics is not None
        if not call.inputs or sum(math.prod(v.shape) for v in call.inputs if v is not None) > MAX_ENTRIES:
            return None
        operands = [self.full(v) for v in call.inputs]
        if any(v is not None and t is None for v, t in zip(call.inputs, operands, strict=True)):
            return None
        results = self.semantics.evaluate(call, operands)
        if results is None or [tuple(r.shape) for r in results] != [tuple(v.shape) for v in call.outputs]:
            return None
        return [Known(torch.ones([1] * r.dim(), dtype=torch.bool), r) for r in results]


def _fits(known: Known, value: Value) -> bool:
    """A mistake in a rule must not become a wrong number."""
    shape = torch.broadcast_shapes(known.known.shape, known.value.shape)
    return len(shape) == len(value.shape) and all(
        n in (1, m) for n, m in zip(shape, value.shape, strict=True)
    )


# -- elementwise -------------------------------------------------------------------------------------

Rule = Callable[[Constants, Call], "Known | list[Known | None] | None"]
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
    return [Known(_ranked(known, r.dim()), r) for r in results]


def _ranked(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.reshape([1] * (rank - tensor.dim()) + list(tensor.shape))


def _multiplied(c: Constants, call: Call, left: Known | None, right: Known | None) -> Known | None:
    """A product is also known where one factor is zero."""
    rank = len(call.outputs[0].shape)
    both = _computed(c, call, [left, right])
    parts = [k for k in both if k is not None]
    for factor in (left, right):
        if factor is not None:
            zero = factor.only(0.0).known
            if bool(zero.any()):
                parts.append(Known(_ranked(zero, rank), torch.zeros([1] * rank, dtype=torch.float64)))
    return _either(parts)


def _either(parts: Sequence[Known | None]) -> Known | None:
    """Known where any part is; earlier parts go first."""
    out: Known | None = None
    for part in parts:
        if part is None:
            continue
        if out is None:
            out = part
        else:
            value = torch.where(out.known, out.value.double(), part.value.double())
            out = Known(out.known | part.known, value)
    return out


def _created(c: Constants, call: Call) -> Known | None:
    assert c.semantics is not None
    number = c.semantics.fill(call)
    return None if number is None else _everywhere(call.outputs[0], number)


def _everywhere(value: Value, number: float) -> Known | None:
    dtype = getattr(torch, value.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return None
    shape = [1] * len(value.shape)
    wide = torch.float64 if dtype.is_floating_point else dtype
    return Known(torch.ones(shape, dtype=torch.bool), torch.full(shape, number, dtype=wide))


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


_PRODUCTS: dict[str, Callable[[Constants, Call], Product | None]] = {
    "linear": _linear_product,
    "conv": _conv_product,
    "conv_transpose": _conv_transpose_product,
    "matmul": _matmul_product,
    "addmm": _addmm_product,
    "gemm": _gemm_product,
}


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
        rows = ~_any_nonzero(weights).reshape(-1)
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
        known, value = _ranked(known, rank), _ranked(value, rank)
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
        parts.append(Known(_ranked(zero, rank), torch.zeros([1] * rank, dtype=torch.float64)))
    return _either(parts)


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
    return _either([silent, *computed[:1]])


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


# -- movements ---------------------------------------------------------------------------------------


def _layout(c: Constants, call: Call) -> Known | None:
    x = c.of(call.inputs[0])
    if x is None:
        return None
    source = call.attrs["source"]
    used = [d for d in source if d is not None]

    def move(t: torch.Tensor) -> torch.Tensor:
        rest = [d for d in range(t.dim()) if d not in used]
        moved = t.permute(*used, *rest).reshape([t.shape[d] for d in used])
        for place, d in enumerate(source):
            if d is None:
                moved = moved.unsqueeze(place)
        return moved

    return x.map(move)


def _reshape(c: Constants, call: Call) -> Known | None:
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if x is None or value is None:
        return None
    shape = list(x.pair()[0].shape)
    target = [1] * len(out.shape)
    for ours, theirs in runs(value.shape, out.shape):
        if all(shape[d] == 1 for d in ours):
            continue
        carried = [d for d in ours if value.shape[d] != 1], [d for d in theirs if out.shape[d] != 1]
        if len(carried[0]) == len(carried[1]) == 1:
            target[carried[1][0]] = shape[carried[0][0]]
            continue
        if any(value.is_dynamic(d) for d in ours) or any(out.is_dynamic(d) for d in theirs):
            return None
        for d in ours:
            shape[d] = value.shape[d]
        for d in theirs:
            target[d] = out.shape[d]
    if math.prod(shape) > MAX_ENTRIES:
        return None
    return x.map(lambda t: t.expand(shape).reshape(target))


def runs(shape: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes with equal products, as (axes of shape, axes of target)."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(target):
        ours: list[int] = []
        theirs: list[int] = []
        have = want = 1
        while not (ours or theirs) or have != want:
            if i < len(shape) and (have <= want or j >= len(target)):
                have *= shape[i]
                ours.append(i)
                i += 1
            elif j < len(target):
                want *= target[j]
                theirs.append(j)
                j += 1
            else:
                return [(list(range(len(shape))), list(range(len(target))))]
        out.append((ours, theirs))
    return out


def _expand(c: Constants, call: Call) -> Known | None:
    x = c.of(call.inputs[0])
    return None if x is None else x.map(lambda t: _ranked(t, len(call.outputs[0].shape)))


def _tile(c: Constants, call: Call) -> Known | None:
    x, out = c.of(call.inputs[0]), call.outputs[0]
    if x is None:
        return None
    shape = [1] * (len(out.shape) - x.known.dim()) + list(x.pair()[0].shape)
    if any(n > 1 and out.is_dynamic(d) for d, n in enumerate(shape)):
        return None
    times = [m // n if n > 1 else 1 for n, m in zip(shape, out.shape, strict=True)]
    return x.map(lambda t: t.repeat(times))


def _repeat_interleave(c: Constants, call: Call) -> Known | None:
    x, out = c.of(call.inputs[0]), call.outputs[0]
    if x is None:
        return None
    dim = call.attrs["dim"] % len(out.shape)
    size = x.pair()[0].shape[dim]
    return x if size == 1 else x.map(lambda t: t.repeat_interleave(out.shape[dim] // size, dim))


def _concat(c: Constants, call: Call) -> Known | None:
    out = call.outputs[0]
    dim = call.attrs["dim"] % len(out.shape)
    operands = [v for v in call.inputs if v is not None and len(v.shape) == len(out.shape)]
    return _joined([(c.of(v), v.shape[dim]) for v in operands], dim, out)


def _joined(parts: Sequence[tuple[Known | None, int]], dim: int, out: Value) -> Known | None:
    """Parts of known sizes one after another along ``dim``."""
    if all(k is None for k, _ in parts):
        return None
    rank = len(out.shape)
    nothing = Known(torch.zeros([1] * rank, dtype=torch.bool), torch.zeros([1] * rank, dtype=torch.float64))
    filled = [(nothing if k is None else k, n) for k, n in parts]
    if out.is_dynamic(dim):
        return _alike_parts([k.alike(dim) for k, _ in filled])
    known, value = zip(*(k.at(dim, n).pair() for k, n in filled), strict=True)
    return Known(_cat(known, dim), _cat([v.double() if v.is_floating_point() else v for v in value], dim))


def _alike_parts(parts: Sequence[Known]) -> Known:
    out = parts[0]
    for part in parts[1:]:
        out = Known(out.known & part.known & (out.value == part.value), out.value)
    return out


def _cat(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    return torch.cat([t.expand(*shape[:dim], t.shape[dim], *shape[dim + 1 :]) for t in tensors], dim)


def _stack(c: Constants, call: Call) -> Known | None:
    out = call.outputs[0]
    dim = call.attrs["dim"] % len(out.shape)
    found = [c.of(v) for v in call.inputs]
    return _joined([(k and k.map(lambda t: t.unsqueeze(dim)), 1) for k in found], dim, out)


def _split(c: Constants, call: Call) -> list[Known | None]:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return []
    dim = call.attrs["dim"] % len(value.shape)
    start = 0
    out: list[Known | None] = []
    for part in call.outputs:
        out.append(_cut(x, dim, start, part.shape[dim], 1))
        start += part.shape[dim]
    return out


def _cut(x: Known, dim: int, start: int, count: int, step: int) -> Known:
    if x.pair()[0].shape[dim] == 1:
        return x
    stop = start + (count - 1) * step + 1
    return x.map(lambda t: t[(slice(None),) * dim + (slice(start, stop, step),)])


def _unbind(c: Constants, call: Call) -> list[Known | None]:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return []
    dim = call.attrs["dim"] % len(value.shape)
    return [_cut(x, dim, i, 1, 1).map(lambda t: t.squeeze(dim)) for i in range(len(call.outputs))]


def _select(c: Constants, call: Call) -> Known | None:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None:
        return None
    dim = call.attrs["dim"] % len(value.shape)
    return x.alike(dim).map(lambda t: t.squeeze(dim))


def _slice(c: Constants, call: Call) -> Known | None:
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if x is None or value is None:
        return None
    for dim, (start, _, step) in call.attrs["slices"].items():
        if value.is_dynamic(dim) or out.is_dynamic(dim) or step < 1:
            x = x.alike(dim)
        else:
            x = _cut(x, dim, start, out.shape[dim], step)
    return x


def _index(c: Constants, call: Call) -> Known | None:
    """A lookup in a table whose entries are alike."""
    x, value, indices = c.of(call.inputs[0]), call.inputs[0], call.inputs[1]
    if x is None or value is None or indices is None:
        return None
    dim = call.attrs["dim"] % len(value.shape)
    ones = [1] * len(indices.shape)
    return x.alike(dim).map(lambda t: t.reshape(*t.shape[:dim], *ones, *t.shape[dim + 1 :]))


def _pad(c: Constants, call: Call) -> Known | None:
    """Channels may be padded with constants; along other axes only what equals the padding stays known."""
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if value is None or c.semantics is None:
        return None
    constant = call.attrs["mode"] == "constant"
    number = c.semantics.fill(call) if constant else None
    for dim, (before, after) in enumerate(call.attrs["pads"]):
        if not before and not after:
            continue
        if not constant:
            x = None if x is None else x.alike(dim)
        elif number is None or before < 0 or after < 0:
            return None
        elif value.is_dynamic(dim) or not _matters(c, out, dim):
            x = None if x is None else x.alike(dim).only(number)
        else:
            side = _everywhere(out, number)
            x = _joined([(side, before), (x, value.shape[dim]), (side, after)], dim, out)
    return x


def _matters(c: Constants, value: Value, dim: int) -> bool:
    """Whether positions of an axis can be removed at all."""
    return any(a.frozen is None for a in atoms(c.analysis.axes(value)[dim]))


def _mixed(c: Constants, call: Call) -> Known | None:
    x, value = c.of(call.inputs[0]), call.inputs[0]
    if x is None or value is None or c.semantics is None:
        return None
    kept = {d % len(value.shape) for d in call.attrs["kept"]}
    for dim in range(len(value.shape)):
        if dim not in kept:
            x = x.alike(dim)
    preserved = c.semantics.preserves(call)
    if preserved == "none":
        return None
    return x.only(0.0) if preserved == "zero" else x


def _channel_shuffle(c: Constants, call: Call) -> Known | None:
    x, groups = c.of(call.inputs[0]), call.attrs["groups"]
    if x is None or x.pair()[0].shape[1] == 1:
        return x
    return x.map(lambda t: t.unflatten(1, (groups, t.shape[1] // groups)).transpose(1, 2).flatten(1, 2))


def _glu(c: Constants, call: Call) -> Known | None:
    """Zero where the first half is."""
    x, value, out = c.of(call.inputs[0]), call.inputs[0], call.outputs[0]
    if x is None or value is None:
        return None
    dim = call.attrs["dim"] % len(value.shape)
    return _cut(x, dim, 0, out.shape[dim], 1).only(0.0)


#: operators that move data: their rules copy nothing, so constants go through them as well
_MOVES = frozenset(
    {"layout", "reshape", "expand", "split", "slice", "concat", "unbind", "create", "positions"}
)

_RULES: dict[str, Rule] = {
    "elementwise": _elementwise,
    "create": _created,
    "prelu": _prelu,
    **dict.fromkeys(_PRODUCTS, _product),
    "attention": _attention,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _channel_norm,
    "instance_norm": _channel_norm,
    "reduce": _reduce,
    "layout": _layout,
    "reshape": _reshape,
    "expand": _expand,
    "tile": _tile,
    "repeat_interleave": _repeat_interleave,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    "index": _index,
    "pad": _pad,
    "mixed": _mixed,
    "resize": _mixed,
    "channel_shuffle": _channel_shuffle,
    "glu": _glu,
}

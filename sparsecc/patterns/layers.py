"""Weights that a product sums over, and the axis that the sums run along.

The axis is what the operators' rules state (``Facts.matched``), followed back through transposes and
casts to the stored weight; it is not guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsecc.axes.analysis import Analysis
from sparsecc.graph import Call, Value, View

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})

INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32"})

#: operators that turn integers into the real numbers that they stand for: operand 0, zero points operand 2
_DECODERS = frozenset(
    {
        "dequantizelinear",
        "quantized_decomposed.dequantize_per_tensor",
        "quantized_decomposed.dequantize_per_channel",
        "quantized_decomposed.dequantize_per_channel_group",
    }
)

#: operators that give back what they are given, zeros as zeros
_COPIES = frozenset({"cast", "identity", "to", "_to_copy", "clone", "contiguous", "alias", "detach"})

#: operators with sums of products whose weights have no pattern here, and why
DENSE: dict[str, str] = {
    "conv": "a depthwise convolution sums over no channels",
    "fused_conv": "a depthwise convolution sums over no channels",
    "conv_transpose": "no sparse kernels exist for transposed convolutions",
    "recurrent_torch": "recurrent layers read their matrices whole",
    "recurrent_cell": "recurrent layers read their matrices whole",
    "recurrent_onnx": "recurrent layers read their matrices whole",
    "self_attention": "the fused attention operator reads its matrix whole",
    "einsum": "this einsum is no product of a matrix",
    "bilinear": "no sparse kernels exist for bilinear forms",
    "qconv": "it is quantised",
    "qmatmul": "it is quantised",
    "dynamic_quantize_matmul": "it is quantised",
    "matmul_nbits": "it is quantised",
}

#: operators either of whose operands may be the weight; of the others it is the second of a matched pair
_EITHER = frozenset({"matmul", "fused_matmul", "einsum", "addmm", "gemm"})


#: convolutions: their sums also run over the kernel, whose axes follow the weight's first two
_CONVOLUTIONS = frozenset({"conv", "fused_conv"})


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight and the axis that sums run along; ``why`` says why no pattern may be put into it, or ''.

    ``kernel``: further axes that the sums run along (None: its readers do not agree on them).  ``groups``:
    into how many parts its rows fall that read different inputs.  ``coded``: it is stored as integers that
    stand for real numbers, 0 for 0; elements may become 0, but not any other number.
    """

    weight: str
    axis: int
    why: str = ""
    kernel: tuple[int, ...] | None = ()
    groups: int = 1
    coded: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """A weight as a call sees it: ``dims[d]`` is the weight's axis behind axis ``d``, None for new ones."""

    value: Value
    dims: tuple[int | None, ...]


def layers(analysis: Analysis) -> list[Layer]:
    """Every weight of two or more axes that some sum of products reads, in graph order."""
    view = analysis.view
    readers = readers_of(view)
    place = {call: i for i, call in enumerate(view.calls)}
    found: list[tuple[int, Layer]] = []
    for name, value in view.weights.items():
        if len(value.shape) < 2:
            continue
        every = list(uses(view, readers, value, decoding=value.dtype in INTEGERS))
        layer = _layer(analysis, name, value, every)
        if layer is not None:
            found.append((min(place.get(c, len(place)) for c, _, _ in every), layer))
    return [layer for _, layer in sorted(found, key=lambda pair: pair[0])]


def computed(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """Products whose matrix is computed from parameters: (the operator, why nothing is done to it)."""
    view, solver = analysis.view, analysis.solver
    producer = {v: call for call in view.calls for v in call.outputs}
    for call in view.calls:
        for _, (operand, _) in _matched(analysis, call):
            value = call.inputs[operand]
            while value is not None and value in producer and _gives_on(view, producer[value]):
                value = producer[value].inputs[0]
            if value is not None and value.kind == "node" and solver.static(value):
                maker = producer[value].describe()
                yield (
                    call.describe(),
                    f"its matrix is computed from parameters by {maker}: sparsecc.fold stores it",
                )


def _matched(analysis: Analysis, call: Call) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    facts = analysis.solver.facts.get(call)
    return [] if facts is None else facts.matched


def _passes(view: View, call: Call) -> bool:
    """Whether a call gives on one operand with its axes in another order at most."""
    if call.op == "layout":
        return True
    if call.op != "elementwise" or view.semantics is None or len(call.outputs) != 1:
        return False
    if sum(v is not None for v in call.inputs) != 1 or call.inputs[0] is None:
        return False
    return view.semantics.function(call) in _COPIES and call.outputs[0].dtype in FLOATS


def readers_of(view: View) -> dict[Value, list[tuple[Call, int]]]:
    """(call, operand) of everything that reads a value."""
    readers: dict[Value, list[tuple[Call, int]]] = {}
    for call in view.calls:
        for index, value in enumerate(call.inputs):
            if value is not None:
                readers.setdefault(value, []).append((call, index))
    return readers


def _gives_on(view: View, call: Call) -> bool:
    """Whether a call gives on a matrix, or what its integers stand for."""
    return _passes(view, call) or decodes(view, call)


def decodes(view: View, call: Call) -> bool:
    """Whether a call turns integers into the real numbers that they stand for."""
    if call.op not in ("quantize", "per_channel", "elementwise") or view.semantics is None:
        return False
    return view.semantics.function(call) in _DECODERS


def uses(
    view: View, readers: dict[Value, list[tuple[Call, int]]], weight: Value, *, decoding: bool = False
) -> Iterator[tuple[Call, int, Seen]]:
    """Everything that reads a weight, also through transposes and casts, and decoders where asked for."""
    stack = [Seen(weight, tuple(range(len(weight.shape))))]
    while stack:
        seen = stack.pop()
        for call, index in readers.get(seen.value, ()):
            if index == 0 and (_gives_on(view, call) if decoding else _passes(view, call)):
                stack.append(Seen(call.outputs[0], _through(call, seen.dims)))
            else:
                yield call, index, seen
        if seen.value in view.outputs:
            yield Call("graph output", seen.value.name, (), ()), 0, seen


def _through(call: Call, dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    if call.op != "layout":
        return dims
    return tuple(None if source is None else dims[source] for source in call.attrs["source"])


def _layer(analysis: Analysis, name: str, value: Value, every: list[tuple[Call, int, Seen]]) -> Layer | None:
    """What the readers of a weight make of it; None where no sum of products is among them."""
    every[:] = [use for use in every if use[0].op != "measured"]
    axes = [_summed(analysis, call, index, seen) for call, index, seen in every]
    along = sorted({axis for axis in axes if axis is not None})
    other = next((call for (call, _, _), axis in zip(every, axes, strict=True) if axis is None), None)
    dense = next((DENSE[call.op] for call, _, _ in every if call.op in DENSE), "")
    if not along:
        return Layer(name, 0, dense) if dense else None
    kernels = {
        _kernel(call, seen) for (call, _, seen), axis in zip(every, axes, strict=True) if axis is not None
    }
    groups = max(call.attrs["groups"] if call.op in _CONVOLUTIONS else 1 for call, _, _ in every)
    kernel = kernels.pop() if len(kernels) == 1 else None
    why = _refusal(analysis, name, value, along, other)
    return Layer(name, along[0], why, kernel, groups, value.dtype in INTEGERS)


def _kernel(call: Call, seen: Seen) -> tuple[int, ...]:
    """The weight's axes behind the kernel of a convolution."""
    behind = seen.dims[2:] if call.op in _CONVOLUTIONS else ()
    return tuple(axis for axis in behind if axis is not None)


def _summed(analysis: Analysis, call: Call, index: int, seen: Seen) -> int | None:
    """The axis of the weight that a call multiplies and sums along, if it does."""
    pair = summed_pair(analysis, call, index)
    return None if pair is None else seen.dims[pair[0] % len(seen.dims)]


def summed_pair(analysis: Analysis, call: Call, index: int) -> tuple[int, int, int] | None:
    """(axis, other operand, its axis) along which a call multiplies operand ``index``, a weight, and sums."""
    for left, right in _matched(analysis, call):
        for (operand, dim), (other, along) in ((right, left), (left, right)):
            if operand == index and (operand == right[0] or _may_be_first(analysis, call, other)):
                return dim, other, along
    if _of_one_channel(call, index):
        assert call.inputs[0] is not None
        assert call.inputs[1] is not None
        return 1, 0, len(call.inputs[0].shape) - len(call.inputs[1].shape) + 1
    return None


def _of_one_channel(call: Call, index: int) -> bool:
    """Whether a weight is that of a convolution of one channel, whose axis no fact is stated about."""
    if call.op not in _CONVOLUTIONS or index != 1 or call.attrs["groups"] != 1:
        return False
    weight = call.inputs[1]
    return weight is not None and weight.shape[1] == 1


def _may_be_first(analysis: Analysis, call: Call, other: int) -> bool:
    """Whether the first factor may be the weight: not where both are constants."""
    value = call.inputs[other]
    return call.op in _EITHER and value is not None and not analysis.solver.static(value)


def _refusal(analysis: Analysis, name: str, value: Value, along: list[int], other: Call | None) -> str:
    if value.dtype in INTEGERS:
        if why := _undecoded(analysis.view, value):
            return f"its elements are {value.dtype} {why}"
    elif value.dtype not in FLOATS:
        return f"its elements are {value.dtype}"
    if name not in analysis.view.parameters:
        return "it is a buffer, not a parameter"
    if other is not None:
        return f"it is also read by {other.describe()}"
    if len(along) > 1:
        return f"operators sum along several of its axes ({', '.join(map(str, along))})"
    semantics = analysis.view.semantics
    if semantics is not None and value in semantics.overwritten(read_later=False):
        return "the model writes to it"
    return ""


def _undecoded(view: View, value: Value) -> str:
    """Why integers may not be set to 0 in order to mask what they stand for, or ''."""
    readers = [call for call in view.calls if value in call.inputs]
    other = next((call for call in readers if not decodes(view, call)), None)
    if other is not None:
        return f"that {other.describe()} reads"
    return "" if all(_no_offset(view, call) for call in readers) else "with zero points other than 0"


def _no_offset(view: View, call: Call) -> bool:
    """Whether the zero points of a decoder are known to be 0."""
    semantics = view.semantics
    assert semantics is not None
    offset = semantics.offset(call)
    return offset is not None and not bool(offset.any())

"""Multiply-accumulates of a graph, from its shapes: functional operators count too."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.axes.linear import parse_einsum
from sparsecc.graph import Call, Value

Sizes = Callable[[int], list[int]]


def macs(analysis: Analysis, keeps: Keeps | None = None, without: Collection[str] = ()) -> int:
    """Multiply-accumulates of one run on the example input, at the kept positions.

    Calls named in ``without`` do not count.
    """
    keeps = keeps or Keeps(analysis, {})
    return sum(_of_call(call, keeps) for call in analysis.view.calls if call.name not in without)


def _of_call(call: Call, keeps: Keeps) -> int:
    rule = _RULES.get(call.op)
    if rule is None:
        return 0

    def operand(index: int) -> list[int]:
        value = call.inputs[index]
        return [] if value is None else _kept(value, keeps.operand(call, index))

    value = call.outputs[0]
    return rule(call, operand, _kept(value, keeps.value(value)))


def _kept(value: Value, masks: list) -> list[int]:  # type: ignore[type-arg]
    return [
        n if m is None else int(m.sum()) * n // len(m)
        for n, m in zip(value.example_shape, masks, strict=True)
    ]


def _conv(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(out) * math.prod(operand(1)[1:])


def _conv_transpose(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(operand(0)) * math.prod(operand(1)[1:])


def _linear(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(out) * operand(0)[-1]


def _addmm(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(out) * operand(1)[-1]


def _gemm(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(out) * operand(0)[0 if call.attrs["trans_a"] else 1]


def _einsum(call: Call, operand: Sizes, out: list[int]) -> int:
    shapes = [operand(i) for i in range(len(call.inputs))]
    labels, _ = parse_einsum(call.attrs["equation"], [len(s) for s in shapes])
    sizes: dict[str, int] = {}
    for names, shape in zip(labels, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values())


def _attention(call: Call, operand: Sizes, out: list[int]) -> int:
    q, k = operand(0), operand(1)
    return math.prod(q) * k[-2] + math.prod(out) * k[-2]


def _transposed(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(out) * operand(0)[-2 if call.attrs.get("trans_a") else -1]


def _heads(call: Call, operand: Sizes, out: list[int]) -> int:
    """Attention over packed or separate heads; what comes from a cache does not count."""
    q, k = operand(0), operand(1) if call.inputs[1] is not None else []
    length = q[1] if not k else k[-2] if len(k) == 4 else k[1]
    return (math.prod(q if k else out) + math.prod(out)) * length


def _self_attention(call: Call, operand: Sizes, out: list[int]) -> int:
    (batch, length, inner), width = operand(0), operand(1)[1]
    carried = out[-1]
    return batch * length * (inner * width + length * ((width - carried) // 2 + carried))


def _recurrent_torch(call: Call, operand: Sizes, out: list[int]) -> int:
    first = 1 + call.attrs["states"]
    weights = [operand(i) for i in range(first, len(call.inputs))]
    return math.prod(operand(0)[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _recurrent_onnx(call: Call, operand: Sizes, out: list[int]) -> int:
    return math.prod(operand(0)[:2]) * (math.prod(operand(1)) + math.prod(operand(2)))


_RULES: dict[str, Callable[[Call, Sizes, list[int]], int]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _linear,
    "addmm": _addmm,
    "gemm": _gemm,
    "grouped_matmul": _linear,
    "einsum": _einsum,
    "attention": _attention,
    "fused_conv": _conv,
    "deform_conv": _conv,
    "qconv": _conv,
    "fused_gemm": _gemm,
    "fused_matmul": _transposed,
    "qmatmul": _transposed,
    "dynamic_quantize_matmul": _linear,
    "matmul_nbits": _linear,
    "attention_onnx": _heads,
    "multi_head_attention": _heads,
    "group_query_attention": _heads,
    "self_attention": _self_attention,
    "recurrent_torch": _recurrent_torch,
    "recurrent_onnx": _recurrent_onnx,
}

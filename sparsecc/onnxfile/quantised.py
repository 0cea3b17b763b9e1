"""Quantised ONNX operators as canonical calls, and which of their inputs are weights.

The operands of ``qconv`` and ``qmatmul`` are x w bias x_zero w_zero x_scale w_scale y_scale y_zero.
"""

from __future__ import annotations

from typing import Any

from sparsecc.onnxfile.site import Entry, Site, Spec

_ZEROS = {0: 3, 1: 4}


def _quantize(s: Site) -> Spec:
    return Spec("quantize", s.given(0, 1, 2), {"axis": s.attr("axis", 1), "block": s.attr("block_size", 0)})


def _dynamic(s: Site) -> Spec:
    return Spec("dynamic_quantize", [0], {"outputs": s.outputs()})


def _conv(*places: int | None) -> Entry:
    """``places`` are the inputs that hold the canonical operands."""

    def entry(s: Site) -> Spec:
        if s.attr("channels_last", 0):
            raise ValueError("channels last")
        operands = [i if i is not None and s.has(i) else None for i in places]
        return Spec("qconv", operands, {"groups": s.attr("group", 1), "zeros": _ZEROS})

    return entry


def _matmul(*places: int | None) -> Entry:
    def entry(s: Site) -> Spec:
        attrs: dict[str, Any] = {"zeros": _ZEROS}
        attrs |= {"trans_a": bool(s.attr("transA", 0)), "trans_b": bool(s.attr("transB", 0))}
        return Spec("qmatmul", [i if i is not None and s.has(i) else None for i in places], attrs)

    return entry


def _dynamic_matmul(s: Site) -> Spec:
    if len(s.shape(1)) != 2:
        raise ValueError("a product of many matrices")
    return Spec("dynamic_quantize_matmul", s.given(0, 1, 2, 3, 4), {"outputs": [0]})


def _attention(s: Site) -> Spec:
    if s.attr("do_rotary", 0) or s.attr("past_present_share_buffer", 0):
        raise ValueError("rotation, or a cache in a shared buffer")
    # x w b padding past mask x_zero w_zero x_scale w_scale
    return self_attention(s, s.given(0, 1, 2, 5, 8, 99, 6, 7, 3, 4), one_width=True, zeros={0: 6, 1: 7})


def self_attention(s: Site, operands: list[int | None], **attrs: Any) -> Spec:
    """Attention that projects its input itself: operands x w b padding past mask, and those of integers."""
    width = s.shape(1)[1]
    attrs |= {
        "heads": s.attr("num_heads"),
        "widths": list(s.attr("qkv_hidden_sizes", [width // 3] * 3)),
        "scale": s.attr("scale") or None,
        "causal": bool(s.attr("unidirectional", 0)),
        "outputs": s.outputs(),
    }
    attrs.setdefault("one_width", False)  # whether queries, keys and values are of one width
    return Spec("self_attention", operands, attrs)


def _elementwise(s: Site) -> Spec:
    return Spec("elementwise", s.present())


def _concat(s: Site) -> Spec:
    return Spec("qconcat", list(range(2, len(s.node.input), 3)), {"dim": s.attr("axis")})


def _pool(s: Site) -> Spec:
    return Spec("qmixed", [0], {"kept": [0, -1 if s.attr("channels_last", 0) else 1]})


def _softmax(s: Site) -> Spec:
    rank = len(s.shape(0))
    axis = s.attr("axis", -1) % rank
    return Spec("qsoftmax", [0], {"dims": list(range(axis, rank)) if s.attr("opset", 13) < 13 else [axis]})


def _nbits(s: Site) -> Spec:
    """Zero points are packed where they are integers of fewer than 8 bits."""
    if s.attr("weight_prepacked", 0):
        raise ValueError("weights laid out for one device")
    zeros = s.shapes.get(s.node.input[3]).dtype if s.has(3) else None
    packed = zeros is not None and not zeros.is_floating_point
    attrs = {"block": s.attr("block_size"), "bits": s.attr("bits", 4), "packed_zeros": packed}
    return Spec("matmul_nbits", s.given(0, 1, 2, 3, 4, 5), attrs)


DEFAULT: dict[str, Entry] = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    "DynamicQuantizeLinear": _dynamic,
    "QLinearConv": _conv(0, 3, 8, 2, 5, 1, 4, 6, 7),
    "ConvInteger": _conv(0, 1, None, 2, 3, None, None, None, None),
    "QLinearMatMul": _matmul(0, 3, None, 2, 5, 1, 4, 6, 7),
    "MatMulInteger": _matmul(0, 1, None, 2, 3, None, None, None, None),
}

CONTRIB: dict[str, Entry] = {
    **{name: DEFAULT[name] for name in ("QuantizeLinear", "DequantizeLinear", "QLinearConv")},
    "QGemm": _matmul(0, 3, 6, 2, 5, 1, 4, 7, 8),
    "MatMulIntegerToFloat": _matmul(0, 1, 6, 4, 5, 2, 3, None, None),
    **dict.fromkeys(
        ("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearWhere"), _elementwise
    ),
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "QAttention": _attention,
    "QLinearConcat": _concat,
    **dict.fromkeys(("QLinearAveragePool", "QLinearGlobalAveragePool"), _pool),
    "QLinearSoftmax": _softmax,
    "MatMulNBits": _nbits,
}

#: inputs that hold weights, as integers or not
WEIGHTS: dict[str, tuple[int, ...]] = {
    "DequantizeLinear": (0,), "QuantizeLinear": (0,), "QLinearConv": (3, 8), "ConvInteger": (1,),
    "QLinearMatMul": (0, 3), "MatMulInteger": (0, 1), "QGemm": (0, 3, 6), "MatMulIntegerToFloat": (0, 1, 6),
    "MatMulNBits": (1, 2, 5), "DynamicQuantizeMatMul": (1,), "QAttention": (1, 2), "QLinearAdd": (0, 3),
    "QLinearMul": (0, 3),
}  # fmt: skip

#: inputs that hold scales, zero points and tables: no parameters, but cut along with what they belong to
AUXILIARY: dict[str, tuple[int, ...]] = {
    "DequantizeLinear": (1, 2), "QuantizeLinear": (1, 2), "QLinearConv": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3), "QLinearMatMul": (1, 2, 4, 5, 6, 7), "MatMulInteger": (2, 3),
    "QGemm": (1, 2, 4, 5, 7, 8), "MatMulIntegerToFloat": (2, 3, 4, 5), "DynamicQuantizeMatMul": (2, 3),
    "QLinearAdd": (1, 2, 4, 5, 6, 7), "QLinearMul": (1, 2, 4, 5, 6, 7), "MatMulNBits": (3, 4),
    "QAttention": (3, 4, 6, 7), "RotaryEmbedding": (1, 2, 3), "GroupQueryAttention": (7, 8),
}  # fmt: skip

#: operators that round to integers
QUANTISERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm"}) | {
    name for name in (*DEFAULT, *CONTRIB) if name.startswith("QLinear")
}

"""ONNX operators as canonical calls: one table entry an operator.

An entry takes a ``Site`` (a node with its shapes and known integers) and returns ``(op, operands,
attrs)``; operands are input indices.  What is in no table (here, ``contrib``, ``opaque``) becomes an
unknown operator, and freezes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsecc.axes.layout import endless
from sparsecc.onnxfile import contrib, quantised
from sparsecc.onnxfile.opaque import opaque
from sparsecc.onnxfile.site import Entry, Site, Spec


def _elementwise(s: Site) -> Spec:
    return Spec("elementwise", s.present())


def _first(s: Site) -> Spec:
    return Spec("elementwise", [0])


def _dropout(s: Site) -> Spec:
    training = s.known(2)
    if s.has(2) and (training is None or training.any()):
        return Spec(
            "opaque", s.present(), {"why": "draws random numbers while it trains; export in eval mode"}
        )
    return _first(s)


def _conv(s: Site) -> Spec:
    name = "conv" if s.node.op_type == "Conv" else "conv_transpose"
    attrs = {"groups": s.attr("group", 1), "pointwise": _pointwise(s)}
    return Spec(name, [0, 1, 2 if s.has(2) else None], attrs)


def _pointwise(s: Site) -> list[bool]:
    """Spatial axes along which the kernel has one position and every position is read once."""
    kernel = s.shape(1)[2:]
    strides, pads = s.attr("strides") or [1] * len(kernel), s.attr("pads") or [0] * 2 * len(kernel)
    grows = any(s.attr("output_padding") or ()) or "output_shape" in s.attributes
    return [
        (size, stride, before, after) == (1, 1, 0, 0) and not grows
        for size, stride, before, after in zip(
            kernel, strides, pads[: len(kernel)], pads[len(kernel) :], strict=True
        )
    ]


def _gemm(s: Site) -> Spec:
    attrs = {"trans_a": bool(s.attr("transA", 0)), "trans_b": bool(s.attr("transB", 0))}
    return Spec("gemm", [0, 1, 2 if s.has(2) else None], attrs)


def _reduce(kind: str) -> Entry:
    def entry(s: Site) -> Spec:
        rank = len(s.shape(0))
        axes = s.ints("axes", 1)
        if not axes and s.attr("noop_with_empty_axes", 0):
            return Spec("elementwise", [0])
        dims = [a % rank for a in axes] if axes else list(range(rank))
        return Spec("reduce", [0], {"kind": kind, "dims": dims, "keepdim": bool(s.attr("keepdims", 1))})

    return entry


def _ordered(default: int | None) -> Entry:
    def entry(s: Site) -> Spec:
        axis = s.attr("axis", default)
        if s.node.op_type in ("CumSum", "CumProd"):
            (axis,) = s.ints("axis", 1) or [0]
        return Spec("ordered", [0], {"dims": [axis]})

    return entry


def _hardmax(s: Site) -> Spec:
    return Spec("ordered", [0], _softmax(s).attrs)


def _softmax(s: Site) -> Spec:
    rank = len(s.shape(0))
    if s.opset < 13:
        axis = s.attr("axis", 1) % rank
        return Spec("softmax", [0], {"dims": list(range(axis, rank))})
    return Spec("softmax", [0], {"dims": [s.attr("axis", -1) % rank]})


def _batch_norm(s: Site) -> Spec:
    if s.attr("training_mode", 0) or len([o for o in s.node.output if o]) > 1:
        return Spec("BatchNormalization (training)", s.present())
    return Spec("batch_norm", [0, 1, 2, 3, 4], {"eps": s.attr("epsilon", 1e-5)})


def _layer_norm(kind: str) -> Entry:
    def entry(s: Site) -> Spec:
        if len([o for o in s.node.output if o]) > 1:
            return Spec(f"{s.node.op_type} (with statistics)", s.present())
        rank = len(s.shape(0))
        dims = list(range(s.attr("axis", -1) % rank, rank))
        operands = [0, 1 if s.has(1) else None, 2 if s.has(2) else None]
        return Spec("layer_norm", operands, {"kind": kind, "dims": dims, "eps": s.attr("epsilon", 1e-5)})

    return entry


def _instance_norm(s: Site) -> Spec:
    return Spec("instance_norm", [0, 1, 2], {"eps": s.attr("epsilon", 1e-5)})


def _group_norm(s: Site) -> Spec:
    attrs = {
        "groups": s.attr("num_groups"),
        "eps": s.attr("epsilon", 1e-5),
        "affine": "group" if s.opset < 21 else "channel",
    }
    return Spec("group_norm", [0, 1, 2], attrs)


def _lp_norm(s: Site) -> Spec:
    return Spec("softmax", [0], {"dims": [s.attr("axis", -1) % len(s.shape(0))]})


def _transpose(s: Site) -> Spec:
    rank = len(s.shape(0))
    return Spec("layout", [0], {"source": list(s.attr("perm", list(reversed(range(rank)))))})


def _squeeze(s: Site) -> Spec:
    shape = s.shape(0)
    axes = s.ints("axes", 1)
    dropped = {a % len(shape) for a in axes} if axes else {d for d, n in enumerate(shape) if n == 1}
    source = [d for d in range(len(shape)) if d not in dropped]
    return Spec("layout", [0], {"source": source, "spared": [] if axes else source})


def _unsqueeze(s: Site) -> Spec:
    rank = len(s.out())
    added = {a % rank for a in s.ints("axes", 1) or ()}
    rest = iter(range(len(s.shape(0))))
    return Spec("layout", [0], {"source": [None if d in added else next(rest) for d in range(rank)]})


def _reshape(s: Site) -> Spec:
    return Spec("reshape", [0])


def _expand(s: Site) -> Spec:
    return Spec("expand", [0])


def _tile(s: Site) -> Spec:
    return Spec("tile", [0])


def _concat(s: Site) -> Spec:
    return Spec("concat", s.present(), {"dim": s.attr("axis")})


def _split(s: Site) -> Spec:
    return Spec("split", [0], {"dim": s.attr("axis", 0)})


def _slice(s: Site) -> Spec:
    shape = s.shape(0)
    starts, ends = s.ints("starts", 1), s.ints("ends", 2)
    if starts is None or ends is None:
        raise ValueError("Slice without starts or ends")
    axes = s.ints("axes", 3) or list(range(len(starts)))
    steps = s.ints("steps", 4) or [1] * len(starts)
    cuts = [c for c in zip(starts, ends, axes, steps, strict=True) if c[::3] != (0, 1) or not endless(c[1])]
    if cuts and all(step == -1 and _reverses(shape[a % len(shape)], b, e) for b, e, a, step in cuts):
        return Spec("flip", [0], {"dims": [axis % len(shape) for _, _, axis, _ in cuts]})
    slices = {}
    for start, end, axis, step in cuts:
        size = shape[axis % len(shape)]
        bounds = slice(start, end, step).indices(size) if step > 0 else (start, end, step)
        slices[axis % len(shape)] = tuple(bounds)
    return Spec("slice", [0], {"slices": slices})


def _reverses(size: int, start: int, end: int) -> bool:
    """Whether a slice with a step of -1 takes everything, however long the axis is."""
    return (start == -1 or start >= size - 1) and end < -size


def _gather(s: Site) -> Spec:
    dim = s.attr("axis", 0)
    known = s.known(1)
    if known is not None and known.ndim == 0:
        return Spec("select", [0], {"dim": dim, "index": int(known)})
    if len(s.shape(0)) == 1 and _takes_all_in_order(s):
        return Spec("reshape", [0])
    return Spec("index", [0, 1], {"dim": dim})


def _takes_all_in_order(s: Site) -> bool:
    """Whether a Gather from a vector is a reshape, for inputs of any size."""
    steps = s.tracer.steps(s.node.input[1])
    if steps is None or not steps.contiguous or steps.count != s.shape(0)[0] or sum(steps.varies) > 1:
        return False
    said = s.shapes.get(s.node.output[0]).dynamic, s.shapes.get(s.node.input[0]).dynamic
    return said == (steps.varies, (any(steps.varies),))


def _pad(s: Site) -> Spec:
    rank = len(s.shape(0))
    flat = s.ints("pads", 1)
    if flat is None:
        raise ValueError("Pad without pads")
    axes = s.ints("axes", 3) if s.has(3) else None
    dims = [a % rank for a in axes] if axes is not None else list(range(rank))
    pads = [(0, 0)] * rank
    for i, dim in enumerate(dims):
        pads[dim] = (flat[i], flat[i + len(dims)])
    return Spec("pad", [0], {"pads": pads, "mode": s.attr("mode", "constant")})


def _depth_to_space(s: Site) -> Spec:
    return Spec("depth_to_space", [0], {"factor": s.attr("blocksize"), "mode": s.attr("mode", "DCR")})


def _space_to_depth(s: Site) -> Spec:
    return Spec("space_to_depth", [0], {"factor": s.attr("blocksize"), "mode": "DCR"})


def _gather_nd(s: Site) -> Spec:
    return Spec("gather_nd", [0, 1], {"batch_dims": s.attr("batch_dims", 0)})


def _spatial(s: Site) -> Spec:
    if len(s.outputs()) > 1:
        return Spec("opaque", [0], {"why": "puts out places in the whole tensor"})
    return Spec("mixed", [0], {"kept": [0, 1]})


def _mixed_but(s: Site, operands: list[int | None], *mixed: int) -> Spec:
    """What happens along the axes ``mixed`` depends on more than one position of them."""
    rank = len(s.shape(0))
    gone = {d % rank for d in mixed}
    return Spec("mixed_by", operands, {"kept": [d for d in range(rank) if d not in gone]})


def _lrn(s: Site) -> Spec:
    return _mixed_but(s, [0], 1)


def _center_crop_pad(s: Site) -> Spec:
    return _mixed_but(s, [0], *s.attr("axes", range(len(s.shape(0)))))


def _compress(s: Site) -> Spec:
    if "axis" not in s.attributes:
        return Spec("opaque", [0, 1], {"why": "picks entries of the whole tensor"})
    return _mixed_but(s, [0, 1], s.attr("axis"))


def _reverse_sequence(s: Site) -> Spec:
    return _mixed_but(s, [0, 1], s.attr("time_axis", 0), s.attr("batch_axis", 1))


def _dft(s: Site) -> Spec:
    axis = s.attr("axis", 1) if s.opset < 20 else (s.ints("axes", 2) or [-2])[0]
    return _mixed_but(s, [0], axis, -1)


def _stft(s: Site) -> Spec:
    return Spec("mixed_by", s.given(0, 1, 2, 3), {"kept": [0]})


def _det(s: Site) -> Spec:
    rank = len(s.shape(0))
    return _mixed_but(s, [0], rank - 2, rank - 1)


def _mean_variance(s: Site) -> Spec:
    rank = len(s.shape(0))
    return Spec("softmax", [0], {"dims": sorted({d % rank for d in s.attr("axes", [0, 2, 3])})})


def _col2im(s: Site) -> Spec:
    kernel = s.ints("block_shape", 2)
    if kernel is None:
        raise ValueError("Col2Im without a block shape")
    return Spec("col2im", [0], {"kernel": math.prod(kernel)})


def _deform_conv(s: Site) -> Spec:
    attrs = {"groups": s.attr("group", 1), "offset_groups": s.attr("offset_group", 1)}
    return Spec("deform_conv", s.given(0, 1, 3, 2, 4), attrs)


def _causal_conv(s: Site) -> Spec:
    return Spec("depthwise_causal", s.given(0, 1, 2, 3), {"outputs": s.outputs()})


def _sampled(s: Site) -> Spec:
    return Spec("sampled", s.present())


def _along(op: str) -> Entry:
    def entry(s: Site) -> Spec:
        return Spec(op, s.present(), {"dim": s.attr("axis", -2 if op == "tensor_scatter" else 0)})

    return entry


def _scatter_nd(s: Site) -> Spec:
    rows = _rows_in_order(s)
    if rows is None or s.attr("reduction", "none") != "none":
        return Spec("scatter_nd", [0, 1, 2])
    return Spec("slice_write", [0, 2, 1], {"slices": {0: (rows.start, rows.stop, 1)}})


def _rows_in_order(s: Site) -> range | None:
    """The neighbouring rows that a ScatterND replaces, whatever the sizes of the inputs are."""
    info = s.shapes.get(s.node.input[1])
    if not info.settled or info.known is None or info.known.shape[1:] != (1,) or not info.known.size:
        return None
    rows = [int(row) % s.shape(0)[0] for row in info.known[:, 0]]
    found = range(rows[0], rows[-1] + 1)
    return found if list(found) == rows else None


def _attention(s: Site) -> Spec:
    packed = len(s.shape(0)) == 3
    causal = s.attr("is_causal", 0) or s.attr("left_window_size", -1) >= 0
    attrs = {
        "q_heads": s.attr("q_num_heads") if packed else None,
        "kv_heads": s.attr("kv_num_heads") if packed else None,
        "scale": s.attr("scale"),
        "causal": bool(causal or s.attr("right_window_size", -1) >= 0 or s.has(6)),
        "outputs": s.outputs(),
    }
    return Spec("attention_onnx", s.given(*range(7)), attrs)


def _rotary(s: Site) -> Spec:
    attrs = {"heads": s.attr("num_heads"), "interleaved": bool(s.attr("interleaved", 0))}
    return Spec("rotary_embedding", s.given(0, 1, 2, 3), attrs)


def _resize(s: Site) -> Spec:
    """Axes that come out as they went in are carried; sizes can be spelled for the last axes alone."""
    rank = len(s.shape(0))
    axes = [a % rank for a in s.attr("axes", range(rank))]
    kept = set(range(rank)).difference(axes)
    if axes != list(range(rank))[-len(axes) :]:
        return Spec("mixed", [0], {"kept": sorted(kept)})
    return Spec("resize", [0], {"kept": sorted(kept.union(_unscaled(s, axes)))})


def _unscaled(s: Site, axes: Sequence[int]) -> set[int]:
    """Those of the axes that a Resize or Upsample leaves alone, whatever the sizes of the inputs are."""
    scales = s.known(2 if s.node.op_type == "Resize" else 1)
    if scales is not None and scales.size:
        same = [scale == 1 for scale in scales]
    elif s.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        same = [False] * len(axes)
    else:  # spatial axes that vary may be as long by chance
        varies = [s.shapes.get(name).dynamic for name in (s.node.input[0], s.node.output[0])]
        same = [s.shape(0)[a] == s.out()[a] and (a < 2 or not any(v[a] for v in varies)) for a in axes]
    if s.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        region = s.known(1)
        whole = [] if region is None else zip(region, region[len(axes) :], strict=False)
        same = [ok and span == (0, 1) for ok, span in zip(same, whole, strict=False)]
    return {a for a, ok in zip(axes, same, strict=False) if ok}


def _create(s: Site) -> Spec:
    return Spec("create", [])


def _positions(s: Site) -> Spec:
    return Spec("positions", [])


def _triangle(s: Site) -> Spec:
    rank = len(s.shape(0))
    return Spec("ordered", [0], {"dims": [rank - 2, rank - 1]})


def _recurrent(gates: int) -> Entry:
    def entry(s: Site) -> Spec:
        outputs = [i for i, name in enumerate(s.node.output) if name]
        operands: list[int | None] = [i if s.has(i) else None for i in range(8)]
        return Spec(
            "recurrent_onnx", operands, {"gates": gates, "layout": s.attr("layout", 0), "outputs": outputs}
        )

    return entry


def _einsum(s: Site) -> Spec:
    return Spec("einsum", s.present(), {"equation": s.attr("equation")})


def _prelu(s: Site) -> Spec:
    return Spec("elementwise", [0, 1])


_ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil", "Celu", "Clip", "Cos", "Cosh",
    "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
    "BitCast", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal",
    "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
    "Sqrt", "Sub", "Sum", "SwiGLU", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip

TABLE: dict[str, Entry] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Cast", "CastLike"), _first),
    "Dropout": _dropout,
    "PRelu": _prelu,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "Gemm": _gemm,
    "MatMul": lambda s: Spec("matmul", [0, 1]),
    "Einsum": _einsum,
    **{
        f"Reduce{k}": _reduce(k)
        for k in ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]
    },
    **dict.fromkeys(("ArgMax", "ArgMin"), _ordered(0)),
    **dict.fromkeys(("CumSum", "CumProd"), _ordered(0)),
    "TopK": _ordered(-1),
    "Hardmax": _hardmax,
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm("layer"),
    "RMSNormalization": _layer_norm("rms"),
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "LRN": _lrn,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _along("gather_elements"),
    **dict.fromkeys(("ScatterElements", "Scatter"), _along("scatter_elements")),
    "ScatterND": _scatter_nd,
    "TensorScatter": _along("tensor_scatter"),
    "Compress": _compress,
    "ReverseSequence": _reverse_sequence,
    "CenterCropPad": _center_crop_pad,
    "Col2Im": _col2im,
    "DeformConv": _deform_conv,
    "CausalConvWithState": _causal_conv,
    **dict.fromkeys(("GridSample", "RoiAlign", "MaxRoiPool"), _sampled),
    "DFT": _dft,
    "STFT": _stft,
    "Det": _det,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Pad": _pad,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **{f"{k}Pool": _spatial for k in ("Max", "Average", "Lp", "GlobalMax", "GlobalAverage", "GlobalLp")},
    "ConstantOfShape": _create,
    **dict.fromkeys(["Range", "BlackmanWindow", "HammingWindow", "HannWindow"], _positions),
    "Trilu": _triangle,
    **quantised.DEFAULT,
    **contrib.DEFAULT,
    "Constant": _create,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
}

#: inputs of contractions and of what leads there: an initializer is one parameter, however often it is used
#: (in whatever domain the operator is)
CONTRACTED: dict[str, tuple[int, ...]] = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1), "Gather": (0,), "Transpose": (0,),
    **{f"Reduce{k}": (0,) for k in ("Sum", "Mean", "L1", "L2", "SumSquare", "Max")},
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2), "Einsum": (0, 1), "DeformConv": (1,),
    **quantised.WEIGHTS, **contrib.WEIGHTS,
}  # fmt: skip


def entry_of(domain: str, op_type: str) -> Entry | None:
    """The entry of an operator: a rule, or why its axes stay; None where nothing is known."""
    table = TABLE if domain in ("", "ai.onnx") else contrib.TABLE if domain == "com.microsoft" else {}
    return table.get(op_type) or opaque(domain, op_type)

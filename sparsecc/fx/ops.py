"""ATen operators as canonical calls: one table entry an operator.

An entry takes the node's arguments by schema name and returns ``(op, operands, attrs)``.  In-place
variants (``relu_``) share the entry of their functional form.  What is not in the table becomes an
unknown operator, and freezes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from sparsecc.axes.layout import endless
from sparsecc.fx import ops_decomposed, ops_indexing, ops_products, ops_signal
from sparsecc.fx.ops_indexing import index_many
from sparsecc.fx.spec import (
    NODE,
    Bound,
    Entry,
    Shapes,
    Spec,
    elementwise,
    ints,
    operand,
    results_read,
    same,
    tensors,
    whole,
    words,
)


def _first(b: Bound, _: Shapes) -> Spec:
    return Spec("elementwise", tensors(b)[:1])


def _conv(b: Bound, s: Shapes) -> Spec:
    return Spec("conv", (b["input"], b["weight"], b["bias"]), _sliding(b, s))


def _conv_transpose(b: Bound, s: Shapes) -> Spec:
    return Spec("conv_transpose", (b["input"], b["weight"], b["bias"]), _sliding(b, s))


def _convolution(b: Bound, s: Shapes) -> Spec:
    return _conv_transpose(b, s) if b["transposed"] else _conv(b, s)


def _sliding(b: Bound, s: Shapes) -> dict[str, Any]:
    """Groups, and the spatial axes along which the kernel has one position and every one is read once."""
    kernel = s.of(b["weight"])[2:]
    strides, paddings = (_a_dim(b[n], len(kernel)) for n in ("stride", "padding"))
    alone = [k == 1 and st == 1 and p == 0 for k, st, p in zip(kernel, strides, paddings, strict=True)]
    grows = any(ints(b.get("output_padding", 0)))
    return {"groups": s.argument(b["groups"]), "pointwise": [a and not grows for a in alone]}


def _a_dim(value: Any, count: int) -> list[Any]:
    """One entry a spatial axis; padding by name pads nothing where the kernel has one position."""
    if isinstance(value, str):
        return [0] * count
    found = ints(value)
    return found * count if len(found) == 1 else found


def _reduce(kind: str) -> Entry:
    def entry(b: Bound, s: Shapes) -> Spec:
        x = operand(b)
        rank = s.rank(x)
        dims = b.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
        attrs = {"dims": [d % rank for d in dims] if rank else [], "keepdim": bool(b.get("keepdim", False))}
        extra: dict[str, Any] = {k: b[k] for k in ("correction", "unbiased", "ord", "p") if k in b}
        return Spec("reduce", (x,), {"kind": kind, **attrs, **extra})

    return entry


def _ordered(b: Bound, s: Shapes) -> Spec:
    x = operand(b)
    dim = b.get("dim")
    return Spec("ordered", (x,), {"dims": list(range(s.rank(x))) if dim is None else [dim]})


def _topk(b: Bound, s: Shapes) -> Spec:
    """Along an axis, with a number that is known."""
    rank = s.rank(b["self"])
    if not rank or not isinstance(b["k"], int):
        return _ordered(b, s)
    return Spec("topk", (b["self"],), {"dim": b["dim"] % rank, "count": b["k"]})


def _one_hot(b: Bound, s: Shapes) -> Spec:
    return Spec("one_hot", (b["self"],))


def _histogram(b: Bound, s: Shapes) -> Spec:
    attrs = {n: b[n] for n in ("bins", "min", "max")}
    return Spec("histogram", (b["self"],), {**attrs, "why": "reads its input in the order of its entries"})


def _extremum(kind: str) -> Entry:
    """max, min, median: of two tensors, of everything, or along an axis (which gives positions too)."""

    def entry(b: Bound, s: Shapes) -> Spec:
        if "other" in b:
            return elementwise(b, s)
        if "dim" in b and 1 in results_read(b):
            return _ordered(b, s)
        return _reduce(kind)(b, s)

    return entry


def _softmax(b: Bound, s: Shapes) -> Spec:
    return Spec("softmax", (b["self"],), {"dims": [b["dim"] % max(s.rank(b["self"]), 1)]})


def _layout(source: Callable[[Bound, int], list[int | None]]) -> Entry:
    def entry(b: Bound, s: Shapes) -> Spec:
        return Spec("layout", (b["self"],), {"source": source(b, s.rank(b["self"]))})

    return entry


def _swapped(b: Bound, rank: int) -> list[int | None]:
    order: list[int | None] = list(range(rank))
    if rank:
        first, second = ("dim0", "dim1") if "dim0" in b else ("axis0", "axis1")
        i, j = b[first] % rank, b[second] % rank
        order[i], order[j] = order[j], order[i]
    return order


def _permuted(b: Bound, rank: int) -> list[int | None]:
    return [d % rank for d in b["dims"]]


def _reversed(b: Bound, rank: int) -> list[int | None]:
    return list(reversed(range(rank)))


def _matrix_transposed(b: Bound, rank: int) -> list[int | None]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _moved(b: Bound, rank: int) -> list[int | None]:
    source = [d % rank for d in ints(b["source"])]
    target = [d % rank for d in ints(b["destination"])]
    rest = iter([d for d in range(rank) if d not in source])
    return [source[target.index(d)] if d in target else next(rest) for d in range(rank)]


def _unsqueezed(b: Bound, rank: int) -> list[int | None]:
    order: list[int | None] = list(range(rank))
    order.insert(b["dim"] % (rank + 1), None)
    return order


def _squeeze(b: Bound, s: Shapes) -> Spec:
    shape = s.of(b["self"])
    dims = range(len(shape)) if b.get("dim") is None else [d % max(len(shape), 1) for d in ints(b["dim"])]
    source = [d for d in range(len(shape)) if not (d in dims and shape[d] == 1)]
    return Spec("layout", (b["self"],), {"source": source, "spared": [d for d in dims if d in source]})


def _reshape(b: Bound, _: Shapes) -> Spec:
    return Spec("reshape", (b["self"], b.get("other")))


def _reshape_alias(b: Bound, s: Shapes) -> Spec:
    """Of contiguous tensors it is a reshape, whose strides follow from its sizes."""
    if not all(s.contiguous(node.meta["val"]) for node in (b["self"], b[NODE])):
        return whole("aten._reshape_alias", "moves elements by strides", b)
    return _reshape(b, s)


def _pixel_shuffle(b: Bound, _: Shapes) -> Spec:
    return Spec("depth_to_space", (b["self"],), {"factor": b["upscale_factor"]})


def _pixel_unshuffle(b: Bound, _: Shapes) -> Spec:
    return Spec("space_to_depth", (b["self"],), {"factor": b["downscale_factor"]})


def _concat(b: Bound, _: Shapes) -> Spec:
    return Spec("concat", list(b["tensors"]), {"dim": b.get("dim", 0)})


def _stack(b: Bound, _: Shapes) -> Spec:
    return Spec("stack", list(b["tensors"]), {"dim": b["dim"]})


def _slice(b: Bound, s: Shapes) -> Spec:
    if (b["start"] or 0, b["step"]) == (0, 1) and (b["end"] is None or endless(b["end"])):
        return Spec("slice", (b["self"],), {"slices": {}})
    shape = s.of(b["self"])
    dim = b["dim"] % len(shape)
    size = shape[dim]
    start, end = s.argument(b["start"]) or 0, s.argument(b["end"])
    start = max(start + size, 0) if start < 0 else min(start, size)
    end = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    return Spec("slice", (b["self"],), {"slices": {dim: (start, end, s.argument(b["step"]))}})


def _narrow(b: Bound, s: Shapes) -> Spec:
    shape = s.of(b["self"])
    dim = b["dim"] % len(shape)
    start = s.argument(b["start"])
    start = start + shape[dim] if start < 0 else start
    return Spec("slice", (b["self"],), {"slices": {dim: (start, start + s.argument(b["length"]), 1)}})


def _index(b: Bound, s: Shapes) -> Spec:
    """x[:, i]: one index tensor anywhere; several, and masks, have a rule of their own."""
    places = [d for d, i in enumerate(b["indices"]) if i is not None]
    if len(places) != 1 or b["indices"][places[0]].meta["val"].dtype in (torch.bool, torch.uint8):
        return index_many(b, s)
    return Spec("index", (b["self"], b["indices"][places[0]]), {"dim": places[0]})


def _pad(b: Bound, s: Shapes) -> Spec:
    rank = s.rank(b["self"])
    flat = [s.argument(p) for p in b["pad" if "pad" in b else "padding"]]
    pads = [(0, 0)] * rank
    for i in range(len(flat) // 2):
        pads[rank - 1 - i] = (flat[2 * i], flat[2 * i + 1])
    return Spec("pad", (b["self"],), {"pads": pads, "mode": b.get("mode", "constant")})


def _mode_pad(mode: str) -> Entry:
    return lambda b, s: _pad({**b, "mode": mode}, s)


def _spatial(count: int) -> Entry:
    """Pools and resizes the last ``count`` axes."""

    def entry(b: Bound, s: Shapes) -> Spec:
        x = operand(b)
        return Spec("mixed", (x,), {"kept": list(range(s.rank(x) - count))})

    return entry


def _roll(b: Bound, s: Shapes) -> Spec:
    rank, shifts = s.rank(b["self"]), [s.argument(n) for n in ints(b["shifts"])]
    dims = [d % rank for d in ints(b["dims"])]
    if not dims:  # rolls all elements as one row
        return Spec("mixed", (b["self"],), {"kept": []})
    return Spec("roll", (b["self"],), {"dims": dims, "shifts": shifts})


def _rot90(b: Bound, s: Shapes) -> Spec:
    rank = s.rank(b["self"])
    dims = [d % rank for d in ints(b["dims"])]
    return Spec("mixed", (b["self"],), {"kept": [d for d in range(rank) if d not in dims]})


def _flip(b: Bound, s: Shapes) -> Spec:
    return Spec("flip", (b["self"],), {"dims": [d % s.rank(b["self"]) for d in ints(b["dims"])]})


def _triangle(b: Bound, s: Shapes) -> Spec:
    rank = s.rank(b["self"])
    return Spec("ordered", (b["self"],), {"dims": [rank - 2, rank - 1]})


def _layer_norm(b: Bound, s: Shapes) -> Spec:
    rank, n = s.rank(b["input"]), len(b["normalized_shape"])
    attrs = {"kind": "layer", "dims": list(range(rank - n, rank)), "eps": b["eps"]}
    return Spec("layer_norm", (b["input"], b["weight"], b.get("bias")), attrs)


def _rms_norm(b: Bound, s: Shapes) -> Spec:
    spec = _layer_norm(b, s)
    return Spec(spec.op, spec.operands, {**spec.attrs, "kind": "rms"})


def _group_norm(b: Bound, _: Shapes) -> Spec:
    attrs = {"groups": b["num_groups"], "eps": b["eps"], "affine": "channel"}
    return Spec("group_norm", (b["input"], b["weight"], b["bias"]), attrs)


def _batch_norm(b: Bound, s: Shapes) -> Spec:
    if b.get("training"):
        return whole("aten.batch_norm", "updates its statistics (training mode)", b)
    mean, var = b["running_mean"], b["running_var"]
    if mean is None or var is None:
        return whole("aten.batch_norm", "has no running statistics", b)
    return Spec("batch_norm", (b["input"], b["weight"], b["bias"], mean, var))


def _instance_norm(b: Bound, _: Shapes) -> Spec:
    attrs = {"eps": b["eps"], "use_input_stats": b["use_input_stats"]}
    return Spec(
        "instance_norm", (b["input"], b["weight"], b["bias"], b["running_mean"], b["running_var"]), attrs
    )


def _attention(b: Bound, _: Shapes) -> Spec:
    attrs = {"scale": b["scale"], "causal": b["is_causal"]}
    return Spec("attention", (b["query"], b["key"], b["value"], b["attn_mask"]), attrs)


def _embedding(b: Bound, _: Shapes) -> Spec:
    return Spec("index", (b["weight"], b["indices"]), {"dim": 0})


def _repeat_interleave(b: Bound, s: Shapes) -> Spec:
    if b.get("dim") is None or not isinstance(b["repeats"], int):
        return whole("aten.repeat_interleave", "repeats each position its own number of times", b)
    spelled = isinstance(b.get("output_size"), int)
    return Spec("repeat_interleave", (b["self"],), {"dim": b["dim"], "spelled": spelled})


def _recurrent(gates: int, states: int) -> Entry:
    def entry(b: Bound, s: Shapes) -> Spec:
        hx = b["hx"] if isinstance(b["hx"], (list, tuple)) else [b["hx"]]
        directions = 2 if b["bidirectional"] else 1
        params = list(b["params"])
        attrs = {
            "gates": gates,
            "layers": b["num_layers"],
            "directions": directions,
            "states": states,
            "per": len(params) // (b["num_layers"] * directions),
            "biased": b["has_biases"],
        }
        return Spec("recurrent_torch", (b["input"], *hx, *params), attrs)

    return entry


def _cell(gates: int, states: int) -> Entry:
    def entry(b: Bound, s: Shapes) -> Spec:
        hx = b["hx"] if isinstance(b["hx"], (list, tuple)) else [b["hx"]]
        attrs = {"gates": gates, "states": states}
        return Spec("recurrent_cell", (b["input"], *hx, b["w_ih"], b["w_hh"], b["b_ih"], b["b_hh"]), attrs)

    return entry


def _create(b: Bound, _: Shapes) -> Spec:
    return Spec("create", ())


def _positions(b: Bound, _: Shapes) -> Spec:
    return Spec("positions", ())


def _addmm(b: Bound, _: Shapes) -> Spec:
    names = ("mat1", "mat2") if "mat1" in b else ("batch1", "batch2")
    return Spec("addmm", (b["self"], b[names[0]], b[names[1]]))


_ELEMENTWISE = words(
    """
    abs acos acosh add addcdiv addcmul alias asin asinh atan atan2 atanh bitwise_and bitwise_not
    bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clone contiguous copy copysign cos cosh
    deg2rad detach div divide dropout elu eq erf erfc erfinv exp exp2 expm1 feature_dropout alpha_dropout
    floor floor_divide fmod frac ge gelu gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot
    isfinite isinf isnan le leaky_relu lerp lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp
    logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply
    nan_to_num native_dropout ne neg pow reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn
    sigmoid sign silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh
    threshold trunc xlogy true_divide __and__ __or__ __xor__
    _assert_tensor_metadata lift_fresh expand_as broadcast_tensors
    absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh clip digamma fix float_power fmax fmin
    gcd greater greater_equal i0 igamma igammac isclose isneginf isposinf isreal lcm ldexp less less_equal
    lgamma logaddexp2 mvlgamma negative nextafter not_equal polygamma positive rad2deg signbit frexp
    feature_alpha_dropout bitwise_left_shift bitwise_right_shift __lshift__ __rshift__
    angle complex conj conj_physical imag polar real resolve_conj resolve_neg _conj _conj_physical _neg_view
    alias_copy detach_copy lift _to_cpu pin_memory
    special_bessel_j0 special_bessel_j1 special_digamma special_entr special_erf special_erfc special_erfcx
    special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc
    special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr
    special_logit special_ndtr special_ndtri special_polygamma special_psi special_round special_sinc
    special_xlog1py special_xlogy special_zeta
    """
)
_FIRST_ONLY = words(
    """
    to _to_copy type_as zeros_like ones_like full_like empty_like rand_like randn_like fill zero
    """
)
_REDUCTIONS = {
    "sum": "sum",
    "mean": "mean",
    "amax": "amax",
    "amin": "amin",
    "var": "var",
    "std": "std",
    "prod": "prod",
    "logsumexp": "logsumexp",
    "linalg_vector_norm": "norm",
    "norm": "norm",
    "var_mean": "var",
    "std_mean": "std",
    "all": "all",
    "any": "any",
    "aminmax": "aminmax",
    "count_nonzero": "count_nonzero",
    "nansum": "nansum",
    "nanmean": "nanmean",
    "special_logsumexp": "logsumexp",
    "frobenius_norm": "norm",
}
_ORDERED = words(
    """
    cumsum cumprod logcumsumexp cummax cummin sort argsort argmax argmin msort kthvalue mode
    """
)

#: views that have a form that copies
_COPIED = words(
    """
    expand narrow permute select slice squeeze t transpose unbind unsqueeze view view_as_complex view_as_real
    """
)
_CREATED = words("zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor")
_POSITIONS = words("arange linspace eye tril_indices triu_indices rand randn randint randperm")


def _where(b: Bound, s: Shapes) -> Spec:
    """With one operand it lists positions."""
    return elementwise(b, s) if "self" in b else whole("aten.where", "lists positions", b)


def _vector_norm(b: Bound, s: Shapes) -> Spec:
    """Without an order, or along one axis, it is a norm of vectors."""
    dims = b["dim"]
    if b["ord"] is None or (dims is not None and len(ints(dims)) == 1 and not isinstance(b["ord"], str)):
        return _reduce("norm")(b, s)
    return whole("aten.linalg_norm", "takes a norm of whole matrices", b)


def _difference(b: Bound, s: Shapes) -> Spec:
    if b["prepend"] is not None or b["append"] is not None:
        return whole("aten.diff", "appends to the axis that it takes differences along", b)
    return _ordered(b, s)


def _stacked(rank: int, dim: int) -> Entry:
    """hstack and its kin, where no operand gains axes."""

    def entry(b: Bound, s: Shapes) -> Spec:
        given = list(b["tensors"])
        if any(s.rank(t) < rank for t in given):
            return whole("aten.stack", "gives vectors new axes before it joins them", b)
        return Spec("concat", given, {"dim": dim})

    return entry


def _view(b: Bound, s: Shapes) -> Spec:
    """A view as another dtype shows the bits of numbers."""
    return (
        whole("aten.view", "shows the bits of numbers as another dtype", b)
        if "dtype" in b
        else _reshape(b, s)
    )


TABLE: dict[str, Entry] = {
    **ops_decomposed.TABLE,
    **ops_indexing.TABLE,
    **ops_products.TABLE,
    **ops_signal.TABLE,
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    "where": _where,
    "linalg_norm": _vector_norm,
    "diff": _difference,
    **dict.fromkeys(_FIRST_ONLY, _first),
    **{name: _reduce(kind) for name, kind in _REDUCTIONS.items()},
    **dict.fromkeys(_ORDERED, _ordered),
    "topk": _topk,
    "max": _extremum("amax"),
    "min": _extremum("amin"),
    "median": _extremum("median"),
    "nanmedian": _extremum("nanmedian"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "convolution": _convolution,
    "_convolution": _convolution,
    "linear": same("linear", "input", "weight", "bias"),
    "matmul": same("matmul", "self", "other"),
    "mm": same("matmul", "self", "mat2"),
    "bmm": same("matmul", "self", "mat2"),
    "mv": same("matmul", "self", "vec"),
    "dot": same("matmul", "self", "tensor"),
    "vdot": same("matmul", "self", "other"),
    "addmm": _addmm,
    "baddbmm": _addmm,
    "transformers.grouped_mm_fallback": same("grouped_matmul", "input", "weight", "offs"),
    "einsum": lambda b, s: Spec("einsum", list(b["tensors"]), {"equation": b["equation"]}),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _softmax,
    "prelu": lambda b, s: Spec("prelu", (b["self"], b["weight"])),
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    "index_select": lambda b, s: Spec("index", (b["self"], b["index"]), {"dim": b["dim"]}),
    "index": _index,
    "view": _view,
    **dict.fromkeys(words("reshape _unsafe_view flatten unflatten ravel _reshape_copy"), _reshape),
    "_reshape_alias": _reshape_alias,
    **dict.fromkeys(("view_as", "reshape_as"), _reshape),
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": same("channel_shuffle", "self", groups="groups"),
    "glu": same("glu", "self", dim="dim"),
    "_weight_norm": same("weight_norm", "v", "g", dim="dim"),
    "_weight_norm_interface": same("weight_norm", "v", "g", dim="dim"),
    "permute": _layout(_permuted),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _layout(_swapped)),
    "t": _layout(_reversed),
    "numpy_T": _layout(_reversed),
    **dict.fromkeys(("mT", "mH", "matrix_H", "adjoint"), _layout(_matrix_transposed)),
    **dict.fromkeys(("movedim", "moveaxis"), _layout(_moved)),
    "unsqueeze": _layout(_unsqueezed),
    "squeeze": _squeeze,
    **dict.fromkeys(("expand", "broadcast_to"), same("expand", "self")),
    "repeat": same("tile", "self"),
    "tile": same("tile", "self"),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concat),
    **dict.fromkeys(("vstack", "row_stack"), _stacked(2, 0)),
    **dict.fromkeys(("hstack", "column_stack"), _stacked(2, 1)),
    "dstack": _stacked(3, 2),
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), same("split", "self", dim="dim")),
    "unbind": same("unbind", "self", dim="dim"),
    "select": same("select", "self", dim="dim"),
    "slice": _slice,
    "narrow": _narrow,
    "pad": _pad,
    "constant_pad_nd": _mode_pad("constant"),
    **{f"{mode}_pad{n}d": _mode_pad(mode) for mode in ("reflection", "replication") for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": _spatial(n) for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _spatial(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _spatial(n) for n in (1, 2, 3)},
    **{
        f"upsample_{m}": _spatial(n)
        for m, n in [("nearest1d", 1), ("linear1d", 1), ("nearest2d", 2), ("bilinear2d", 2)]
    },
    **{f"upsample_{m}": _spatial(n) for m, n in [("bicubic2d", 2), ("nearest3d", 3), ("trilinear3d", 3)]},
    **{f"_upsample_{m}": _spatial(n) for m, n in [("nearest_exact1d", 1), ("nearest_exact2d", 2)]},
    "roll": _roll,
    "flip": _flip,
    "rot90": _rot90,
    "tril": _triangle,
    "triu": _triangle,
    "lstm": _recurrent(4, 2),
    "gru": _recurrent(3, 1),
    "rnn_tanh": _recurrent(1, 1),
    "rnn_relu": _recurrent(1, 1),
    "lstm_cell": _cell(4, 2),
    "gru_cell": _cell(3, 1),
    "rnn_tanh_cell": _cell(1, 1),
    "rnn_relu_cell": _cell(1, 1),
    **dict.fromkeys(_CREATED, _create),
    **dict.fromkeys(_POSITIONS, _positions),
    "one_hot": _one_hot,
    "histc": _histogram,
}
TABLE |= {f"{name}_copy": TABLE[name] for name in _COPIED}


def bind(node: Node) -> Bound:
    """Arguments of an ATen node by schema name, defaults filled in."""
    defaults = parameters(node.target)
    bound = defaults.copy()
    bound.update(zip(defaults, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


@cache
def parameters(target: Any) -> Bound:
    """What an ATen operator takes, in order: the defaults by schema name, None without one."""
    return {a.name: a.default_value if a.has_default_value() else None for a in target._schema.arguments}


#: In place these change the shape of their operand, which every other reader of it then sees.
_OWN_FORM = frozenset(words("t transpose swapaxes swapdims squeeze unsqueeze"))


@cache
def aten_name(target: Any) -> str | None:
    """``relu`` for ``aten.relu.default`` and ``aten.relu_.default``; None for what is no ATen operator."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    space, _, base = schema.name.partition("::")
    name: str = base if space == "aten" else schema.name.replace("::", ".")
    own_form = name.endswith("__") or name[:-1] in _OWN_FORM
    return name[:-1] if name.endswith("_") and not own_form else name


#: Python operators that torch.export leaves on symbolic sizes; they compute no tensors.
SIZE_OPERATORS = frozenset({operator.getitem})

"""Entries of the forms that ``run_decompositions`` and export on other devices leave behind."""

from __future__ import annotations

from sparsecc.fx.spec import Bound, Entry, Shapes, Spec, elementwise, operand, same, whole, words


def _layer_norm(b: Bound, s: Shapes) -> Spec:
    rank, n = s.rank(b["input"]), len(b["normalized_shape"])
    attrs = {"kind": "layer", "dims": list(range(rank - n, rank)), "eps": b["eps"]}
    return Spec("layer_norm", (b["input"], b["weight"], b["bias"]), attrs)


def _rms_norm(b: Bound, s: Shapes) -> Spec:
    rank, n = s.rank(b["input"]), len(b["normalized_shape"])
    attrs = {"kind": "rms", "dims": list(range(rank - n, rank)), "eps": b["eps"]}
    return Spec("layer_norm", (b["input"], b["weight"], None), attrs)


def _group_norm(b: Bound, _: Shapes) -> Spec:
    attrs = {"groups": b["group"], "eps": b["eps"], "affine": "channel", "spelled": True}
    return Spec("group_norm", (b["input"], b["weight"], b["bias"]), attrs)


def _running(b: Bound, _: Shapes) -> Spec:
    if b.get("training"):
        return whole("aten.native_batch_norm", "updates its statistics (training mode)", b)
    return Spec("batch_norm", [b[n] for n in words("input weight bias running_mean running_var")])


def _batch_statistics(b: Bound, s: Shapes) -> Spec:
    """Without running statistics: over the batch and space, a channel at a time."""
    if "running_mean" in b or not b["training"]:
        return _running(b, s)
    attrs = {"eps": b["eps"], "dims": [0, *range(2, s.rank(b["input"]))]}
    return Spec("instance_norm", (b["input"], b["weight"], b["bias"]), attrs)


def _attention(b: Bound, _: Shapes) -> Spec:
    mask = b.get("attn_mask", b.get("attn_bias"))
    return Spec(
        "attention", (b["query"], b["key"], b["value"], mask), {"scale": b["scale"], "causal": b["is_causal"]}
    )


def _flash(b: Bound, s: Shapes) -> Spec:
    """Takes values only if they are as wide as queries and keys."""
    op, operands, attrs = _attention(b, s)
    return Spec(op, operands, {**attrs, "one_width": True})


def _softmax(b: Bound, s: Shapes) -> Spec:
    return Spec("softmax", (b["self"],), {"dims": [b["dim"] % max(s.rank(b["self"]), 1)]})


def _pool(count: int) -> Entry:
    def entry(b: Bound, s: Shapes) -> Spec:
        return Spec("mixed", (operand(b),), {"kept": list(range(s.rank(operand(b)) - count))})

    return entry


_SPLITS = ("unsafe_split", "unsafe_split_with_sizes", "split_copy", "split_with_sizes_copy", "unsafe_chunk")

TABLE: dict[str, Entry] = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "_native_batch_norm_legit_no_training": _running,
    "_batch_norm_no_update": _running,
    "native_batch_norm": _running,
    "cudnn_batch_norm": _running,
    "miopen_batch_norm": _running,
    "_native_batch_norm_legit": _batch_statistics,
    "_scaled_dot_product_flash_attention_for_cpu": _flash,
    "_scaled_dot_product_attention_math": _attention,
    **dict.fromkeys(("_log_softmax", "_safe_softmax", "special_softmax", "special_log_softmax"), _softmax),
    "_adaptive_avg_pool2d": _pool(2),
    "_adaptive_avg_pool3d": _pool(3),
    "_upsample_nearest_exact3d": _pool(3),
    **dict.fromkeys([f"_upsample_{m}2d_aa" for m in ("bilinear", "bicubic", "lanczos")], _pool(2)),
    "_prelu_kernel": elementwise,
    "log_sigmoid_forward": elementwise,
    "native_channel_shuffle": same("channel_shuffle", "self", groups="groups"),
    **dict.fromkeys(_SPLITS, same("split", "self", dim="dim")),
}

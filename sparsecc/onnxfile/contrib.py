"""Operators that runtimes fuse (domain ``com.microsoft``) as canonical calls."""

from __future__ import annotations

from sparsecc.onnxfile import quantised
from sparsecc.onnxfile.site import Entry, Site, Spec


def _elementwise(s: Site) -> Spec:
    return Spec("elementwise", s.present())


def _fused_conv(s: Site) -> Spec:
    if s.node.op_type.startswith("Nhwc"):
        raise ValueError("channels last")
    return Spec("fused_conv", s.given(0, 1, 2, 3), {"groups": s.attr("group", 1)})


def _fused_gemm(s: Site) -> Spec:
    attrs = {"trans_a": bool(s.attr("transA", 0)), "trans_b": bool(s.attr("transB", 0))}
    return Spec("fused_gemm", s.given(0, 1, 2), attrs)


def _fused_matmul(s: Site) -> Spec:
    if s.attr("transBatchA", 0) or s.attr("transBatchB", 0):
        raise ValueError("batch axes are transposed")
    attrs = {"trans_a": bool(s.attr("transA", 0)), "trans_b": bool(s.attr("transB", 0))}
    return Spec("fused_matmul", [0, 1], attrs)


def _layer_norm(kind: str) -> Entry:
    def entry(s: Site) -> Spec:
        if len(s.outputs()) > 1:
            raise ValueError("statistics among the outputs")
        rank = len(s.shape(0))
        dims = list(range(s.attr("axis", -1) % rank, rank))
        attrs = {"kind": kind, "dims": dims, "eps": s.attr("epsilon", 1e-5)}
        return Spec("layer_norm", s.given(0, 1, 2), attrs)

    return entry


def _skip_layer_norm(s: Site) -> Spec:
    return Spec("skip_layer_norm", s.given(0, 1, 2, 3, 4), {"outputs": s.outputs()})


def _embed_layer_norm(s: Site) -> Spec:
    return Spec("embed_layer_norm", s.given(*range(9)), {"outputs": s.outputs()})


def _split_gate(s: Site) -> Spec:
    return Spec("split_gate", s.given(0, 1))


def _attention(s: Site) -> Spec:
    if s.attr("do_rotary", 0) or s.attr("past_present_share_buffer", 0) or s.has(6):
        raise ValueError("rotation, or a cache in a shared buffer")
    return quantised.self_attention(s, s.given(0, 1, 2, 3, 4, 5))


def _multi_head(s: Site) -> Spec:
    if not (s.has(1) and s.has(2)) or len(s.shape(1)) == 5 or s.has(8) or s.has(9):
        raise ValueError("packed queries, keys and values, or a cache in a shared buffer")
    attrs = {
        "heads": s.attr("num_heads"),
        "scale": s.attr("scale") or None,
        "causal": bool(s.attr("unidirectional", 0)),
        "outputs": s.outputs(),
    }
    return Spec("multi_head_attention", s.given(*range(8)), attrs)


def _group_query(s: Site) -> Spec:
    quantised_cache = {s.attr("k_quant_type", "NONE"), s.attr("v_quant_type", "NONE")} != {"NONE"}
    if quantised_cache or s.attr("sliding_window_cache", 0) or s.has(16) or len(s.outputs()) > 3:
        raise ValueError("a quantised or windowed cache, or scores among the outputs")
    attrs = {
        "q_heads": s.attr("num_heads"),
        "kv_heads": s.attr("kv_num_heads"),
        "scale": s.attr("scale") or None,
        "outputs": s.outputs(),
    }
    # lengths and positions say where along the sequence, which stays
    return Spec("group_query_attention", s.given(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15), attrs)


def _rotary(s: Site) -> Spec:
    if s.attr("is_packed_batching", 0):
        raise ValueError("ragged batches")
    heads, attrs = s.attr("num_heads", 0), {"interleaved": bool(s.attr("interleaved", 0))}
    if not heads and len(s.shape(0)) == 3:
        heads = s.shape(0)[2] // (2 * s.shape(2)[-1])  # whole heads are turned
    return Spec("rotary_embedding", s.given(0, 2, 3, 1), {**attrs, "heads": heads})


def _trilu(s: Site) -> Spec:
    rank = len(s.shape(0))
    return Spec("ordered", [0], {"dims": [rank - 2, rank - 1]})


def _expand_dims(s: Site) -> Spec:
    axes = s.ints("axes", 1)
    if axes is None:
        raise ValueError("ExpandDims without an axis")
    rank = len(s.out())
    rest = iter(range(rank - 1))
    return Spec("layout", [0], {"source": [None if d == axes[0] % rank else next(rest) for d in range(rank)]})


def _gather_nd(s: Site) -> Spec:
    return Spec("gather_nd", [0, 1], {"batch_dims": s.attr("batch_dims", 0)})


TABLE: dict[str, Entry] = {
    **quantised.CONTRIB,
    **dict.fromkeys(
        ("BiasGelu", "FastGelu", "QuickGelu", "Gelu", "BiasAdd", "SwiGLU"),
        _elementwise,
    ),
    **dict.fromkeys(("FusedConv", "NhwcConv", "NhwcFusedConv"), _fused_conv),
    "FusedGemm": _fused_gemm,
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), _fused_matmul),
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "BiasSplitGelu": _split_gate,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _group_query,
    "RotaryEmbedding": _rotary,
    "Trilu": _trilu,
    "ExpandDims": _expand_dims,
    "GatherND": _gather_nd,
}

#: operators that onnxruntime puts into the default domain
DEFAULT: dict[str, Entry] = {"SimplifiedLayerNormalization": _layer_norm("rms")}

#: inputs that hold weights
WEIGHTS: dict[str, tuple[int, ...]] = {
    "FusedConv": (1,), "FusedGemm": (0, 1), "FusedMatMul": (0, 1), "Attention": (1, 2),
    "EmbedLayerNormalization": (2, 3, 4), "MultiHeadAttention": (3,),
}  # fmt: skip

"""Operators of which no axis may shrink, each with its reason.

Together with the table in ``ops`` these are all operators of ONNX's default domain (a test holds that).
"""

from __future__ import annotations

from sparsecc.onnxfile.site import Entry, Site, Spec

_BODY = "runs a body whose operators are not analysed"
_SEQUENCE = "works on sequences of tensors"
_OPTIONAL = "works on optional values"
_TEXT = "works on text"
_RANDOM = "draws random numbers in an order that follows from its sizes"
_PLACES = "puts places in a tensor into data"
_GENERATES = "generates a sequence with a model inside"
_DEVICE = "lays its operands out for one device; optimise the model for no device (extended optimisations)"

#: default domain: operator -> why every axis that it touches stays
DEFAULT: dict[str, str] = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), _BODY),
    **dict.fromkeys(
        (
            "ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
            "SequenceInsert", "SequenceLength", "SplitToSequence",
        ),
        _SEQUENCE,
    ),
    **dict.fromkeys(("Optional", "OptionalGetElement", "OptionalHasElement"), _OPTIONAL),
    **dict.fromkeys(
        ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"), _TEXT
    ),
    **dict.fromkeys(
        (
            "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
            "RandomUniformLike",
        ),
        _RANDOM,
    ),
    **dict.fromkeys(("NonZero", "EyeLike", "OneHot", "MaxUnpool"), _PLACES),
    "Shape": "puts sizes into data",
    "Size": "puts sizes into data",
    "Unique": "compares whole slices with each other",
    "NonMaxSuppression": "selects boxes by comparing them with each other",
    "AffineGrid": "makes coordinates of the sizes of an image",
    "MelWeightMatrix": "makes a matrix of numbers of bins",
    "ImageDecoder": "decodes bytes",
    "NegativeLogLikelihoodLoss": "looks up positions of the class axis",
    "SoftmaxCrossEntropyLoss": "looks up positions of the class axis",
    "LinearAttention": "carries a state of heads and dimensions through the sequence",
}  # fmt: skip

#: operators of other domains
CONTRIB: dict[tuple[str, str], str] = {
    **{("com.microsoft", name): _GENERATES for name in
       ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch")},
    **{("com.microsoft", name): "routes tokens to experts by number" for name in
       ("MoE", "QMoE", "MoEPacked", "MoEGroupRouter")},
    **{("com.microsoft", name): _TEXT for name in ("Tokenizer", "WordConvEmbedding", "MurmurHash3")},
    **{("com.microsoft", name): "compares whole slices with each other" for name in ("Unique", "CDist")},
    **{("com.microsoft", name): "has a layout for one device" for name in
       ("QuantizeWithOrder", "DequantizeWithOrder", "QOrderedAttention", "QOrderedGelu",
        "QOrderedLayerNormalization", "QOrderedMatMul", "EPContext")},
    **{("com.microsoft", name): "mixes the positions of its last axes" for name in
       ("Inverse", "Rfft", "Irfft")},
    ("com.microsoft", "Range"): "puts positions into data",
    ("com.microsoft", "DynamicQuantizeLSTM"): "packs the quantised weights of its gates",
    ("com.microsoft", "GatherBlockQuantized"): "looks up rows of packed numbers",
    **{("com.microsoft.nchwc", name): _DEVICE for name in
       ("Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "ReorderInput",
        "ReorderOutput", "Upsample")},
}  # fmt: skip


def opaque(domain: str, op_type: str) -> Entry | None:
    """The entry that freezes an operator for its own reason; None for operators without one."""
    why = DEFAULT.get(op_type) if domain in ("", "ai.onnx") else CONTRIB.get((domain, op_type))
    return None if why is None else _frozen(why)


def _frozen(why: str) -> Entry:
    def entry(s: Site) -> Spec:
        return Spec("opaque", s.present(), {"why": why})

    return entry

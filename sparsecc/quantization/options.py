"""What may be asked of the quantisers, and models that they cannot be asked to quantise."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from onnx import TensorProto

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.quantised import AUXILIARY, QUANTISERS

WEIGHTS = ("int8",)
#: of activations; None quantises them as they come, with a range of every tensor's own
ACTIVATIONS = ("int8", "uint8", None)
METHODS = ("minmax", "entropy", "percentile")

_QUANTISED = QUANTISERS | AUXILIARY.keys() - {"RotaryEmbedding", "GroupQueryAttention"}
_OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``sparsecc.quantize`` that say what is done to a model."""

    weights: str = "int8"
    activations: str | None = "int8"
    per_channel: bool = True
    method: str = "minmax"
    biases: bool = True
    reduce_range: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _known("weights", self.weights, WEIGHTS, "weights are symmetric, so that zeros stay zeros")
        _known("activations", self.activations, ACTIVATIONS, "None quantises them when the model runs")
        _known("method", self.method, METHODS, "how ranges follow from calibration data")
        for name in ("per_channel", "biases", "reduce_range"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidOption(f"{name}={getattr(self, name)!r}: give True or False")


def _known(name: str, value: object, known: Collection[object], words: str) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
    listed = ", ".join(map(repr, known))
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InvalidOption(f"{name}={value!r} is not known{hint}; there is {listed}: {words}")


def check_quantisable(file: OnnxFile) -> None:
    """Raise InvalidOption for a model that is quantised already, or that is not of float32."""
    for node in file.proto.graph.node:
        if node.op_type in _QUANTISED:
            raise InvalidOption(
                f"the model is quantised already: it has {node.op_type} {node.name or node.output[0]!r}; "
                "quantise the float model, or prune this one as it is (scales are cut along)"
            )
    kinds = {t.name: t.data_type for t in file.proto.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in file.inputs}
    other = next((name for name, kind in kinds.items() if kind in _OTHER_FLOATS), None)
    if other is not None:
        kind = TensorProto.DataType.Name(kinds[other]).lower()
        raise InvalidOption(
            f"{other!r} is {kind}; only float32 models are quantised: convert the model first"
        )

"""Target ``onnx``: the slimmed model as a plain ONNX file, for any runtime that reads ONNX."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecc.artifact import MODEL, WEIGHTS, Artifact, Generated, Member, make_manifest
from sparsecc.signature import Signature, onnx_signature
from sparsecc.target import ANY_PATTERN, Capabilities, Target, TargetSpec
from sparsecc.targets.ort import OrtExecutor

if TYPE_CHECKING:
    import onnx

    from sparsecc.onnxfile.model import OnnxFile

_ALIGNMENT = 64


class Onnx(Target):
    """The artifact's main product is ``model.onnx``: ``artifact.save("model.onnx")`` writes just that."""

    name: ClassVar[str] = "onnx"
    capabilities: ClassVar[Capabilities] = Capabilities(
        "the slimmed model as a plain ONNX file; it carries N:M patterns as zeros in dense weights, so that "
        "runtimes which know them may use them",
        patterns=(ANY_PATTERN,),
    )

    def build(
        self,
        model: OnnxFile,
        spec: TargetSpec,
        *,
        signature: Signature | None = None,
        recipe: str | None = None,
        report: Mapping[str, Any] | None = None,
        certificate: Mapping[str, Any] | None = None,
        members: Mapping[str, bytes] | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
    ) -> Artifact:
        """Pack ``model``; without ``signature`` it is called by the names of its inputs."""
        manifest = make_manifest(
            target=str(spec),
            signature=signature or onnx_signature(model.proto),
            recipe=recipe,
            report=report,
            certificate=certificate,
            main=MODEL,
        )
        return Artifact(manifest, {**onnx_members(model), **(members or {})})

    def executor(self, artifact: Artifact, *, threads: int | None = None) -> OrtExecutor:
        """The model on onnxruntime."""
        return OrtExecutor(artifact, threads=threads)


def onnx_members(model: OnnxFile, *, limit: int | None = None) -> dict[str, Member]:
    """``model.onnx`` with its weights inside, or beside it in ``weights.bin`` above ``limit`` bytes.

    A model that is unchanged and complete keeps its very bytes.  ``limit`` is what one protobuf
    message holds (2 GB), unless it is given.
    """
    from sparsecc.onnxfile.model import EXTERNAL_THRESHOLD, SPLIT_AT, copy_proto, encode, serialise

    tensors = list(_tensors(model.proto))
    outside = [tensor for tensor in tensors if _is_external(tensor)]
    total = _size(model.proto) + sum(model.read(tensor).nbytes for tensor in outside)
    split = total > (SPLIT_AT if limit is None else limit)
    if not outside and not split:
        return {MODEL: model.raw if model.raw is not None else serialise(model.proto)}
    weights = _Weights()
    replaced = {
        tensor.name: weights.add(tensor, model.read(tensor).size)
        for tensor in model.proto.graph.initializer
        if split and (_is_external(tensor) or _nbytes(tensor) >= EXTERNAL_THRESHOLD)
    }
    proto = copy_proto(model.proto, replaced)  # without the payloads, which may not fit in memory twice
    for place, (tensor, original) in enumerate(zip(_tensors(proto), tensors, strict=True)):
        if place < len(proto.graph.initializer) and tensor.name in replaced:
            continue
        if split and (_is_external(original) or _nbytes(original) >= EXTERNAL_THRESHOLD):
            tensor.CopyFrom(weights.add(original, model.read(original).size))
        elif _is_external(original):
            inside = _header(original)
            inside.raw_data = encode(model.read(original), original.data_type)
            tensor.CopyFrom(inside)
    members: dict[str, Member] = {MODEL: serialise(proto)}
    if weights.placed:
        members[WEIGHTS] = Generated(partial(_weight_chunks, model, weights.placed))
    return members


@dataclass(slots=True)
class _Weights:
    """Where each tensor lies in ``weights.bin``."""

    placed: list[tuple[int, onnx.TensorProto]] = field(default_factory=list)
    end: int = 0

    def add(self, tensor: onnx.TensorProto, count: int) -> onnx.TensorProto:
        """Place a tensor of ``count`` elements; what stands for it in the model."""
        from onnx import TensorProto

        from sparsecc.onnxfile.model import payload_bytes

        offset = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        size = payload_bytes(tensor.data_type, count)
        self.placed.append((offset, tensor))
        self.end = offset + size
        pointer = _header(tensor)
        pointer.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(size))):
            pointer.external_data.add(key=key, value=value)
        return pointer


def _header(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A tensor proto of the same name, type and shape, without content."""
    from onnx import TensorProto

    return TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, doc_string=tensor.doc_string
    )


def _size(proto: onnx.ModelProto) -> float:
    """Bytes of the serialised proto; infinite where protobuf cannot even count them."""
    from sparsecc.onnxfile.model import EncodeError

    try:
        return float(proto.ByteSize())
    except EncodeError:
        return math.inf


def _weight_chunks(model: OnnxFile, weights: list[tuple[int, onnx.TensorProto]]) -> Iterator[bytes]:
    from sparsecc.onnxfile.model import encode

    end = 0
    for offset, tensor in weights:
        data = encode(model.read(tensor), tensor.data_type)
        yield bytes(offset - end) + data if offset > end else data
        end = offset + len(data)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    from sparsecc.onnxfile.model import graph_tensors, graphs

    for graph in graphs(proto):
        yield from graph_tensors(graph)


def _is_external(tensor: onnx.TensorProto) -> bool:
    from onnx import TensorProto

    return tensor.data_location == TensorProto.EXTERNAL


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an inline payload; none for strings, which cannot be external."""
    from onnx import TensorProto

    return 0 if tensor.data_type == TensorProto.STRING else tensor.ByteSize()

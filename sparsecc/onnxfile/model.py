"""The container of an ONNX model: one proto that is never modified, and its weights.

The proto is parsed without its external payloads; a tensor is read when it is asked for, without
copying where the format allows it (external data is memory-mapped).  What a hostile or damaged
file could do (paths that leave its folder, sizes that lie, names defined twice, cycles, recursive
functions) is checked once, when the model is loaded.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from sparsecc.errors import InvalidModel, SparseccError, UnsupportedModel, summary
from sparsecc.onnxfile.structure import check_structure, execution_order
from sparsecc.onnxfile.tensors import (
    TORCH_DTYPES,
    Array,
    check_typed_length,
    constant_attribute,
    declared_size,
    decode,
    encode,
    entry_number,
    external_entries,
    numpy_dtype,
    payload_bytes,
    set_typed,
    to_numpy,
    to_torch,
    type_name,
    wrong_size,
)

__all__ = [
    "ALIGNMENT",
    "EXTERNAL_THRESHOLD",
    "MIN_OPSET",
    "PAYLOAD",
    "SPLIT_AT",
    "TORCH_DTYPES",
    "Array",
    "EncodeError",
    "OnnxFile",
    "SourceKind",
    "constant_attribute",
    "copy_proto",
    "encode",
    "external_entries",
    "external_path",
    "graph_tensors",
    "graphs",
    "numpy_dtype",
    "payload_bytes",
    "replace_tensor",
    "serialise",
    "subgraphs",
    "to_numpy",
    "to_torch",
    "type_name",
]

_protobuf = importlib.import_module("google.protobuf.message")  # its stubs are a package of their own
DecodeError: type[Exception] = _protobuf.DecodeError
EncodeError: type[Exception] = _protobuf.EncodeError

SourceKind = Literal["path", "bytes", "proto", "ir", "gs"]

MIN_OPSET = 11
PROTO_LIMIT = 2**31 - 1
"""Bytes that one protobuf message can hold; a larger model needs external data."""
EXTERNAL_THRESHOLD = 1024
"""Bytes from which a tensor moves to external data when a model has to be split."""
SPLIT_AT = PROTO_LIMIT - (64 << 20)
PAYLOAD = "payload"
ALIGNMENT = 64


class OnnxFile:
    """An ONNX model: ``proto`` and whatever is needed to read its weights and to write it again.

    The proto is shared, not copied, and is never modified; ``derive`` makes the container of an
    edited one.  ``raw`` holds the bytes that the model was read from, ``base_dir`` the folder that
    external data is relative to, ``kind`` what the user gave.
    """

    def __init__(
        self,
        proto: ModelProto,
        *,
        raw: bytes | None = None,
        base_dir: Path | None = None,
        kind: SourceKind = "proto",
        path: Path | None = None,
        payloads: Mapping[str, Array] | None = None,
    ) -> None:
        self.proto = proto
        self.raw = raw
        self.base_dir = base_dir
        self.kind: SourceKind = kind
        self.path = path
        self.payloads: dict[str, Array] = dict(payloads or {})
        self.initializers: dict[str, TensorProto] = {t.name: t for t in proto.graph.initializer}
        self.constants: dict[str, NodeProto] = {
            node.output[0]: node for node in proto.graph.node if node.op_type == "Constant" and node.output
        }
        self._read: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._maps: dict[Path, Array] = {}
        self._order: list[int] | None = None

    # ------------------------------------------------------------------ loading

    @classmethod
    def load(cls, source: Any, *, base_dir: str | os.PathLike[str] | None = None) -> OnnxFile:
        """The model behind a path, bytes, ``ModelProto``, ``onnx_ir.Model`` or graphsurgeon ``Graph``.

        ``base_dir`` is the folder of external data for a model that was not given as a path.
        Raises ``InvalidModel`` for files that are missing, damaged or hostile, ``UnsupportedModel``
        for valid models that sparsecc cannot represent, ``TypeError`` for any other source.
        """
        folder = Path(base_dir) if base_dir is not None else None
        if isinstance(source, OnnxFile):
            return source
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            raw = _read_file(path)
            proto = _parse(raw, str(path))
            model = cls(proto, raw=raw, base_dir=folder or path.parent, kind="path", path=path)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            raw = bytes(source)
            model = cls(_parse(raw, "the given bytes"), raw=raw, base_dir=folder, kind="bytes")
        elif isinstance(source, ModelProto):
            model = cls(source, base_dir=folder, kind="proto")
        elif _is_instance(source, "onnx_ir", "Model"):
            model = cls(_from_ir(source), base_dir=folder or _ir_base_dir(source), kind="ir")
        elif _is_instance(source, "onnx_graphsurgeon", "Graph"):
            model = cls(_from_gs(source), base_dir=folder, kind="gs")
        else:
            raise TypeError(
                f"cannot load an ONNX model from {type(source).__name__}; give a path, bytes, "
                "onnx.ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph"
            )
        model._validate_named()
        return model

    def derive(self, proto: ModelProto, payloads: Mapping[str, Array] | None = None) -> OnnxFile:
        """The container of an edited copy of this model's proto.

        ``payloads`` holds the data of tensors that ``replace_tensor`` left out of the proto.
        """
        merged = {**self.payloads, **(payloads or {})}
        return OnnxFile(proto, base_dir=self.base_dir, kind=self.kind, path=self.path, payloads=merged)

    def _validate_named(self) -> None:
        """``validate`` whose errors say which file they are about."""
        try:
            self.validate()
        except SparseccError as error:
            if self.path is None:
                raise
            raise type(error)(f"{self.path}: {error}") from error

    def validate(self) -> None:
        """Check everything that can be checked without computing; see ``load`` for the errors."""
        _check_texts(self.proto)
        check_structure(self.proto, MIN_OPSET)
        for graph in graphs(self.proto):
            for tensor in graph_tensors(graph):
                self._check_payload(tensor)

    def check(self, *, full: bool = False) -> str | None:
        """What ``onnx.checker`` says against the model; None when it passes.

        ``full`` adds strict shape inference.
        """
        try:
            external = any(True for _ in self._external_tensors())
            if self.raw is not None and self.path is not None and external:
                onnx.checker.check_model(str(self.path), full_check=full)
            elif external or (self.raw is None and self.proto.ByteSize() > SPLIT_AT):
                with tempfile.TemporaryDirectory() as folder:
                    target = Path(folder) / "model.onnx"
                    self.save(target)
                    onnx.checker.check_model(str(target), full_check=full)
            else:
                onnx.checker.check_model(self.raw or self.proto, full_check=full)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return str(error).strip()
        except (EncodeError, ValueError) as error:
            return f"cannot be checked: {summary(error)}"
        return None

    # ------------------------------------------------------------------ structure

    @property
    def opset(self) -> int:
        """The version of the default operator domain."""
        return self.opsets.get("", 0)

    @property
    def opsets(self) -> dict[str, int]:
        """The operator set versions by domain; the default domain is ``""``."""
        return {_domain(entry.domain): entry.version for entry in self.proto.opset_import}

    @property
    def order(self) -> list[int]:
        """Indices of the main graph's nodes in an order in which they can be executed."""
        if self._order is None:
            self._order = execution_order(self.proto.graph)
        return self._order

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The inputs that a caller has to give: graph inputs that are no initializers."""
        return [value for value in self.proto.graph.input if value.name not in self.initializers]

    def inlined(self) -> OnnxFile:
        """The model without local functions; itself when it has none."""
        if not self.proto.functions:
            return self
        import onnx.inliner

        left: list[str] = []
        for convert in (False, True):  # functions may be written for another opset than the model
            try:
                proto = onnx.inliner.inline_local_functions(self.proto, convert)
            except Exception as error:  # the inliner raises bare RuntimeError from C++
                raise UnsupportedModel(
                    f"the model's local functions cannot be inlined: {summary(error)}; "
                    "export without functions"
                ) from error
            used = {(_domain(node.domain), node.op_type) for graph in graphs(proto) for node in graph.node}
            left = [f.name for f in proto.functions if (_domain(f.domain), f.name) in used]
            if not left:
                break
        if left:
            names = ", ".join(left[:5])
            raise UnsupportedModel(f"local functions cannot be inlined: {names}; export without functions")
        found = self.derive(proto)
        found.validate()
        return found

    # ------------------------------------------------------------------ weights

    def tensor_type(self, name: str) -> tuple[tuple[int, ...], int]:
        """Shape and ONNX element type of an initializer or Constant output, without reading it."""
        tensor = self._tensor_proto(name)
        if isinstance(tensor, TensorProto):
            return tuple(tensor.dims), tensor.data_type
        array = self.array(name)
        return array.shape, onnx.helper.np_dtype_to_tensor_dtype(array.dtype)

    def array(self, name: str) -> Array:
        """An initializer or the output of a Constant node as a numpy array, not copied if possible.

        Raises ``KeyError`` for other names and ``InvalidModel`` where the payload does not fit.
        """
        cached = self._read.get(name)
        if cached is not None:
            return np.asarray(cached)
        tensor = self._tensor_proto(name)
        array = self.read(tensor) if isinstance(tensor, TensorProto) else self._attribute(tensor)
        self._read[name] = array
        return array

    def tensor(self, name: str) -> torch.Tensor:
        """An initializer or the output of a Constant node as a torch tensor, not copied if possible.

        4-bit and 2-bit integers come as int8 or uint8.  Raises as ``array`` does, and
        ``UnsupportedModel`` for strings.
        """
        array = self.array(name)
        tensor = to_torch(array)
        if tensor is None:
            small = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8}
            kind = small.get(array.dtype.name, np.float32 if array.dtype.name.startswith("float") else None)
            if kind is None:
                raise UnsupportedModel(f"tensor {name!r} holds {array.dtype}, which torch cannot represent")
            tensor = torch.from_numpy(array.astype(kind))
        return tensor

    def read(self, tensor: TensorProto) -> Array:
        """The values of any tensor of this model (also in subgraphs and attributes).

        Raises ``InvalidModel`` where payload and declared shape do not fit.
        """
        count, size = declared_size(tensor)
        shape = tuple(tensor.dims)
        external = external_entries(tensor)
        if PAYLOAD in external:
            return self.payloads[external[PAYLOAD]]
        if tensor.data_type == TensorProto.STRING:
            return np.array(list(tensor.string_data), dtype=object).reshape(shape)
        if external:
            return decode(self._mapped(tensor, external, size), tensor.data_type, count, shape)
        if tensor.HasField("raw_data"):
            raw = np.frombuffer(tensor.raw_data, np.uint8)
            if raw.size != size:
                raise wrong_size(tensor, size, f"{raw.size} bytes")
            return decode(raw, tensor.data_type, count, shape)
        check_typed_length(tensor, count)
        return numpy_helper.to_array(tensor)

    def _tensor_proto(self, name: str) -> TensorProto | AttributeProto:
        if name in self.initializers:
            return self.initializers[name]
        attributes: dict[str, AttributeProto] = {a.name: a for a in self.constants[name].attribute}
        if "value" in attributes:
            tensor: TensorProto = attributes["value"].t
            return tensor
        if "sparse_value" in attributes:
            raise _sparse(f"Constant {name!r}")
        for key, attribute in attributes.items():
            if key.startswith("value_"):
                return attribute
        raise InvalidModel(f"Constant {name!r} has no value; export the model again")

    def _attribute(self, attribute: AttributeProto) -> Array:
        return constant_attribute(attribute)

    # ------------------------------------------------------------------ payload checks

    def _check_payload(self, tensor: TensorProto) -> None:
        count, size = declared_size(tensor)
        external = external_entries(tensor)
        if external:
            if PAYLOAD not in external and self.base_dir is not None:
                self._located(tensor, external, size)
        elif tensor.HasField("raw_data"):
            found = len(tensor.raw_data)
            if found != size:
                raise wrong_size(tensor, size, f"{found} bytes")
        else:
            check_typed_length(tensor, count)

    def _located(self, tensor: TensorProto, external: Mapping[str, str], size: int) -> tuple[Path, int]:
        """File and offset of an external payload, checked to lie inside the model's folder."""
        name = tensor.name or "of a Constant"
        if self.base_dir is None:
            raise InvalidModel(
                f"tensor {name!r} has external data, and the model's folder is not known; "
                "load the model from its path, or give base_dir="
            )
        path = external_path(self.base_dir, external.get("location", ""), name, self.path)
        offset = entry_number(external, "offset", name)
        length = entry_number(external, "length", name) if "length" in external else size
        try:
            available = path.stat().st_size
        except OSError as error:
            raise InvalidModel(
                f"tensor {name!r}: external data file {external.get('location')!r} is missing; "
                f"put it beside the model ({error.strerror})"
            ) from error
        if not path.is_file():
            raise InvalidModel(f"tensor {name!r}: external data {external.get('location')!r} is not a file")
        if length != size:
            raise wrong_size(tensor, size, f"{length} bytes of external data")
        if offset + length > available:
            raise InvalidModel(
                f"tensor {name!r}: external data ends at byte {offset + length}, but "
                f"{external.get('location')!r} has {available}; the file is truncated, copy it again"
            )
        return path, offset

    def _mapped(self, tensor: TensorProto, external: Mapping[str, str], size: int) -> Array:
        path, offset = self._located(tensor, external, size)
        if size == 0:
            return np.empty(0, np.uint8)
        if path not in self._maps:
            # copy-on-write: the file is never written, and torch gets memory that may be written
            self._maps[path] = np.memmap(path, np.uint8, mode="c")
        return np.asarray(self._maps[path][offset : offset + size])

    def _external_tensors(self) -> Iterator[TensorProto]:
        for graph in graphs(self.proto):
            for tensor in graph_tensors(graph):
                if tensor.data_location == TensorProto.EXTERNAL:
                    yield tensor

    # ------------------------------------------------------------------ writing

    def to_kind(self, kind: SourceKind | None = None) -> Any:
        """The model as it was given: ``bytes``, ``onnx_ir.Model``, graphsurgeon ``Graph``, else a
        ``ModelProto`` (also for a model that was given as a path).

        External data that was replaced is put into the model, so that the result is complete;
        raises ``UnsupportedModel`` where that would exceed 2 GB (then ``save`` it).
        """
        kind = kind or self.kind
        if kind == "bytes":
            return self.to_bytes()
        proto = self._embedded()
        if kind == "ir":
            import onnx_ir

            model = onnx_ir.from_proto(proto)
            if self.base_dir is not None:
                onnx_ir.external_data.set_base_dir(model.graph, self.base_dir)
            return model
        if kind == "gs":
            import onnx_graphsurgeon

            return onnx_graphsurgeon.import_onnx(proto)
        return proto

    def to_bytes(self) -> bytes:
        """The serialised model; the very bytes it was read from when nothing was changed."""
        if self.raw is not None:
            return self.raw
        return serialise(self._embedded())

    def _embedded(self) -> ModelProto:
        if not self.payloads:
            return self.proto
        total = sum(array.nbytes for array in self.payloads.values())
        if total + self.proto.ByteSize() > SPLIT_AT:
            raise UnsupportedModel("the model exceeds 2 GB, which one message cannot hold; save it to a path")
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        for graph in graphs(proto):
            for tensor in graph_tensors(graph):
                if PAYLOAD in external_entries(tensor):
                    array = self.payloads[external_entries(tensor)[PAYLOAD]]
                    _set_inline(tensor, encode(array, tensor.data_type))
        return proto

    def save(self, path: str | os.PathLike[str], *, compact: bool = True) -> None:
        """Write the model and its external data; each file appears whole or not at all.

        Tensors that were external stay so, in files of the same names beside the model (never
        over the files that this model was read from: those names get the new model's stem).
        With ``compact=False`` untouched tensors keep their offsets, so that their protos stay
        byte-identical, at the price of gaps.  A model over 2 GB is split by itself.
        Raises ``InvalidOption`` where the folder cannot be written, and for a ``path`` that holds the
        external data of this very model.
        """
        from sparsecc.onnxfile.writing import write_model

        write_model(self, Path(path), compact=compact)


# ---------------------------------------------------------------------- helpers for editors


def replace_tensor(
    proto: TensorProto,
    name: str,
    array: Array | torch.Tensor,
    payloads: MutableMapping[str, Array] | None = None,
) -> TensorProto:
    """A new proto with the shape and values of ``array``, everything else as in ``proto``.

    Element type, name, doc string and layout (raw bytes, typed field or external data) are kept.
    The data of an external tensor goes to ``payloads[name]`` (give the dictionary to ``derive``);
    without ``payloads`` it is stored in the proto.  ``name`` must be unique among the payloads.
    """
    values = to_numpy(array)
    wanted = numpy_dtype(proto.data_type)
    if proto.data_type != TensorProto.STRING and values.dtype != wanted:
        values = values.astype(wanted)
    result = TensorProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name in ("name", "doc_string", "data_type"):
            setattr(result, descriptor.name, value)
        elif descriptor.name == "metadata_props":
            result.metadata_props.extend(value)
    result.dims.extend(values.shape)
    external = external_entries(proto)
    if external and payloads is not None:
        payloads[name] = np.ascontiguousarray(values)
        result.data_location = TensorProto.EXTERNAL
        for key, text in (("location", external.get("location", "")), (PAYLOAD, name)):
            result.external_data.add(key=key, value=text)
    elif external or proto.HasField("raw_data"):
        result.raw_data = encode(values, proto.data_type)
    else:
        set_typed(result, values)
    return result


def copy_proto(proto: ModelProto, replace: Mapping[str, TensorProto]) -> ModelProto:
    """A copy of a model in which the initializers named in ``replace`` are the given protos.

    Payloads that are replaced are never copied.  Values of Constant nodes can be replaced too, by
    the name of the node's output.  Order, and every other field, is kept.
    """
    result = ModelProto()
    _copy_fields(proto, result, {"graph"})
    graph = result.graph
    _copy_fields(proto.graph, graph, {"initializer", "node"})
    for tensor in proto.graph.initializer:
        graph.initializer.add().CopyFrom(replace.get(tensor.name, tensor))
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.output and node.output[0] in replace:
            copy = graph.node.add()
            _copy_fields(node, copy, {"attribute"})
            attribute = copy.attribute.add(name="value", type=AttributeProto.TENSOR)
            attribute.t.CopyFrom(replace[node.output[0]])
        else:
            graph.node.add().CopyFrom(node)
    return result


def graphs(proto: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every subgraph, outer ones first."""
    stack = [proto.graph]
    while stack:
        graph = stack.pop()
        yield graph
        stack.extend(subgraph for node in graph.node for subgraph in subgraphs(node))


def every_name(proto: ModelProto) -> set[str]:
    """Every name of a value in a model."""
    found = {v.name for v in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)}
    for graph in graphs(proto):
        found.update(t.name for t in graph.initializer)
        for node in graph.node:
            found.update(node.output)
            found.update(node.input)
    return found


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs among the attributes of a node."""
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            found.append(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            found.extend(attribute.graphs)
    return found


def graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers and tensor attributes of one graph, without those of its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.TENSORS:
                yield from attribute.tensors


def external_path(base: Path, location: str, name: str, model_path: Path | None = None) -> Path:
    """The real path of external data; refuses locations that leave the model's folder."""
    hint = "external data must lie in the model's folder; save the model again with relative locations"
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or location.startswith(("/", "\\", "~")) or ":" in parts[0]:
        raise InvalidModel(f"tensor {name!r}: external data {location!r} is no relative path; {hint}")
    if ".." in parts:
        raise InvalidModel(f"tensor {name!r}: external data location {location!r} leaves the folder; {hint}")
    roots = [base.resolve()]
    if model_path is not None:
        roots.append(model_path.resolve().parent)
    path = (base / location).resolve()
    if not any(path.is_relative_to(root) for root in roots):
        raise InvalidModel(f"tensor {name!r}: external data {location!r} is a link out of the folder; {hint}")
    return path


# ---------------------------------------------------------------------- reading


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise InvalidModel(f"{path} is a folder; give the path of an .onnx file")
        size = path.stat().st_size
        if size > PROTO_LIMIT:
            raise InvalidModel(
                f"{path} has {size} bytes, and protobuf holds at most 2 GB; "
                "save the model with external data (onnx.save(..., save_as_external_data=True))"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidModel(f"no such file: {path}; check the path of the ONNX model") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidModel(f"cannot read {path}: {reason}") from error


def _parse(raw: bytes, where: str) -> ModelProto:
    if not raw:
        raise InvalidModel(f"{where}: empty, not an ONNX model; copy or export it again")
    try:
        proto: ModelProto = ModelProto.FromString(raw)
        return proto
    except (DecodeError, ValueError) as error:
        raise InvalidModel(
            f"{where}: not a complete ONNX model (truncated, damaged, nested too deeply or another "
            "format); copy or export it again"
        ) from error


def _check_texts(proto: ModelProto) -> None:
    """Protobuf gives a text that is not UTF-8 as bytes, which then cannot be copied or compared."""
    stack: list[Any] = [proto]
    while stack:
        for descriptor, value in stack.pop().ListFields():
            values = value if hasattr(value, "append") else (value,)
            if descriptor.message_type is not None:
                stack.extend(values)
            elif descriptor.type == descriptor.TYPE_STRING and any(isinstance(v, bytes) for v in values):
                raise InvalidModel(
                    f"the model holds a {descriptor.name} that is not UTF-8 ({values[0]!r:.40}): "
                    "it is damaged, "
                    "copy or export it again"
                )


def _is_instance(source: object, module: str, name: str) -> bool:
    loaded = sys.modules.get(module)
    kind = getattr(loaded, name, None)
    return isinstance(kind, type) and isinstance(source, kind)


def _from_ir(source: Any) -> ModelProto:
    try:
        proto: ModelProto = sys.modules["onnx_ir"].to_proto(source)
    except Exception as error:  # whatever a half-built IR raises
        raise InvalidModel(f"the onnx_ir model cannot be serialised: {summary(error)}") from error
    return proto


def _ir_base_dir(source: Any) -> Path | None:
    external = getattr(sys.modules["onnx_ir"], "ExternalTensor", ())
    for value in source.graph.initializers.values():
        if isinstance(value.const_value, external):
            return Path(value.const_value.base_dir)
    return None


def _from_gs(source: Any) -> ModelProto:
    try:
        proto: ModelProto = sys.modules["onnx_graphsurgeon"].export_onnx(source)
    except Exception as error:  # whatever a half-built graph raises
        raise InvalidModel(f"the onnx-graphsurgeon graph cannot be serialised: {summary(error)}") from error
    return proto


def _sparse(where: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where} is a SparseTensor, which is not supported; store it dense "
        "(sparsity patterns are recognised from the zeros of a dense tensor)"
    )


def _set_inline(tensor: TensorProto, data: bytes) -> None:
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")
    tensor.raw_data = data


def _copy_fields(source: Any, target: Any, skip: Iterable[str]) -> None:
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if hasattr(value, "extend"):  # a repeated field
            getattr(target, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(target, descriptor.name).CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)


def serialise(proto: ModelProto) -> bytes:
    try:
        data: bytes = proto.SerializeToString()
        return data
    except (EncodeError, ValueError) as error:
        raise UnsupportedModel("the model exceeds 2 GB, which one message cannot hold; save it") from error


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain

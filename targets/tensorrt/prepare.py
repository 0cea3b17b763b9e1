"""The surgery: a model in which TensorRT can pick sparse kernels, computing what it computed before.

    prepared = prepare(model)                        a path, bytes, ModelProto, onnx_ir.Model or gs.Graph;
    prepared = prepare(graph, dtype="fp16")          ONNX comes back in the form that it was given

Untouched nodes and initializers come back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsecc.errors import InvalidOption, TargetUnavailable

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import ModelProto

    from sparsecc.onnxfile.model import OnnxFile

DTYPES = ("fp16", "bf16")


@dataclass(frozen=True, eq=False)
class Prepared:
    """The result of the surgery.

    ``rounds`` maps the outputs of products to the shorter type that they are computed in now, ``notes`` the
    outputs of products to what was done to them, or why something was not.  ``origin`` maps outputs of
    products in ``file`` to those in the original, where the two differ.
    """

    file: OnnxFile
    rounds: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)


def prepare(model: Any, dtype: str | None = None, *, linear: str = "matmul") -> Any:
    """``model`` with its products spelled, stored and typed as TensorRT's sparse kernels need them.

    ``dtype``: compute products with stored weights in ``fp16`` or ``bf16`` (None keeps the types, ``auto``
    takes fp16 where a float32 weight has the 2:4 pattern).  ``linear``: keep products as ``matmul``, or make
    1x1 convolutions (``conv``) of them where their operands have two or three axes.  The model given is not
    changed.

    Raises ``InvalidOption`` for other words, ``TargetUnavailable`` without onnx-graphsurgeon, and what
    loading a model raises.
    """
    from sparsecc.onnxfile.model import OnnxFile

    file = OnnxFile.load(model)
    prepared = prepare_file(file, dtype, linear=linear).file
    return prepared.to_kind(file.kind)


def prepare_file(file: OnnxFile, dtype: str | None = None, *, linear: str = "matmul") -> Prepared:
    """``prepare`` on a loaded model, with what was done."""
    _check(dtype, linear)
    with _quiet():
        return _prepared(file, dtype, linear)


def _prepared(file: OnnxFile, dtype: str | None, linear: str) -> Prepared:
    import onnx_graphsurgeon as gs

    from sparsecc.targets.tensorrt.graft import grafted
    from sparsecc.targets.tensorrt.opsets import raised
    from sparsecc.targets.tensorrt.spelling import respell
    from sparsecc.targets.tensorrt.stored import SUMMED
    from sparsecc.targets.tensorrt.surgeon import Surgeon
    from sparsecc.targets.tensorrt.types import Typing

    given = file.inlined()
    convolves = linear == "conv" or any(node.op_type == "Conv" for node in given.proto.graph.node)
    file = raised(given) if dtype == "bf16" and convolves else given
    graph = gs.import_onnx(_skeleton(file.proto))
    idle = {id(node) for node in graph.nodes if _is_idle(node, graph)}
    surgeon, typing = Surgeon(file, graph, dtype), Typing(dtype)
    nodes: list[gs.Node] = []
    origin: dict[str, str] = {}
    for node in graph.nodes:
        output = node.outputs[0].name if node.outputs else ""
        respell(surgeon, node, linear)
        typing.narrow(surgeon, node, output)
        if node.op not in SUMMED:
            typing.follow(surgeon, node)
        elif output and node.outputs[0].name != output:
            origin[node.outputs[0].name] = output
        nodes += [*surgeon.before, node, *surgeon.after]
        surgeon.before.clear()
        surgeon.after.clear()
    if not surgeon.notes:
        return Prepared(given)
    graph.nodes = _without_dead(nodes, graph, idle)
    proto = grafted(file.proto, gs.export_onnx(graph, do_type_check=False))
    notes = {output: tuple(texts) for output, texts in surgeon.notes.items()}
    return Prepared(file.derive(proto), typing.rounds, notes, origin)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without graphsurgeon's warnings, which go to standard output."""
    from onnx_graphsurgeon.logger import G_LOGGER

    before, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = before


def _skeleton(proto: ModelProto) -> ModelProto:
    """A copy to be written into, without the contents of initializers, which are read from the file."""
    from onnx import TensorProto

    from sparsecc.onnxfile.model import copy_proto

    tensors = proto.graph.initializer
    return copy_proto(
        proto, {t.name: TensorProto(name=t.name, data_type=t.data_type, dims=t.dims) for t in tensors}
    )


def _check(dtype: str | None, linear: str) -> None:
    from sparsecc.target import _installed

    if dtype not in (None, "auto", *DTYPES):
        raise InvalidOption(f"dtype must be None, auto, {' or '.join(DTYPES)}; got {dtype!r}")
    if linear not in ("matmul", "conv"):
        raise InvalidOption(f"linear must be matmul or conv; got {linear!r}")
    if not _installed("onnx_graphsurgeon"):
        raise TargetUnavailable("onnx-graphsurgeon is not installed here: pip install 'sparsecc[gs]'")


def _is_idle(node: gs.Node, graph: gs.Graph) -> bool:
    """Whether nothing reads what a node gives."""
    given = {value.name for value in graph.outputs}
    return not any(value.outputs or value.name in given for value in node.outputs)


def _without_dead(nodes: Sequence[gs.Node], graph: gs.Graph, idle: set[int]) -> list[gs.Node]:
    """The nodes without those that nothing reads any more; those that nothing ever read stay."""
    kept: list[gs.Node] = []
    for node in reversed(nodes):
        if id(node) in idle or not _is_idle(node, graph):
            kept.append(node)
        else:
            node.inputs.clear()
    return kept[::-1]

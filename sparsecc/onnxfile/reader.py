"""Builds the view of an ONNX model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from onnx import NodeProto

from sparsecc.graph import Call, Value, View
from sparsecc.onnxfile.branches import passed_on
from sparsecc.onnxfile.model import OnnxFile, every_name, subgraphs
from sparsecc.onnxfile.opaque import opaque
from sparsecc.onnxfile.ops import CONTRACTED, entry_of
from sparsecc.onnxfile.quantised import AUXILIARY
from sparsecc.onnxfile.quantised import WEIGHTS as QUANTISED_WEIGHTS
from sparsecc.onnxfile.real import real_weight
from sparsecc.onnxfile.semantics import ModelSemantics
from sparsecc.onnxfile.shapes import Shapes
from sparsecc.onnxfile.site import Site, Spec
from sparsecc.onnxfile.sizes import size_only
from sparsecc.onnxfile.strides import Tracer
from sparsecc.onnxfile.structure import free_names

_MISFIT = "has operands that do not fit together at any sizes that were tried (give example inputs)"
_UNKNOWN = (
    "reads or writes a value whose shape is not known before it runs (declare it: "
    "onnx.shape_inference.infer_shapes, or value_info)"
)
_UNUSUAL = "has arguments that its axis rule does not cover"


def read(model: OnnxFile, shapes: Shapes) -> View:
    """The view of an inlined model; nothing of the model is copied or changed."""
    return _Reader(model, shapes).view()


def call_name(node: NodeProto, index: int) -> str:
    """What plans call a node: its first output, which is unique in a graph."""
    return next((name for name in node.output if name), f"node {index}")


class _Reader:
    def __init__(self, model: OnnxFile, shapes: Shapes) -> None:
        self.model = model
        self.shapes = shapes
        self.values: dict[str, Value] = {}
        self.calls: list[Call] = []
        self.stored = {**model.initializers, **model.constants}
        self.tied, self.uses = _initializer_uses(model)
        self.integers = _at_places(model, QUANTISED_WEIGHTS)
        self.auxiliary = _at_places(model, AUXILIARY)
        self.sizes = size_only(model, shapes)
        made = {n: node for node in model.proto.graph.node for n in node.output if n}
        self.tracer = Tracer(shapes, made, self._stored)

    def view(self) -> View:
        graph = self.model.proto.graph
        inputs = [self._input(v.name) for v in self.model.inputs]
        for index in self.model.order:
            node = graph.node[index]
            if node.op_type != "Constant" and node.output[0] not in self.sizes:
                self._call(node, index)
        outputs = [self._value(v.name) for v in graph.output]
        weights = {n: v for n, v in self.values.items() if v.kind == "weight"}
        return View(
            dialect="onnx",
            calls=self.calls,
            inputs=inputs,
            outputs=outputs,
            weights=weights,
            weight=self._tensor,
            parameters=frozenset(weights),
            semantics=ModelSemantics(self.model, self.shapes),
            names=partial(every_name, self.model.proto),
        )

    def _stored(self, name: str) -> npt.NDArray[Any] | None:
        return self.model.array(name) if name in self.stored else None

    def _tensor(self, name: str) -> torch.Tensor:
        return real_weight(self.model, name)

    def _input(self, name: str) -> Value:
        value = self._new(name, "input")
        self.values[name] = value
        return value

    def _new(self, name: str, kind: Any) -> Value:
        info = self.shapes.get(name)
        shape = info.shape or ()
        dynamic = info.dynamic if info.shape is not None and any(info.dynamic) else ()
        dtype = str(info.dtype)[6:] if info.dtype is not None else "unknown"
        return Value(
            name,
            tuple(shape),
            dtype,
            kind,
            tuple(dynamic),
            example=tuple(shape),
            unranked=info.shape is None,
        )

    def _value(self, name: str) -> Value:
        found = self.values.get(name)
        if found is not None:
            return found
        if name in self.stored:
            kind = "weight" if self._is_parameter(name) else "const"
            value = self._new(name, kind)
            value.weight = name
        else:
            value = self._new(name, "const")
            value.data = self.shapes.get(name).known
        self.values[name] = value
        return value

    def _is_parameter(self, name: str) -> bool:
        """One parameter: multiplied somewhere, or used once; other shared tensors are constants.

        So are tables and scales, wherever they are used.
        """
        info = self.shapes.get(name)
        if info.dtype is None or name in self.auxiliary:
            return False
        if not info.dtype.is_floating_point:
            return name in self.integers
        return name in self.tied or self.uses[name] == 1

    def _call(self, node: NodeProto, index: int) -> None:
        spec = self._spec(node)
        inputs = tuple(None if i is None else self._value(node.input[i]) for i in spec.operands)
        refs: tuple[Any, ...] = tuple(spec.operands)
        passed = passed_on(node, self.shapes)
        captured = [n for g in subgraphs(node) for n in sorted(free_names(g))]
        if passed is not None:
            spec = Spec("layout", [], {"source": passed[1]})
            inputs, refs = (self._value(passed[0]),), (None,)
        elif captured:
            inputs += tuple(self._value(n) for n in captured)
            refs += (None,) * len(captured)
        outputs = []
        for name in node.output:
            if name:
                self.values[name] = self._new(name, "node")
                outputs.append(self.values[name])
        where = f"node {index}, {node.op_type}" + (f" {node.name!r}" if node.name else "")
        self.calls.append(
            Call(spec.op, call_name(node, index), inputs, tuple(outputs), spec.attrs, where, index, refs)
        )

    def _spec(self, node: NodeProto) -> Spec:
        site = Site(node, self.shapes, self.model.opset, self.tracer)
        everything = site.present()
        names = [n for n in (*node.input, *node.output) if n]
        unknown = next((n for n in names if self.shapes.get(n).shape is None), None)
        entry = entry_of(node.domain, node.op_type)
        if entry is None:
            prefix = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
            return Spec(f"{prefix}{node.op_type}", everything)
        if self.shapes.misfits.intersection(node.output):
            return _unruled(node, everything, "of operands that do not fit", _MISFIT)
        if unknown is not None and opaque(node.domain, node.op_type) is None:
            return _unruled(node, everything, "of a shape that is not known before it runs", _UNKNOWN)
        try:
            return entry(site)
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
            return _unruled(node, everything, "unusual arguments", _UNUSUAL)


def _unruled(node: NodeProto, operands: list[int], how: str, why: str) -> Spec:
    """A call of an operator that has a rule, but not for this."""
    return Spec(f"{node.op_type} ({how})", operands, {"why": why})


def _at_places(model: OnnxFile, places: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Values that operators read at these inputs."""
    return frozenset(
        node.input[i]
        for node in model.proto.graph.node
        for i in places.get(node.op_type, ())
        if i < len(node.input) and node.input[i]
    )


def _bounds(node: NodeProto) -> bytes:
    """What a Slice cuts out, as something to compare."""
    parts = [a.SerializeToString() for a in node.attribute]
    return b"".join([*parts, *(name.encode() + b"," for name in node.input[1:])])


def _initializer_uses(model: OnnxFile) -> tuple[set[str], Counter[str]]:
    """Initializers that are one parameter however often they are used, and how often each one is used.

    Those are the ones that a contraction multiplies, and those that are cut into several pieces.
    """
    tied: set[str] = set()
    uses: Counter[str] = Counter()
    cuts: dict[str, set[bytes]] = {}
    for node in model.proto.graph.node:
        uses.update(n for n in node.input if n)
        for graph in subgraphs(node):
            uses.update(free_names(graph))
        places = CONTRACTED.get(node.op_type, ())
        tied.update(node.input[i] for i in places if i < len(node.input))
        if node.op_type == "Slice":
            cuts.setdefault(node.input[0], set()).add(_bounds(node))
    tied.update(name for name, different in cuts.items() if len(different) > 1)
    uses.update(v.name for v in model.proto.graph.output)
    return tied, uses

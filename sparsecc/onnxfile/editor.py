"""Applies a plan to an ONNX model: a new proto in which whatever the plan does not name is untouched.

What becomes of numbers that follow from sizes is left to ``sparsecc.onnxfile.spelling``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from sparsecc.axes.analysis import Keeps
from sparsecc.errors import PlanConflict
from sparsecc.fx.weights import WeightActions
from sparsecc.onnxfile.model import OnnxFile, copy_proto, replace_tensor, subgraphs
from sparsecc.onnxfile.shapes import Shapes
from sparsecc.onnxfile.spelling import Speller, name_of
from sparsecc.onnxfile.structure import free_names
from sparsecc.onnxfile.tensors import TORCH_DTYPES
from sparsecc.plan import Bypass, Fold, Plan, SetAttr, SetShape

_ELEMENTS = {dtype: element for element, dtype in TORCH_DTYPES.items()}


def edit(model: OnnxFile, shapes: Shapes, plan: Plan, keeps: Keeps) -> OnnxFile:
    """An edited copy of an inlined model.

    Raises PlanConflict where the plan names nodes or weights that the model lacks, or where a size
    cannot be spelled out.
    """
    return _Editor(model, shapes, plan, keeps).run()


@dataclass
class _Editor:
    model: OnnxFile
    shapes: Shapes
    plan: Plan
    keeps: Keeps
    payloads: dict[str, Any] = field(default_factory=dict)

    def run(self) -> OnnxFile:
        actions = WeightActions(self.plan)
        replaced = {
            name: self._edited(name, actions)
            for name in (*self.model.initializers, *self.model.constants)
            if actions.touches(name)
        }
        self.proto = copy_proto(self.model.proto, replaced)
        self.graph = self.proto.graph
        self.nodes = {n: node for node in self.graph.node for n in node.output if n}
        self.calls = {c.name: c for c in self.keeps.analysis.view.calls}
        self.speller = Speller(self.model, self.shapes, self.keeps, self.graph)
        self.touched = self.speller.touched
        self.clones: dict[tuple[str, bytes], str] = {}
        self.rows: dict[str, dict[str, int]] = {}
        for name, node, operand in actions.uses:
            array = actions.edit_use((name, node, operand), self.model.tensor(name))
            self._point(self._node(node), self._input_of(node, operand), self._clone(name, array))
        for action in self.plan.actions:
            self._apply(action)
        self._write_rows()
        self.speller.settle()
        self._drop_dead()
        self._update_types()
        return self.model.derive(self.proto, self.payloads)

    # -- weights ------------------------------------------------------------------------------------

    def _edited(self, name: str, actions: WeightActions) -> TensorProto:
        array = actions.edit(name, self.model.tensor(name))
        return replace_tensor(self._stored(name), name, array, self.payloads)

    def _stored(self, name: str) -> TensorProto:
        found = self.model.initializers.get(name)
        if found is not None:
            return found
        attribute = self.model.constants[name].attribute[0]
        if attribute.name == "value":
            stored: TensorProto = attribute.t
            return stored
        return numpy_helper.from_array(self.model.array(name), name)

    def _clone(self, name: str, array: Any) -> str:
        """A new initializer like ``name``; equal ones are made once."""
        values = np.ascontiguousarray(array.numpy() if hasattr(array, "numpy") else array)
        key = (name, repr((values.shape, str(values.dtype))).encode() + values.tobytes())
        if key not in self.clones:
            own = self.speller.fresh(name)
            proto = replace_tensor(self._stored(name), own, array, None)
            proto.name = own
            self.graph.initializer.append(proto)
            self.clones[key] = own
        return self.clones[key]

    def _point(self, node: NodeProto, index: int, name: str) -> None:
        self.touched.add(node.input[index])
        node.input[index] = name

    # -- nodes --------------------------------------------------------------------------------------

    def _node(self, name: str) -> NodeProto:
        if name not in self.nodes:
            raise PlanConflict(
                f"the plan names node {name!r}, which the model lacks; apply it to the planned model"
            )
        node: NodeProto = self.nodes[name]
        return node

    def _input_of(self, name: str, operand: int) -> int:
        call = self.calls.get(name)
        return operand if call is None else call.refs[operand]

    def _apply(self, action: Any) -> None:
        if isinstance(action, SetShape):
            _SHAPES[self._node(action.node).op_type](self, self._node(action.node), action)
        elif isinstance(action, SetAttr):
            self._set_attr(self._node(action.node), action)
        elif isinstance(action, Bypass):
            self._bypass(action)
        elif isinstance(action, Fold):
            self._fold(action)

    def _fold(self, action: Fold) -> None:
        """A new initializer; what only the value needed is dead then."""
        node = self._node(action.output)
        if any(t.name == action.parameter for t in self.graph.initializer):
            self._read_instead(node, action.output, action.parameter)
            return
        dtype = self.shapes.get(action.output).dtype
        if dtype is None:
            raise PlanConflict(f"{action.output}: of no known element type, so it cannot be stored")
        empty = TensorProto(name=action.parameter, data_type=_ELEMENTS[dtype], raw_data=b"")
        self.graph.initializer.append(
            replace_tensor(empty, action.parameter, torch.from_numpy(action.values))
        )
        self._read_instead(node, action.output, action.parameter)

    def _bypass(self, action: Bypass) -> None:
        node = self._node(action.output)
        source, around = action.source, {b.output: b.source for b in self.plan.of(Bypass)}
        while source in around:
            source = around[source]
        self._read_instead(node, action.output, source)

    def _read_instead(self, node: NodeProto, output: str, source: str) -> None:
        """Let everyone who reads ``output`` of a node read ``source``."""
        self.touched.update((output, *node.input))
        inner = any(output in free_names(g) for other in self.graph.node for g in subgraphs(other))
        if inner or any(v.name == output for v in self.graph.output):
            node.CopyFrom(onnx.helper.make_node("Identity", [source], [output], name=node.name))
            return
        for other in self.graph.node:
            for index, name in enumerate(other.input):
                if name == output:
                    other.input[index] = source

    def _set_attr(self, node: NodeProto, action: SetAttr) -> None:
        for prefix in ("start", "stop"):
            if action.name.startswith(prefix) and node.op_type == "ScatterND":
                self.rows.setdefault(action.node, {})[prefix] = action.value
                return
            if action.name.startswith(prefix):
                self._slice_bound(node, prefix, int(action.name.removeprefix(prefix)), action.value)
                return
        setter = _ATTRIBUTES.get((node.op_type, action.name))
        if setter is None:
            raise PlanConflict(f"{action.node}: {node.op_type} has no {action.name!r} to set")
        setter(self, node, action.value)

    def _slice_bound(self, node: NodeProto, which: str, dim: int, value: int) -> None:
        first = self.calls[name_of(node)].inputs[0]
        assert first is not None
        shape = first.shape  # not by name: the input may be a cut copy by now
        attributes = {a.name: a for a in node.attribute}
        key, place = ("starts", 1) if which == "start" else ("ends", 2)
        if key in attributes:
            bounds = attributes[key].ints
            axes = list(attributes["axes"].ints) if "axes" in attributes else list(range(len(bounds)))
            bounds[[a % len(shape) for a in axes].index(dim)] = value
            return
        goal = self.speller.goal(node, place)
        axes_known = (
            self.speller.known(node.input[3], node) if len(node.input) > 3 and node.input[3] else None
        )
        axes = list(range(goal.size)) if axes_known is None else [int(a) for a in np.atleast_1d(axes_known)]
        at = [a % len(shape) for a in axes].index(dim)
        if (which == "start" and goal[at] == 0) or (which == "stop" and goal[at] >= shape[dim]):
            return
        goal[at] = value

    def _write_rows(self) -> None:
        """Indices of the rows that a ScatterND replaces."""
        for name, bounds in self.rows.items():
            node = self._node(name)
            start, stop, _ = self.calls[name].attrs["slices"][0]
            rows = np.arange(bounds.get("start", start), bounds.get("stop", stop))
            self._point(node, 1, self.speller.constant(f"{name}_rows", rows.reshape(-1, 1)))

    # -- clean-up -----------------------------------------------------------------------------------

    def _drop_dead(self) -> None:
        """Remove nodes and initializers that only the edit made useless."""
        used: dict[str, int] = {}
        for name in self._uses():
            used[name] = used.get(name, 0) + 1
        queue = [n for n in self.touched if n]
        dead: set[int] = set()
        index_of = {n: i for i, node in enumerate(self.graph.node) for n in node.output if n}
        gone: set[str] = set()
        while queue:
            name = queue.pop()
            if used.get(name, 0):
                continue
            if name not in index_of:
                gone.add(name)
                continue
            index = index_of[name]
            node = self.graph.node[index]
            if index in dead or any(used.get(o, 0) for o in node.output if o):
                continue
            dead.add(index)
            for source in node.input:
                if source:
                    used[source] -= 1
                    queue.append(source)
        for index in sorted(dead, reverse=True):
            gone.update(self.graph.node[index].output)
            del self.graph.node[index]
        inputs = {v.name for v in self.graph.input}
        for index in reversed(range(len(self.graph.initializer))):
            name = self.graph.initializer[index].name
            if name in gone and name not in inputs:
                del self.graph.initializer[index]
        for index in reversed(range(len(self.graph.value_info))):
            if self.graph.value_info[index].name in gone:
                del self.graph.value_info[index]

    def _uses(self) -> Iterator[str]:
        for node in self.graph.node:
            yield from (n for n in node.input if n)
            for inner in subgraphs(node):
                yield from free_names(inner)
        yield from (v.name for v in self.graph.output)

    def _update_types(self) -> None:
        """Shapes in value_info (and of initializers that are also inputs) follow the kept counts."""
        values = {v.name: v for v in self.keeps.analysis.solver.axes}
        for info in (*self.graph.value_info, *self.graph.input):
            new = self.speller.new_shape(info.name)
            old = self.shapes.get(info.name).shape
            if new is None or old is None or not info.type.HasField("tensor_type"):
                continue
            dims = info.type.tensor_type.shape.dim
            if len(dims) != len(new):
                continue
            value = values.get(info.name)
            for d, dim in enumerate(dims):
                varies = value is not None and value.is_dynamic(d)
                if new[d] != old[d] and dim.HasField("dim_value") and not varies:
                    dim.dim_value = new[d]
        self._update_bodies()

    def _update_bodies(self) -> None:
        """Branches that pass a value on that has shrunk say no shape any more."""
        for node in self.graph.node:
            for body in subgraphs(node):
                if any(self.speller.new_shape(n) != self.shapes.get(n).shape for n in free_names(body)):
                    for info in (*body.output, *body.value_info):
                        if info.name in {v.name for v in body.output}:
                            info.type.tensor_type.ClearField("shape")


def _attribute(name: str, *, add: bool = False) -> Any:
    """Sets an attribute that the node has; with ``add`` also one that it lacks."""

    def setter(editor: _Editor, node: NodeProto, value: Any) -> None:
        found = next((a for a in node.attribute if a.name == name), None)
        if found is not None:
            if found.type != AttributeProto.INT or found.i or add:  # 0: it follows from the tensors
                found.CopyFrom(onnx.helper.make_attribute(name, value))
        elif add:
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return setter


def _nothing(editor: _Editor, node: NodeProto, value: Any) -> None:
    """The size is read from the weights."""


def _query_heads(editor: _Editor, node: NodeProto, value: int) -> None:
    _attribute("num_heads" if node.domain == "com.microsoft" else "q_num_heads")(editor, node, value)


def _hidden_sizes(editor: _Editor, node: NodeProto, sizes: list[int]) -> None:
    """Spelled out where keys and values differ in width, or the node did so."""
    spelled = any(a.name == "qkv_hidden_sizes" for a in node.attribute)
    _attribute("qkv_hidden_sizes", add=spelled or len(set(sizes)) > 1)(editor, node, sizes)


def _even(total: int, parts: int) -> list[int]:
    """What Split with ``num_outputs`` gives: equal parts, the last one smaller where they do not divide."""
    part = -(-total // parts)
    return [min(part, total - i * part) for i in range(parts)]


def _split_sizes(editor: _Editor, node: NodeProto, sizes: list[int]) -> None:
    for attribute in node.attribute:
        if attribute.name == "split":
            attribute.ints[:] = sizes
            return
    if len(node.input) > 1 and node.input[1]:
        editor.speller.goal(node, 1)[:] = sizes
        return
    kept = [a for a in node.attribute if a.name != "num_outputs"]
    may_differ = len(kept) < len(node.attribute)
    if sizes == _even(sum(sizes), len(sizes)) and (may_differ or len(set(sizes)) == 1):
        return
    del node.attribute[:]
    node.attribute.extend(kept)
    if editor.model.opset < 13:
        node.attribute.append(onnx.helper.make_attribute("split", sizes))
        return
    while len(node.input) < 2:
        node.input.append("")
    node.input[1] = editor.speller.constant(f"{node.output[0]}_split", sizes)


def _squeezed(editor: _Editor, node: NodeProto, axes: list[int]) -> None:
    if not axes:
        node.op_type = "Identity"
    elif editor.model.opset < 13:
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
    else:
        del node.input[1:]
        node.input.append(editor.speller.constant(f"{node.output[0]}_axes", axes))


_GROUPED = (
    "Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "FusedConv", "DeformConv",
)  # fmt: skip
_SCALED = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention")

#: (operator, size) -> what sets it, in whatever domain the operator is
_ATTRIBUTES: dict[tuple[str, str], Any] = {
    **{(name, "groups"): _attribute("group", add=True) for name in _GROUPED},
    **{(name, "scale"): _attribute("scale", add=True) for name in _SCALED},
    ("GroupNormalization", "groups"): _attribute("num_groups"),
    ("LayerNormalization", "normalized_shape"): _nothing,
    ("RMSNormalization", "normalized_shape"): _nothing,
    ("Split", "sizes"): _split_sizes,
    ("Squeeze", "squeezed"): _squeezed,
    ("SimplifiedLayerNormalization", "normalized_shape"): _nothing,
    **{(name, "hidden_size"): _attribute("hidden_size", add=True) for name in ("LSTM", "GRU", "RNN")},
    ("Attention", "q_num_heads"): _query_heads,
    ("Attention", "kv_num_heads"): _attribute("kv_num_heads"),
    ("Attention", "qkv_hidden_sizes"): _hidden_sizes,
    ("QAttention", "q_num_heads"): _attribute("num_heads"),
    ("QAttention", "kv_num_heads"): _nothing,
    ("QAttention", "qkv_hidden_sizes"): _nothing,
    ("MultiHeadAttention", "q_num_heads"): _attribute("num_heads"),
    ("MultiHeadAttention", "kv_num_heads"): _nothing,
    ("GroupQueryAttention", "q_num_heads"): _attribute("num_heads"),
    ("GroupQueryAttention", "kv_num_heads"): _attribute("kv_num_heads"),
    ("RotaryEmbedding", "num_heads"): _attribute("num_heads"),
    ("RotaryEmbedding", "rotary_embedding_dim"): _attribute("rotary_embedding_dim"),
    ("MatMulNBits", "K"): _attribute("K"),
    ("MatMulNBits", "N"): _attribute("N"),
}


def _shape_input(place: int) -> Any:
    def spell(editor: _Editor, node: NodeProto, action: SetShape) -> None:
        if place < len(node.input) and node.input[place]:
            editor.speller.spell_shape(node, action, place)

    return spell


def _follows(editor: _Editor, node: NodeProto, action: SetShape) -> None:
    """The shape follows from the input."""


def _reshape_instead(editor: _Editor, node: NodeProto, action: SetShape) -> None:
    """A Gather of everything in order: its indices are those of the size before, so it becomes a Reshape."""
    value = editor.calls[name_of(node)].outputs[0]
    terms = editor.keeps.analysis.solver.axes[value]
    sizes = [-1 if value.is_dynamic(d) else editor.keeps.count(t) for d, t in enumerate(terms)]
    if sizes.count(-1) > 1:
        raise PlanConflict(
            f"{action.node}: a Gather that reshapes to several dynamic sizes cannot be written as a Reshape",
            node=action.node,
        )
    editor.touched.add(node.input[1])
    shape = editor.speller.constant(f"{node.output[0]}_shape", sizes)
    node.CopyFrom(onnx.helper.make_node("Reshape", [node.input[0], shape], list(node.output), name=node.name))


_SHAPES: dict[str, Any] = {
    "Gather": _reshape_instead,
    "Reshape": _shape_input(1),
    "Flatten": _follows,
    "Expand": _shape_input(1),
    "Resize": _shape_input(3),
    "Upsample": _follows,
    "ConstantOfShape": _shape_input(0),
}

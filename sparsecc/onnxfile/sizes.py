"""Numbers that a graph computes from sizes: what they are, what an edit makes of them, how to keep them.

``Shape`` of a value that shrinks gives other numbers than before, and so does whatever is computed
from it.  Most of that is welcome (a Reshape that follows the width of its input), some is not (a
softmax scale, an index).  Here the size computations are run again for the edited graph, so that an
editor can compare, and cloned with the original sizes put back where numbers must stay but vary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx
import torch
from onnx import NodeProto

from sparsecc.axes.analysis import Keeps
from sparsecc.axes.terms import Term, resolve
from sparsecc.errors import PlanConflict
from sparsecc.onnxfile.model import OnnxFile, subgraphs, to_numpy, to_torch
from sparsecc.onnxfile.shapes import Info, Shapes
from sparsecc.onnxfile.structure import uses

Numbers = npt.NDArray[Any]


#: operators that make a tensor as large as they are told
_SPREADING = frozenset({"Expand", "ConstantOfShape"})

#: operators that look positions up by numbers: they read which, so these stay numbers
_LOOKING_UP = frozenset({"Gather", "GatherND", "ScatterND"})


def size_only(model: OnnxFile, shapes: Shapes) -> set[str]:
    """First outputs of nodes that compute on sizes and constants alone, and that no graph output shows.

    Neither do tensors count that are spread out to the sizes of what they meet (a mask for all heads).
    """
    found: dict[str, NodeProto] = {}
    made: set[str] = set()  # values that are no sizes: what is computed from floats among them is none either
    numbers: set[str] = {n for n in (*model.initializers, *model.constants) if _is_table(shapes.get(n))}
    for index in model.order:
        node = model.proto.graph.node[index]
        outputs = [n for n in node.output if n]
        if node.op_type in ("Shape", "Size"):
            found[node.output[0]] = node
        elif not numbers.isdisjoint(node.input):
            numbers.update(n for n in outputs if _is_float(shapes.get(n)))
        summed = any(_is_float(shapes.get(n)) for n in uses(node) & made)
        if numbers.isdisjoint(outputs) and not summed and all(_is_size(shapes.get(n)) for n in outputs):
            found[node.output[0]] = node
        elif node.op_type != "Constant":
            made.update(outputs)
    shown = {v.name for v in model.proto.graph.output}
    for node in reversed(found.values()):
        if shown.intersection(node.output):
            shown |= uses(node)
    found = {name: node for name, node in found.items() if not shown.intersection(node.output)}
    return found.keys() - _spread(model, shapes, found)


def _spread(model: OnnxFile, shapes: Shapes, found: Mapping[str, NodeProto]) -> set[str]:
    """Tensors that are made as large as others are, and what follows, if all of that stays tensors."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.proto.graph.node:
        for name in uses(node):
            readers.setdefault(name, []).append(node)
    spread: set[str] = set()
    for name, node in found.items():
        if node.op_type in _SPREADING and name not in spread:
            spread |= _tensors_from(name, readers, shapes, found)
    return spread


def _tensors_from(
    start: str, readers: Mapping[str, list[NodeProto]], shapes: Shapes, found: Mapping[str, NodeProto]
) -> set[str]:
    """``start`` and the known values that are computed from it; nothing where numbers are made of one."""
    reached: set[str] = {start}
    queue = [start]
    while queue:
        name = queue.pop()
        if len(shapes.get(name).shape or ()) < 2:
            return set()
        for node in readers.get(name, ()):
            if node.op_type in ("Shape", "Size"):
                continue
            if (node.op_type in _LOOKING_UP and name in node.input[1:2]) or subgraphs(node):
                return set()
            if node.output[0] in found and node.output[0] not in reached:
                reached.add(node.output[0])
                queue.append(node.output[0])
    return reached


def _is_float(info: Info) -> bool:
    return info.dtype is not None and info.dtype.is_floating_point


def _is_table(info: Info) -> bool:
    """Several floats: what is computed from them is about weights."""
    return _is_float(info) and info.shape is not None and math.prod(info.shape) > 1


def _is_size(info: Info) -> bool:
    """Known integers, or a known single number; small weights that are computed on are no sizes."""
    return info.known is not None and (info.known.dtype.kind != "f" or info.known.size == 1)


class Sizes:
    """The size computations of ``model`` that an edit changes.

    ``now`` holds the new values (at the representative sizes) of those that change; ``new_shape``
    tells the sizes that a value of the main graph has after the edit.
    """

    def __init__(
        self,
        model: OnnxFile,
        shapes: Shapes,
        new_shape: Callable[[str], tuple[int, ...] | None],
        terms: Mapping[str, Sequence[Term]],
    ) -> None:
        self.model = model
        self.shapes = shapes
        self.new_shape = new_shape
        self.terms = terms
        self.affected = self._affected(size_only(model, shapes))
        self.now: dict[str, Numbers] = self._evaluated() if self.affected else {}

    def _affected(self, own: set[str]) -> list[NodeProto]:
        """Size computations that see a size which changes, in order."""
        changed: set[str] = set()
        found: list[NodeProto] = []
        for index in self.model.order:
            node = self.model.proto.graph.node[index]
            if node.output[0] not in own:
                continue
            reads = uses(node)
            if reads & changed or any(n not in changed and self._resized(n) for n in reads):
                found.append(node)
                changed.update(n for n in node.output if n)
        return found

    def _resized(self, name: str) -> bool:
        old = self.shapes.get(name).shape
        return old is not None and self.new_shape(name) != old

    def _evaluated(self) -> dict[str, Numbers]:
        from sparsecc.reference.onnx_run import Runner

        produced = {n for node in self.affected for n in node.output if n}
        feeds = {n: self._feed(n) for node in self.affected for n in sorted(uses(node) - produced)}
        graph = onnx.helper.make_graph(
            self.affected, "sizes", [onnx.helper.make_empty_tensor_value_info(n) for n in feeds], []
        )
        proto = onnx.helper.make_model(graph, opset_imports=self.model.proto.opset_import)
        values = Runner(OnnxFile(proto)).run(feeds, keep_values=True)
        return {n: to_numpy(values[n]) for n in produced if isinstance(values.get(n), torch.Tensor)}

    def behind(self, *names: str) -> list[Term]:
        """Axes of the values that some numbers are computed from."""
        makers = {n: node for node in self.affected for n in node.output if n}
        found: list[Term] = []
        queue, seen = list(names), set(names)
        while queue:
            name = queue.pop()
            found += self.terms.get(name, ())
            fresh = uses(makers[name]) - seen if name in makers else set()
            seen |= fresh
            queue += sorted(fresh)
        return found

    def _feed(self, name: str) -> torch.Tensor:
        info = self.shapes.get(name)
        if not self._resized(name):  # else only its shape counts
            known = None if info.known is None else to_torch(info.known)
            if known is not None:
                return known
            if name in self.model.initializers or name in self.model.constants:
                return self.model.tensor(name)
        shape = self.new_shape(name)
        if shape is None:
            raise PlanConflict(
                f"sizes are computed from {name!r}, whose own size is not known; exclude what feeds it",
                axes=self.behind(*(node.output[0] for node in self.affected if name in uses(node))),
            )
        return torch.zeros((), dtype=info.dtype or torch.float32).expand(shape)


def share(term: Term, keeps: Keeps) -> tuple[int, int] | None:
    """(kept, of): any size of the axis becomes size * kept / of, whatever its dynamic factors are."""
    found = _share(term, keeps)
    return None if found is None else found[1:]


def _share(term: Term, keeps: Keeps) -> tuple[list[Term], int, int] | None:
    """The factors of an axis that vary, and of the others how much is kept of how much."""
    root = resolve(term)
    if root in keeps.analysis.dynamic:
        return [root], 1, 1
    if root.kind in ("atom", "pick"):
        return [], keeps.count(root), root.size
    parts = [_share(part, keeps) for part in root.parts]
    known = [p for p in parts if p is not None]
    varying = [sorted(v, key=lambda t: t.serial) for v, _, _ in known]
    same = all(v == varying[0] for v in varying)
    if len(known) < len(parts) or (root.kind == "concat" and not same):
        return ([root], 1, 1) if keeps.mask(root) is None else None
    if root.kind == "concat":
        return varying[0], sum(k for _, k, _ in known), sum(of for _, _, of in known)
    return (
        list(itertools.chain(*varying)),
        math.prod(k for _, k, _ in known),
        math.prod(of for _, _, of in known),
    )

"""Spells sizes out: every number that a node reads and that follows from sizes is made right after an edit.

A number is either set by the plan (an entry of a shape, a bound of a slice) or has to stay what it was (a
scale, an index).  What is right by itself is left alone; else a constant takes its place, with ``0`` for a
copied and ``-1`` for an inferred size; and where several numbers vary with the inputs, some nodes compute
them from the sizes that the original had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, numpy_helper

from sparsecc.axes.analysis import Keeps
from sparsecc.axes.terms import Term, resolve
from sparsecc.errors import PlanConflict
from sparsecc.graph import Call
from sparsecc.onnxfile.model import OnnxFile, every_name, subgraphs
from sparsecc.onnxfile.shapes import Shapes
from sparsecc.onnxfile.sizes import Numbers, Sizes, share, size_only
from sparsecc.onnxfile.structure import free_names
from sparsecc.plan import SetShape

Flags = npt.NDArray[np.bool_]
Factor = tuple[int, int]


def name_of(node: NodeProto) -> str:
    """What plans call a node: its first output."""
    return next((n for n in node.output if n), "")


class Speller:
    """The numbers of a graph that is being edited; ``graph`` is the copy, ``model`` the original."""

    def __init__(self, model: OnnxFile, shapes: Shapes, keeps: Keeps, graph: GraphProto) -> None:
        self.model = model
        self.shapes = shapes
        self.keeps = keeps
        self.graph = graph
        self.calls = {c.name: c for c in keeps.analysis.view.calls}
        self.axes = keeps.analysis.solver.axes
        self.touched: set[str] = set()
        self._terms = {v.name: t for v, t in self.axes.items()}
        self._names = every_name(model.proto)
        self._made: dict[tuple[str, bytes], str] = {}
        self._goals: dict[tuple[str, int], Numbers] = {}
        self._originals: dict[str, str] = {}
        self._added: list[tuple[str, NodeProto]] = []
        self._reader = ""
        self._sizes: Sizes | None = None
        self._stored: dict[str, tuple[int, ...]] = {}

    # -- what the plan wants ------------------------------------------------------------------------

    def goal(self, node: NodeProto, place: int) -> Numbers:
        """What an input of numbers shall be at the representative sizes; edit it in place."""
        key = (name_of(node), place)
        if key not in self._goals:
            self._goals[key] = np.atleast_1d(self.known(node.input[place], node)).copy()
        return self._goals[key]

    def spell_shape(self, node: NodeProto, action: SetShape, place: int) -> None:
        """New sizes for the shape operand of Reshape, Expand, Resize or ConstantOfShape."""
        terms = self.axes[self.calls[name_of(node)].outputs[0]]
        goal = self.goal(node, place)
        offset = len(action.sizes) - len(goal)
        for dim, size in enumerate(action.sizes):
            if size is None or dim < offset:
                continue
            entry = goal[dim - offset]
            follows = (node.op_type == "Reshape" and entry in (0, -1)) or (
                node.op_type == "Expand" and entry == 1
            )
            if not follows:
                goal[dim - offset] = self.keeps.count(terms[dim])

    def known(self, name: str, reader: NodeProto) -> Numbers:
        """Numbers of the original; raises PlanConflict where they depend on data."""
        known = self.shapes.get(name).known
        if known is None and name in self.model.initializers:
            known = self.model.array(name)
        if known is None:
            raise PlanConflict(f"{name!r} is computed from data, so it cannot be set", node=name_of(reader))
        return known

    def new_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value after the edit, at the representative sizes."""
        stored = self._stored.get(name)
        if stored is not None:
            return stored
        if self._sizes is not None and name in self._sizes.now:
            return self._sizes.now[name].shape
        terms = self._terms.get(name)
        return self.shapes.get(name).shape if terms is None else tuple(self.keeps.count(t) for t in terms)

    # -- making it so -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Make every number that a node reads what it shall be."""
        self._stored = _stored_shapes(self.graph)
        self._sizes = Sizes(self.model, self.shapes, self.new_shape, self._terms)
        own = size_only(self.model, self.shapes) if self._sizes.now else set()
        for node in list(self.graph.node):
            self._reader = name_of(node)
            if self._reader in own or node.op_type == "Constant":
                continue
            for place, name in enumerate(node.input):
                self._settle_input(node, place, name)
            for inner in subgraphs(node):
                for name in sorted(free_names(inner) & self._sizes.now.keys()):
                    if not self._unchanged(name):
                        self.touched.add(name)
                        _rename_free(inner, name, self._original(name))
        self._insert()

    def _settle_input(self, node: NodeProto, place: int, name: str) -> None:
        assert self._sizes is not None
        goal = self._goals.get((self._reader, place))
        if goal is None and self._unchanged(name):
            return
        before = np.asarray(self._before(node, name))
        now = self._sizes.now.get(name, before)
        wanted = before if goal is None else goal.reshape(before.shape)
        if np.array_equal(now, wanted):
            return
        self.touched.add(name)
        if goal is None:
            node.input[place] = self._original(name)
        else:
            node.input[place] = self._spelled(node, name, before, now, wanted)

    def _before(self, node: NodeProto, name: str) -> Numbers:
        assert self._sizes is not None
        if self.shapes.get(name).known is None and name in self._sizes.now:
            raise self._lost(name)
        return self.known(name, node)

    def _lost(self, name: str) -> PlanConflict:
        assert self._sizes is not None
        return PlanConflict(
            f"{name!r} is computed from sizes that shrink, and cannot be undone; exclude the weights that "
            "feed it",
            axes=self._sizes.behind(name),
        )

    def _unchanged(self, name: str) -> bool:
        assert self._sizes is not None
        before = self.shapes.get(name).known
        return name not in self._sizes.now or (
            before is not None and np.array_equal(before, self._sizes.now[name])
        )

    def _spelled(self, node: NodeProto, name: str, before: Numbers, now: Numbers, goal: Numbers) -> str:
        """Numbers of which some are set; those that vary with the inputs are still computed."""
        varies = self.shapes.get(name).varies
        computed = np.zeros(before.shape, bool) if varies is None else varies.copy()
        if node.op_type == "Reshape":
            computed &= ~np.isin(before, (0, -1))
        if not computed.any():
            return self.constant(name, goal, before.dtype)
        plain = self._placeholders(node, before, goal, computed)
        if plain is not None:
            return self.constant(name, plain, before.dtype)
        base = name
        if (now != goal)[computed].any():
            base = self._shrunk(self._original(name), node, before, goal, computed)
        return self._where(computed, base, goal, name)

    def _placeholders(
        self, node: NodeProto, before: Numbers, goal: Numbers, computed: Flags
    ) -> Numbers | None:
        """Constants alone: 0 for copied, 1 for carried, -1 for inferred sizes; None where these do not do."""
        values = goal.copy()
        call = self.calls[self._reader]
        allowzero = any(a.name == "allowzero" and a.i for a in node.attribute)
        left: list[int] = []
        for i in np.flatnonzero(computed).tolist():
            d = i + len(call.outputs[0].shape) - len(goal)
            if node.op_type == "Reshape" and not allowzero and self._carried(call, d, d):
                values[i] = 0
            elif node.op_type == "Expand" and self._carried(call, d - _lead(call), d):
                values[i] = 1
            else:
                left.append(i)
        if not left:
            return values
        if node.op_type != "Reshape" or len(left) > 1 or (before == -1).any():
            return None
        values[left] = -1
        return values

    def _carried(self, call: Call, source: int, target: int) -> bool:
        """Whether an axis of the input goes into the output as it is."""
        value = call.inputs[0]
        if value is None or value not in self.axes or not 0 <= source < len(value.shape):
            return False
        theirs = self.axes[call.outputs[0]]
        return target < len(theirs) and resolve(self.axes[value][source]) is resolve(theirs[target])

    # -- numbers as constants and nodes -------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A name that nothing has, like ``name``."""
        count = 0
        while f"{name}_pruned{count or ''}" in self._names:
            count += 1
        own = f"{name}_pruned{count or ''}"
        self._names.add(own)
        return own

    def constant(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        """An initializer like ``name`` with these values; equal ones are made once."""
        array = np.asarray(values, dtype)
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self._made:
            own = self._made[key] = self.fresh(name)
            self.graph.initializer.append(numpy_helper.from_array(array, own))
        return self._made[key]

    def _original(self, name: str) -> str:
        """The numbers that ``name`` held before: a constant, or the same computation on original sizes."""
        info = self.shapes.get(name)
        if self._unchanged(name):
            return name
        if info.known is None:
            raise self._lost(name)
        if info.varies is None or not info.varies.any():
            return self.constant(name, info.known, info.known.dtype)
        if name not in self._originals:
            self._recompute(name, info.known, info.varies)
        return self._originals[name]

    def _recompute(self, name: str, before: Numbers, varies: Flags) -> None:
        assert self._sizes is not None
        source = next(n for n in self._sizes.affected if name in n.output)
        if source.op_type in ("Shape", "Size"):
            self._originals[name] = self._restored(source, name, before, varies)
            return
        if subgraphs(source):
            raise PlanConflict(
                f"{name!r} branches on sizes that shrink; exclude the weights that feed it",
                axes=self._sizes.behind(name),
            )
        twin = NodeProto()
        twin.CopyFrom(source)
        for place, read in enumerate(source.input):
            if read:
                twin.input[place] = self._original(read)
        for place, written in enumerate(source.output):
            if written:
                twin.output[place] = self._originals[written] = self.fresh(written)
        twin.name = self._originals[name]
        self._add(twin)

    def _restored(self, source: NodeProto, name: str, before: Numbers, varies: Flags) -> str:
        """The result of Shape or Size with original numbers where they changed."""
        terms = self._terms.get(source.input[0])
        shares = [None] if terms is None else [share(t, self.keeps) for t in terms]
        if source.op_type == "Size":
            found = _all(shares, terms, name)
            return self._times(name, math.prod(of for _, of in found), math.prod(k for k, _ in found))
        start = next((a.i for a in source.attribute if a.name == "start"), 0)
        shares = shares[start:][: before.size]
        needed = _all([f if v else (1, 1) for f, v in zip(shares, varies, strict=True)], terms, name)
        base = self._times(name, [of for _, of in needed], [k for k, _ in needed])
        return self._where(varies, base, before, name)

    def _shrunk(self, base: str, node: NodeProto, before: Numbers, goal: Numbers, computed: Flags) -> str:
        """Original numbers times the share of positions that stay."""
        terms = self.axes[self.calls[name_of(node)].outputs[0]][-goal.size :]
        lost = computed & (before != goal)
        shares = [share(t, self.keeps) if hit else (1, 1) for t, hit in zip(terms, lost, strict=True)]
        found = _all(shares, terms, base)
        return self._times(base, [kept for kept, _ in found], [of for _, of in found])

    def _times(self, base: str, up: Any, down: Any) -> str:
        if np.array_equal(up, down):
            return base
        made = self._operator("Mul", base, base, self.constant(base, up))
        return self._operator("Div", base, made, self.constant(base, down))

    def _where(self, computed: Flags, base: str, goal: Numbers, name: str) -> str:
        if computed.all():
            return base
        literal = self.constant(name, np.where(computed, 0, goal), goal.dtype)
        return self._operator("Where", name, self.constant(name, computed, np.bool_), base, literal)

    def _operator(self, kind: str, like: str, *inputs: str) -> str:
        key = (kind, "\0".join(inputs).encode())
        if key not in self._made:
            own = self._made[key] = self.fresh(like)
            self._add(onnx.helper.make_node(kind, inputs, [own], name=own))
        return self._made[key]

    def _add(self, node: NodeProto) -> None:
        """A new node, in front of the first one that reads it."""
        self._added.append((self._reader, node))

    def _insert(self) -> None:
        places = {name_of(node): i for i, node in enumerate(self.graph.node)} if self._added else {}
        for reader, node in reversed(self._added):
            self.graph.node.insert(places[reader], node)


def _lead(call: Call) -> int:
    """How many axes the output has in front of those of the first input."""
    assert call.inputs[0] is not None
    return len(call.outputs[0].shape) - len(call.inputs[0].shape)


def _all(factors: Sequence[Factor | None], terms: Sequence[Term] | None, name: str) -> list[Factor]:
    known = [f for f in factors if f is not None]
    if len(known) != len(factors):
        raise PlanConflict(
            f"{name!r}: how the sizes behind it shrink depends on the inputs, so they cannot be spelled out; "
            "exclude the weights that feed it, or make its dimensions static",
            axes=terms or (),
        )
    return known


def _stored_shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of initializers and of tensors in Constant nodes."""
    found = {t.name: tuple(t.dims) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], tuple(a.t.dims)) for a in node.attribute if a.name == "value")
    return found


def _rename_free(graph: GraphProto, old: str, new: str) -> None:
    """Let a subgraph read ``new`` where it read ``old`` from outside."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
        for inner in subgraphs(node):
            if old in free_names(inner):
                _rename_free(inner, old, new)
    for value in graph.output:
        if value.name == old:
            graph.node.add().CopyFrom(onnx.helper.make_node("Identity", [new], [f"{new}_inner"]))
            value.name = f"{new}_inner"

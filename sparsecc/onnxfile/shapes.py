"""Shapes of every value of an ONNX graph, by executing it on tensors without data.

The operators of the reference run on meta tensors; integers that follow from sizes and constants
are computed along (``known``), with a note of where each one was moved from (``origin``).  Dynamic
dimensions get representative sizes, found by trial: an assignment under which every node fits, and
a second one that shows which sizes depend on the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from onnx import GraphProto, TensorProto, ValueInfoProto

from sparsecc.errors import InvalidOption, UnsupportedModel, summary
from sparsecc.onnxfile.model import TORCH_DTYPES, OnnxFile, subgraphs, to_torch
from sparsecc.onnxfile.structure import describe
from sparsecc.reference.onnx_ops.elementwise import ELEMENTWISE
from sparsecc.reference.onnx_ops.registry import Ctx, DataDependent, Value, broadcast
from sparsecc.reference.onnx_run import Program, Step, build_program, execute

DimKey: TypeAlias = "str | tuple[str, int]"
"""A dynamic dimension: its symbolic name, or input and axis where it has none of its own."""
Origin: TypeAlias = "tuple[Literal['literal', 'dim'], str, int]"
"""``('literal', tensor, flat index)`` or ``('dim', value, axis)``."""

MAX_KNOWN = 65536
MAX_KNOWN_FLOATS = 64
_STEP_BUDGET = 400_000
_ANONYMOUS = frozenset({"", "?", "-1", "None", "unk", "unknown", "*"})
_GROWING = frozenset(
    {"Tile", "Pad", "OneHot", "Resize", "Upsample", "EyeLike", "Expand", "CenterCropPad", "DFT", "Col2Im"}
)
_COMPARISONS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN"}
)
_LIKE_FIRST = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "HardSigmoid", "HardSwish", "Softplus",
        "Softsign", "ThresholdedRelu", "Gelu", "Mish", "Swish", "Shrink", "Softmax", "LogSoftmax", "Hardmax",
        "Dropout", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
        "RMSNormalization", "LpNormalization", "LRN", "MeanVarianceNormalization", "CumSum", "CumProd",
    }
)  # fmt: skip
"""Operators whose first output is like their first input."""
_FALLBACK_SIZES = (
    1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 512, 576, 640, 768, 1024, 1536,
    16000,
)  # fmt: skip
_BATCHES = (3, 5, 2, 7)
_LENGTHS = (5, 7, 11, 13, 17, 19, 23, 29)
_SPATIAL = (96, 160, 224, 352, 416, 544)


@dataclass(slots=True)
class Info:
    """What is known of one value.

    ``shape`` is None where it could not be determined, ``why`` then says why.  ``known`` holds the
    values of small integer (and tiny float) tensors that follow from sizes and constants,
    ``varies`` which of them change with the dynamic dimensions.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None = None
    known: npt.NDArray[Any] | None = None
    dynamic: tuple[bool, ...] = ()
    varies: npt.NDArray[np.bool_] | None = None
    why: str = ""
    _tags: npt.NDArray[np.int64] | None = None
    _table: _Tags | None = None

    @property
    def origin(self) -> npt.NDArray[Any] | None:
        """For known integers an array of ``Origin`` or None, element by element."""
        if self.known is None or self._tags is None or self._table is None:
            return None
        table = self._table
        found = np.empty(self.known.size, dtype=object)
        for place, tag in enumerate(self._tags.reshape(-1).tolist()):
            found[place] = table.origin(tag)
        return found.reshape(self.known.shape)


@dataclass(slots=True)
class Shapes:
    """The result of ``infer``: one ``Info`` per value of the main graph, and the sizes used.

    ``dims`` holds the representative size of every dynamic dimension, ``other`` those of the second
    assignment (None when only one was found).  ``failed`` names nodes that no assignment fitted, and
    ``misfits`` holds their outputs, which may have declared shapes all the same.
    """

    values: dict[str, Info]
    dims: dict[DimKey, int]
    other: dict[DimKey, int] | None
    failed: list[str] = field(default_factory=list)
    misfits: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Info:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def get(self, name: str) -> Info:
        """What is known of a value; an empty ``Info`` for names that the graph lacks."""
        return self.values.get(name, _NOTHING)

    @property
    def dynamic(self) -> dict[str, tuple[bool, ...]]:
        """Per value, which of its dimensions depend on the sizes of the inputs."""
        return {name: info.dynamic for name, info in self.values.items()}


_NOTHING = Info(None, why="no such value")


def infer(model: OnnxFile, dims: Mapping[DimKey, int] | None = None) -> Shapes:
    """Shapes, known integers and dynamic dimensions of every value of the (inlined) main graph.

    ``dims`` gives sizes for dynamic dimensions, by symbolic name or ``(input, axis)``; the others are
    searched for.  Nodes that cannot be executed abstractly leave their outputs unknown.
    Raises ``InvalidOption`` for dimensions that the model does not have.
    """
    model = model.inlined()
    problem = _Problem(model, dict(dims or {}))
    first, assignment = problem.first()
    second, other = problem.second(assignment)
    return _result(model, first, second, assignment, other)


# ---------------------------------------------------------------------- tags


class _Tags:
    """Numbers that stand for elements: 0 for none, else a place in one of the registered ranges."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, Literal["literal", "dim"], str]] = []
        self._next = 1

    def new(self, kind: Literal["literal", "dim"], name: str, count: int) -> torch.Tensor:
        start = self._next
        self._ranges.append((start, kind, name))
        self._next += count
        return torch.arange(start, start + count)

    def origin(self, tag: int) -> Origin | None:
        if tag <= 0:
            return None
        low, high = 0, len(self._ranges)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._ranges[middle][0] <= tag else (low, middle)
        start, kind, name = self._ranges[low]
        return kind, name, tag - start


# ---------------------------------------------------------------------- abstract execution


@dataclass(slots=True)
class _Cell:
    """A value of abstract execution: a tensor without data, what is known of it, and its tags."""

    value: Value
    known: torch.Tensor | None = None
    tags: torch.Tensor | None = None
    why: str = ""

    @property
    def unknown(self) -> bool:
        return bool(self.why)


class _Misfit(Exception):
    """A node that the assigned sizes do not fit."""

    def __init__(
        self, step: Step, position: tuple[int, ...], shapes: list[tuple[int, ...]], error: BaseException | str
    ) -> None:
        super().__init__(f"{describe(step.node, step.index)}: {summary(error)}")
        self.position = position
        self.shapes = shapes


class _Execution:
    """One abstract run of the main graph."""

    def __init__(self, problem: _Problem, tolerant: bool) -> None:
        self.problem = problem
        self.tolerant = tolerant
        self.tags = _Tags()
        self.cells: dict[str, _Cell] = {}
        self.failed: list[str] = []
        self.misfits: set[str] = set()

    def run(self, inputs: Mapping[str, _Cell]) -> None:
        program = self.problem.program
        self.cells.update(inputs)
        for position, step in enumerate(program.steps):
            outputs = self._step(program, step, self.cells, (position,))
            for name, cell in zip(step.node.output, outputs, strict=False):
                if name:
                    self.cells[name] = cell

    def _step(
        self, program: Program, step: Step, cells: Mapping[str, _Cell], position: tuple[int, ...]
    ) -> Sequence[_Cell]:
        self.problem.spend()
        given = [self._cell(name, cells) if name else None for name in step.node.input]
        unknown = next((cell.why for cell in given if cell is not None and cell.unknown), None)
        if unknown is not None:
            return self._unknown(step, unknown)
        try:
            outputs = self._execute(program, step, given, cells, position)
        except (DataDependent, UnsupportedModel, NotImplementedError) as error:
            return self._unknown(step, f"{describe(step.node, step.index)}: {summary(error)}")
        except _Misfit as misfit:
            return self._misfit_within(step, misfit)
        except Exception as error:  # torch raises many kinds for sizes that do not fit
            return self._misfit(step, position, given, error)
        if not self.tolerant and _collapsed(given, outputs):
            return self._misfit(step, position, given, "a size becomes 0")
        return outputs

    def _misfit(
        self, step: Step, position: tuple[int, ...], given: Sequence[_Cell | None], error: BaseException | str
    ) -> Sequence[_Cell]:
        shapes = [tuple(c.value.shape) for c in given if c is not None and isinstance(c.value, torch.Tensor)]
        return self._misfit_within(step, _Misfit(step, position, shapes, error))

    def _misfit_within(self, step: Step, misfit: _Misfit) -> Sequence[_Cell]:
        if not self.tolerant:
            raise misfit
        self.failed.append(str(misfit))
        self.misfits.update(step.node.output)
        return self._unknown(step, str(misfit))

    def _unknown(self, step: Step, why: str) -> list[_Cell]:
        """Outputs of a node that cannot be executed: what the model declares of them, else nothing."""
        return [self.problem.declared_cell(name) or _Cell(None, why=why) for name in step.node.output]

    def _cell(self, name: str, cells: Mapping[str, _Cell]) -> _Cell:
        found = cells.get(name)
        if found is None:
            found = self.cells[name] = self._weight(name)
        return found

    def _weight(self, name: str) -> _Cell:
        tensor = self.problem.model.initializers.get(name)
        if tensor is None:
            return _Cell(None, why=f"{name!r} is not computed")
        return self._constant(name, tensor)

    def _constant(self, name: str, tensor: TensorProto) -> _Cell:
        """A weight: known when it is small, else its shape alone."""
        value, known = self.problem.constant(tensor)
        if known is None:
            return _Cell(value)
        tags = None
        if not known.dtype.is_floating_point:
            tags = self.tags.new("literal", name, known.numel()).reshape(known.shape)
        return _Cell(value, known, tags)

    # ------------------------------------------------------------------ one node

    def _execute(
        self,
        program: Program,
        step: Step,
        given: Sequence[_Cell | None],
        cells: Mapping[str, _Cell],
        position: tuple[int, ...],
    ) -> list[_Cell]:
        kind = step.node.op_type
        default = step.node.domain in ("", "ai.onnx")
        if default and kind == "Constant":
            return [self._constant_node(step)]
        if default and kind == "If":
            return self._branch(program, step, given, cells, position)
        if default and kind == "Shape":
            return [self._shape_of(step, given)]
        all_known = all(cell is None or cell.known is not None for cell in given)
        if all_known and given and step.op is not None and self._worth_computing(step, given):
            known_inputs = [None if cell is None else cell.known for cell in given]
            outputs = execute(step.op, self._ctx(program, step, cells, position), known_inputs)
            tags = self._move_tags(step, given, outputs)
            return [_computed(value, tag) for value, tag in zip(outputs, tags, strict=True)]
        if default and step.op is not None:
            quick = _quick(step, given)
            if quick is not None:
                return [_Cell(quick)]
        ctx = self._ctx(program, step, cells, position)
        args: list[Value] = []
        known: dict[int, torch.Tensor] = {}
        for cell in given:
            args.append(None if cell is None else cell.value)
            if cell is not None and cell.known is not None:
                known[id(cell.value)] = cell.known
        ctx.known = known
        return [_computed(value, None) for value in execute(step.op, ctx, args)]

    def _ctx(
        self, program: Program, step: Step, cells: Mapping[str, _Cell], position: tuple[int, ...]
    ) -> Ctx:
        ctx = step.ctx  # this run's own: the program was built for it
        ctx.abstract = True
        if program.bodies and subgraphs(step.node):
            ctx = ctx.copy()
            ctx.call = lambda graph, args: self._call(
                program, graph, [_computed(a, None) for a in args], cells, position
            )
        return ctx

    def _call(
        self,
        program: Program,
        graph: GraphProto,
        args: Sequence[_Cell],
        outer: Mapping[str, _Cell],
        position: tuple[int, ...],
    ) -> list[Value]:
        """A subgraph's outputs as values: known ones with their data."""
        outputs = self._body(program, graph, args, outer, position)
        for cell in outputs:
            if cell.unknown:
                raise DataDependent(cell.why)
        return [cell.value if cell.known is None else cell.known for cell in outputs]

    def _body(
        self,
        program: Program,
        graph: GraphProto,
        args: Sequence[_Cell],
        outer: Mapping[str, _Cell],
        position: tuple[int, ...],
    ) -> list[_Cell]:
        body = program.bodies[id(graph)]
        cells = {name: self._cell(name, outer) for name in body.free}
        for name, tensor in body.constants.items():
            cells[name] = self._constant(name, tensor)
        cells.update(zip(body.inputs, args, strict=False))
        for place, step in enumerate(body.steps):
            outputs = self._step(body, step, cells, (*position, place))
            cells.update(zip(step.node.output, outputs, strict=False))
        return [self._cell(name, cells) for name in body.outputs]

    def _branch(
        self,
        program: Program,
        step: Step,
        given: Sequence[_Cell | None],
        cells: Mapping[str, _Cell],
        position: tuple[int, ...],
    ) -> list[_Cell]:
        """If: the branch that is taken, else the one that fits, or what both have in common."""
        condition = given[0].known if given[0] is not None else None
        names = ["then_branch", "else_branch"]
        if condition is not None:
            names = names[:1] if bool(condition.reshape(-1)[0]) else names[1:]
        fitting: list[list[_Cell]] = []
        misfits: list[_Misfit] = []
        tolerant, self.tolerant = self.tolerant, False
        try:
            for name in names:
                try:
                    fitting.append(self._body(program, step.ctx.graph(name), [], cells, position))
                except _Misfit as misfit:
                    misfits.append(misfit)
        finally:
            self.tolerant = tolerant
        if not fitting:
            raise max(misfits, key=lambda misfit: misfit.position)
        if len(fitting) == 1 and condition is not None:
            return fitting[0]
        declared = self._unknown(
            step, f"{describe(step.node, step.index)}: its branches give different shapes"
        )
        if len(fitting) == 1:
            # a branch that does not fit these sizes is not the one that the model takes with them
            return [b if a.unknown else _Cell(a.value) for a, b in zip(fitting[0], declared, strict=True)]
        return [_common(*trio) for trio in zip(*fitting, declared, strict=True)]

    def _constant_node(self, step: Step) -> _Cell:
        name = step.node.output[0]
        value = step.ctx.attrs.get("value")
        if isinstance(value, TensorProto):
            return self._constant(name, value)
        made = execute(step.op, step.ctx, ())[0]
        if not isinstance(made, torch.Tensor):
            return _Cell(None, why="a constant of strings")
        tags = None
        if not made.dtype.is_floating_point:
            tags = self.tags.new("literal", name, made.numel()).reshape(made.shape)
        return _Cell(_meta(made), made, tags)

    def _shape_of(self, step: Step, given: Sequence[_Cell | None]) -> _Cell:
        sizes = execute(step.op, step.ctx, [given[0].value if given[0] is not None else None])[0]
        rank = given[0].value.ndim if given[0] and isinstance(given[0].value, torch.Tensor) else len(sizes)
        axes = self.tags.new("dim", step.node.input[0], rank)
        start = step.ctx.integer("start", 0)
        start = max(0, min(rank, start + rank if start < 0 else start))
        return _Cell(_meta(sizes), sizes, axes[start : start + len(sizes)])

    def _worth_computing(self, step: Step, given: Sequence[_Cell | None]) -> bool:
        """Whether computing on known values stays small."""
        total = sum(cell.known.numel() for cell in given if cell is not None and cell.known is not None)
        if total <= 4096 and step.node.op_type not in _GROWING:
            return True
        ctx = step.ctx
        ctx.abstract = True
        ctx.known = {id(c.value): c.known for c in given if c is not None and c.known is not None}
        outputs = execute(step.op, ctx, [None if cell is None else cell.value for cell in given])
        return all(o.numel() <= MAX_KNOWN for o in outputs if isinstance(o, torch.Tensor))

    def _move_tags(
        self, step: Step, given: Sequence[_Cell | None], outputs: Sequence[Value]
    ) -> Sequence[torch.Tensor | None]:
        """The outputs' tags, by moving the inputs' tags as the operator moves elements."""
        nothing: list[torch.Tensor | None] = [None] * len(outputs)
        if step.op is None or not any(cell is not None and cell.tags is not None for cell in given):
            return nothing
        kind = step.node.op_type
        if kind == "Cast":
            return [given[0].tags if given[0] is not None else None]
        places = _moved_inputs(kind, len(given), step.ctx)
        if places is None and step.op.kind != "moves":
            return nothing
        args: list[torch.Tensor | None] = [None if cell is None else cell.known for cell in given]
        for place in places if places is not None else [0]:
            cell = given[place]
            if cell is not None and cell.known is not None:
                args[place] = (
                    torch.zeros_like(cell.known, dtype=torch.int64) if cell.tags is None else cell.tags
                )
        moved = execute(step.op, step.ctx, args)
        return [tag if isinstance(tag, torch.Tensor) else None for tag in moved]


def _moved_inputs(kind: str, count: int, ctx: Ctx) -> list[int] | None:
    """Which inputs' elements an operator moves; None for the usual: the first."""
    if kind == "Concat":
        return list(range(count))
    if kind == "Where":
        return [1, 2]
    if kind in ("ScatterElements", "ScatterND", "Scatter", "TensorScatter"):
        return [0, 2] if ctx.text("reduction", "none") == "none" and kind != "TensorScatter" else None
    return None


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _computed(value: Any, tags: torch.Tensor | None) -> _Cell:
    """The cell of an operator's output."""
    if value is None:
        return _Cell(None, why="an optional value is absent")
    if isinstance(value, np.ndarray):
        found = to_torch(value)
        if found is None:
            return _Cell(torch.empty(value.shape, dtype=torch.int8, device="meta"))
        value = found
    if isinstance(value, torch.Tensor) and not value.is_meta:
        limit = MAX_KNOWN_FLOATS if value.dtype.is_floating_point else MAX_KNOWN
        if value.numel() <= limit:
            return _Cell(_meta(value), value, tags)
        return _Cell(_meta(value))
    return _Cell(value)


def _collapsed(given: Sequence[_Cell | None], outputs: Sequence[_Cell]) -> bool:
    """Whether a size became 0 that was not before."""
    if not any(isinstance(cell.value, torch.Tensor) and 0 in cell.value.shape for cell in outputs):
        return False
    known = all(cell is None or cell.known is not None for cell in given)
    before = any(isinstance(c.value, torch.Tensor) and 0 in c.value.shape for c in given if c is not None)
    return not before and not known


def _quick(step: Step, given: Sequence[_Cell | None]) -> torch.Tensor | None:
    """The result of the commonest operators without asking torch, which is slow at that."""
    kind = step.node.op_type
    if kind in ELEMENTWISE:
        return _broadcast(step, given)
    first = given[0].value if given and given[0] is not None else None
    if not isinstance(first, torch.Tensor) or any(step.node.output[1:]):
        return None
    if kind in _LIKE_FIRST:
        return torch.empty(first.shape, dtype=first.dtype, device="meta")
    if kind in ("GlobalAveragePool", "GlobalMaxPool") and first.ndim > 2:
        return torch.empty((*first.shape[:2], *[1] * (first.ndim - 2)), dtype=first.dtype, device="meta")
    return None


def _broadcast(step: Step, given: Sequence[_Cell | None]) -> torch.Tensor | None:
    """The result of an elementwise operator, without asking torch; None where that is not plain."""
    tensors = [c.value for c in given if c is not None and isinstance(c.value, torch.Tensor)]
    if not tensors or len(tensors) != sum(cell is not None for cell in given):
        return None
    shapes: list[Sequence[int]] = [tensor.shape for tensor in tensors]
    kind = step.node.op_type
    if kind == "Clip":
        shapes = shapes[:1]
    shape = shapes[0]
    for another in shapes[1:]:
        if another != shape:
            shape = broadcast(shape, another)
    if kind in _COMPARISONS:
        dtype = torch.bool
    elif kind == "Cast":
        dtype = TORCH_DTYPES.get(step.ctx.integer("to"), torch.int8)
    else:
        dtype = tensors[1 if kind == "Where" else 0].dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def _common(first: _Cell, second: _Cell, declared: _Cell) -> _Cell:
    """What two branches of an If agree on."""
    a, b = first.value, second.value
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return declared
    if a.shape != b.shape or a.dtype != b.dtype:
        return declared
    same = first.known is not None and second.known is not None and torch.equal(first.known, second.known)
    return _Cell(a, first.known if same else None)


_Trial: TypeAlias = "tuple[dict[DimKey, int], tuple[int, ...], _Execution | _Misfit]"
"""Sizes that were tried, how far the run came with them, and its outcome."""


# ---------------------------------------------------------------------- dynamic dimensions


@dataclass(slots=True)
class _Symbol:
    """A dynamic dimension: where it occurs, and sizes worth trying, best first."""

    key: DimKey
    places: list[tuple[str, int]]
    pool: tuple[int, ...]


class _Problem:
    """A model and the search for sizes of its dynamic dimensions."""

    def __init__(self, model: OnnxFile, given: dict[DimKey, int]) -> None:
        self.model = model
        self.program = build_program(model, model.proto.graph, model.order)
        self.inputs = {value.name: value for value in model.inputs}
        self._declared = {v.name: v for v in (*model.proto.graph.output, *model.proto.graph.value_info)}
        self._constants: dict[int, tuple[Value, torch.Tensor | None]] = {}
        self.symbols = _symbols(self.inputs)
        self.given = self._checked(given)
        self._budget = _STEP_BUDGET
        self._sizes: Mapping[DimKey, int] = {}
        self.groups: dict[DimKey, DimKey] = {}

    def _checked(self, given: dict[DimKey, int]) -> dict[DimKey, int]:
        by_place = {place: symbol.key for symbol in self.symbols.values() for place in symbol.places}
        found: dict[DimKey, int] = {}
        for key, size in given.items():
            name = key if key in self.symbols else by_place.get(key) if isinstance(key, tuple) else None
            if name is None:
                known = ", ".join(map(str, self.symbols)) or "none"
                raise InvalidOption(f"the model has no dynamic dimension {key!r}; it has: {known}")
            if size < 1:
                raise InvalidOption(f"dynamic dimension {key!r}: size {size} is not positive")
            found[name] = int(size)
        return found

    def spend(self) -> None:
        self._budget -= 1
        if self._budget < -_STEP_BUDGET:
            raise DataDependent("abstract execution takes too many steps")

    @property
    def exhausted(self) -> bool:
        return self._budget <= 0

    def constant(self, tensor: TensorProto) -> tuple[Value, torch.Tensor | None]:
        """A weight without data, and its values when it is small."""
        cached = self._constants.get(id(tensor))
        if cached is not None:
            return cached
        dtype = TORCH_DTYPES.get(tensor.data_type, torch.int8)
        count = math.prod(tensor.dims)
        known = None
        limit = MAX_KNOWN_FLOATS if dtype.is_floating_point else MAX_KNOWN
        if count <= limit and tensor.data_type != TensorProto.STRING:
            found = to_torch(self.model.read(tensor))
            known = found.clone() if found is not None else None
        value = torch.empty(tuple(tensor.dims), dtype=dtype, device="meta")
        return self._constants.setdefault(id(tensor), (value, known))

    def declared_cell(self, name: str) -> _Cell | None:
        """A value as the model declares it, when that is complete under the current sizes."""
        info = self._declared.get(name)
        if info is None or not info.type.HasField("tensor_type"):
            return None
        declared = info.type.tensor_type
        dtype = TORCH_DTYPES.get(declared.elem_type)
        if not declared.HasField("shape") or dtype is None:
            return None
        sizes = []
        for dim in declared.shape.dim:
            size = dim.dim_value if dim.dim_value > 0 else self._sizes.get(dim.dim_param or "?", 0)
            if size < 1:
                return None
            sizes.append(size)
        return _Cell(torch.empty(sizes, dtype=dtype, device="meta"))

    # ------------------------------------------------------------------ runs

    def execute(self, sizes: Mapping[DimKey, int], *, tolerant: bool = False) -> _Execution:
        """One abstract run; raises ``_Misfit`` at the first node that does not fit."""
        self._sizes = sizes
        execution = _Execution(self, tolerant)
        execution.run({name: self._input(info, sizes) for name, info in self.inputs.items()})
        return execution

    def _input(self, info: ValueInfoProto, sizes: Mapping[DimKey, int]) -> _Cell:
        declared = info.type.tensor_type
        if not info.type.HasField("tensor_type") or not declared.HasField("shape"):
            return _Cell(None, why=f"input {info.name!r} declares no shape")
        shape = []
        for axis, dim in enumerate(declared.shape.dim):
            key = dim_key(info.name, axis, dim.dim_param)
            shape.append(dim.dim_value if dim.dim_value > 0 else sizes[key])
        dtype = TORCH_DTYPES.get(declared.elem_type)
        if dtype is None:
            return _Cell(None, why=f"input {info.name!r} has a type that torch lacks")
        try:
            return _Cell(torch.empty(shape, dtype=dtype, device="meta"))
        except (RuntimeError, TypeError) as error:  # sizes that overflow
            return _Cell(None, why=f"input {info.name!r} has an impossible shape: {summary(error)}")

    def _progress(self, sizes: Mapping[DimKey, int]) -> tuple[tuple[int, ...], _Execution | _Misfit]:
        """How many nodes fit, and the finished run or the misfit."""
        try:
            return (len(self.program.steps),), self.execute(sizes)
        except _Misfit as misfit:
            return misfit.position, misfit

    # ------------------------------------------------------------------ first assignment

    def first(self) -> tuple[_Execution, dict[DimKey, int]]:
        """A run with sizes that fit, found by hill climbing over the node that fails first."""
        sizes = _starting_sizes(self.symbols, self.given)
        best, outcome = self._progress(sizes)
        while isinstance(outcome, _Misfit) and not self.exhausted:
            found = self._better(sizes, best, outcome)
            if found is None:
                break
            sizes, best, outcome = found
        if isinstance(outcome, _Execution):
            return outcome, sizes
        return self.execute(sizes, tolerant=True), sizes

    def _better(self, sizes: dict[DimKey, int], best: tuple[int, ...], misfit: _Misfit) -> _Trial | None:
        """The change of one or two dimensions that lets the most further nodes fit."""
        chosen: _Trial | None = None
        for trial in self._trials(sizes, misfit):
            if self.exhausted:
                break
            reached, outcome = self._progress(trial)
            if reached > max(best, chosen[1] if chosen else ()):
                chosen = trial, reached, outcome
                if isinstance(outcome, _Execution):
                    break
        return chosen

    def _trials(self, sizes: dict[DimKey, int], misfit: _Misfit) -> Iterable[dict[DimKey, int]]:
        """Assignments that differ in what the failing node hints at, likely ones first."""
        free = [key for key in self.symbols if key not in self.given]
        hinted = sorted({size for shape in misfit.shapes for size in shape if size > 0})
        for key in free:
            for another in self.symbols:
                if another != key and sizes[another] != sizes[key]:
                    yield {**sizes, key: sizes[another]}
        for key in free:
            for size in hinted:
                if size != sizes[key]:
                    yield {**sizes, key: size}
        for key in free:
            for size in (*_FALLBACK_SIZES, *self.symbols[key].pool):
                if size != sizes[key] and size not in hinted:
                    yield {**sizes, key: size}
        for scale in (64, 48, 16, 1):
            spatial = [key for key in free if self.symbols[key].pool[0] >= 32]
            yield {**sizes, **{key: scale * p for key, p in zip(spatial, (3, 5, 7, 11, 13), strict=False)}}

    # ------------------------------------------------------------------ second assignment

    def second(self, sizes: dict[DimKey, int]) -> tuple[_Execution | None, dict[DimKey, int] | None]:
        """A run with as many other sizes as fit; dimensions of equal size vary together."""
        if not sizes:
            return None, None
        classes = self._classes(sizes)
        options: dict[DimKey, list[int]] = {}
        everything = dict(sizes)
        taken = set(sizes.values())
        for key, members in classes.items():
            options[key] = _other_sizes(self.symbols[key], sizes[key], taken)
            taken.add(options[key][0])
            everything.update(dict.fromkeys(members, options[key][0]))
        _, outcome = self._progress(everything)
        if isinstance(outcome, _Execution):
            return outcome, everything
        current = dict(sizes)
        last: _Execution | None = None
        for key, members in classes.items():
            for size in options[key]:
                trial = {**current, **dict.fromkeys(members, size)}
                _, outcome = self._progress(trial)
                if isinstance(outcome, _Execution):
                    current, last = trial, outcome
                    break
        return (last, current) if last is not None else (None, None)

    def _classes(self, sizes: Mapping[DimKey, int]) -> dict[DimKey, list[DimKey]]:
        """Dimensions by size: those that were given the same one vary together."""
        classes: dict[int, list[DimKey]] = {}
        for key in self.symbols:
            classes.setdefault(sizes[key], []).append(key)
        return {members[0]: members for members in classes.values()}


def dim_key(name: str, axis: int, param: str) -> DimKey:
    """How a dynamic dimension of an input is called: by its symbol, else by place."""
    return (name, axis) if param in _ANONYMOUS else param


def _symbols(inputs: Mapping[str, ValueInfoProto]) -> dict[DimKey, _Symbol]:
    symbols: dict[DimKey, _Symbol] = {}
    for name, info in inputs.items():
        declared = info.type.tensor_type
        if not info.type.HasField("tensor_type"):
            continue
        floats = TORCH_DTYPES.get(declared.elem_type, torch.int64).is_floating_point
        rank = len(declared.shape.dim)
        for axis, dim in enumerate(declared.shape.dim):
            if dim.dim_value > 0:
                continue
            key = dim_key(name, axis, dim.dim_param)
            pool: tuple[int, ...] = _LENGTHS
            if axis == 0:
                pool = _BATCHES
            elif floats and rank >= 4 and axis >= 2:
                pool = _SPATIAL
            symbol = symbols.setdefault(key, _Symbol(key, [], pool))
            symbol.places.append((name, axis))
    return symbols


def _starting_sizes(symbols: Mapping[DimKey, _Symbol], given: Mapping[DimKey, int]) -> dict[DimKey, int]:
    """Distinct sizes; axes without a name of their own that lead their inputs share the batch size."""
    sizes: dict[DimKey, int] = {}
    taken = set(given.values())
    batch: int | None = None
    for key, symbol in symbols.items():
        if key in given:
            sizes[key] = given[key]
        elif isinstance(key, tuple) and key[1] == 0 and batch is not None:
            sizes[key] = batch
        else:
            sizes[key] = next((size for size in symbol.pool if size not in taken), symbol.pool[0])
            taken.add(sizes[key])
        if isinstance(key, tuple) and key[1] == 0 and batch is None:
            batch = sizes[key]
    return sizes


def _other_sizes(symbol: _Symbol, size: int, taken: Iterable[int]) -> list[int]:
    """Sizes to try in place of ``size``, none of them in use."""
    used = set(taken)
    multiples = [size * factor for factor in (2, 3, 4)] if size >= 8 else [size + 2, size * 2, size + 1]
    wanted = [*(s for s in symbol.pool if s > size), *multiples, size + 8, size + 16, size + 32, size // 2, 1]
    fresh = [s for s in dict.fromkeys(wanted) if s > 0 and s not in used]
    return fresh or [size + 1]


# ---------------------------------------------------------------------- result


def _result(
    model: OnnxFile,
    first: _Execution,
    second: _Execution | None,
    assignment: dict[DimKey, int],
    other: dict[DimKey, int] | None,
) -> Shapes:
    values: dict[str, Info] = {}
    for name in (*model.initializers, *first.cells):
        if name and name not in values:
            cell = first.cells.get(name) or first._weight(name)
            twin = second.cells.get(name) if second is not None else None
            values[name] = _info(cell, twin, first.tags)
    if second is None and assignment:
        _mark_declared(model, values, assignment)
    failed = [*first.failed]
    return Shapes(values, assignment, other, failed, frozenset(first.misfits))


def _info(cell: _Cell, twin: _Cell | None, table: _Tags) -> Info:
    if not isinstance(cell.value, torch.Tensor):
        return Info(None, why=cell.why or "a sequence")
    shape = tuple(cell.value.shape)
    dynamic = (False,) * len(shape)
    if twin is not None and isinstance(twin.value, torch.Tensor) and twin.value.ndim == len(shape):
        dynamic = tuple(a != b for a, b in zip(shape, twin.value.shape, strict=True))
    elif twin is not None:
        dynamic = (True,) * len(shape)
    known = varies = tags = None
    if cell.known is not None:
        known = cell.known.float().numpy() if cell.known.dtype == torch.bfloat16 else cell.known.numpy()
        if twin is not None and twin.known is not None and twin.known.shape == cell.known.shape:
            varies = (cell.known != twin.known).numpy()
        elif twin is not None:
            varies = np.ones(known.shape, dtype=np.bool_)
        tags = None if cell.tags is None else cell.tags.numpy()
    return Info(shape, cell.value.dtype, known, dynamic, varies, "", tags, table)


def _mark_declared(model: OnnxFile, values: dict[str, Info], sizes: Mapping[DimKey, int]) -> None:
    """Dynamic dimensions by declaration alone, where no second assignment was found."""
    graph = model.proto.graph
    for info in (*graph.input, *graph.value_info, *graph.output):
        found = values.get(info.name)
        dims = info.type.tensor_type.shape.dim
        if found is None or found.shape is None or len(dims) != len(found.shape):
            continue
        found.dynamic = tuple(
            dim.dim_value <= 0 and dim_key(info.name, axis, dim.dim_param) in sizes
            for axis, dim in enumerate(dims)
        )

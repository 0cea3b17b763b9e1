"""An executable reference of ONNX in torch, node by node, optionally in float64.

It says what a model means independently of any runtime, and lets a hook replace single nodes,
which is how masked semantics are put into the original graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

from sparsecc.errors import InvalidModel, InvalidOption, SparseccError, UnsupportedModel, summary
from sparsecc.memory import out_of_memory
from sparsecc.onnxfile.model import TORCH_DTYPES, OnnxFile, subgraphs, to_numpy, to_torch, type_name
from sparsecc.onnxfile.structure import describe, execution_order, free_names, uses
from sparsecc.reference.onnx_ops import Ctx, DataDependent, Op, Value, find
from sparsecc.reference.onnx_ops.registry import PROMOTED

Values: TypeAlias = "list[Any]"
Default: TypeAlias = "Callable[[Values], tuple[Any, ...]]"
Hook: TypeAlias = "Callable[[NodeProto, int, Values, Default], tuple[Any, ...]]"
"""``hook(node, index, inputs, default)`` returns the node's outputs; ``default(inputs)`` computes
them.  ``index`` is the node's place in the main graph; nodes of subgraphs belong to their If, Loop
or Scan and are not intercepted."""

_HALF = (torch.float16, torch.bfloat16)
_FALL_BACK_TYPES = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(slots=True)
class Step:
    """One node, ready to be executed."""

    node: NodeProto
    index: int
    op: Op | None
    ctx: Ctx
    reads: tuple[str, ...]
    last: tuple[str, ...] = ()
    native: bool = False


@dataclass(slots=True)
class Program:
    """A graph, ready to be executed: its steps, names and constants."""

    graph: GraphProto
    steps: list[Step]
    inputs: list[str]
    outputs: list[str]
    free: frozenset[str]
    constants: dict[str, TensorProto]
    bodies: dict[int, Program] = field(default_factory=dict)


def build_program(
    model: OnnxFile,
    graph: GraphProto,
    order: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    keep: frozenset[str] = frozenset(),
) -> Program:
    """Look up every node's operator once, and find out where values are used last."""
    opset = model.opset
    steps = []
    bodies: dict[int, Program] = {}
    for index in order if order is not None else execution_order(graph):
        node = graph.node[index]
        ctx = Ctx(node, opset, index=index, dtype=dtype, read=model.read)
        version = opset if node.domain in ("", "ai.onnx") else model.opsets.get(node.domain, 1)
        steps.append(Step(node, index, find(node.domain, node.op_type, version), ctx, tuple(uses(node))))
    # ``id`` is stable: ctx.attrs holds the subgraphs' protos for as long as the program lives
    for step in steps:
        for value in step.ctx.attrs.values():
            if isinstance(value, GraphProto) and id(value) not in bodies:
                bodies[id(value)] = build_program(model, value, dtype=dtype)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value.name for value in graph.input]
    outputs = [value.name for value in graph.output]
    _mark_last_uses(steps, set(outputs) | keep)
    return Program(graph, steps, inputs, outputs, frozenset(free_names(graph)), constants, bodies)


def _mark_last_uses(steps: list[Step], keep: set[str]) -> None:
    seen = set(keep)
    for step in reversed(steps):
        names = {*step.reads, *step.node.output}
        step.last = tuple(name for name in names - seen if name)
        seen |= names


class Runner:
    """Executes a model.  ``dtype=torch.float64`` promotes every float: weights, constants, inputs,
    and casts to float16, bfloat16 and float32.  Computations on sizes alone keep their own type,
    so that a rounded size stays what it is.  Weights and inputs are moved to ``device``, if one is given.
    ``weights`` stand in the place of the model's own.  ``sizes`` are those of the model that this one was
    made from: one number that is left of a table does not make a size of what is computed from it.

    Local functions are inlined first: ``model`` is then the inlined one, and a hook's indices
    refer to it.  Raises ``UnsupportedModel`` for operators that nothing here can execute.
    """

    def __init__(
        self,
        model: OnnxFile,
        *,
        dtype: torch.dtype | None = None,
        cache: bool = True,
        device: torch.device | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        sizes: Mapping[str, bool] | None = None,
    ) -> None:
        self.model = model.inlined()
        self.weights = weights or {}
        self.dtype = dtype
        self.device = device
        self._cache: dict[str, Value] | None = {} if cache else None
        self.program = build_program(self.model, self.model.proto.graph, self.model.order, dtype)
        for name, node in self.model.constants.items():
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                self.program.constants[name] = value
        _mark_native(self.program, sizes or {})

    @property
    def sizes(self) -> dict[str, bool]:
        """Whether a value is computed from sizes alone: by name."""
        return {n: step.native for step in self.program.steps for n in step.node.output if n}

    def run(
        self,
        inputs: Mapping[str, torch.Tensor | npt.NDArray[Any]],
        *,
        hook: Hook | None = None,
        keep_values: bool = False,
    ) -> dict[str, Any]:
        """The graph's outputs by name, with ``keep_values`` every value of the main graph.

        Raises ``InvalidOption`` for inputs that do not fit the model, ``InvalidModel`` for nodes
        that cannot be computed from what they are given.
        """
        steps = self.steps(inputs, keep_values=keep_values)
        try:
            node, index, given, default = next(steps)
            while True:
                found = default(given) if hook is None else hook(node, index, given, default)
                node, index, given, default = steps.send(found)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def steps(
        self, inputs: Mapping[str, torch.Tensor | npt.NDArray[Any]], *, keep_values: bool = False
    ) -> Generator[tuple[NodeProto, int, Values, Default], tuple[Any, ...], dict[str, Any]]:
        """Every node before it is computed; what is sent are its outputs.  Ends with what ``run`` gives."""
        values = self._inputs(inputs)
        for step in self.program.steps:
            given = [self._lookup(name, values, step) if name else None for name in step.node.input]
            seen = dict(values) if self.program.bodies and subgraphs(step.node) else values
            outputs = yield step.node, step.index, given, partial(self._execute, step, self.program, seen)
            for name, value in zip(step.node.output, outputs, strict=False):
                if name:
                    values[name] = value
            if not keep_values:
                for name in step.last:
                    values.pop(name, None)
        if keep_values:
            return values
        return {name: self._lookup(name, values, step=None) for name in self.program.outputs}

    # ------------------------------------------------------------------ one node

    def _execute(
        self, step: Step, program: Program, values: Mapping[str, Value], args: Values
    ) -> tuple[Any, ...]:
        ctx = step.ctx
        if (
            step.node.op_type == "Constant"
            and program is self.program
            and step.node.output[0] in program.constants
        ):
            return (self._weight(step.node.output[0]),)
        if step.native and ctx.dtype is not None:
            ctx.dtype = None
        if program.bodies and subgraphs(step.node):
            ctx = ctx.copy()
            ctx.call = lambda graph, given: self._call(program, graph, given, values)
        try:
            return execute(step.op, ctx, args)
        except SparseccError as error:
            raise type(error)(f"{describe(step.node, step.index)}: {error}") from error
        except DataDependent as error:
            raise UnsupportedModel(f"{describe(step.node, step.index)}: {summary(error)}") from error
        except Exception as error:  # torch and numpy raise many kinds for shapes that do not fit
            if out_of_memory(error):
                raise
            shapes = [list(a.shape) if isinstance(a, (torch.Tensor, np.ndarray)) else None for a in args]
            raise InvalidModel(
                f"{describe(step.node, step.index)} does not compute on inputs of shapes {shapes}: "
                f"{summary(error)}"
            ) from error

    def _call(
        self, program: Program, graph: GraphProto, args: Sequence[Value], outer: Mapping[str, Value]
    ) -> list[Value]:
        """Execute a subgraph with ``outer`` visible."""
        body = program.bodies[id(graph)]
        values: dict[str, Value] = {name: self._lookup(name, outer, None) for name in body.free}
        for name, tensor in body.constants.items():
            values[name] = self._promoted(self._constant(tensor))
        values.update(zip(body.inputs, args, strict=False))
        for step in body.steps:
            given = [values[name] if name else None for name in step.node.input]
            for name, value in zip(step.node.output, self._execute(step, body, values, given), strict=False):
                values[name] = value
        return [values[name] for name in body.outputs]

    # ------------------------------------------------------------------ values

    def _lookup(self, name: str, values: Mapping[str, Value], step: Step | None) -> Value:
        value = values[name] if name in values else self._weight(name)
        return value if step is not None and step.native else self._promoted(value)

    def _promoted(self, value: Value) -> Value:
        if self.dtype is None or not isinstance(value, torch.Tensor) or value.dtype not in PROMOTED:
            return value
        return value.to(self.dtype)

    def constant(self, name: str) -> Value:
        """A constant of the main graph by name."""
        return self._weight(name)

    def _weight(self, name: str) -> Value:
        if name in self.weights:
            return self.weights[name]
        if self._cache is not None and name in self._cache:
            return self._cache[name]
        if name not in self.program.constants:
            raise InvalidModel(f"value {name!r} is never computed")
        value = self._constant(self.program.constants[name])
        if self._cache is not None:
            self._cache[name] = value
        return value

    def _constant(self, tensor: TensorProto) -> Value:
        array = self.model.read(tensor)
        found = to_torch(array)
        if found is None:
            return array
        if self.device is not None:
            found = found.to(self.device)
        if self.dtype is not None and found.dtype in PROMOTED and found.numel() > 1024:
            return found.to(self.dtype)  # small ones may take part in computations on sizes
        return found

    def _inputs(self, given: Mapping[str, torch.Tensor | npt.NDArray[Any]]) -> dict[str, Value]:
        """Graph inputs as values, checked against their declared types."""
        declared = {value.name: value for value in self.model.proto.graph.input}
        unknown = sorted(set(given) - set(declared))
        missing = [value.name for value in self.model.inputs if value.name not in given]
        missing = [name for name in missing if not declared[name].type.HasField("optional_type")]
        if unknown or missing:
            raise InvalidOption(
                f"inputs do not fit: missing {missing}, unknown {unknown}; the model takes {sorted(declared)}"
            )
        values: dict[str, Value] = {}
        for name, info in declared.items():
            if name in given:
                values[name] = self._input(info, given[name])
            elif name not in self.program.constants:
                values[name] = None
        return values

    def _input(self, info: ValueInfoProto, value: Any) -> Value:
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            return [self._plain(item) for item in value] if isinstance(value, (list, tuple)) else value
        tensor = self._plain(value)
        if info.type.HasField("tensor_type"):
            check_input(info, tensor)
        return tensor

    def _plain(self, value: Any) -> Value:
        if isinstance(value, np.generic):
            value = np.asarray(value)
        found = to_torch(value) if isinstance(value, np.ndarray) else value
        if isinstance(found, torch.Tensor) and self.device is not None:
            found = found.to(self.device)
        if isinstance(found, torch.Tensor) and self.dtype is not None and found.dtype in PROMOTED:
            return found.to(self.dtype)
        return value if found is None else found


def check_input(info: ValueInfoProto, value: Value) -> None:
    """Raise ``InvalidOption`` where an input contradicts its declaration."""
    declared = info.type.tensor_type
    if isinstance(value, torch.Tensor):
        wanted = TORCH_DTYPES.get(declared.elem_type)
        if wanted is not None and wanted.is_floating_point != value.dtype.is_floating_point:
            raise InvalidOption(
                f"input {info.name!r} is {value.dtype}, and the model takes {type_name(declared.elem_type)}"
            )
    if isinstance(value, (torch.Tensor, np.ndarray)) and declared.HasField("shape"):
        sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in declared.shape.dim]
        fits = len(sizes) == value.ndim and all(
            size in (None, have) for size, have in zip(sizes, value.shape, strict=True)
        )
        if not fits:
            shown = [size or "any" for size in sizes]
            raise InvalidOption(
                f"input {info.name!r} has shape {list(value.shape)}, and the model takes {shown}"
            )


def execute(op: Op | None, ctx: Ctx, args: Sequence[Value]) -> tuple[Any, ...]:
    """One operator on values; raises ``UnsupportedModel`` where nothing implements it."""
    arrays = any(isinstance(arg, np.ndarray) for arg in args)
    if op is not None and not (arrays and op.kind != "raw") and not _needs_numpy(op, args):
        try:
            return _as_tuple(_call_op(op, ctx, args))
        except UnsupportedModel:
            if any(isinstance(arg, torch.Tensor) and arg.is_meta for arg in args) or ctx.call is not None:
                raise
    return fall_back(ctx, args)


def _needs_numpy(op: Op, args: Sequence[Value]) -> bool:
    """Unsigned integers of more than a byte: torch has few kernels for them."""
    if op.kind != "compute":
        return False
    return any(isinstance(a, torch.Tensor) and a.dtype in _FALL_BACK_TYPES and not a.is_meta for a in args)


def _call_op(op: Op, ctx: Ctx, args: Sequence[Value]) -> Any:
    if op.kind != "compute":
        return op.function(ctx, *args)
    halves = {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.dtype in _HALF}
    if not halves:
        return op.function(ctx, *args)
    half = next(iter(halves))
    wide = [arg.float() if isinstance(arg, torch.Tensor) and arg.dtype in _HALF else arg for arg in args]
    found = op.function(ctx, *wide)
    if isinstance(found, tuple):
        return tuple(_narrow(item, half) for item in found)
    return _narrow(found, half)


def _narrow(value: Any, half: torch.dtype) -> Any:
    return value.to(half) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def fall_back(ctx: Ctx, args: Sequence[Value]) -> tuple[Any, ...]:
    """A node executed by ``onnx.reference``, in numpy; for operators that the table lacks."""
    node = ctx.node
    if any(isinstance(arg, torch.Tensor) and arg.is_meta for arg in args):
        raise DataDependent(f"{node.op_type} has no abstract execution")
    import onnx
    from onnx.reference import ReferenceEvaluator

    feeds = {f"in{k}": _to_reference(arg) for k, arg in enumerate(args) if arg is not None}
    single = NodeProto()
    single.CopyFrom(node)
    for k in range(len(single.input)):
        single.input[k] = f"in{k}" if k < len(args) and args[k] is not None else ""
    version = ctx.opset
    if node.op_type == "RoiAlign" and version < 16:  # run by today's default otherwise
        single.attribute.append(
            onnx.helper.make_attribute("coordinate_transformation_mode", "output_half_pixel")
        )
        version = 16
    outputs = [name or f"unused{k}" for k, name in enumerate(single.output)]
    graph = onnx.helper.make_graph(
        [single],
        "single",
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in outputs if name in single.output],
    )
    opsets = [onnx.helper.make_opsetid("", version)]
    if node.domain not in ("", "ai.onnx"):
        opsets.append(onnx.helper.make_opsetid(node.domain, 1))
    try:
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
    except Exception as error:  # whatever it raises for operators that it does not know
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise UnsupportedModel(
            f"operator {name} has no reference implementation, so that nothing about the model can be "
            f"proved: add one with @sparsecc.reference.onnx_ops.registry.op({name!r}), or pass verify=False"
        ) from error
    try:
        results = evaluator.run(None, feeds)
    except Exception:
        if ctx.dtype is None:
            raise
        # some of these implementations insist on the types that the model was written with
        narrow = {name: _narrowed(value) for name, value in feeds.items()}
        results = evaluator.run(None, narrow)
    found = iter(results)
    return tuple(_from_reference(ctx, next(found)) if name else None for name in single.output)


def _to_reference(value: Value) -> Any:
    if isinstance(value, list):
        return [_to_reference(item) for item in value]
    return to_numpy(value) if isinstance(value, torch.Tensor) else value


def _narrowed(value: Any) -> Any:
    if isinstance(value, list):
        return [_narrowed(item) for item in value]
    is_double = isinstance(value, np.ndarray) and value.dtype == np.float64
    return value.astype(np.float32) if is_double else value


def _from_reference(ctx: Ctx, value: Any) -> Value:
    if isinstance(value, list):
        return [_from_reference(ctx, item) for item in value]
    return None if value is None else ctx.constant(np.asarray(value))


def _is_number(tensor: TensorProto) -> bool:
    """Whether a constant may take part in computations on sizes: integers, and single numbers."""
    dtype = TORCH_DTYPES.get(tensor.data_type)
    return dtype is not None and (not dtype.is_floating_point or math.prod(tensor.dims) == 1)


def _mark_native(program: Program, told: Mapping[str, bool]) -> None:
    """Find the nodes that compute on sizes alone: from Shape, Size and constants, where nobody has told."""
    native: set[str] = set()
    constant = {name for name, tensor in program.constants.items() if _is_number(tensor)}
    for step in program.steps:
        names = {name for name in step.reads if name}
        if step.node.op_type in ("Shape", "Size"):
            native.update(step.node.output)
            step.native = True
        elif step.node.op_type == "Constant":
            constant.update(n for n in step.node.output if n not in program.constants)
        elif names and names <= constant:
            constant.update(step.node.output)
        elif names and names <= native | constant and not subgraphs(step.node):
            step.native = all(told.get(name, True) for name in step.node.output)
            native.update(step.node.output if step.native else ())

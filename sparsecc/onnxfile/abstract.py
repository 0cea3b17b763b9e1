"""Abstract execution of an ONNX graph: every node once, on tensors without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from onnx import GraphProto, TensorProto

from sparsecc.errors import UnsupportedModel, summary
from sparsecc.onnxfile.cells import MAX_KNOWN, Cell, Tags, collapsed, common, computed, meta
from sparsecc.onnxfile.model import subgraphs
from sparsecc.onnxfile.quick import GROWING, moved_inputs, quick
from sparsecc.onnxfile.structure import describe
from sparsecc.reference.onnx_ops.registry import Ctx, DataDependent, Value
from sparsecc.reference.onnx_run import Program, Step, execute

if TYPE_CHECKING:
    from sparsecc.onnxfile.dims import Problem


COUNTING = frozenset({"NonZero", "Unique", "NonMaxSuppression", "Compress"})
"""Operators that put out as much as their data say."""


class Misfit(Exception):
    """A node that the assigned sizes do not fit."""

    def __init__(
        self, step: Step, position: tuple[int, ...], shapes: list[tuple[int, ...]], error: BaseException | str
    ) -> None:
        super().__init__(f"{describe(step.node, step.index)}: {summary(error)}")
        self.position = position
        self.shapes = shapes


class Execution:
    """One abstract run of the main graph."""

    def __init__(self, problem: Problem, tolerant: bool) -> None:
        self.problem = problem
        self.tolerant = tolerant
        self.tags = Tags()
        self.cells: dict[str, Cell] = {}
        self.failed: list[str] = []
        self.misfits: set[str] = set()

    def run(self, inputs: Mapping[str, Cell]) -> None:
        program = self.problem.program
        self.cells.update(inputs)
        for position, step in enumerate(program.steps):
            outputs = self._step(program, step, self.cells, (position,))
            for name, cell in zip(step.node.output, outputs, strict=False):
                if name:
                    self.cells[name] = cell

    def _step(
        self, program: Program, step: Step, cells: Mapping[str, Cell], position: tuple[int, ...]
    ) -> Sequence[Cell]:
        self.problem.spend()
        given = [self._cell(name, cells) if name else None for name in step.node.input]
        unknown = next((cell.why for cell in given if cell is not None and cell.unknown), None)
        if unknown is not None:
            return self._unknown(step, unknown)
        try:
            outputs = self._execute(program, step, given, cells, position)
        except (DataDependent, UnsupportedModel, NotImplementedError) as error:
            return self._unknown(step, f"{describe(step.node, step.index)}: {summary(error)}")
        except Misfit as misfit:
            return self._misfit_within(step, misfit)
        except Exception as error:  # torch raises many kinds for sizes that do not fit
            return self._misfit(step, position, given, error)
        if not self.tolerant and collapsed(given, outputs):
            return self._misfit(step, position, given, "a size becomes 0")
        return outputs

    def _misfit(
        self, step: Step, position: tuple[int, ...], given: Sequence[Cell | None], error: BaseException | str
    ) -> Sequence[Cell]:
        shapes = [tuple(c.value.shape) for c in given if c is not None and isinstance(c.value, torch.Tensor)]
        return self._misfit_within(step, Misfit(step, position, shapes, error))

    def _misfit_within(self, step: Step, misfit: Misfit) -> Sequence[Cell]:
        if not self.tolerant:
            raise misfit
        self.failed.append(str(misfit))
        self.misfits.update(step.node.output)
        return self._unknown(step, str(misfit))

    def _unknown(self, step: Step, why: str) -> list[Cell]:
        """Outputs of a node that cannot be executed: what the model declares of them, else nothing."""
        return [self.problem.declared_cell(name) or Cell(None, why=why) for name in step.node.output]

    def _cell(self, name: str, cells: Mapping[str, Cell]) -> Cell:
        found = cells.get(name)
        if found is None:
            found = self.cells[name] = self.weight(name)
        return found

    def weight(self, name: str) -> Cell:
        tensor = self.problem.model.initializers.get(name)
        if tensor is None:
            return Cell(None, why=f"{name!r} is not computed")
        return self._constant(name, tensor)

    def _constant(self, name: str, tensor: TensorProto) -> Cell:
        """A weight: known when it is small, else its shape alone."""
        value, known = self.problem.constant(tensor)
        if known is None:
            return Cell(value)
        tags = None
        if not known.dtype.is_floating_point:
            tags = self.tags.new("literal", name, known.numel()).reshape(known.shape)
        return Cell(value, known, tags)

    # ------------------------------------------------------------------ one node

    def _execute(
        self,
        program: Program,
        step: Step,
        given: Sequence[Cell | None],
        cells: Mapping[str, Cell],
        position: tuple[int, ...],
    ) -> list[Cell]:
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
            return [computed(value, tag) for value, tag in zip(outputs, tags, strict=True)]
        if default and step.op is not None:
            shortcut = quick(step, given)
            if shortcut is not None:
                return [Cell(shortcut)]
        ctx = self._ctx(program, step, cells, position)
        args: list[Value] = []
        known: dict[int, torch.Tensor] = {}
        for cell in given:
            args.append(None if cell is None else cell.value)
            if cell is not None and cell.known is not None:
                known[id(cell.value)] = cell.known
        ctx.known = known
        return [computed(value, None) for value in execute(step.op, ctx, args)]

    def _ctx(self, program: Program, step: Step, cells: Mapping[str, Cell], position: tuple[int, ...]) -> Ctx:
        ctx = step.ctx  # this run's own: the program was built for it
        ctx.abstract = True
        if step.node.op_type in COUNTING:
            declared = all(self.problem.declared_cell(name) for name in step.node.output if name)
            ctx.count = None if declared else self.problem.count
        if program.bodies and subgraphs(step.node):
            ctx = ctx.copy()
            ctx.call = lambda graph, args: self._call(
                program, graph, [computed(a, None) for a in args], cells, position
            )
        return ctx

    def _call(
        self,
        program: Program,
        graph: GraphProto,
        args: Sequence[Cell],
        outer: Mapping[str, Cell],
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
        args: Sequence[Cell],
        outer: Mapping[str, Cell],
        position: tuple[int, ...],
    ) -> list[Cell]:
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
        given: Sequence[Cell | None],
        cells: Mapping[str, Cell],
        position: tuple[int, ...],
    ) -> list[Cell]:
        """If: the branch that is taken, else the one that fits, or what both have in common."""
        condition = given[0].known if given[0] is not None else None
        names = ["then_branch", "else_branch"]
        if condition is not None:
            names = names[:1] if bool(condition.reshape(-1)[0]) else names[1:]
        fitting: list[list[Cell]] = []
        misfits: list[Misfit] = []
        tolerant, self.tolerant = self.tolerant, False
        try:
            for name in names:
                try:
                    fitting.append(self._body(program, step.ctx.graph(name), [], cells, position))
                except Misfit as misfit:
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
            return [b if a.unknown else Cell(a.value) for a, b in zip(fitting[0], declared, strict=True)]
        return [common(*trio) for trio in zip(*fitting, declared, strict=True)]

    def _constant_node(self, step: Step) -> Cell:
        name = step.node.output[0]
        value = step.ctx.attrs.get("value")
        if isinstance(value, TensorProto):
            return self._constant(name, value)
        made = execute(step.op, step.ctx, ())[0]
        if not isinstance(made, torch.Tensor):
            return Cell(None, why="a constant of strings")
        tags = None
        if not made.dtype.is_floating_point:
            tags = self.tags.new("literal", name, made.numel()).reshape(made.shape)
        return Cell(meta(made), made, tags)

    def _shape_of(self, step: Step, given: Sequence[Cell | None]) -> Cell:
        sizes = execute(step.op, step.ctx, [given[0].value if given[0] is not None else None])[0]
        rank = given[0].value.ndim if given[0] and isinstance(given[0].value, torch.Tensor) else len(sizes)
        axes = self.tags.new("dim", step.node.input[0], rank)
        start = step.ctx.integer("start", 0)
        start = max(0, min(rank, start + rank if start < 0 else start))
        return Cell(meta(sizes), sizes, axes[start : start + len(sizes)])

    def _worth_computing(self, step: Step, given: Sequence[Cell | None]) -> bool:
        """Whether computing on known values stays small."""
        total = sum(cell.known.numel() for cell in given if cell is not None and cell.known is not None)
        if total <= 4096 and step.node.op_type not in GROWING:
            return True
        ctx = step.ctx
        ctx.abstract = True
        ctx.known = {id(c.value): c.known for c in given if c is not None and c.known is not None}
        outputs = execute(step.op, ctx, [None if cell is None else cell.value for cell in given])
        return all(o.numel() <= MAX_KNOWN for o in outputs if isinstance(o, torch.Tensor))

    def _move_tags(
        self, step: Step, given: Sequence[Cell | None], outputs: Sequence[Value]
    ) -> Sequence[torch.Tensor | None]:
        """The outputs' tags, by moving the inputs' tags as the operator moves elements."""
        nothing: list[torch.Tensor | None] = [None] * len(outputs)
        if step.op is None or not any(cell is not None and cell.tags is not None for cell in given):
            return nothing
        kind = step.node.op_type
        if kind == "Cast":
            return [given[0].tags if given[0] is not None else None]
        places = moved_inputs(kind, len(given), step.ctx)
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

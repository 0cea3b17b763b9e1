"""A captured PyTorch model as the pipeline and the verification see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.axes.terms import Kept
from sparsecc.errors import InvalidOption, SparseccError, UnsupportedModel
from sparsecc.fx.batch_of_one import holds_for_one
from sparsecc.fx.capture import Program, capture, evaluating, recapture, split_inputs
from sparsecc.fx.config import changed, descriptions, has_config, rebuilt
from sparsecc.fx.editor import edit
from sparsecc.fx.inputs import has_integers, synthesised
from sparsecc.fx.module import (
    Diverged,
    accepted,
    looks_up_for_nothing,
    module_actions,
    narrowed,
    recaptured,
    replacements,
)
from sparsecc.fx.program_module import argument_names, program_module
from sparsecc.fx.reader import read, unread, where
from sparsecc.fx.training import misfit, training_program
from sparsecc.fx.weights import exact_weights, substituted, under
from sparsecc.graph import View
from sparsecc.memory import out_of_memory
from sparsecc.plan import Bypass, Fold, Mask, Plan, SetModule, Take, Write
from sparsecc.reference.masked import Masked
from sparsecc.reference.node_checks import check_nodes
from sparsecc.reference.torch_run import Default, MaskedCalls, ProgramRunner, masked_hook, result_of, runs
from sparsecc.subject import (
    Applied,
    Arguments,
    NodeCheck,
    Outputs,
    Step,
    Stepping,
    Subject,
)
from sparsecc.verification.check import FLOAT64_BOUND, RUNS, distance


@dataclass
class AppliedTorch(Applied):
    """``program`` is what the returned model runs: its own export where the class was kept.

    ``described``: the model's configuration gives the class its widths, so that ``from_pretrained`` works;
    ``undescribed`` is why none does, of a model that has a configuration.
    """

    program: Program | None = None
    described: bool = False
    undescribed: str = ""

    def run(self, inputs: list[Any], dtype: torch.dtype | None = None) -> Outputs:
        """Flat outputs of the returned model."""
        assert self.program is not None
        overrides = exact_weights(self.plan, self.program.weights) if dtype == torch.float64 else {}
        return ProgramRunner(self.program, dtype=dtype, overrides=overrides).run(inputs)[0]

    @contextmanager
    def timed(self, arguments: Arguments) -> Iterator[Callable[[], object]]:
        """The returned module's forward, without gradients, in evaluation mode."""
        with _timed(self.model, arguments) as call:
            yield call


@contextmanager
def _timed(model: torch.nn.Module | ExportedProgram, arguments: Arguments) -> Iterator[Callable[[], object]]:
    args, kwargs = arguments
    module = model.module() if isinstance(model, ExportedProgram) else model
    with torch.no_grad(), evaluating(module):
        yield lambda: module(*args, **kwargs)


#: no rounding makes so large a part of the largest output
_ROUGHLY = 0.25


_DIFFERS = "it treats a batch of one differently"


def _first(x: Any) -> Any:
    """The first of a batch."""
    return x[:1] if isinstance(x, torch.Tensor) and x.dim() else x


class TorchSubject(Subject):
    """An nn.Module, GraphModule or ExportedProgram after capture."""

    dialect = "torch"

    def __init__(self, model: Any, example_inputs: Any = None, *, dynamic_shapes: Any = None) -> None:
        self.given = model
        self.program = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
        if self.program.automatic and not holds_for_one(self.program, *self._batch_of_one()):
            if self.program.doubled:
                self.program = capture(model, example_inputs, static=_DIFFERS)
            else:
                self.program.notes.append(f"{_DIFFERS}, which was not captured: give it two at least")
        self.notes = list(self.program.notes)
        self._held = False

    def _batch_of_one(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The first of the example's batch."""
        given = (self.program.args, self.program.kwargs)
        first: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(_first, given)
        return first

    @cached_property
    def view(self) -> View:
        """The exported graph."""
        return read(self.program, self._training)

    @cached_property
    def _training(self) -> Program | None:
        return training_program(self.program)

    def inputs(self, seed: int, variant: int) -> tuple[list[Any], str]:
        """Flat inputs like the example's; seed 0 of variant 0 is the example itself.

        Raises UnsupportedModel for a model on the meta device, which nothing can be run on.
        """
        for name, weight in self.program.weights.items():
            if weight.is_meta:
                raise UnsupportedModel(
                    f"{name!r} is on the meta device, so the model cannot be run; load the weights first, "
                    "or pass verify=False"
                )
        return synthesised(self.program, self.view, seed, variant, held=self._held)

    def example(self) -> list[Any]:
        """The example inputs; a batch of one, which is captured as two, is one again."""
        inputs, _ = self.inputs(0, 0)
        return [_first(x) for x in inputs] if self.program.doubled else inputs

    def hold_integers(self) -> bool:
        """Let ``inputs`` take integers from the example alone."""
        before, self._held = self._held, has_integers(self.program)
        return self._held and not before

    def arguments(self, inputs: list[Any]) -> Arguments:
        """Flat inputs in the structure of the example's."""
        args, kwargs = pytree.tree_unflatten(inputs, self.program.in_spec)
        return tuple(args), dict(kwargs)

    @contextmanager
    def timed(self, arguments: Arguments) -> Iterator[Callable[[], object]]:
        """The user's module, without gradients, in evaluation mode."""
        module = self.program.module
        with _timed(self.program.exported if module is None else module, arguments) as call:
            yield call

    def original(self, inputs: list[Any], dtype: torch.dtype | None = None) -> Outputs:
        """Outputs of the original program."""
        with self._blaming(inputs):
            return ProgramRunner(self.program, dtype=dtype).run(inputs)[0]

    @contextmanager
    def _blaming(self, inputs: list[Any]) -> Iterator[None]:
        """Raise InvalidOption for an error that the model itself makes on these inputs.

        torch.export checks neither dtypes nor the range of indices.
        """
        try:
            yield
        except Exception:
            try:
                ProgramRunner(self.program).run(inputs)
            except SparseccError:
                raise
            except Exception as error:  # whatever the operators raise
                first = (str(error).strip() or repr(error)).split("\n")[0]
                raise InvalidOption(
                    f"the model itself fails on example_inputs, or on inputs made like them: "
                    f"{type(error).__name__}: {first}; check their dtypes and values"
                ) from error
            raise

    def masked(
        self,
        plan: Plan,
        kept: Mapping[str, Kept],
        inputs: list[Any],
        dtype: torch.dtype | None = None,
        *,
        nudge: int | None = None,
    ) -> Outputs:
        """Outputs under masked semantics."""
        hook = self._hook(plan, self.semantics(kept, nudge, dtype))
        with self._blaming(inputs):
            return self._masked_runner(plan, dtype).run(inputs, hook=hook)[0]

    def _masked_runner(self, plan: Plan, dtype: torch.dtype | None) -> ProgramRunner:
        valued = {a.weight for a in (*plan.of(Write), *plan.of(Mask))}
        overrides = {n: substituted(plan, n, self.program.weights[n].detach()) for n in valued}
        return ProgramRunner(self.program, dtype=dtype, overrides=overrides)

    def _hook(self, plan: Plan, semantics: Masked) -> Any:
        masking = self._masking(plan, semantics)
        return masked_hook(self.view, masking.masked, masking.around)

    def _masking(self, plan: Plan, semantics: Masked) -> MaskedCalls:
        bypassed = {b.output: b.source for b in plan.of(Bypass)}
        return MaskedCalls(self.view, semantics, bypassed)

    def stepping(
        self,
        inputs: list[Any],
        *,
        weights: Mapping[str, torch.Tensor] | None = None,
        plan: Plan | None = None,
    ) -> Stepping:
        """The original program, call by call."""
        runner = (
            ProgramRunner(self.program, overrides=weights)
            if plan is None
            else self._masked_runner(plan, None)
        )
        masking = None if plan is None else self._masking(plan, self.semantics(self.kept(plan)))
        calls = {call.raw: call for call in self.view.calls}
        env: dict[Any, Any] = {}
        steps = runner.steps(inputs, env)
        try:
            node, default = next(steps)
            while True:
                call = calls.get(node)
                if call is None:
                    found = default({})
                elif masking is None:
                    operands = [None if ref is None else env[ref] for ref in call.refs]
                    found = result_of(node, (yield Step(call, operands, runs(call, default))))
                else:
                    whole = runs(call, default)
                    run = partial(masking.masked, call, default=whole)
                    found = result_of(node, (yield Step(call, masking.operands(call, env), run, whole)))
                node, default = steps.send(found)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def bound(self, example_inputs: Any) -> list[Any]:
        """Flat inputs from a tensor, a tuple of positional or a dict of keyword inputs."""
        args, kwargs = split_inputs(example_inputs)
        flat = self.program.flat_inputs(args, kwargs)
        placeholders = {n.name: n.meta["val"] for n in self.program.graph.nodes if n.op == "placeholder"}
        for name, leaf in zip(self.program.inputs, flat, strict=True):
            if isinstance(leaf, torch.Tensor):
                _check_fits(name, leaf, placeholders[name])
        return flat

    def structured(self, outputs: Outputs) -> Any:
        """What the module returns."""
        return pytree.tree_unflatten(outputs, self.program.out_spec)

    def apply(self, plan: Plan, kept: Mapping[str, Kept]) -> AppliedTorch:
        """The user's class where it can express the plan, else the graph as a module."""
        slim = edit(self.program, plan)
        notes = self._left_out(plan)
        if self.program.module is None:
            return AppliedTorch(self._exported(slim), replace(plan, form="graph"), notes, slim)
        try:
            applied = self._same_class(plan, kept, slim)
            applied.notes += [*notes, *self._untrainable(applied)]
            return applied
        except Diverged as reason:
            note = f"returned as a graph module, because the class cannot express the plan: {reason}"
            module = program_module(slim, training=self.program.module.training)
            return AppliedTorch(module, replace(plan, form="graph"), [note, *notes, *self._unread()], slim)

    def _unread(self) -> list[str]:
        """A note on parameters that the class has and the graph has not."""
        names = sorted(unread(self.program))
        return [_UNREAD.format(", ".join(names))] if names else []

    def _left_out(self, plan: Plan) -> list[str]:
        """A note on buffers that were cut although no state dict holds them."""
        unsaved = set(self.program.exported.graph_signature.non_persistent_buffers)
        cut = sorted(unsaved.intersection(t.weight for t in plan.of(Take)))
        return [_LEFT_OUT.format(", ".join(cut))] if cut else []

    def _untrainable(self, applied: AppliedTorch) -> list[str]:
        """A note on code that only training runs, and that the new widths do not fit."""
        why = misfit(applied.model, self._training) if applied.plan and self._training is not None else ""
        return [_UNTRAINABLE.format(why)] if why else []

    def _exported(self, slim: Program) -> ExportedProgram:
        """An ExportedProgram goes in, so one comes back."""
        args, kwargs = self.program.exported.example_inputs or ((), {})
        shapes = _dynamic_like(self.program, args, kwargs)
        like = replace(self.program, args=tuple(args), kwargs=dict(kwargs), dynamic_shapes=shapes)
        return recapture(program_module(slim), like).exported

    def _same_class(self, plan: Plan, kept: Mapping[str, Kept], slim: Program) -> AppliedTorch:
        module = self.program.module
        assert module is not None
        for fold in plan.of(Fold):
            raise Diverged(fold.output, "is computed by the class, and stored in the result")
        keeps = self.analysis.keeps(kept)
        widths = module_actions(self.program, self.view, plan, keeps)
        ways = replacements(self.program, self.view, plan)
        for replaced in ways:
            here = [a for a in widths if not any(under(a.module, r.module) for r in replaced)]
            full = replace(plan.with_actions([*here, *replaced]), form="class")
            try:
                return self._accepted(narrowed(module, full, self.program.tied), full, slim, keeps)
            except Diverged:
                if replaced is ways[-1]:
                    raise
        raise AssertionError("there is always a way to try")

    def _accepted(self, edited: torch.nn.Module, plan: Plan, slim: Program, keeps: Keeps) -> AppliedTorch:
        """The narrowed module where it is the edited graph, with the configuration that describes it."""
        why = ""
        if plan and has_config(edited) and self.has_values:
            why = "no values of its fields give these shapes"
            for changes in descriptions(edited, self.program, self.view, plan, keeps):
                described = plan.with_actions(changes)
                try:
                    with changed(edited, changes):
                        self.check_loaded(edited, slim, keeps, described)
                        program = self._exports(edited, described, slim, keeps)
                        return AppliedTorch(edited, described, [_loads(changes)], program, True)
                except Diverged as reason:
                    why = str(reason)
        program = self._exports(edited, plan, slim, keeps)
        notes = [_NO_CONFIG.format(why)] if why else []
        return AppliedTorch(edited, plan, notes, program, undescribed=why)

    def _exports(self, edited: torch.nn.Module, plan: Plan, slim: Program, keeps: Keeps) -> Program:
        """The program of the narrowed module; raises Diverged unless it is the edited graph, and runs."""
        program = accepted(edited, self.program, slim, self.view, keeps, plan)
        if plan and self.has_values and looks_up_for_nothing(program):
            self._check_runs(program)
        return program

    def _check_runs(self, program: Program) -> None:
        """Raise Diverged where a program does not run on the example."""
        inputs, _ = self.inputs(*RUNS[0])
        place = ""

        def hook(node: Node, default: Default, env: Mapping[Node, Any]) -> Any:
            nonlocal place
            place = where(node) or node.name
            return default({})

        try:
            ProgramRunner(program).run(inputs, hook=hook)
        except Exception as failure:  # whatever the operators raise
            if out_of_memory(failure):
                raise
            raise Diverged(place, f"is run for nothing, and fails: {failure}") from failure

    @property
    def has_values(self) -> bool:
        """Whether the weights are there, so that what a configuration gives can be compared."""
        return not any(w.is_meta for w in self.program.weights.values())

    def check_loaded(self, edited: torch.nn.Module, slim: Program, keeps: Keeps, plan: Plan) -> None:
        """Raise Diverged unless what is loaded from a module's configuration and weights computes in float64
        what the edited graph does.
        """
        loaded = rebuilt(edited)
        self._compare_roughly(loaded, slim)
        again = recaptured(loaded, self.program)
        for seed, variant in RUNS:
            inputs, _ = self.inputs(seed, variant)
            try:
                ours, theirs = (ProgramRunner(p, dtype=torch.float64).run(inputs)[0] for p in (again, slim))
            except Exception as failure:  # whatever the operators raise
                raise Diverged(type(loaded).__name__, f"does not run on the example: {failure}") from failure
            for name, a, b in zip(self.output_names, ours, theirs, strict=True):
                error, scale = distance(a, b) if isinstance(b, torch.Tensor) else (float(a != b), 1.0)
                if error > FLOAT64_BOUND * scale:
                    raise Diverged(name, f"differs by {error:.1e} when the model is built from its config")

    def _compare_roughly(self, loaded: torch.nn.Module, slim: Program) -> None:
        """Raise Diverged for what one run of the module shows: exporting it takes much longer."""
        inputs, _ = self.inputs(*RUNS[0])
        try:
            with _timed(loaded, self.arguments(inputs)) as call:
                found = pytree.tree_leaves(call())
        except Exception as failure:  # the model's own code runs
            raise Diverged(type(loaded).__name__, f"does not run on the example: {failure}") from failure
        wanted = ProgramRunner(slim).run(inputs)[0]
        if len(found) != len(wanted):
            return
        for name, a, b in zip(self.output_names, found, wanted, strict=True):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and b.is_floating_point():
                error, scale = distance(a, b)
                if error > _ROUGHLY * scale:
                    raise Diverged(name, f"differs by {error:.1e} when the model is built from its config")

    def adopt(self, result: Any, plan: Plan) -> AppliedTorch:
        """A module from elsewhere, exported with this model's inputs."""
        if isinstance(result, torch.nn.Module):
            return AppliedTorch(result, plan, [], recapture(result, self.program))
        if isinstance(result, torch.export.ExportedProgram):
            return AppliedTorch(result, plan, [], capture(result))
        raise InvalidOption(
            f"the original is a PyTorch model, so the result must be one, not a {type(result).__name__}"
        )

    def node_checks(
        self, applied: Applied, kept: Mapping[str, Kept], inputs: list[Any]
    ) -> Iterator[NodeCheck]:
        """Every operator of the result on the masked original's activations."""
        assert isinstance(applied, AppliedTorch)
        assert applied.program is not None
        runner = self._masked_runner(applied.plan, None)
        yield from check_nodes(
            runner,
            self.view,
            self.analysis.keeps(kept),
            self._hook(applied.plan, self.semantics(kept)),
            applied.program,
            inputs,
            applied.plan.actions,
        )

    def fingerprint(self) -> str:
        """SHA-256 of the graph's text and of every weight."""
        digest = hashlib.sha256(str(self.program.graph).encode())
        for name in sorted(self.program.weights):
            tensor = self.program.weights[name].detach()
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            if tensor.device.type != "meta":
                raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    @cached_property
    def output_names(self) -> Sequence[str]:
        """Names of the flat outputs, by their place in the output structure."""
        count = sum(kind == "USER_OUTPUT" for kind, _ in self.program.outputs)
        dummy = pytree.tree_unflatten(list(range(count)), self.program.out_spec)
        paths, _ = pytree.tree_flatten_with_path(dummy)
        return ["output" + pytree.keystr(path) for path, _ in paths]


def _check_fits(name: str, given: torch.Tensor, like: torch.Tensor) -> None:
    """Raise InvalidOption where a tensor has another dtype than an input, or a size that is not free."""
    if given.dtype != like.dtype:
        raise InvalidOption(f"input {name!r} is {given.dtype}, the model takes {like.dtype}: convert it")
    sizes = [n if isinstance(n, int) else None for n in like.shape]
    fits = len(sizes) == given.dim() and all(n in (None, m) for n, m in zip(sizes, given.shape, strict=True))
    if not fits:
        shown = [n or "any" for n in sizes]
        raise InvalidOption(f"input {name!r} has shape {list(given.shape)}, the model takes {shown}")


def _loads(changes: Sequence[SetModule]) -> str:
    fields = ", ".join(f"{a.name.partition('.')[2]} = {a.value}" for a in changes)
    told = f"config describes the result ({fields})" if fields else "config describes the result as it is"
    return f"{told}: save_pretrained and from_pretrained work"


_NO_CONFIG = (
    "config keeps its old widths, so from_pretrained cannot load the result: apply the plan to the original "
    "model, or compile an artifact ({})"
)


_LEFT_OUT = (
    "{}: cut, but no part of a state dict; to load the weights elsewhere, apply the plan to the original "
    "model first (Pruned.save writes both)"
)


_UNREAD = "{}: no output depends on them in evaluation, so the graph module goes without"


_UNTRAINABLE = (
    "in evaluation the class computes what the plan says, but what it runs in training alone does not fit "
    "its new widths: exclude the groups that this reads ({})"
)


def _dynamic_like(program: Program, args: Any, kwargs: Any) -> Any:
    """Dynamic shapes that keep dynamic what is dynamic in an exported program."""
    holes = iter([n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.inputs])

    def spec(leaf: Any) -> Any:
        fake = next(holes).meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return None
        return {d: torch.export.Dim.AUTO for d, n in enumerate(fake.shape) if not isinstance(n, int)}

    positional = tuple(pytree.tree_map(spec, a) for a in args)
    names = argument_names(program)
    keyword = {k: pytree.tree_map(spec, v) for k, v in kwargs.items()}
    return {**dict(zip(names, positional, strict=False)), **keyword}


__all__ = ["Analysis", "AppliedTorch", "TorchSubject"]

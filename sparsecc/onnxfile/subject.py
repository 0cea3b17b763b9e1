"""An ONNX model as the pipeline and the verification see it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, ValueInfoProto, numpy_helper

from sparsecc.axes.terms import Kept
from sparsecc.errors import InvalidModel, InvalidOption, UnsupportedModel
from sparsecc.fx.weights import WeightActions, exact_weights
from sparsecc.graph import Call, View
from sparsecc.onnxfile.editor import edit
from sparsecc.onnxfile.model import (
    TORCH_DTYPES,
    OnnxFile,
    copy_proto,
    graph_tensors,
    graphs,
    replace_tensor,
    to_torch,
)
from sparsecc.onnxfile.reader import read
from sparsecc.onnxfile.shapes import Shapes, dims_of, infer
from sparsecc.onnxfile.synth import synthesise
from sparsecc.onnxfile.timing import timed_call
from sparsecc.plan import Bypass, Fold, Mask, Plan, Write
from sparsecc.reference.masked import Masked
from sparsecc.reference.onnx_node_checks import check_nodes
from sparsecc.reference.onnx_run import Hook, Runner, check_input
from sparsecc.subject import Applied, Arguments, NodeCheck, Outputs, Step, Stepping, Subject

Named = dict[str, torch.Tensor]

MAX_ELEMENTS = 1 << 33
"""Elements of one value; a model that asks for more is damaged or hostile."""


@dataclass
class AppliedOnnx(Applied):
    """``file`` is the edited model; ``model`` the same thing in the kind that was given.

    ``sizes`` are those of the original, as ``Runner`` takes them.
    """

    file: OnnxFile | None = None
    sizes: Mapping[str, bool] = field(default_factory=dict)

    def run(self, inputs: Named, dtype: torch.dtype | None = None) -> Outputs:
        """Outputs of the edited model, by the executable reference."""
        assert self.file is not None
        runner = Runner(self.file, dtype=dtype, cache=False, sizes=self.sizes)
        if dtype == torch.float64:
            stored = {*self.file.initializers, *self.file.constants}
            changed = {w.weight for w in self.plan.of(Write)} | {f.parameter for f in self.plan.of(Fold)}
            written = changed & stored if self.plan.mode == "slim" else ()
            exact = exact_weights(self.plan, {n: self.file.tensor(n) for n in written})
            runner.program.constants.update(
                (n, numpy_helper.from_array(t.numpy(), n)) for n, t in exact.items()
            )
        return _outputs(runner, inputs)

    @contextmanager
    def timed(self, arguments: Arguments) -> Iterator[Callable[[], object]]:
        """The edited model on onnxruntime."""
        assert self.file is not None
        with timed_call(self.file, arguments[1]) as call:
            yield call


def _example(info: ValueInfoProto, value: Any) -> torch.Tensor:
    """An example input as a tensor; raises InvalidOption where it contradicts the input's declaration."""
    wanted = TORCH_DTYPES.get(info.type.tensor_type.elem_type)
    tensor = value if isinstance(value, torch.Tensor) else to_torch(np.asarray(value))
    if tensor is None:
        raise InvalidOption(f"input {info.name!r}: {type(value).__name__} {value!r:.50} is no tensor")
    if wanted is not None and not isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        tensor = tensor.to(wanted)  # Python numbers have no dtype of their own
    if wanted is not None and tensor.dtype != wanted:
        raise InvalidOption(f"input {info.name!r} is {tensor.dtype}, the model takes {wanted}: convert it")
    check_input(info, tensor)
    return tensor


def _outputs(runner: Runner, inputs: Named, hook: Hook | None = None) -> Outputs:
    found = runner.run(inputs, hook=hook)
    return [found[v.name] for v in runner.model.proto.graph.output]


class OnnxSubject(Subject):
    """An ONNX file, bytes, ModelProto, onnx_ir.Model or graphsurgeon Graph after reading.

    ``example_inputs`` is optional: a mapping by input name, or a sequence in input order.
    """

    dialect = "onnx"

    def __init__(self, model: Any, example_inputs: Any = None) -> None:
        try:
            self.given = OnnxFile.load(model)
        except TypeError as error:
            raise InvalidOption(str(error)) from error
        self.file = self.given.inlined()
        self.notes = [] if self.file is self.given else ["local functions were inlined"]
        inside = _weights_in_bodies(self.file)
        if inside > _FEW:
            self.notes.append(
                f"{inside:,} weights lie in bodies of If, Loop or Scan, which are not analysed: they stay, "
                "and are not counted"
            )
        self.examples = self._named(example_inputs)
        self._held = False

    def _named(self, examples: Any) -> Named:
        if examples is None:
            return {}
        names = [v.name for v in self.file.inputs]
        if not isinstance(examples, Mapping):
            values = list(examples) if isinstance(examples, (tuple, list)) else [examples]
            if len(values) != len(names):
                raise InvalidOption(
                    f"{len(values)} example inputs for a model that takes {len(names)}: {', '.join(names)}"
                )
            examples = dict(zip(names, values, strict=True))
        unknown = sorted(set(examples) - set(names))
        if unknown:
            raise InvalidOption(f"no input is named {', '.join(unknown)}; the model takes {', '.join(names)}")
        return {v.name: _example(v, examples[v.name]) for v in self.file.inputs if v.name in examples}

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of every value, at the sizes of the example inputs where there are any."""
        sizes = {name: tuple(example.shape) for name, example in self.examples.items()}
        found = infer(self.file, dims_of(self.file, sizes))
        for name, value in found.values.items():
            if value.shape is not None and math.prod(value.shape) > MAX_ELEMENTS:
                raise UnsupportedModel(
                    f"the value {name!r} of shape {list(value.shape)} does not fit in memory; "
                    "if a dynamic size "
                    "makes it so large, give example inputs"
                )
        return found

    @cached_property
    def _sizes(self) -> Mapping[str, bool]:
        return Runner(self.file, dtype=torch.float64, cache=False).sizes

    @cached_property
    def view(self) -> View:
        """The graph."""
        return read(self.file, self.shapes)

    def inputs(self, seed: int, variant: int) -> tuple[Named, str]:
        """Inputs by name: the example for seed 0 of variant 0, else synthesised."""
        variant = 0 if self._held else variant
        sizes = self.shapes.other if variant and self.shapes.other is not None else self.shapes.dims
        overrides = self.examples if seed == 0 and not variant else self._integers if self._held else {}
        made = synthesise(self.file, sizes, seed, overrides)
        return made.inputs, "; ".join(made.notes)

    def hold_integers(self) -> bool:
        """Let ``inputs`` take integers from the example alone."""
        before, self._held = self._held, bool(self._integers)
        return self._held and not before

    @property
    def _integers(self) -> Named:
        examples = self.examples.items()
        return {n: x for n, x in examples if isinstance(x, torch.Tensor) and not x.is_floating_point()}

    def arguments(self, inputs: Named) -> Arguments:
        """Inputs by name."""
        return (), dict(inputs)

    @contextmanager
    def timed(self, arguments: Arguments) -> Iterator[Callable[[], object]]:
        """The given model on onnxruntime."""
        with timed_call(self.given, arguments[1]) as call:
            yield call

    def original(self, inputs: Named, dtype: torch.dtype | None = None) -> Outputs:
        """Outputs of the original model, by the executable reference."""
        try:
            return _outputs(Runner(self.file, dtype=dtype, cache=False), inputs)
        except InvalidModel as error:
            made = [v.name for v in self.file.inputs if v.name not in self.examples]
            if not made:
                raise
            names = ", ".join(made[:5])
            raise InvalidModel(
                f"{error}; if it is the numbers made up for {names} that do not fit, give example inputs"
            ) from error

    def masked(
        self,
        plan: Plan,
        kept: Mapping[str, Kept],
        inputs: Named,
        dtype: torch.dtype | None = None,
        *,
        nudge: int | None = None,
    ) -> Outputs:
        """Outputs under masked semantics."""
        runner = Runner(self._substituted(plan), dtype=dtype, cache=False)
        hook = self._hook(plan, self.semantics(kept, nudge, dtype))
        with self._blaming(inputs):
            return _outputs(runner, inputs, hook)

    @contextmanager
    def _blaming(self, inputs: Named) -> Iterator[None]:
        """Raise what the original model raises on these inputs, where it is the model that cannot run."""
        try:
            yield
        except Exception:
            self.original(inputs)
            raise

    def _substituted(self, plan: Plan) -> OnnxFile:
        """The original with written and masked values put in, at their original sizes."""
        actions = WeightActions(
            replace(plan, actions=tuple(a for a in plan.actions if isinstance(a, (Write, Mask))))
        )
        if not actions.valued:
            return self.file
        protos = {}
        payloads: dict[str, Any] = {}
        for name in actions.valued:
            stored = self.file.initializers.get(name) or self.file.constants[name].attribute[0].t
            protos[name] = replace_tensor(stored, name, actions.edit(name, self.file.tensor(name)), payloads)
        return self.file.derive(copy_proto(self.file.proto, protos), payloads)

    def _hook(self, plan: Plan, semantics: Masked) -> Hook:
        calls = {call.raw: call for call in self.view.calls}
        bypassed = {b.output: b.source for b in plan.of(Bypass)}
        remembered: dict[str, Any] = {}
        sources = set(bypassed.values())

        def hook(node: NodeProto, index: int, inputs: list[Any], default: Any) -> tuple[Any, ...]:
            remembered.update(_wanted(node, inputs, sources))
            if node.output and node.output[0] in bypassed:
                return (remembered[bypassed[node.output[0]]],)
            call = calls.get(index)
            return default(inputs) if call is None else masked_call(call, semantics, inputs, default)

        return hook

    def stepping(
        self,
        inputs: Named,
        *,
        weights: Mapping[str, torch.Tensor] | None = None,
        plan: Plan | None = None,
    ) -> Stepping:
        """The original graph, call by call."""
        file = self.file if plan is None else self._substituted(plan)
        masked = None if plan is None else Masked(self.analysis.keeps(self.kept(plan)))
        bypassed = {} if plan is None else {b.output: b.source for b in plan.of(Bypass)}
        calls = {call.raw: call for call in self.view.calls}
        steps = Runner(file, cache=False, weights=weights).steps(inputs)
        remembered: dict[str, Any] = {}
        try:
            node, index, given, default = next(steps)
            while True:
                remembered.update(_wanted(node, given, bypassed.values()))
                call = calls.get(index)
                if node.output and node.output[0] in bypassed:
                    found: tuple[Any, ...] = (remembered[bypassed[node.output[0]]],)
                elif call is None:
                    found = default(given)
                else:
                    operands, run = canonical(call, given, default)
                    masking = run if masked is None else partial(masked, call, default=run)
                    found = yield Step(call, operands, masking, run)
                node, index, given, default = steps.send(found)
        except StopIteration as end:
            return [end.value[v.name] for v in self.file.proto.graph.output]

    def bound(self, example_inputs: Any) -> Named:
        """Inputs by name, from a mapping, a sequence in input order, or the one input."""
        named = self._named(example_inputs)
        missing = [v.name for v in self.file.inputs if v.name not in named]
        if missing:
            raise InvalidOption(f"no value for {', '.join(missing)}; the model takes it as input")
        return named

    def structured(self, outputs: Outputs) -> dict[str, Any]:
        """Outputs by name."""
        return dict(zip(self.output_names, outputs, strict=True))

    def apply(self, plan: Plan, kept: Mapping[str, Kept]) -> AppliedOnnx:
        """The edited model; an empty plan gives back what was given, byte for byte."""
        if not plan:
            kind = self.given.kind
            source = self.given.proto if kind == "path" else self.given.to_kind()
            return AppliedOnnx(source, plan, [], self.given, self._sizes)
        edited = edit(self.file, self.shapes, plan, self.analysis.keeps(kept))
        return AppliedOnnx(_in_kind(edited), plan, [], edited, self._sizes)

    def adopt(self, result: Any, plan: Plan) -> AppliedOnnx:
        """An ONNX model from elsewhere."""
        try:
            return AppliedOnnx(result, plan, [], OnnxFile.load(result).inlined(), self._sizes)
        except TypeError as error:
            raise InvalidOption(f"the original is an ONNX model, the result must be one: {error}") from error

    def node_checks(self, applied: Applied, kept: Mapping[str, Kept], inputs: Named) -> Iterator[NodeCheck]:
        """Every operator of the result on the masked original's activations."""
        assert isinstance(applied, AppliedOnnx)
        assert applied.file is not None
        reference = Runner(self._substituted(applied.plan), cache=False)
        hook = self._hook(applied.plan, self.semantics(kept))
        keeps, bypassed = self.analysis.keeps(kept), {b.output for b in applied.plan.of(Bypass)}
        with self._blaming(inputs):
            yield from check_nodes(reference, hook, self.view, keeps, applied.file, inputs, bypassed)

    def fingerprint(self) -> str:
        """SHA-256 of the model's graph and weights."""
        digest = hashlib.sha256(self.file.proto.SerializeToString(deterministic=True))
        for name in sorted(self.file.initializers):
            if self.file.initializers[name].data_location:
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(self.file.array(name)).data)
        return digest.hexdigest()

    @property
    def output_names(self) -> Sequence[str]:
        """Names of the graph's outputs."""
        return [v.name for v in self.file.proto.graph.output]


#: numbers that bodies hold without being layers: axes, bounds, scales
_FEW = 256


def _weights_in_bodies(file: OnnxFile) -> int:
    """Floats that subgraphs store."""
    inner = [g for g in graphs(file.proto) if g is not file.proto.graph]
    tensors = [t for graph in inner for t in graph_tensors(graph)]
    floats = (t for t in tensors if TORCH_DTYPES.get(t.data_type, torch.int64).is_floating_point)
    return sum(math.prod(t.dims) for t in floats)


def _in_kind(edited: OnnxFile) -> Any:
    """The result as the user gave the model; the container itself where 2 GB do not fit one message."""
    try:
        return edited.to_kind()
    except UnsupportedModel:
        return edited


def _wanted(node: NodeProto, inputs: list[Any], names: Collection[str]) -> dict[str, Any]:
    """Those inputs of a node that have one of these names."""
    return {name: value for name, value in zip(node.input, inputs, strict=True) if name in names}


def canonical(
    call: Call, inputs: list[Any], default: Any
) -> tuple[list[Any], Callable[[list[Any]], tuple[Any, ...]]]:
    """A node's inputs as operands in canonical order, and the node as a function of these."""
    operands = [None if ref is None else inputs[ref] for ref in call.refs]

    def run(new: list[torch.Tensor | None]) -> tuple[Any, ...]:
        substituted = list(inputs)
        for ref, tensor in zip(call.refs, new, strict=True):
            if ref is not None:
                substituted[ref] = tensor
        return default(substituted)  # type: ignore[no-any-return]

    return operands, run


def masked_call(call: Call, masked: Masked, inputs: list[Any], default: Any) -> tuple[Any, ...]:
    """One node under masked semantics: canonical operands in, the node's inputs out."""
    operands, run = canonical(call, inputs, default)
    return masked(call, operands, run)

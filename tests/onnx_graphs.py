"""Builds small ONNX graphs, and tells whether a pruned one is right without trusting what made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsecc.axes.terms import Keep
from sparsecc.lowering import lower
from sparsecc.onnxfile.model import OnnxFile, copy_proto, replace_tensor
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.plan import Plan, Renumber, SetAttr, SetShape, Take
from sparsecc.reference.onnx_run import Runner

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, torch.Tensor]
Shape = Sequence[int | str]

_TYPES = {
    np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int64: TensorProto.INT64,
    np.int32: TensorProto.INT32, np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8,
    np.bool_: TensorProto.BOOL,
}  # fmt: skip


class Graph:
    """A graph under construction; weights are drawn from a seed."""

    def __init__(self, opset: int = 20, seed: int = 0, dtype: Any = np.float32) -> None:
        self.opset = opset
        self.dtype = dtype
        self.random = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.value_info: list[onnx.ValueInfoProto] = []
        self.constant_nodes = False

    def input(self, name: str, shape: Shape, dtype: Any = None) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype or self.dtype], shape))
        return name

    def tensor(self, name: str, values: Any, dtype: Any = None) -> str:
        """An initializer (or a Constant node) with these values."""
        array = np.asarray(values, dtype or self.dtype)
        if self.constant_nodes:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Normal weights that keep activations of the size of one."""
        fan = max(1, int(np.prod(shape[1:])))
        return self.tensor(name, self.random.standard_normal(shape) / fan**0.5)

    def vector(self, name: str, size: int, low: float = 0.5, high: float = 1.5) -> str:
        """A vector of positive numbers."""
        return self.tensor(name, self.random.uniform(low, high, size))

    def ints(self, name: str, values: Any) -> str:
        """An int64 constant."""
        return self.tensor(name, values, np.int64)

    def node(self, kind: str, inputs: Sequence[str], out: str | Sequence[str], **attributes: Any) -> Any:
        """One node; its output's name."""
        outputs = [out] if isinstance(out, str) else list(out)
        self.nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=f"node_{outputs[0]}", **attributes)
        )
        return out

    def conv(
        self, x: str, out: str, cin: int, cout: int, kernel: int = 3, groups: int = 1, **attributes: Any
    ) -> str:
        """A convolution with bias that keeps the image's size."""
        w = self.weight(f"{out}.weight", cout, cin // groups, kernel, kernel)
        b = self.vector(f"{out}.bias", cout, -0.5, 0.5)
        pads = [kernel // 2] * 4
        return str(self.node("Conv", [x, w, b], out, group=groups, pads=pads, **attributes))

    def batch_norm(self, x: str, out: str, channels: int) -> str:
        """Batch normalisation."""
        names = [self.vector(f"{out}.{part}", channels) for part in ("scale", "shift", "mean", "var")]
        return str(self.node("BatchNormalization", [x, *names], out))

    def linear(self, x: str, out: str, cin: int, cout: int) -> str:
        """MatMul and Add."""
        product = self.node("MatMul", [x, self.weight(f"{out}.weight", cin, cout)], f"{out}.product")
        return str(self.node("Add", [product, self.vector(f"{out}.bias", cout, -0.5, 0.5)], out))

    def head(self, x: str, channels: int, classes: int = 5) -> str:
        """Pooling and a Gemm."""
        pooled = self.node("GlobalAveragePool", [x], "pooled")
        flat = self.node("Flatten", [pooled], "flat")
        w = self.weight("head.weight", classes, channels)
        b = self.vector("head.bias", classes)
        return str(self.node("Gemm", [flat, w, b], "logits", transB=1))

    def build(self, *outputs: str, shapes: bool = True, **fields: Any) -> ModelProto:
        """The model, with inferred shapes of every value (``shapes``)."""
        infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(
            self.nodes,
            "graph",
            self.inputs,
            infos,
            self.tensors,
            value_info=self.value_info,
            doc_string="a graph",
        )
        opsets = [helper.make_opsetid("", self.opset), *fields.pop("opsets", ())]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="tests", **fields)
        helper.set_model_props(model, {"author": "tests", "note": "kept"})
        typed = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        if shapes:
            return typed
        for info, found in zip(model.graph.output, typed.graph.output, strict=True):
            info.CopyFrom(found)
        return model


# -- running -----------------------------------------------------------------------------------------


def ort(
    model: ModelProto | bytes | str, feeds: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[Array]:
    """Outputs on onnxruntime, with its graph rewriting switched off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, ModelProto) else model
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    numbers = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in feeds.items()}
    return list(session.run(names, numbers))


def complete(file: OnnxFile) -> ModelProto:
    """A model with its external data inside."""
    found = ModelProto()
    found.CopyFrom(file.to_kind("proto"))
    if file.base_dir is not None:
        onnx.external_data_helper.load_external_data_for_model(found, str(file.base_dir))
    return found


def run64(file: OnnxFile, feeds: Feeds, sizes: Mapping[str, bool] | None = None) -> list[torch.Tensor]:
    """Outputs of the executable reference in float64; ``sizes`` are those of the model it was made from."""
    found = Runner(file, dtype=torch.float64, cache=False, sizes=sizes).run(feeds)
    return [found[v.name] for v in file.proto.graph.output]


def masked64(
    subject: OnnxSubject, plan: Plan, kept: Mapping[str, Keep], feeds: Feeds, *, garbage: bool
) -> list[Any]:
    """Masked semantics in float64; with ``garbage`` every removed entry of a weight holds a random number."""
    file = poisoned(subject.file, plan) if garbage else subject.file
    found = Runner(file, dtype=torch.float64, cache=False).run(
        feeds, hook=subject._hook(plan, subject.semantics(kept))
    )
    return [found[v.name] for v in file.proto.graph.output]


def poisoned(file: OnnxFile, plan: Plan) -> OnnxFile:
    """The original with garbage at every entry that the plan takes away everywhere."""
    random = np.random.default_rng(7)
    changed: dict[str, Array] = {}
    for take in plan.of(Take):
        if take.use is not None:
            continue
        array = changed.get(take.weight)
        if array is None:
            array = np.array(file.array(take.weight))
        if array.dtype.kind == "b" or array.dtype == np.int64:
            continue  # indices and masks: no number of them may be just anything
        removed = _removed(take)
        shape = [len(removed) if d == take.axis else n for d, n in enumerate(array.shape)]
        array[_at(take.axis, removed)] = (random.standard_normal(shape) * 5 + 3).astype(array.dtype)
        changed[take.weight] = array
    return _with(file, changed)


def undefined(file: OnnxFile, plan: Plan) -> OnnxFile:
    """The original with NaN at every removed entry that makes a removed position (and not: reads one)."""
    reads = _read_axes(file.proto)
    changed: dict[str, Array] = {}
    for take in plan.of(Take):
        if take.use is None and take.axis not in reads.get(take.weight, ()):
            array = changed.setdefault(take.weight, np.array(file.array(take.weight)))
            array[_at(take.axis, _removed(take))] = np.nan
    return _with(file, changed)


def zeroed(file: OnnxFile, plan: Plan) -> OnnxFile:
    """The original whose consumers read nothing of removed positions: an exact mask without reductions."""
    reads = _read_axes(file.proto)
    changed: dict[str, Array] = {}
    for take in plan.of(Take):
        if take.axis in reads.get(take.weight, ()):
            array = changed.setdefault(take.weight, np.array(file.array(take.weight)))
            array[_at(take.axis, _removed(take))] = 0
    return _with(file, changed)


def _with(file: OnnxFile, changed: Mapping[str, Array]) -> OnnxFile:
    def stored(name: str) -> TensorProto:
        found = file.initializers.get(name)
        return numpy_helper.from_array(file.array(name), name) if found is None else found

    protos = {n: replace_tensor(stored(n), n, a, None) for n, a in changed.items()}
    return OnnxFile(copy_proto(file.proto, protos), base_dir=file.base_dir)


def _removed(take: Take) -> Array:
    return np.setdiff1d(np.arange(take.size), take.indices)


def _at(axis: int, indices: Array) -> tuple[Any, ...]:
    return (*(slice(None) for _ in range(axis)), indices)


def _read_axes(proto: ModelProto) -> dict[str, set[int]]:
    """Axes of weights along which a node sums over what it reads."""
    transposed = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Transpose"}
    producers = {n: node for node in proto.graph.node for n in node.output}
    ranks = {t.name: len(t.dims) for t in proto.graph.initializer}
    found: dict[str, set[int]] = {}
    for node in proto.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            found.setdefault(node.input[1], set()).add(1)
        elif node.op_type == "ConvTranspose":
            found.setdefault(node.input[1], set()).add(0)
        elif node.op_type == "Gemm":
            found.setdefault(node.input[1], set()).add(1 if attributes.get("transB") else 0)
        elif node.op_type == "MatMul":
            name = node.input[1]
            found.setdefault(transposed.get(name, name), set()).add(1 if name in transposed else 0)
        elif node.op_type in ("LSTM", "GRU", "RNN"):
            for name in _sources(producers, node.input[1]) | _sources(producers, node.input[2]):
                found.setdefault(name, set()).add(ranks.get(name, 1) - 1)
    return found


def _sources(producers: Mapping[str, NodeProto], name: str) -> set[str]:
    """Initializers that a value is put together from."""
    node = producers.get(name)
    if node is None:
        return {name}
    inputs = node.input if node.op_type == "Concat" else node.input[:1]
    return {source for read in inputs for source in _sources(producers, read)}


def error(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest |a - b| / max |b| of any output; infinite where anything else differs."""
    worst = 0.0 if len(ours) == len(theirs) else float("inf")
    for a, b in zip(ours, theirs, strict=False):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
            return float("inf")
        if b.dtype.kind != "f":
            worst = max(worst, 0.0 if np.array_equal(a, b) else float("inf"))
        elif not np.isfinite(a).all() or not np.isfinite(b).all():
            worst = float("inf")
        elif b.size:
            wide = a.astype(np.float64) - b.astype(np.float64)
            worst = max(worst, float(np.abs(wide).max() / max(np.abs(b.astype(np.float64)).max(), 1e-30)))
    return worst


# -- random plans ------------------------------------------------------------------------------------

EXACT = 1e-12


@dataclass
class Trial:
    """A model with a random choice of what stays, pruned."""

    subject: OnnxSubject
    kept: dict[str, Keep]
    plan: Plan
    file: OnnxFile
    applied: Any

    def removed(self, weight: str) -> list[int]:
        """How many positions every axis of a weight has lost."""
        before, after = self.subject.file.tensor(weight).shape, self.file.tensor(weight).shape
        return [a - b for a, b in zip(before, after, strict=True)]


def trial(model: ModelProto, seed: int = 0) -> Trial:
    """Prune a random part of every group."""
    subject = OnnxSubject(model)
    random = np.random.default_rng(seed)
    kept: dict[str, Keep] = {}
    for group in subject.analysis.groups:
        mask = random.random(group.size) < random.choice((0.3, 0.6, 0.9))
        mask[random.integers(group.size)] = True
        kept[group.name] = mask
    plan = lower(subject.analysis, kept)
    applied = subject.apply(plan, kept)
    assert applied.file is not None
    return Trial(subject, kept, plan, applied.file, applied)


def check_trial(t: Trial, seed: int = 0, *, runtime: bool = True, loose: float = 1e-6) -> None:
    """The pruned model equals masked semantics (float64, garbage at what is removed), and runs as it should.

    ``runtime``: onnxruntime has kernels for the model; ``loose`` is what it may differ by.
    """
    gaps = [f for f in t.subject.analysis.frozen if f.reason.kind in ("unknown operator", "rule failed")]
    assert gaps == []
    if t.subject.file.check(full=True) is None:  # onnx does not know every operator of the runtime
        assert t.file.check(full=True) is None
    for variant in (0, 1):
        feeds, _ = t.subject.inputs(seed, variant)
        reference = masked64(t.subject, t.plan, t.kept, feeds, garbage=True)
        assert error(run64(t.file, feeds), reference) <= EXACT
    single = Runner(t.file, cache=False).run(feeds)
    rounding = error([single[v.name] for v in t.file.proto.graph.output], reference)
    if runtime:
        assert error(ort(t.file.proto, feeds), reference) <= 100 * max(rounding, loose)
    failed = [c for c in t.subject.node_checks(t.applied, t.kept, feeds) if not c.passed]
    assert failed == []


# -- what an edit touched ----------------------------------------------------------------------------


@dataclass
class Difference:
    """Names of what two models have in common and serialise differently, and of what only one has."""

    nodes: set[str] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)
    infos: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)


def difference(before: ModelProto, after: ModelProto) -> Difference:
    """Compare two models message by message; order, names and everything else must be the same."""
    found = Difference()
    for kind, ours, theirs, changed in (
        ("node", _nodes(before), _nodes(after), found.nodes),
        (
            "tensor",
            {t.name: t for t in before.graph.initializer},
            {t.name: t for t in after.graph.initializer},
            found.tensors,
        ),
        (
            "info",
            {v.name: v for v in before.graph.value_info},
            {v.name: v for v in after.graph.value_info},
            found.infos,
        ),
    ):
        changed.update(
            n
            for n in ours.keys() & theirs.keys()
            if ours[n].SerializeToString() != theirs[n].SerializeToString()
        )
        if kind != "info":
            found.added |= theirs.keys() - ours.keys()
            found.removed |= ours.keys() - theirs.keys()
        common = [n for n in ours if n in theirs]
        assert common == [n for n in theirs if n in ours], f"{kind}s in another order"
    for ours, theirs in ((before.graph.input, after.graph.input), (before.graph.output, after.graph.output)):
        assert [v.name for v in ours] == [v.name for v in theirs]
    for message in (before, after):
        assert message.graph.name == before.graph.name
    rest = [ModelProto(), ModelProto()]
    for copy, source in zip(rest, (before, after), strict=True):
        copy.CopyFrom(source)
        copy.graph.ClearField("node")
        copy.graph.ClearField("initializer")
        copy.graph.ClearField("value_info")
        copy.graph.ClearField("input")
    assert rest[0].SerializeToString() == rest[1].SerializeToString()
    return found


def _nodes(model: ModelProto) -> dict[str, NodeProto]:
    return {next(n for n in node.output if n): node for node in model.graph.node}


def explained(plan: Plan, file: OnnxFile) -> tuple[set[str], set[str]]:
    """Nodes and tensors that a plan names."""
    nodes = {a.node for a in plan.actions if isinstance(a, (SetShape, SetAttr))}
    changes = [*plan.of(Take), *plan.of(Renumber)]
    nodes |= {t.use[0] for t in changes if t.use is not None}
    tensors = {t.weight for t in changes if t.use is None}
    return nodes | (tensors & file.constants.keys()), tensors - file.constants.keys()


# -- shapes that a model declares --------------------------------------------------------------------


def check_value_info(model: ModelProto, feeds: Mapping[str, Any]) -> int:
    """Every declared shape is the one that onnxruntime sees; how many there are."""
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    shown = {v.name for v in (*model.graph.input, *model.graph.output)}
    produced = {n for node in model.graph.node for n in node.output}
    infos = [v for v in model.graph.value_info if v.name in produced and v.name not in shown]
    for tensor in model.graph.initializer:
        for info in model.graph.value_info:
            if info.name == tensor.name:
                assert [d.dim_value for d in info.type.tensor_type.shape.dim] == list(tensor.dims), (
                    tensor.name
                )
    wide = ModelProto()
    wide.CopyFrom(model)
    wide.graph.output.extend(infos)
    names = [v.name for v in infos]
    if not names:
        return 0
    sizes: dict[str, int] = {}
    for info in model.graph.input:
        if info.name in feeds:
            for dim, size in zip(info.type.tensor_type.shape.dim, feeds[info.name].shape, strict=True):
                sizes.setdefault(dim.dim_param or "", int(size))
    for info, value in zip(infos, ort(wide, feeds, names), strict=True):
        if not info.type.tensor_type.HasField("shape"):
            continue
        dims = info.type.tensor_type.shape.dim
        assert len(dims) == value.ndim, info.name
        for dim, size in zip(dims, value.shape, strict=True):
            if dim.HasField("dim_value"):
                assert dim.dim_value == size, (info.name, [d.dim_value for d in dims], value.shape)
            elif dim.dim_param in sizes:
                assert sizes[dim.dim_param] == size, info.name
    return len(names)

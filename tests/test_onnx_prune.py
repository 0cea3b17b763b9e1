"""Pruned ONNX files: what is untouched, what the numbers are, and where weights and sizes come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from sparsecc.errors import PlanConflict
from sparsecc.lowering import lower
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.subject import AppliedOnnx, OnnxSubject
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import Pruned, finish, run
from sparsecc.plan import Plan, SetAttr, SetShape
from sparsecc.reference.onnx_run import Runner
from tests.onnx_graphs import (
    Difference,
    Graph,
    check_value_info,
    complete,
    difference,
    error,
    explained,
    masked64,
    ort,
    run64,
    undefined,
    zeroed,
)

EXACT = 1e-12
SINGLE = 1e-4
PASSES = (ChannelPruning(sparsity=0.5), HeadPruning(sparsity=0.5, head_dims=True))


class Result:
    """A pruned model with everything that was checked about it on the way."""

    def __init__(
        self, model: Any, tolerance: float = SINGLE, exact_zero: bool = False, valid: bool = True
    ) -> None:
        self.pruned: Pruned = run(model, None, PASSES)
        assert isinstance(self.pruned.subject, OnnxSubject)
        assert isinstance(self.pruned.applied, AppliedOnnx)
        assert self.pruned.applied.file is not None
        self.subject: OnnxSubject = self.pruned.subject
        self.file: OnnxFile = self.pruned.applied.file
        self.plan: Plan = self.pruned.plan
        self.before: ModelProto = self.subject.file.proto
        self.after: ModelProto = self.file.proto
        assert self.pruned.certificate.status == "VERIFIED", str(self.pruned.certificate)
        assert (self.subject.file.check(full=True) is None) == valid
        assert (self.file.check(full=True) is None) == valid
        kept = self.subject.kept(self.plan)
        for seed, variant in ((0, 0), (3, 1)):
            feeds, _ = self.subject.inputs(seed, variant)
            reference = masked64(self.subject, self.plan, kept, feeds, garbage=True)
            assert error(run64(self.file, feeds), reference) <= EXACT
            ours = ort(complete(self.file), feeds)
            assert error(ours, reference) <= tolerance
            if exact_zero:
                assert error(ours, ort(complete(zeroed(self.subject.file, self.plan)), feeds)) <= tolerance
        check_value_info(complete(self.file), feeds)

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored weights of the result."""
        return {t.name: tuple(t.dims) for t in self.after.graph.initializer}

    @property
    def difference(self) -> Difference:
        return difference(self.before, self.after)

    def node(self, output: str) -> onnx.NodeProto:
        """The node of the result that puts out a value."""
        return next(n for n in self.after.graph.node if output in n.output)

    def frozen(self, kind: str) -> list[str]:
        """What is frozen for a kind of reason."""
        return [str(f) for f in self.subject.analysis.frozen if f.reason.kind == kind]


def convnet(
    opset: int = 20, *, batch: int | str = "batch", dtype: Any = np.float32, constants: bool = False
) -> Graph:
    """Convolutions with a residual, a concatenation and a split, an addition and a Gemm at the end."""
    g = Graph(opset, dtype=dtype)
    g.constant_nodes = constants
    x = g.input("x", [batch, 3, 8, 8])
    stem = g.node("Relu", [g.batch_norm(g.conv(x, "stem", 3, 8), "norm", 8)], "stem.relu")
    branch = g.conv(g.node("Relu", [g.conv(stem, "a", 8, 6)], "a.relu"), "b", 6, 8)
    total = g.node("Add", [stem, branch], "sum")
    side = g.node("Concat", [total, g.conv(total, "side", 8, 4)], "cat", axis=1)
    if opset < 13:
        parts = g.node("Split", [side], ["left", "right"], axis=1, split=[7, 5])
    else:
        parts = g.node("Split", [side, g.ints("sizes", [7, 5])], ["left", "right"], axis=1)
    left = g.conv(parts[0], "left.conv", 7, 6, 1)
    right = g.conv(parts[1], "right.conv", 5, 6, 1)
    g.head(g.node("Mul", [left, g.node("Sigmoid", [right], "gate")], "gated"), 6)
    return g


# -- identity ----------------------------------------------------------------------------------------


def no_plan() -> Plan:
    return Plan(dialect="onnx")


def test_an_empty_plan_gives_back_the_bytes(tmp_path: Path) -> None:
    raw = convnet().build("logits").SerializeToString() + b"\xf2\x3f\x03abc"  # a field that nobody knows
    path = tmp_path / "net.onnx"
    path.write_bytes(raw)
    subject = OnnxSubject(raw)
    assert finish(subject, no_plan()).model == raw
    of_path = finish(OnnxSubject(path), no_plan())
    of_path.save(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == raw
    assert path.read_bytes() == raw


def test_an_empty_plan_gives_back_the_proto() -> None:
    proto = convnet().build("logits")
    before = proto.SerializeToString()
    result = finish(OnnxSubject(proto), no_plan()).model
    assert result is proto
    assert proto.SerializeToString() == before


def test_an_empty_plan_keeps_ir_and_graphsurgeon_models() -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    graphsurgeon = pytest.importorskip("onnx_graphsurgeon")
    proto = convnet().build("logits")
    model = onnx_ir.from_proto(proto)
    result = finish(OnnxSubject(model), no_plan()).model
    assert isinstance(result, onnx_ir.Model)
    assert onnx_ir.to_proto(result).SerializeToString() == onnx_ir.to_proto(model).SerializeToString()
    graph = graphsurgeon.import_onnx(proto)
    again = finish(OnnxSubject(graph), no_plan()).model
    assert isinstance(again, graphsurgeon.Graph)
    assert again == graph


def test_exactly_what_the_plan_names_is_touched() -> None:
    r = Result(convnet().build("logits"), exact_zero=True)
    found = r.difference
    assert found.nodes == {"left"}
    assert found.added == {"sizes_pruned"}
    assert found.removed == {"sizes"}
    nodes, tensors = explained(r.plan, r.subject.file)
    assert nodes == {"left", "flat"}  # what a Flatten puts out follows from its input
    assert found.tensors == tensors == {t.name for t in r.before.graph.initializer} - {"sizes", "head.bias"}
    widths = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in r.after.graph.value_info}
    assert found.infos == widths.keys() - {"logits"}
    assert widths["cat"][1] == r.widths["left.conv.weight"][1] + r.widths["right.conv.weight"][1]


def test_removed_positions_may_hold_anything() -> None:
    """NaN in what is removed does not reach the masked reference, nor the result."""
    r = Result(convnet().build("logits"))
    feeds, _ = r.subject.inputs(0, 0)
    hook = r.subject._hook(r.plan, r.subject.semantics(r.subject.kept(r.plan)))
    spoilt = undefined(r.subject.file, r.plan)
    assert not np.isfinite(ort(spoilt.proto, feeds)[0]).all()
    found = Runner(spoilt, dtype=torch.float64, cache=False).run(feeds, hook=hook)["logits"]
    assert error(run64(r.file, feeds), [found]) <= EXACT


def test_a_partial_plan_leaves_the_rest_alone() -> None:
    proto = convnet().build("logits")
    pruned = run(proto, None, [ChannelPruning(sparsity=0.5, include=("a.bias",))])
    found = difference(proto, pruned.model)
    assert found == Difference(tensors={"a.weight", "a.bias", "b.weight"}, infos={"a", "a.relu"})


def test_model_fields_are_kept() -> None:
    g = convnet()
    proto = g.build("logits", shapes=False)
    proto.doc_string, proto.domain, proto.model_version, proto.producer_version = (
        "doc",
        "org.example",
        7,
        "1.2",
    )
    proto.opset_import.append(helper.make_opsetid("org.example", 3))
    proto.graph.node[0].doc_string = "first"
    proto.graph.initializer[0].doc_string = "weights"
    prop = proto.graph.metadata_props.add()
    prop.key, prop.value = "k", "v"
    result = run(proto, None, PASSES).model
    for field in ("doc_string", "domain", "model_version", "producer_name", "producer_version", "ir_version"):
        assert getattr(result, field) == getattr(proto, field)
    assert list(result.opset_import) == list(proto.opset_import)
    assert list(result.metadata_props) == list(proto.metadata_props)
    assert list(result.graph.metadata_props) == list(proto.graph.metadata_props)
    assert result.graph.doc_string == "a graph"
    assert result.graph.node[0] == proto.graph.node[0]
    assert result.graph.initializer[0].doc_string == "weights"
    assert len(result.graph.value_info) == 0


@pytest.mark.parametrize("kind", ["bytes", "proto", "path", "ir", "gs"])
def test_the_result_is_of_the_kind_that_was_given(kind: str, tmp_path: Path) -> None:
    proto = convnet().build("logits")
    reference = run(proto, None, PASSES).model
    if kind == "proto":
        assert isinstance(reference, ModelProto)
    elif kind == "bytes":
        given = proto.SerializeToString()
        result = run(given, None, PASSES).model
        assert result == reference.SerializeToString()
    elif kind == "path":
        onnx.save(proto, tmp_path / "net.onnx")
        result = run(str(tmp_path / "net.onnx"), None, PASSES).model
        assert result.SerializeToString() == reference.SerializeToString()
    elif kind == "ir":
        onnx_ir = pytest.importorskip("onnx_ir")
        result = run(onnx_ir.from_proto(proto), None, PASSES).model
        assert isinstance(result, onnx_ir.Model)
        _same_function(onnx_ir.to_proto(result), reference)
    else:
        graphsurgeon = pytest.importorskip("onnx_graphsurgeon")
        result = run(graphsurgeon.import_onnx(proto), None, PASSES).model
        assert isinstance(result, graphsurgeon.Graph)
        _same_function(graphsurgeon.export_onnx(result), reference)


def _same_function(ours: ModelProto, theirs: ModelProto) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)}
    assert error(ort(ours, x), ort(theirs, x)) == 0


# -- where weights are stored ------------------------------------------------------------------------


def test_weights_in_constant_nodes() -> None:
    r = Result(convnet(constants=True).build("logits"), exact_zero=True)
    assert r.pruned.report.after["parameters"] < 0.6 * r.pruned.report.before["parameters"]
    assert [n.output[0] for n in r.after.graph.node if n.op_type == "Constant"] == [
        n.output[0] for n in r.before.graph.node if n.op_type == "Constant" and n.output[0] != "sizes"
    ]
    assert {t.name for t in r.after.graph.initializer} == {"sizes_pruned"}


def test_weights_in_other_fields_of_constant_nodes() -> None:
    g = Graph()
    x = g.input("x", ["batch", 6])
    y = g.linear(x, "a", 6, 8)
    g.nodes.append(helper.make_node("Constant", [], ["scale"], value_floats=[1.0, 2, 3, 4, 5, 6, 7, 8]))
    g.linear(g.node("Mul", [y, "scale"], "scaled"), "b", 8, 3)
    r = Result(g.build("b"), exact_zero=True)
    constant = r.node("scale").attribute[0]
    assert constant.name == "value"
    assert list(constant.t.dims) == [4]


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_keeps_its_layout(tmp_path: Path, one_file: bool) -> None:
    proto = convnet().build("logits")
    inside = run(copy.deepcopy(proto), None, PASSES).model
    path = tmp_path / "in" / "net.onnx"
    path.parent.mkdir()
    onnx.save(
        proto,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location="w.bin" if one_file else None,
        size_threshold=64,
    )
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    stored = {t.name: t.data_location for t in onnx.load(path, load_external_data=False).graph.initializer}
    r = Result(str(path), exact_zero=True)
    (tmp_path / "out").mkdir()
    r.pruned.save(tmp_path / "out" / "net.onnx")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == before.keys()
    saved = onnx.load(tmp_path / "out" / "net.onnx", load_external_data=False)
    for tensor in saved.graph.initializer:
        if tensor.name in stored:
            assert tensor.data_location == stored[tensor.name]
    complete = onnx.load(tmp_path / "out" / "net.onnx")
    _same_function(complete, inside)


def test_shared_vectors_do_not_couple_layers() -> None:
    """Exporters store equal vectors once: four norms with the same statistics are four norms."""
    g = Graph()
    x = g.input("x", ["batch", 3, 8, 8])
    shared = [g.tensor("ones", np.ones(8)), g.tensor("zeros", np.zeros(8)), "zeros", "ones"]
    y = x
    for i in range(4):
        y = g.conv(y, f"c{i}", 3 if i == 0 else 8, 8)
        y = g.node("Relu", [g.node("BatchNormalization", [y, *shared], f"n{i}")], f"r{i}")
    g.head(y, 8)
    model = g.build("logits")
    r = Result(model, exact_zero=True)
    assert len(r.subject.analysis.groups) == 4
    assert {r.widths[f"c{i}.weight"][0] for i in range(4)} == {4}
    assert "ones" not in r.widths  # nobody reads the whole ones any more
    assert (
        len([n for n in r.widths if n.startswith(("ones", "zeros"))]) == 2
    )  # and equal cuts are stored once
    alone = run(
        model, None, [ChannelPruning(sparsity=0.5, include=("c1.weight",), exclude=("c0.weight", "c2.bias"))]
    )
    assert {
        n: w for n, w in ((t.name, list(t.dims)) for t in alone.model.graph.initializer) if n.startswith("c1")
    }["c1.weight"] == [4, 8, 3, 3]


def test_tied_weights_stay_tied() -> None:
    g = Graph()
    x = g.input("x", ["batch", 4])
    inner = g.linear(x, "in", 4, 8)
    tied = g.weight("tied", 8, 8)
    first = g.node("Relu", [g.node("MatMul", [inner, tied], "m1")], "r1")
    second = g.node("Relu", [g.node("MatMul", [first, tied], "m2")], "r2")
    g.linear(second, "out", 8, 3)
    r = Result(g.build("out"), exact_zero=True)
    assert r.widths["tied"] == (4, 4)
    assert [n.input[1] for n in r.after.graph.node if n.output[0] in ("m1", "m2")] == ["tied", "tied"]
    assert r.difference.added == set()


def test_tied_embedding_and_output() -> None:
    """One table is looked up, and read transposed by the output."""
    g = Graph()
    ids = g.input("ids", ["batch", "length"], np.int64)
    table = g.weight("table", 11, 8)
    x = g.node("Gather", [table, ids], "looked_up")
    y = g.node("Add", [x, g.linear(g.node("Relu", [g.linear(x, "up", 8, 12)], "act"), "down", 12, 8)], "sum")
    g.node("MatMul", [y, g.node("Transpose", [table], "turned", perm=[1, 0])], "logits")
    r = Result(g.build("logits"))
    assert r.widths["table"] == (11, 4)
    assert r.widths["up.weight"] == (4, 6)


def test_initializers_that_are_also_inputs() -> None:
    g = convnet(12, batch=2)
    g.input("a.weight", [6, 8, 3, 3])
    g.input("norm.scale", [8])
    r = Result(g.build("logits"), exact_zero=True)
    inputs = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in r.after.graph.input}
    assert inputs == {"x": [2, 3, 8, 8], "a.weight": [3, 5, 3, 3], "norm.scale": [5]}
    assert [v.name for v in r.subject.file.inputs] == ["x"]


def test_half_precision() -> None:
    r = Result(convnet(dtype=np.float16).build("logits"), tolerance=2e-2)
    assert {t.data_type for t in r.after.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}


# -- versions of operators ---------------------------------------------------------------------------


def versioned(opset: int) -> ModelProto:
    """Operators whose arguments moved from attributes to inputs, written as the opset wants them."""
    g = Graph(opset)

    def listed(kind: str, x: str, out: Any, since: int, name: str, values: list[int], **rest: Any) -> Any:
        if opset < since:
            return g.node(kind, [x], out, **{name: values}, **rest)
        return g.node(kind, [x, g.ints(f"{kind}.{name}.{len(g.nodes)}", values)], out, **rest)

    x = g.input("x", ["batch", 3, 8, 8])
    stem = g.node("Relu", [g.conv(x, "stem", 3, 12)], "relu")
    halves = listed("Split", stem, ["p", "q"], 13, "split", [6, 6], axis=1)
    pads = [0, 1, 0, 0, 0, 2, 1, 1]
    padded = g.node("Pad", [halves[0], g.ints("pads", pads)], "padded")
    wide = g.conv(padded, "wide", 9, 8)
    starts = [
        g.ints("starts", [0, -7]),
        g.ints("ends", [4, -1]),
        g.ints("axes", [2, 1]),
        g.ints("steps", [1, 1]),
    ]
    cut = g.node("Slice", [wide, *starts], "cut")
    mean = listed("ReduceMean", cut, "mean", 18, "axes", [2, 3], keepdims=0)
    total = listed("ReduceSum", halves[1], "total", 13, "axes", [-1, -2], keepdims=1)
    flat = listed("Squeeze", total, "flat", 13, "axes", [2, 3])
    again = listed("Unsqueeze", flat, "again", 13, "axes", [1])
    soft = g.node("Softmax", [again], "soft", axis=2 if opset < 13 else -1)
    last = listed("Squeeze", soft, "last", 13, "axes", [1])
    merged = g.node("Concat", [mean, last], "merged", axis=-1)
    g.linear(merged, "out", 12, 4)
    return g.build("out")


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21])
def test_operators_of_every_version(opset: int) -> None:
    r = Result(versioned(opset))
    assert [
        f for f in r.subject.analysis.frozen if f.reason.kind in ("unknown operator", "rule failed")
    ] == []
    assert [str(g) for g in r.subject.analysis.groups] == [
        str(g) for g in OnnxSubject(versioned(13)).analysis.groups
    ]
    assert r.widths["out.weight"][0] == 6


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
def test_a_convolutional_network_of_every_version(opset: int) -> None:
    Result(convnet(opset).build("logits"), exact_zero=True)


@pytest.mark.parametrize("opset", [18, 21])
def test_group_normalisation(opset: int) -> None:
    g = Graph(opset)
    y = g.conv(g.input("x", ["batch", 3, 8, 8]), "stem", 3, 8)
    count = 4 if opset < 21 else 8
    names = [g.vector("scale", count), g.vector("shift", count)]
    g.value_info.append(helper.make_tensor_value_info("normed", TensorProto.FLOAT, ["batch", 8, 8, 8]))
    g.head(g.node("GroupNormalization", [y, *names], "normed", num_groups=4), 8)
    r = Result(g.build("logits"), valid=opset >= 21)  # the checker calls version 18 deprecated
    attributes = {a.name: a.i for a in r.node("normed").attribute}
    assert attributes["num_groups"] < 4 or r.widths["stem.weight"][0] < 8
    assert r.widths["scale"] == ((attributes["num_groups"],) if opset < 21 else r.widths["stem.bias"])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    g = Graph()
    y = g.conv(g.input("x", ["batch", 3, 8, 8]), "stem", 3, 12)
    y = g.conv(g.node("DepthToSpace", [y], "wide", blocksize=2, mode=mode), "mid", 3, 6)
    y = g.node("SpaceToDepth", [y], "deep", blocksize=2)
    g.head(y, 24)
    r = Result(g.build("logits"))
    assert r.widths["stem.weight"][0] == 8  # 2 of 3 channels of 2 x 2 pixels each
    assert r.widths["mid.weight"][:2] == (3, 2)
    assert r.widths["head.weight"] == (5, 12)


# -- sizes -------------------------------------------------------------------------------------------


def attention(spell: Callable[[Graph, str, str], str]) -> Graph:
    """Two heads of four; ``spell`` reshapes [batch, length, 8] to heads."""
    g = Graph()
    x = g.input("x", ["batch", "length", 8])
    x = g.linear(x, "in", 8, 8)
    q, k, v = (g.linear(x, name, 8, 8) for name in "qkv")
    heads = {}
    for name, value in zip("qkv", (q, k, v), strict=True):
        heads[name] = g.node("Transpose", [spell(g, value, f"{name}.heads")], f"{name}.t", perm=[0, 2, 1, 3])
    keys = g.node("Transpose", [heads["k"]], "k.tt", perm=[0, 1, 3, 2])
    scale = g.tensor("scale", 0.5)
    scores = g.node("Mul", [g.node("MatMul", [heads["q"], keys], "scores"), scale], "scaled")
    mixed = g.node("MatMul", [g.node("Softmax", [scores], "soft", axis=-1), heads["v"]], "mixed")
    back = g.node("Transpose", [mixed], "back", perm=[0, 2, 1, 3])
    size = g.node("Shape", [back], "back.shape", end=2)
    joined = g.node(
        "Reshape", [back, g.node("Concat", [size, g.ints("rest", [-1])], "joined.shape", axis=0)], "joined"
    )
    g.linear(joined, "out", 8, 3)
    return g


def literal(g: Graph, value: str, out: str) -> str:
    return str(g.node("Reshape", [value, g.ints(f"{out}.shape", [0, 0, 2, 4])], out))


def allow_zero(g: Graph, value: str, out: str) -> str:
    """Sizes by Shape, and a Reshape in which 0 would be a size."""
    sizes = g.node("Shape", [value], f"{out}.size", end=2)
    shape = g.node("Concat", [sizes, g.ints(f"{out}.rest", [2, 4])], f"{out}.shape", axis=0)
    return str(g.node("Reshape", [value, shape], out, allowzero=1))


def computed(g: Graph, value: str, out: str) -> str:
    """Every size by itself, as the tracing exporter writes it; the last one is a quotient."""
    shape = g.node("Shape", [value], f"{out}.size")
    index = [g.node("Gather", [shape, g.ints(f"{out}.i{i}", i)], f"{out}.s{i}") for i in range(3)]
    each = g.node("Div", [index[2], g.ints(f"{out}.two", 2)], f"{out}.each")
    parts = [index[0], index[1], f"{out}.two", each]
    axis = g.ints(f"{out}.axis", [0])
    up = [g.node("Unsqueeze", [p, axis], f"{out}.u{i}") for i, p in enumerate(parts)]
    return str(g.node("Reshape", [value, g.node("Concat", up, f"{out}.shape", axis=0)], out))


def inferred(g: Graph, value: str, out: str) -> str:
    """The number of heads inferred."""
    size = g.node("Shape", [value], f"{out}.size", end=2)
    return str(
        g.node(
            "Reshape", [value, g.node("Concat", [size, g.ints(f"{out}.r", [-1, 4])], f"{out}.c", axis=0)], out
        )
    )


@pytest.mark.parametrize("spell", [literal, allow_zero, computed, inferred])
def test_shapes_spelled_out_or_computed(spell: Callable[[Graph, str, str], str]) -> None:
    r = Result(attention(spell).build("out"))
    assert {g.kind for g in r.subject.analysis.groups} == {"channel", "head", "head_dim"}
    assert r.widths["q.weight"] == (4, 2)
    assert r.widths["out.weight"] == (2, 3)


def test_computed_shapes_that_follow_are_left_alone() -> None:
    """Half of the head dimensions go, but no head: Shape / 2 is right by itself."""
    model = attention(computed).build("out")
    pruned = run(model, None, [HeadPruning(heads=False, head_dims=True, sparsity=0.5)])
    found = difference(model, pruned.model)
    assert found.nodes == set()
    assert found.added == set()


def test_batch_and_heads_in_one_axis() -> None:
    """[batch * heads, length, dim]: a size that varies and shrinks."""
    g = Graph()
    x = g.input("x", ["batch", 5, 8])
    q, k, v = (g.linear(x, name, 8, 8) for name in "qkv")
    shape = g.node("Shape", [x], "x.shape")
    batch = g.node("Gather", [shape, g.ints("zero", 0)], "b")
    rows = g.node("Unsqueeze", [g.node("Mul", [batch, g.ints("two", 2)], "b2"), g.ints("axis", [0])], "rows")
    heads = []
    for name, value in zip("qkv", (q, k, v), strict=True):
        four = g.node("Reshape", [value, g.ints(f"{name}.s", [0, 5, 2, 4])], f"{name}.4")
        turned = g.node("Transpose", [four], f"{name}.t", perm=[0, 2, 1, 3])
        size = g.node(
            "Concat", [rows, g.ints(f"{name}.m", [-1]), g.ints(f"{name}.d", [4])], f"{name}.c", axis=0
        )
        heads.append(g.node("Reshape", [turned, size], f"{name}.3"))
    keys = g.node("Transpose", [heads[1]], "kt", perm=[0, 2, 1])
    soft = g.node("Softmax", [g.node("MatMul", [heads[0], keys], "scores")], "soft")
    mixed = g.node("MatMul", [soft, heads[2]], "mixed")
    four = g.node(
        "Concat", [g.node("Unsqueeze", [batch, "axis"], "b1"), g.ints("r4", [2, 5, 4])], "c4", axis=0
    )
    apart = g.node("Transpose", [g.node("Reshape", [mixed, four], "apart")], "back", perm=[0, 2, 1, 3])
    g.linear(g.node("Reshape", [apart, g.ints("r3", [0, 5, -1])], "joined"), "out", 8, 3)
    r = Result(g.build("out"))
    assert r.widths["q.weight"] == (8, 2)
    assert r.widths["out.weight"] == (2, 3)


def test_a_scale_from_a_size_is_pinned() -> None:
    g = Graph()
    y = g.linear(g.input("x", ["batch", 6]), "a", 6, 8)
    size = g.node("Gather", [g.node("Shape", [y], "y.shape"), g.ints("last", -1)], "width")
    root = g.node("Sqrt", [g.node("Cast", [size], "float", to=TensorProto.FLOAT)], "root")
    g.linear(g.node("Div", [y, root], "scaled"), "b", 8, 3)
    r = Result(g.build("b"), exact_zero=True)
    name = r.node("scaled").input[1]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in r.after.graph.initializer}
    assert values[name] == np.float32(8) ** np.float32(0.5)
    assert r.difference.removed >= {"y.shape", "width", "float", "root"}


def test_a_scale_from_sizes_of_which_one_varies() -> None:
    """x / (length * width): the width is what it was, the length is what it is."""
    g = Graph()
    y = g.linear(g.input("x", ["batch", "length", 6]), "a", 6, 8)
    shape = g.node("Shape", [y], "y.shape")
    sizes = [g.node("Gather", [shape, g.ints(f"i{i}", i)], f"s{i}") for i in (1, 2)]
    number = g.node("Cast", [g.node("Mul", sizes, "area")], "float", to=TensorProto.FLOAT)
    g.linear(g.node("Div", [y, number], "scaled"), "b", 8, 3)
    r = Result(g.build("b"), exact_zero=True)
    x = {"x": np.ones((2, 9, 6), np.float32)}
    expected = ort(zeroed(r.subject.file, r.plan).proto, x)
    assert error(ort(r.after, x), expected) <= SINGLE


@pytest.mark.parametrize("stored", [(4, 1, 1), (4,)], ids=["as it is read", "as a vector"])
def test_one_number_that_is_left_of_a_table_is_no_size(stored: tuple[int, ...]) -> None:
    g = Graph()
    y = g.linear(g.input("x", ["batch", "length", 6]), "a", 6, 8)
    parts = g.node("Reshape", [y, g.ints("heads", [0, 0, 4, 2])], "parts")
    parts = g.node("Transpose", [parts], "turned", perm=[0, 2, 1, 3])
    length = g.node("Gather", [g.node("Shape", [y], "shape"), g.ints("1", 1)], "length")
    places = g.node("Range", [g.ints("0", 0), length, "1"], "places")
    column = g.node("Unsqueeze", [g.node("Cast", [places], "real", to=TensorProto.FLOAT), "1"], "column")
    slopes = g.tensor("slopes", g.random.uniform(0.1, 1, stored))
    if len(stored) == 1:
        slopes = g.node("Reshape", [slopes, g.ints("wide", [4, 1, 1])], "slopes.wide")
    biased = g.node("Add", [parts, g.node("Mul", [column, slopes], "bias")], "biased")
    joined = g.node("Transpose", [g.node("Tanh", [biased], "t")], "back", perm=[0, 2, 1, 3])
    g.linear(g.node("Reshape", [joined, g.ints("flat", [0, 0, -1])], "joined"), "z", 8, 3)
    model = g.build("z")
    subject = OnnxSubject(model)
    (heads,) = (group for group in subject.analysis.groups if group.size == 4)
    plan = lower(subject.analysis, {heads.name: np.arange(4) == 2})
    assert finish(OnnxSubject(model), plan).certificate.status == "VERIFIED"


def test_the_number_of_elements_is_pinned() -> None:
    g = Graph()
    y = g.linear(g.input("x", ["batch", 6]), "a", 6, 8)
    number = g.node("Cast", [g.node("Size", [y], "count")], "float", to=TensorProto.FLOAT)
    g.linear(g.node("Div", [y, number], "scaled"), "b", 8, 3)
    Result(g.build("b"), exact_zero=True)


def test_an_index_from_a_size_is_pinned() -> None:
    """Only the width of something else is looked up in a table."""
    g = Graph()
    y = g.linear(g.input("x", ["batch", 6]), "a", 6, 8)
    size = g.node("Gather", [g.node("Shape", [y], "y.shape"), g.ints("last", -1)], "width")
    row = g.node("Gather", [g.weight("table", 12, 3), size], "row")
    g.node("Add", [g.linear(y, "b", 8, 3), row], "out")
    r = Result(g.build("out"), exact_zero=True)
    assert r.widths["a.weight"] == (6, 4)


def test_a_size_that_is_an_output_freezes() -> None:
    g = Graph()
    y = g.linear(g.input("x", ["batch", 6]), "a", 6, 8)
    size = g.node("Gather", [g.node("Shape", [y], "y.shape"), g.ints("last", -1)], "width")
    g.linear(g.node("Relu", [g.linear(y, "b", 8, 8)], "act"), "c", 8, 3)
    r = Result(g.build("c", size))
    assert r.widths["a.weight"] == (6, 8)
    assert r.widths["b.weight"] == (8, 4)
    assert ort(r.after, {"x": np.ones((2, 6), np.float32)})[1] == 8


def test_expansion_of_a_learned_token() -> None:
    g = Graph()
    x = g.input("x", ["batch", 4, 6])
    y = g.linear(x, "a", 6, 8)
    batch = g.node("Shape", [x], "b", end=1)
    token = g.tensor("token", np.random.default_rng(0).standard_normal((1, 1, 8)))
    plain = g.node("Expand", [token, g.node("Concat", [batch, g.ints("ones", [1, 1])], "s1", axis=0)], "t1")
    wide = g.node("Expand", [token, g.node("Concat", [batch, g.ints("full", [2, 8])], "s2", axis=0)], "t2")
    joined = g.node("Concat", [plain, y, wide], "joined", axis=1)
    g.linear(joined, "out", 8, 3)
    r = Result(g.build("out"), exact_zero=True)
    assert r.widths["token"] == (1, 1, 4)


def test_initial_states_of_computed_shape() -> None:
    g = Graph()
    x = g.input("x", [5, "batch", 6])
    y = g.linear(x, "a", 6, 8)
    batch = g.node("Shape", [x], "b", start=1, end=2)
    shape = g.node("Concat", [g.ints("one", [1]), batch, g.ints("hidden", [4])], "s", axis=0)
    zeros = g.node("ConstantOfShape", [shape], "zeros")
    weights = [g.weight("W", 1, 16, 8), g.weight("R", 1, 16, 4), g.weight("B", 1, 32)]
    outs = g.node("LSTM", [y, *weights, "", zeros, zeros], ["Y", "H", "C"], hidden_size=4)
    g.linear(g.node("Squeeze", [outs[0], g.ints("dirs", [1])], "flat"), "out", 4, 3)
    r = Result(g.build("out"), exact_zero=True)
    assert r.widths["R"] == (1, 8, 2)
    assert {a.name: a.i for a in r.node("Y").attribute}["hidden_size"] == 2
    assert [n.op_type for n in r.after.graph.node if n.output[0] == "zeros"] == ["ConstantOfShape"]


@pytest.mark.parametrize("form", ["num_outputs", "input", "equal", "nothing"])
def test_split(form: str) -> None:
    g = Graph(13 if form == "nothing" else 20)
    y = g.node("Relu", [g.conv(g.input("x", ["batch", 3, 8, 8]), "stem", 3, 8)], "relu")
    inputs = (
        [y]
        if form in ("num_outputs", "nothing")
        else [y, g.ints("sizes", [3, 5] if form == "input" else [4, 4])]
    )
    attributes = {"num_outputs": 2} if form == "num_outputs" else {}
    left, right = g.node("Split", inputs, ["left", "right"], axis=1, **attributes)
    widths = (3, 5) if form == "input" else (4, 4)
    parts = [g.conv(part, f"{part}.conv", n, 4, 1) for part, n in zip((left, right), widths, strict=True)]
    g.head(g.node("Sub", parts, "sub"), 4)
    model = g.build("logits")
    r = Result(model, exact_zero=True)
    if form != "input":
        uneven = run(
            model, None, [ChannelPruning(sparsity=0.5, include=("left.conv.weight",), exclude=("head",))]
        )
        assert uneven.certificate.status == "VERIFIED"
    assert r.widths["left.conv.weight"][1] == widths[0] - widths[0] // 2


@pytest.mark.parametrize("bounds", [(0, 5), (3, 8), (-5, 2**63 - 1), (0, -3), (2, -2)])
@pytest.mark.parametrize("opset", [11, 20])
def test_slice_whatever_part_shrinks(bounds: tuple[int, int], opset: int) -> None:
    """Bounds may count from the end, and what is cut off may shrink alone."""
    g = Graph(opset)
    y = g.node("Relu", [g.conv(g.input("x", ["batch", 3, 8, 8]), "stem", 3, 8)], "relu")
    arguments = [g.ints("starts", [bounds[0]]), g.ints("ends", [bounds[1]]), g.ints("axes", [-3])]
    part = g.node("Slice", [y, *arguments], "part")
    size = len(range(8)[slice(*bounds)])
    g.node("Add", [g.head(g.conv(part, "narrow", size, 4, 1), 4), g.tensor("offset", 0.0)], "one")
    pooled = g.node("Flatten", [g.node("GlobalMaxPool", [y], "max")], "whole")
    both = g.node("Add", ["one", g.linear(pooled, "wide", 8, 5)], "both")
    model = g.build(both)
    subject = OnnxSubject(model)
    stem = [
        group for group in subject.analysis.groups if any(m.weight == "stem.weight" for m in group.members)
    ]
    assert sum(group.size for group in stem) >= 3
    for chosen in stem:
        kept = {chosen.name: np.arange(chosen.size) % 2 == 0}
        plan = lower(subject.analysis, kept)
        done = finish(OnnxSubject(model), plan)
        assert done.certificate.status == "VERIFIED"
    Result(model, exact_zero=True)


@pytest.mark.parametrize("spelled", ["sizes", "computed", "scales"])
def test_resize(spelled: str) -> None:
    g = Graph()
    y = g.conv(g.input("x", ["batch", 3, 8, 8]), "stem", 3, 8)
    if spelled == "scales":
        arguments = ["", g.tensor("scales", [1, 1, 2, 2], np.float32)]
    else:
        size = g.node("Shape", [y], "y.shape", end=1 if spelled == "sizes" else 2)
        rest = [8, 16, 16] if spelled == "sizes" else [16, 16]
        arguments = ["", "", g.node("Concat", [size, g.ints("rest", rest)], "size", axis=0)]
    up = g.node("Resize", [y, *arguments], "up", mode="linear")
    g.head(g.conv(up, "next", 8, 6), 6)
    r = Result(g.build("logits"), exact_zero=True)
    assert r.widths["next.weight"][:2] == (3, 4)


def test_a_size_that_cannot_be_spelled_out_is_a_clear_error() -> None:
    g = Graph()
    y = g.linear(g.input("x", ["batch", 6]), "a", 6, 8)
    g.linear(y, "b", 8, 3)
    subject = OnnxSubject(g.build("b"))
    with pytest.raises(PlanConflict, match="the plan names node 'nowhere'"):
        subject.apply(Plan(dialect="onnx", actions=(SetShape("nowhere", (3,)),)), {})
    with pytest.raises(PlanConflict, match="MatMul has no 'groups' to set"):
        subject.apply(Plan(dialect="onnx", actions=(SetAttr("a.product", "groups", 3),)), {})


# -- what stays --------------------------------------------------------------------------------------


def branch(name: str, kind: str, captured: str) -> onnx.GraphProto:
    node = helper.make_node(kind, [captured], [f"{name}.out"])
    info = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [info])


def test_values_that_a_branch_captures_stay() -> None:
    g = Graph()
    x = g.input("x", ["batch", 6])
    y = g.node("Relu", [g.linear(x, "a", 6, 8)], "act")
    seen = g.node("Relu", [g.linear(y, "b", 8, 8)], "seen")
    flag = g.node("Greater", [g.node("ReduceSum", [x], "total", keepdims=0), g.tensor("zero", 0.0)], "flag")
    chosen = g.node(
        "If", [flag], "chosen", then_branch=branch("yes", "Exp", seen), else_branch=branch("no", "Neg", seen)
    )
    g.linear(chosen, "c", 8, 3)
    r = Result(g.build("c"))
    assert r.widths["a.weight"] == (6, 4)
    assert r.widths["b.weight"] == (4, 8)
    assert any("If 'node_chosen') runs a body" in text for text in r.frozen("opaque"))


def test_a_size_that_a_branch_captures_is_pinned() -> None:
    g = Graph()
    x = g.input("x", ["batch", 6])
    y = g.linear(x, "a", 6, 8)
    size = g.node("Gather", [g.node("Shape", [y], "y.shape"), g.ints("last", -1)], "width")
    number = g.node("Cast", [size], "float", to=TensorProto.FLOAT)
    flag = g.node("Greater", [g.node("ReduceSum", [x], "total", keepdims=0), g.tensor("zero", 0.0)], "flag")
    chosen = g.node(
        "If",
        [flag],
        "chosen",
        then_branch=branch("yes", "Sqrt", number),
        else_branch=branch("no", "Neg", number),
    )
    g.node("Mul", [g.linear(y, "b", 8, 3), chosen], "out")
    r = Result(g.build("out"), exact_zero=True)
    assert r.widths["a.weight"] == (6, 4)


def test_every_graph_output_keeps_its_size() -> None:
    g = convnet()
    r = Result(g.build("logits", "a.relu", "cat"))
    assert r.widths["a.weight"][0] == 6
    assert any("graph output 'a.relu'" in text for text in r.frozen("graph output"))
    assert list(r.after.graph.output) == list(r.before.graph.output)


def test_an_unknown_operator_freezes_and_is_named() -> None:
    g = Graph()
    y = g.node("Relu", [g.linear(g.input("x", ["batch", 6]), "a", 6, 8)], "act")
    z = g.linear(y, "b", 8, 8)
    g.nodes.append(helper.make_node("Gizmo", [z], ["odd"], name="the_gizmo", domain="org.example"))
    g.value_info.append(helper.make_tensor_value_info("odd", TensorProto.FLOAT, ["batch", 8]))
    g.linear("odd", "c", 8, 3)
    model = g.build("c", opsets=[helper.make_opsetid("org.example", 1)])
    pruned = run(model, None, PASSES, verify=False)
    shapes = {t.name: tuple(t.dims) for t in pruned.model.graph.initializer}
    assert shapes["a.weight"] == (6, 4)
    assert shapes["b.weight"] == (4, 8)
    assert shapes["c.weight"] == (8, 3)
    reasons = [str(f.reason) for f in pruned.subject.analysis.frozen if f.weight == "b.weight"]
    assert any("org.example.Gizmo 'odd'" in text and "the_gizmo" in text for text in reasons)


def test_local_functions() -> None:
    """Functions are inlined where something is pruned, and kept where nothing is."""
    g = Graph()
    y = g.linear(g.input("x", ["batch", 6]), "a", 6, 8)
    g.nodes.append(helper.make_node("Twice", [y], ["doubled"], domain="local"))
    g.linear("doubled", "b", 8, 3)
    body = [helper.make_node("Add", ["u", "u"], ["w"]), helper.make_node("Relu", ["w"], ["v"])]
    function = helper.make_function("local", "Twice", ["u"], ["v"], body, [helper.make_opsetid("", 20)])
    graph = helper.make_graph(
        g.nodes,
        "g",
        g.inputs,
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", 3])],
        g.tensors,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    assert finish(OnnxSubject(model), no_plan()).model is model
    r = Result(model, exact_zero=True)
    assert r.widths["a.weight"] == (6, 4)
    assert "local functions were inlined" in r.pruned.report.notes


def test_dynamic_batch_and_length_stay_dynamic() -> None:
    r = Result(attention(literal).build("out"))
    for batch, length in ((1, 1), (4, 9)):
        assert ort(r.after, {"x": np.ones((batch, length, 8), np.float32)})[0].shape == (batch, length, 3)
    symbols = {d.dim_param for v in r.after.graph.value_info for d in v.type.tensor_type.shape.dim}
    assert {"batch", "length"} <= symbols


def test_the_input_is_never_changed() -> None:
    proto = convnet().build("logits")
    before = proto.SerializeToString()
    run(proto, None, PASSES)
    assert proto.SerializeToString() == before


def test_example_inputs_are_used() -> None:
    x = torch.randn(3, 3, 8, 8)
    pruned = run(convnet().build("logits"), {"x": x}, PASSES)
    assert pruned.subject.inputs(0, 0)[0]["x"] is x
    assert any("float32[3, 3, 8, 8]" in c.inputs for c in pruned.certificate.checks)


def test_outputs_that_are_sequences_are_compared_item_by_item() -> None:
    g = Graph()
    x = g.input("x", ["batch", 4])
    a = g.node("Relu", [g.linear(x, "fc1", 4, 8)], "a")
    b = g.linear(a, "fc2", 8, 4)
    g.node("SplitToSequence", [b], "parts", axis=1)
    result = run(g.build("parts", shapes=False), None, [ChannelPruning(sparsity=0.5)])
    assert result.certificate.status == "VERIFIED"
    assert result.plan


def test_a_shape_that_nobody_knows_before_it_runs_freezes_and_is_no_error() -> None:
    g = Graph()
    x = g.input("x", ["batch", 4])
    a = g.node("Relu", [g.linear(x, "fc1", 4, 8)], "a")
    b = g.linear(a, "fc2", 8, 4)
    count = g.node("Size", [g.node("NonZero", [b], "places")], "count")
    y = g.node("Add", [b, g.node("Cast", [count], "number", to=TensorProto.FLOAT)], "y")
    result = run(g.build(y), None, [ChannelPruning(sparsity=0.5)])
    assert result.certificate.status == "VERIFIED"
    assert result.plan


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("extra", [False, True])
def test_a_squeeze_drops_no_axis_for_what_is_left_of_it(opset: int, extra: bool) -> None:
    """Without axes it drops all of size 1; of three channels one is left, which is then no such axis."""
    g = Graph(opset)
    y = g.node("Conv", [g.input("x", [2, 2, 6]), g.weight("a.weight", 3, 2, 3)], "a", pads=[1, 1])
    if extra:
        more, axes = ([], {"axes": [3]}) if opset < 13 else ([g.ints("axis", [3])], {})
        y = g.node("Unsqueeze", [y, *more], "wide", **axes)
    z = g.node("Squeeze", [y], "narrow")
    model = g.build(g.node("Conv", [z, g.weight("b.weight", 2, 3, 1)], "b"))
    pruned = run(model, None, [ChannelPruning(sparsity=0.9)])
    assert pruned.certificate.status == "VERIFIED"
    assert [d.kept.size for d in pruned.plan.decisions] == [1]
    assert isinstance(pruned.applied, AppliedOnnx)
    assert pruned.applied.file is not None
    pruned.applied.file.check(full=True)

"""The target grammar, the registry, the two targets on onnxruntime, and timing."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sparsecc.targets
from sparsecc import target as registry
from sparsecc.artifact import MODEL, WEIGHTS, Artifact
from sparsecc.errors import InvalidModel, InvalidOption, TargetRefused, TargetUnavailable, UnsupportedModel
from sparsecc.graph.view import Call, Value, View
from sparsecc.measure import compare_latency
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.signature import Record, Signature, TensorSpec, onnx_signature
from sparsecc.target import (
    DTYPES,
    Capabilities,
    Target,
    TargetSpec,
    require_accepted,
    resolve,
    targets,
)
from sparsecc.targets.cpu import Cpu
from sparsecc.targets.onnx import Onnx, onnx_members

SPEC = TargetSpec("cpu")


def affine(dtype: int = TensorProto.FLOAT, *, external: bool = False) -> onnx.ModelProto:
    """y = x @ w + b with a dynamic batch, and the column sums of x as a second output."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    w = np.arange(12 * 40, dtype=np.float64).reshape(12, 40) / 100
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"], "mm"),
            helper.make_node("Add", ["xw", "b"], ["y"], "add"),
            helper.make_node("ReduceSum", ["x"], ["s"], "sum", keepdims=0),
        ],
        "affine",
        [helper.make_tensor_value_info("x", dtype, ["batch", 12])],
        [
            helper.make_tensor_value_info("y", dtype, ["batch", 40]),
            helper.make_tensor_value_info("s", dtype, []),
        ],
        [numpy_helper.from_array(w.astype(kind), "w"), numpy_helper.from_array(np.ones(40, kind), "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def one_input(node: onnx.NodeProto, x: Any, y: Any, *initializers: TensorProto) -> OnnxFile:
    graph = helper.make_graph([node], "g", [x], [y], list(initializers))
    return OnnxFile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


# ---------------------------------------------------------------------- grammar


@st.composite
def specs(draw: st.DrawFn) -> TargetSpec:
    arch = draw(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True))
    m = draw(st.integers(1, 64))
    pattern = draw(st.none() | st.integers(1, m).map(lambda n: f"{n}:{m}"))
    return TargetSpec(arch, pattern, draw(st.none() | st.sampled_from(DTYPES)))


@given(specs())
def test_parse_and_str_are_inverse(spec: TargetSpec) -> None:
    assert TargetSpec.parse(str(spec)) == spec
    assert TargetSpec.parse(f"  {str(spec).upper()} ") == spec


@given(st.text(max_size=24))
def test_parse_either_round_trips_or_says_why_not(text: str) -> None:
    try:
        spec = TargetSpec.parse(text)
    except InvalidOption:
        return
    assert str(spec) == text.strip().lower()


@pytest.mark.parametrize(
    "text",
    ["", "-", "sm80-4:2", "sm80-0:4", "cpu-2:4-fp99", "cpu-fp16-2:4", "cpu-2:4-fp16-x", "80sm", "cpu--"],
)
def test_malformed_targets_are_refused_with_the_grammar_or_the_dtypes(text: str) -> None:
    with pytest.raises(InvalidOption, match=r"PATTERN|known are fp64"):
        TargetSpec.parse(text)


def test_a_target_must_be_text() -> None:
    with pytest.raises(InvalidOption, match="got int"):
        TargetSpec.parse(80)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- registry


def test_resolve_gives_the_target_and_the_spec() -> None:
    target, spec = resolve("CPU")
    assert isinstance(target, Cpu)
    assert spec == SPEC
    assert isinstance(resolve("onnx")[0], Onnx)


def test_an_unknown_target_lists_what_there_is_and_the_closest() -> None:
    with pytest.raises(
        TargetUnavailable, match=r"'onxx' \(did you mean 'onnx'\?\); targets here: .*cpu, onnx"
    ):
        resolve("onxx")
    with pytest.raises(TargetUnavailable, match=r"unknown target 'sm75'.*targets here"):
        resolve("sm75-2:4")


def test_unknown_patterns_and_dtypes_say_what_the_target_has(plugins: list[Any]) -> None:
    plugins += [_entry("fake", Fake), _entry("plain", Plain)]
    with pytest.raises(TargetUnavailable, match="no pattern '2:4'; it takes no pattern"):
        resolve("plain-2:4")
    with pytest.raises(TargetUnavailable, match=r"no pattern '1:3'.*it has 2:4, 1:4"):
        resolve("fake-1:3")
    with pytest.raises(TargetUnavailable, match=r"no dtype 'fp8'; it has fp16"):
        resolve("fake-2:4-fp8")
    assert resolve("fake-1:4-fp16")[1] == TargetSpec("fake", "1:4", "fp16")
    assert resolve("onnx-8:16")[1] == TargetSpec("onnx", "8:16"), "it takes any pattern"


def test_a_missing_module_names_the_extra(plugins: list[Any]) -> None:
    class Needy(Fake):
        capabilities = Capabilities("needs more", modules=("no_such_module",), extra="needy")

    plugins.append(_entry("needy", Needy))
    with pytest.raises(TargetUnavailable, match=r"needs no_such_module.*pip install 'sparsecc\[needy\]'"):
        resolve("needy")
    info = next(info for info in targets() if info.name == "needy")
    assert not info.available
    assert "sparsecc[needy]" in info.why_not
    assert "sparsecc[needy]" in str(targets())


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (ImportError("libfoo.so"), "ImportError: libfoo.so"),
        (42, "not a Target class"),
        (type("Bare", (Target,), {}), "sets no Capabilities"),
        (type("Half", (Target,), {"capabilities": Capabilities("half")}), "leaves out build, executor"),
    ],
)
def test_a_broken_plugin_is_reported_and_breaks_nothing_else(
    plugins: list[Any], value: Any, why: str
) -> None:
    plugins.append(_entry("broken", value))
    rows = {info.name: info for info in targets()}
    assert why in rows["broken"].why_not
    assert rows["cpu"].available
    assert rows["onnx"].available
    with pytest.raises(TargetUnavailable, match="'broken' cannot be used"):
        resolve("broken")
    assert resolve("cpu")


def test_a_plugin_cannot_take_the_name_of_a_listed_target(plugins: list[Any]) -> None:
    plugins.append(_entry("cpu", Fake))
    assert isinstance(resolve("cpu")[0], Cpu)
    with pytest.raises(InvalidOption, match="already taken"):
        registry.register("cpu", Fake)


def test_the_package_can_be_called_for_the_list() -> None:
    package: Any = sys.modules["sparsecc.targets"]
    assert isinstance(package, ModuleType)
    assert [info.name for info in package()] == [info.name for info in targets()]


def test_the_package_refuses_a_second_copy() -> None:
    source = sparsecc.targets.__file__
    assert source is not None
    with open(source) as file, pytest.raises(ImportError, match="second table"):
        exec(compile(file.read(), source, "exec"), {"__name__": "targets"})


class Fake(Target):
    """A plug-in that can do nothing but be found."""

    name = "fake"
    capabilities = Capabilities("for tests", patterns=("2:4", "1:4"), dtypes=("fp16",))

    def build(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def executor(self, artifact: Artifact, *, threads: int | None = None) -> Any:
        raise NotImplementedError


class Plain(Fake):
    """One that takes no pattern."""

    name = "plain"
    capabilities = Capabilities("for tests")


def _entry(name: str, value: Any) -> Any:
    def load() -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    entry = importlib.metadata.EntryPoint(name, "nowhere:Nothing", registry.ENTRY_POINTS)
    vars(entry)["load"] = load
    return entry


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    entries: list[Any] = []
    fake = SimpleNamespace(**vars(importlib.metadata))
    fake.entry_points = lambda group: list(entries)
    monkeypatch.setattr(registry.importlib, "metadata", fake)
    return entries


# ---------------------------------------------------------------------- refusals


def view(*dtypes: str) -> View:
    x = Value("x", (2, 3), "float32", "input")
    calls = [Call("relu", f"n{k}", (x,), (Value(f"v{k}", (2, 3), d),)) for k, d in enumerate(dtypes)]

    def weight(name: str) -> torch.Tensor:
        raise KeyError(name)

    return View("torch", calls, [x], list(calls[-1].outputs), {}, weight)


def test_refusals_are_collected_and_raised_once() -> None:
    require_accepted(Cpu(), SPEC, view("float32", "int64", "bool", "float16"))
    with pytest.raises(TargetRefused) as caught:
        require_accepted(Cpu(), SPEC, view("bfloat16", "bfloat16", "torch.complex64"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "target 'cpu' cannot run this model:"
    assert len(lines) == 3
    assert "relu 'n0'" in lines[1]
    assert "convert the model to float32" in lines[1]
    assert "complex64" in lines[2]
    require_accepted(Onnx(), TargetSpec("onnx"), view("bfloat16"))


def test_complex_numbers_that_callers_do_not_see_run_as_pairs() -> None:
    """The lowering writes them as floats; inputs and outputs of that type have no such form."""

    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(9, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.first(torch.fft.rfft(x).abs()).relu())
            return y

    model, x = Spectrum(), torch.randn(3, 16)
    compiled = sparsecc.compile(model, (x,), target="cpu", recipe="ChannelPruning(sparsity=0.5)")
    assert compiled.certificate.status == "VERIFIED"
    pruned = sparsecc.prune(model, (x,), recipe="ChannelPruning(sparsity=0.5)").model
    torch.testing.assert_close(compiled(x), pruned(x))
    outside = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).to(torch.complex64)
    with pytest.raises(TargetRefused, match="complex64"):
        sparsecc.compile(outside, (torch.randn(2, 4, dtype=torch.complex64),), target="cpu")


def test_an_operator_that_onnxruntime_lacks_is_refused() -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="acme")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    model = one_input(node, x, y)
    model.proto.opset_import.append(helper.make_opsetid("acme", 1))
    artifact = Cpu().build(model, SPEC)
    with pytest.raises(TargetRefused, match=r"'cpu' cannot run this model: onnxruntime .*Frobnicate"):
        Cpu().executor(artifact)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    node = helper.make_node("SequenceLength", ["x"], ["y"])
    x = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    model = one_input(node, x, helper.make_tensor_value_info("y", TensorProto.INT64, []))
    with pytest.raises(UnsupportedModel, match="'x' is not a tensor but a sequence"):
        Cpu().build(model, SPEC)


# ---------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def run() -> Any:
    return Cpu().executor(Cpu().build(OnnxFile(affine()), SPEC), threads=1)


X = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)


def test_the_kind_that_is_given_comes_back(run: Any) -> None:
    y, s = run(X)
    assert isinstance(y, np.ndarray)
    w = numpy_helper.to_array(affine().graph.initializer[0])
    np.testing.assert_allclose(y, X @ w + 1, rtol=1e-5)
    assert s.shape == ()
    y_torch, s_torch = run(torch.from_numpy(X))
    assert isinstance(y_torch, torch.Tensor)
    assert isinstance(s_torch, torch.Tensor)
    assert torch.equal(y_torch, torch.from_numpy(y))


def test_by_position_by_name_and_as_a_dict_are_the_same(run: Any) -> None:
    for result in (run(x=X), run({"x": X}), run(X.tolist()), run(np.asfortranarray(X)), run(X.astype(">f4"))):
        np.testing.assert_array_equal(result[0], run(X)[0])


def test_tensors_that_need_gradients_or_are_strided_are_taken(run: Any) -> None:
    x = torch.from_numpy(np.concatenate([X, X], 1)).requires_grad_()[:, ::2]
    np.testing.assert_array_equal(run(x)[0].numpy(), run(x.detach().numpy())[0])


def test_an_empty_batch_runs(run: Any) -> None:
    assert run(X[:0])[0].shape == (0, 40)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X.astype(np.float64),), {}, "input 'x' must be float32, got float64"),
        ((torch.zeros(3, 12, dtype=torch.int64),), {}, "input 'x' must be float32, got int64"),
        ((X[0],), {}, r"input x: float32\[batch, 12\] does not fit the given shape \[12\]"),
        ((X[:, :5],), {}, r"input x: float32\[batch, 12\] does not fit the given shape \[3, 5\]"),
        ((), {}, r"input x is missing; the model takes \(x: float32\[batch, 12\]\)"),
        ((X, X), {}, "takes 1 arguments, got 2"),
        ((X,), {"x": X}, "given twice"),
        ((X,), {"z": X}, "no input 'z'"),
        (("text",), {}, "must be a torch tensor or a NumPy array, got str"),
        (([["a"]],), {}, "cannot be made from"),
        ((None,), {}, "got NoneType"),
    ],
)
def test_wrong_inputs_say_name_expected_and_got(run: Any, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        run(*args, **kwargs)


def test_named_sizes_must_agree_over_the_inputs() -> None:
    node = helper.make_node("Add", ["x", "z"], ["y"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in ("x", "z", "y")]
    graph = helper.make_graph([node], "g", info[:2], info[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    run = Cpu().executor(Cpu().build(OnnxFile(model), SPEC))
    with pytest.raises(InvalidOption, match="'x' and 'z' must agree in 'n': got 2 and 1"):
        run(np.zeros(2, np.float32), np.zeros(1, np.float32))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_must_be_a_count(threads: Any) -> None:
    with pytest.raises(InvalidOption, match="threads"):
        Cpu().executor(Cpu().build(OnnxFile(affine()), SPEC), threads=threads)


def test_an_error_inside_onnxruntime_is_reported_in_one_line() -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    shape = numpy_helper.from_array(np.array([2, 3], np.int64), "shape")
    run = Cpu().executor(Cpu().build(one_input(node, *info, shape), SPEC))
    assert run(np.zeros(6, np.float32)).shape == (2, 3)
    with pytest.raises(TargetRefused, match="onnxruntime failed on these inputs") as caught:
        run(np.zeros(7, np.float32))
    assert "\n" not in str(caught.value)


def test_bfloat16_crosses_as_bits() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    x, y = (helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]), None)
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [3])
    run = Onnx().executor(Onnx().build(one_input(node, x, y), TargetSpec("onnx")))
    value = torch.tensor([1.0, -2.5, 1e30])
    assert torch.equal(run(value), value.to(torch.bfloat16))
    assert run(value.numpy()).dtype.name == "bfloat16"
    back = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    x16 = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [3])
    y32 = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    run = Onnx().executor(Onnx().build(one_input(back, x16, y32), TargetSpec("onnx")))
    assert torch.equal(run(value.to(torch.bfloat16)), value.to(torch.bfloat16).float())


def test_float16_and_float64_run() -> None:
    for dtype, kind in ((TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)):
        run = Cpu().executor(Cpu().build(OnnxFile(affine(dtype)), SPEC))
        assert run(X.astype(kind))[0].dtype == kind


# ---------------------------------------------------------------------- signatures


def signature(**changes: Any) -> Signature:
    spec = TensorSpec("a", "float32", (2,), ("batch", "ids"))
    other = TensorSpec("b", "float32", (2,), ("batch", "pair", 1))
    fields: dict[str, Any] = {
        "inputs": (spec, other),
        "outputs": (TensorSpec("y", "float32", (2,)), TensorSpec("z", "float32", None)),
        "parameters": ("batch", "flag"),
        "constants": ((("flag",), True), (("batch", "pair", 0), None)),
    }
    return Signature(**{**fields, **changes})


def test_nested_arguments_reach_their_inputs() -> None:
    sig = signature()
    batch = {"ids": 1, "pair": (None, 2)}
    for values in (sig.bind((batch,), {}), sig.bind((), {"batch": batch}), sig.bind((), {"a": 1, "b": 2})):
        assert values == {"a": 1, "b": 2}
    assert sig.bind(({"a": 1, "b": 2},), {}) == {"a": 1, "b": 2}
    assert sig.bind((batch, True), {}) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (({"ids": 1, "pair": (None,)},), r"input batch\['pair'\]\[1\] is missing"),
        (
            ({"ids": 1, "pair": (None, 2)}, False),
            "flag was fixed to True when the model was captured; got False",
        ),
        (({"ids": 1, "pair": (3, 2)},), r"batch\['pair'\]\[0\] was fixed to None"),
    ],
)
def test_arguments_that_differ_from_the_capture_are_refused(args: Any, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        signature().bind(args, {})


def test_a_dict_that_is_the_only_parameter_is_not_taken_for_names() -> None:
    spec = TensorSpec("x", "float32", (2,), ("x", "x"))
    sig = Signature((spec,), (), ("x",))
    assert sig.bind(({"x": 7},), {}) == {"x": 7}


def test_results_have_the_structure_of_the_model() -> None:
    leaf_y, leaf_z = ({"kind": "leaf", "output": n} for n in "yz")
    outputs = {"y": 1, "z": 2}
    pair = {"kind": "tuple", "items": [leaf_y, {"kind": "list", "items": [leaf_z]}]}
    assert signature(result=pair).assemble(outputs) == (1, [2])
    record = {
        "kind": "record",
        "name": "Out",
        "keys": ["logits", "loss"],
        "items": [leaf_z, {"kind": "constant", "value": None}],
    }
    result = signature(result=record).assemble(outputs)
    assert isinstance(result, Record)
    assert result.logits == result["logits"] == 2
    assert result.loss is None
    with pytest.raises(AttributeError, match="no 'hidden'; it has logits, loss"):
        _ = result.hidden
    assert signature().assemble(outputs) == (1, 2)


def test_signatures_round_trip_as_json() -> None:
    import json

    for sig in (signature(), signature(result={"kind": "leaf", "output": "y"}), onnx_signature(affine())):
        assert Signature.from_json(json.loads(json.dumps(sig.to_json()))) == sig


@pytest.mark.parametrize(
    "change",
    [
        {"result": {"kind": "leaf", "output": "nowhere"}},
        {"result": {"kind": "eval", "code": "1"}},
        {"result": {"kind": "dict", "keys": ["a"], "items": []}},
        {"result": [1]},
        {"inputs": [{"name": 3}]},
        {"inputs": 3},
        {"parameters": [1]},
        {"constants": [[["x"], {"a": 1}]]},
        {"outputs": [{"name": "y", "dtype": "float32", "shape": [True], "path": []}]},
    ],
)
def test_malformed_signatures_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match="malformed"):
        Signature.from_json({**signature().to_json(), **change})


# ---------------------------------------------------------------------- packing


def test_an_unchanged_model_keeps_its_bytes() -> None:
    raw = affine().SerializeToString()
    assert Onnx().build(OnnxFile.load(raw), TargetSpec("onnx")).read(MODEL) == raw


def test_external_data_is_put_inside(tmp_path: Any) -> None:
    model = affine()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    artifact = Cpu().build(OnnxFile.load(tmp_path / "m.onnx"), SPEC)
    assert WEIGHTS not in artifact.members
    for path in tmp_path.iterdir():
        path.unlink()
    np.testing.assert_array_equal(Cpu().executor(artifact)(X)[0], _reference(X))


@pytest.mark.parametrize("external", [False, True])
def test_a_model_over_the_limit_is_split(
    tmp_path: Any, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsecc.onnxfile.model.SPLIT_AT", 500)
    onnx.save(
        affine(), tmp_path / "m.onnx", save_as_external_data=external, location="w.bin", size_threshold=0
    )
    artifact = Onnx().build(OnnxFile.load(tmp_path / "m.onnx"), TargetSpec("onnx"))
    assert set(artifact.members) == {MODEL, WEIGHTS}
    assert len(artifact.read(MODEL)) < 1000
    np.testing.assert_array_equal(Onnx().executor(artifact)(X)[0], _reference(X))
    artifact.save(tmp_path / "a.scc")
    loaded = Artifact.load(tmp_path / "a.scc")
    np.testing.assert_array_equal(Onnx().executor(loaded)(X)[0], _reference(X))
    folder = tmp_path / "plain"
    folder.mkdir()
    loaded.save(folder / "out.onnx")
    assert len(list(folder.iterdir())) == 2
    onnx.checker.check_model(str(folder / "out.onnx"))
    session = onnxruntime.InferenceSession(folder / "out.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["y"], {"x": X})[0], _reference(X))


def test_splitting_is_decided_by_size() -> None:
    assert WEIGHTS in onnx_members(OnnxFile(affine()), limit=500)
    assert WEIGHTS not in onnx_members(OnnxFile(affine()), limit=100_000)


def _reference(x: Any) -> Any:
    session = onnxruntime.InferenceSession(affine().SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


# ---------------------------------------------------------------------- timing


def test_latency_is_interleaved_and_pairwise() -> None:
    now = [0.0]
    order = []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += seconds * (10 if len(order) in (7, 8) else 1)  # one slow spell hits both

        return run

    latency = compare_latency(
        call("a", 0.004), call("b", 0.001), rounds=5, warmup=1, budget_s=100, clock=lambda: now[0]
    )
    assert order == ["a", "b", *"ab", *"ba", *"ab", *"ba", *"ab"]
    assert latency.rounds == 5
    assert latency.before_ms == pytest.approx(4)
    assert latency.after_ms == pytest.approx(1)
    assert latency.ratio == pytest.approx(4)
    assert latency.low == pytest.approx(4)
    assert "4.00x" in str(latency)
    assert latency.to_json()["ratio"] == latency.ratio


def test_latency_stops_at_its_budget_but_runs_once() -> None:
    now = [0.0]

    def slow() -> None:
        now[0] += 3.0

    latency = compare_latency(slow, slow, rounds=50, warmup=0, budget_s=1, clock=lambda: now[0])
    assert latency.rounds == 1
    assert latency.ratio == latency.low == latency.high == 1
    with pytest.raises(InvalidOption, match="rounds"):
        compare_latency(slow, slow, rounds=0)

"""Exported programs as ONNX: the same function, silent, repeatable, without traces of the machine."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from sparsecc.errors import InvalidOption, UnsupportedModel
from sparsecc.fx.to_onnx import OPSET, to_onnx, torch_signature
from sparsecc.fx.translations import translations_kept
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.signature import Record
from sparsecc.target import TargetSpec
from sparsecc.targets.cpu import Cpu


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def export(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, dynamic: Any = None
) -> ExportedProgram:
    return torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic, strict=False)


def executor(program: ExportedProgram, proto: onnx.ModelProto | None = None) -> Any:
    proto = to_onnx(program) if proto is None else proto
    onnx.checker.check_model(proto, full_check=True)
    signature = torch_signature(program, proto)
    return Cpu().executor(Cpu().build(OnnxFile(proto), TargetSpec("cpu"), signature=signature), threads=1)


class Block(nn.Module):
    """Attention and a gated MLP as exporters meet them: reshapes, casts, masks, dynamic sizes."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.reshape(batch, length, self.heads, -1).transpose(1, 2)
            for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal & mask[:, None, None, :].bool())
        x = x + self.out(y.transpose(1, 2).contiguous().reshape(batch, length, width))
        wide = x.to(torch.float32)
        x = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        return x + self.down(F.dropout(F.silu(self.up(x)), 0.1, self.training))


class Net(nn.Module):
    """A small convolutional network with BatchNorm, in-place activation and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.act(self.bn2(self.conv2(x)) + x), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 7, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.lstm(x)


BATCH = Dim("b", min=1, max=64)
LENGTH = Dim("s", min=2, max=128)
MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], Any]]] = {
    "block": lambda: (
        Block(),
        (torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.int64)),
        {"x": {0: BATCH, 1: LENGTH}, "mask": {0: BATCH, 1: LENGTH}},
    ),
    "conv": lambda: (Net(), (torch.randn(2, 3, 8, 8),), {"x": {0: BATCH}}),
    "lstm": lambda: (Recurrent(), (torch.randn(2, 5, 6),), {"x": {0: BATCH}}),
    "encoder": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        (torch.randn(2, 4, 8),),
        {"src": {0: BATCH}},
    ),
}


class Case(NamedTuple):
    model: nn.Module
    args: tuple[Any, ...]
    program: ExportedProgram
    proto: onnx.ModelProto
    seen: list[Any]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    """A model with its ONNX form, and whatever was warned of or logged on the way."""
    torch.manual_seed(0)
    model, args, dynamic = MODELS[request.param]()
    program = export(model, args, dynamic=dynamic)
    seen: list[Any] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            proto = to_onnx(program)
    finally:
        logging.getLogger().removeHandler(handler)
    return Case(model, args, program, proto, seen)


# ---------------------------------------------------------------------- the function


def test_onnx_computes_what_torch_does_at_other_sizes_too(case: Case) -> None:
    model, args = case.model, case.args
    run = executor(case.program, case.proto)
    larger = tuple(torch.cat([a, a.flip(0), a]) for a in args)
    for inputs in (args, larger):
        with torch.no_grad():
            expected = model(*inputs)
        got = run(*inputs)
        assert pytree.tree_structure(got) == pytree.tree_structure(expected)
        for g, e in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
            assert e.abs().max() > 0.01
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


class Attend(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=0.4)


@pytest.mark.parametrize("mask", ["none", "causal", "square", "heads", "full", "one sample", "bool"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 2, 3)])
def test_attention_on_tensors_of_any_rank(lead: tuple[int, ...], mask: str) -> None:
    """ONNX has a translation for rank four."""
    shapes = {"square": (), "heads": lead[-1:], "full": lead, "bool": lead, "one sample": (1, *lead[1:])}
    args = [torch.randn(*lead, n, w) for n, w in ((5, 4), (7, 4), (7, 6))]
    if mask in shapes:
        args.append(torch.randn(*(shapes[mask] if lead else ()), 5, 7))
    if mask == "bool":
        args[-1] = args[-1] > -1
    model = Attend(mask == "causal")
    batch = [{0: BATCH} if len(lead) > 1 else None for _ in "qkv"]
    per_sample = mask in ("full", "bool") and len(lead) > 1
    dynamic = (*batch, *[{0: BATCH} if per_sample else None for _ in args[3:]])
    run = executor(export(model, tuple(args), dynamic=dynamic))
    larger = [
        a.repeat(3, *[1] * (a.dim() - 1)) if d is not None else a for a, d in zip(args, dynamic, strict=True)
    ]
    for inputs in (args, larger):
        torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_quick_and_traced_decomposition_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = executor(case.program, case.proto)(*case.args)
    monkeypatch.setattr("sparsecc.fx.to_onnx._simple", lambda node, table: False)
    traced = executor(case.program)(*case.args)
    for g, e in zip(pytree.tree_leaves(quick), pytree.tree_leaves(traced), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


def test_transformers_are_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, dynamic = MODELS["block"]()
    program = export(model, args, dynamic=dynamic)

    def traced(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("traced")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", traced)
    assert to_onnx(program).graph.node


class Aliases(nn.Module):
    """Writes into tensors that are seen elsewhere, which must not be mistaken for new tensors."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x - 1
        if self.which == 0:
            view = y.view(-1)
            y.relu_()
            return view
        if self.which == 1:
            before = y * 1
            y.add_(3)
            return y * before
        if self.which == 2:
            same = F.dropout(y, 0.5, training=False)
            same.mul_(2)
            return y + same
        if self.which == 3:
            same = y.to(torch.float32)
            same.mul_(2)
            return y + same
        if self.which == 4:
            first, second = y.chunk(2, 1)
            first.mul_(second)
            return y
        y.add_(x).relu_().mul_(y)
        return y.contiguous().add_(1) + y


@pytest.mark.parametrize("which", range(6))
def test_writes_into_shared_memory_are_kept(which: int) -> None:
    x = torch.randn(2, 4)
    torch.testing.assert_close(executor(export(Aliases(which), (x,)))(x), Aliases(which)(x))


def test_parameters_keep_their_names_and_values(case: Case) -> None:
    initializers = {t.name: onnx.numpy_helper.to_array(t) for t in case.proto.graph.initializer}
    state = {n: p for n, p in case.model.state_dict().items() if "num_batches_tracked" not in n}
    assert set(state) <= set(initializers)
    for name, value in state.items():
        np.testing.assert_array_equal(initializers[name], value.numpy())


def test_equal_parameters_stay_apart_and_tied_ones_stay_tied() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LayerNorm(4), nn.LayerNorm(4)
            self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.down.weight = self.up.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.b(self.up(self.a(x))))

    names = [t.name for t in to_onnx(export(Twins(), (torch.randn(2, 4),))).graph.initializer]
    assert {"a.weight", "a.bias", "b.weight", "b.bias"} <= set(names)
    assert len([name for name in names if name in ("up.weight", "down.weight")]) == 1


def test_the_same_program_gives_the_same_bytes_and_is_not_modified(case: Case) -> None:
    before = str(case.program.graph)
    method = case.program.run_decompositions
    assert to_onnx(case.program).SerializeToString() == case.proto.SerializeToString()
    assert str(case.program.graph) == before
    assert case.program.run_decompositions == method


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, (x, mask), _ = MODELS["block"]()
    model = model.to(dtype)
    x = x.to(dtype)
    run = executor(export(model, (x, mask)))
    with torch.no_grad():
        torch.testing.assert_close(run(x, mask), model(x, mask), rtol=2e-2, atol=2e-3)


# ---------------------------------------------------------------------- repeatable, silent, clean


SCRIPT = """
    import hashlib, sys, torch
    from torch import nn
    from sparsecc.fx.to_onnx import to_onnx
    def digest():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        model = nn.Sequential(*layers)
        shapes = ({0: torch.export.Dim("n", min=1, max=9)},)
        args = (torch.randn(2, 3, 8, 8),)
        program = torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=False)
        sys.stderr.write("export done\\n")
        return hashlib.sha256(to_onnx(program).SerializeToString()).hexdigest()
"""


def test_processes_agree_and_say_nothing() -> None:
    script = textwrap.dedent(SCRIPT)
    here: dict[str, Any] = {}
    exec(script, here)
    run = subprocess.run(
        [sys.executable, "-c", script + "\nprint(digest())"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "2", "PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "default"},
    )
    assert run.stdout == here["digest"]() + "\n"
    assert run.stderr.split("export done\n")[1] == ""


def test_nothing_is_printed_warned_or_logged(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert case.seen == []
    if isinstance(case.model, Net):
        levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
        to_onnx(case.program)
        assert capfd.readouterr() == ("", "")
        assert {name: logging.getLogger(name).level for name in levels} == levels


def test_no_trace_of_sources_or_classes_is_left(case: Case) -> None:
    proto = case.proto
    content = proto.SerializeToString()
    for trace in (
        b'File "',
        b".py",
        b"stack_trace",
        b"class_hierarchy",
        b"namespace",
        b"/home",
        b"/usr",
        b"/tmp",
    ):
        assert trace not in content
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not any(tensor.metadata_props or tensor.doc_string for tensor in proto.graph.initializer)
    assert not proto.functions


# ---------------------------------------------------------------------- names


def test_inputs_outputs_and_sizes_can_be_named(block: ExportedProgram) -> None:
    proto = to_onnx(
        block,
        input_names=["hidden", "keep"],
        output_names=["linear"],  # also the name of a value inside
        dynamic={"x": {0: "batch", 1: "length"}},
    )
    onnx.checker.check_model(proto, full_check=True)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {
        "hidden": ["batch", "length", 16],
        "keep": ["batch", "length"],
        "linear": ["batch", "length", 16],
    }
    plain = to_onnx(block)
    assert [i.name for i in plain.graph.input] == ["x", "mask"]
    assert [d.dim_param for d in plain.graph.input[0].type.tensor_type.shape.dim[:2]] == ["batch", "x_dim1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a"]}, "input_names must be 2 names"),
        ({"input_names": ["a", "a"]}, "must differ"),
        ({"input_names": ["a", ""]}, "input_names must be 2 names"),
        ({"output_names": ["x"]}, "'x' is that of another input or output"),
        ({"output_names": ["qkv.weight"]}, "'qkv.weight' is that of a parameter"),
        ({"dynamic": {"z": {0: "n"}}}, "dynamic names 'z', but the inputs are x, mask"),
        ({"dynamic": {"x": {2: "n"}}}, "dimension 2 of input 'x' is not dynamic"),
        ({"dynamic": {"x": {0: "n", 1: "n"}}}, "one name to dimensions that differ"),
    ],
)
def test_names_that_cannot_be_are_refused(options: Any, message: str, block: ExportedProgram) -> None:
    with pytest.raises(InvalidOption, match=message):
        to_onnx(block, **options)


@pytest.fixture(scope="module")
def block() -> ExportedProgram:
    model, args, dynamic = MODELS["block"]()
    return export(model, args, dynamic=dynamic)


# ---------------------------------------------------------------------- arguments and results


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


torch.export.register_dataclass(Output)


class Nested(nn.Module):
    def __init__(self, result: Callable[..., Any]) -> None:
        super().__init__()
        self.result = result

    def forward(
        self, batch: dict[str, Any], *, scale: torch.Tensor, flag: bool = False, extra: Any = None
    ) -> Any:
        a, (b, c) = batch["a"], batch["more"]
        return self.result(a * scale, b + c)


def nested_inputs(n: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch = {"a": torch.randn(n, 3), "more": [torch.randn(n, 3), torch.randn(1)]}
    return (batch,), {"scale": torch.tensor(3.0), "flag": True, "extra": None}


@pytest.mark.parametrize(
    "result",
    [
        lambda x, y: x + y,
        lambda x, y: (x,),
        lambda x, y: [x, (y, None)],
        lambda x, y: {"x": x, "y": {"z": y}},
        lambda x, y: OrderedDict(b=x, a=y),
        lambda x, y: Pair(x, y),
        lambda x, y: Output(x),
        lambda x, y: (x, x, 7, "text"),
    ],
)
def test_arguments_and_results_keep_their_structure(result: Callable[..., Any]) -> None:
    model = Nested(result)
    args, kwargs = nested_inputs()
    run = executor(export(model, args, kwargs))
    expected = model(*args, **kwargs)
    got = run(*args, **kwargs)
    if isinstance(expected, Pair | Output):
        fields = expected._asdict() if isinstance(expected, Pair) else vars(expected)
        assert isinstance(got, Record)
        assert list(got) == list(fields)
        got, expected = dict(got), dict(fields)
    if isinstance(expected, OrderedDict):
        assert next(iter(got)) == "b"
        got, expected = dict(got), dict(expected)
    for g, e in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert (g == e).all() if isinstance(e, torch.Tensor) else g == e
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)


def test_nested_arguments_in_numpy_by_name_and_flat() -> None:
    args, kwargs = nested_inputs()
    run = executor(export(Nested(lambda x, y: (x, y)), args, kwargs))
    expected = run(*args, **kwargs)
    as_numpy = pytree.tree_map_only(torch.Tensor, lambda t: t.numpy(), (args, kwargs))
    flat = dict(
        zip([s.name for s in run.signature.inputs], pytree.tree_leaves((args, kwargs))[:4], strict=True)
    )
    for result in (run(*as_numpy[0], **as_numpy[1]), run(batch=args[0], **kwargs), run(**flat), run(flat)):
        for g, e in zip(result, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(g), e.numpy())
    with pytest.raises(InvalidOption, match="flag was fixed to True"):
        run(*args, **{**kwargs, "flag": False})
    with pytest.raises(InvalidOption, match=r"batch\['more'\]\[1\] is missing"):
        run({"a": args[0]["a"], "more": args[0]["more"][:1]}, **kwargs)


def test_inputs_without_effect_and_outputs_that_are_inputs() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> Any:
            return x, x.contiguous(), (x + 1).to(torch.float32), torch.ones(2)

    x = torch.randn(2, 3)
    for g, e in zip(executor(export(Odd(), (x, x)))(x, x), Odd()(x, x), strict=True):
        assert torch.equal(g, e)


# ---------------------------------------------------------------------- failures


@torch.library.custom_op("sparsecc_test::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@strange.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_operator_without_a_translation_is_named_with_its_source_line() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return strange(x + 1) * 2

    with pytest.raises(UnsupportedModel) as caught:
        to_onnx(export(Strange(), (torch.randn(2),)))
    message = str(caught.value)
    assert "no translation for the operator sparsecc_test.strange.default (node 'strange'" in message
    assert "test_to_onnx.py:" in message
    assert "\n" not in message


def test_errors_leave_the_loggers_as_they_were() -> None:
    program = export(nn.Linear(2, 2), (torch.randn(1, 2),))
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(InvalidOption):
        to_onnx(program, dynamic={"input": {0: "n"}})
    assert logging.getLogger("torch.onnx").level == level


def test_translations_are_read_once_and_not_shared() -> None:
    """What an export registers stays its own, and PyTorch is left as it was."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = ONNXRegistry.__dict__["from_torchlib"]
    target = torch.ops.aten.relu.default
    with translations_kept():
        first = ONNXRegistry.from_torchlib(OPSET)
        known = first.get_decomps(target)
        first.register_op(target, lambda x: x)
        second = ONNXRegistry.from_torchlib(OPSET)
    assert second.get_decomps(target) == known != first.get_decomps(target)
    assert second.get_decomps(target)[0] is known[0], "read anew"
    assert ONNXRegistry.__dict__["from_torchlib"] is before
    fresh = ONNXRegistry.from_torchlib(OPSET)
    assert fresh.functions.keys() == second.functions.keys()
    assert fresh.opset_version == second.opset_version == OPSET


def test_operators_that_come_later_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantiser brings its operators with it: those of an earlier table would lack their translations."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    reads = 0
    original = ONNXRegistry.from_torchlib.__func__

    def counted(kind: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        return original(kind, *args, **kwargs)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    monkeypatch.setattr("sparsecc.fx.translations._known", {})
    with torch.library._scoped_library("sparsecc_late", "DEF") as library:
        for known in (False, True):
            for _ in range(2):
                with translations_kept():
                    ONNXRegistry.from_torchlib()
            assert reads == 1 + known
            library.define(f"later{known}(Tensor x) -> Tensor")

"""Bad input, by API and command line: one clear error, the right exit code, nothing written or changed."""

from __future__ import annotations

import hashlib
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import sparsecc
from sparsecc import (
    InvalidModel,
    InvalidOption,
    PlanConflict,
    SparseccError,
    TargetUnavailable,
    UnsupportedModel,
)
from sparsecc.cli.command import run as run_command
from sparsecc.cli.commands import cli
from sparsecc.passes import ChannelPruning

FLOAT = TensorProto.FLOAT


def weight(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def proto(*nodes: onnx.NodeProto, **changes: Any) -> onnx.ModelProto:
    """A model from ``x[batch, 4]`` to ``y[batch, 3]``; a small MLP unless nodes are given."""
    given = list(nodes) or [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["a"], "fc1"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "fc2.weight"], ["y"], "fc2"),
    ]
    graph = helper.make_graph(
        given,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, changes.get("shape", ["batch", 4]))],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        changes.get("weights", [weight("fc1.weight", 4, 8), weight("fc2.weight", 8, 3)]),
    )
    opsets = [helper.make_opsetid("", changes.get("opset", 17)), helper.make_opsetid("local", 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=9, functions=changes.get("functions", [])
    )


GOOD = proto().SerializeToString()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty, but for a good model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "good.onnx").write_bytes(GOOD)
    return tmp_path


def state(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "-"
        for path in sorted(folder.rglob("*"))
    }


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that has to be refused; returns the message."""

    def call(*arguments: object, code: int = 2) -> str:
        before = state(folder)
        capfd.readouterr()
        found = run_command(cli, [str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert (found, out) == (code, ""), err
        assert "Traceback" not in err
        assert "internal error" not in err
        assert err.count("sparsecc: ") <= 1, "more than one error"
        assert state(folder) == before
        return err

    return call


# ---------------------------------------------------------------------- files that are no models


def truncated(tenth: int) -> bytes:
    return GOOD[: len(GOOD) * tenth // 10]


FILES: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is not a model\n" * 20,
    "random": random.Random(0).randbytes(2000),
    "zeros": bytes(1000),
    "zip": b"PK\x05\x06" + bytes(18),
    "a pickle": b"\x80\x02}q\x00.",
    **{f"the first {tenth}0 percent": truncated(tenth) for tenth in range(1, 10)},
    "more than everything": GOOD + b"\xff\xff",
    "twice": GOOD + GOOD,
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_that_are_no_models(folder: Path, refused: Refused, content: bytes) -> None:
    path = folder / "bad.onnx"
    path.write_bytes(content)
    before = state(folder)
    for call in (sparsecc.prune, sparsecc.slim, sparsecc.analyze, sparsecc.compile):
        for source in (path, str(path), content):
            with pytest.raises(InvalidModel):
                call(source)
    with pytest.raises(InvalidModel):
        sparsecc.verify("good.onnx", path)
    assert state(folder) == before
    for arguments in (
        ("prune", "bad.onnx", "-o", "out.onnx"),
        ("slim", "bad.onnx", "-o", "out.onnx"),
        ("compile", "bad.onnx", "-o", "out.scc"),
        ("inspect", "bad.onnx"),
        ("verify", "bad.onnx", "good.onnx"),
        ("verify", "good.onnx", "bad.onnx"),
        ("run", "bad.onnx"),
    ):
        assert "bad.onnx" in refused(*arguments) or len(content) > len(GOOD)


def test_paths_that_are_no_files(folder: Path, refused: Refused) -> None:
    for path, message in (("missing.onnx", "no such file"), (folder, "is a folder")):
        for call in (sparsecc.prune, sparsecc.slim, sparsecc.analyze, sparsecc.compile):
            with pytest.raises(InvalidModel, match=message):
                call(path)
        assert message in refused("prune", path, "-o", "out.onnx")
        assert message in refused("inspect", path)
        refused("run", path)
        refused("verify", "good.onnx", path)
        refused("verify", "good.onnx", "good.onnx", "--plan", path)
    with pytest.raises(InvalidModel):
        sparsecc.load("missing.scc")
    with pytest.raises(InvalidModel):
        sparsecc.Plan.load("missing.plan")
    refused("inspect", "good.onnx\0")


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".pth", ".ckpt", ".bin"])
def test_pytorch_files_are_not_unpickled(folder: Path, refused: Refused, suffix: str) -> None:
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.randn(4, 2),)) if suffix == ".pt2" else None
    if program is not None:
        torch.export.save(program, folder / f"model{suffix}")
    else:
        torch.save(torch.nn.Linear(2, 3).state_dict(), folder / f"model{suffix}")
    assert "unpickles" in refused("prune", f"model{suffix}", "-o", "out.onnx")
    assert "package.module:callable" in refused("inspect", f"model{suffix}")


def test_results_are_no_models(folder: Path, refused: Refused) -> None:
    sparsecc.compile("good.onnx").save("a.scc")
    sparsecc.prune("good.onnx").plan.save("a.plan")
    assert "an artifact" in refused("prune", "a.scc", "-o", "out.onnx")
    assert "a plan" in refused("compile", "a.plan", "-o", "out.scc")
    assert "not a sparsecc artifact" in refused("run", "a.plan")


@pytest.mark.parametrize("name", ["a.scc", "a.plan"])
@pytest.mark.parametrize("tenth", range(0, 10, 3))
def test_truncated_results(folder: Path, refused: Refused, name: str, tenth: int) -> None:
    if name == "a.scc":
        sparsecc.compile("good.onnx", recipe="ChannelPruning()").save(name)
    else:
        sparsecc.prune("good.onnx").plan.save(name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * tenth // 10])
    refused("inspect", name)
    if name == "a.scc":
        refused("run", name)
        refused("verify", "good.onnx", name)
    else:
        refused("verify", "good.onnx", "good.onnx", "--plan", name)


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("plan.json", b"{}"),
        ("plan.json", b"["),
        ("plan.json", b"[" * 100_000),
        ("plan.json", b"\xff"),
        ("plan.json", b'{"format": 99}'),
        ("plan.safetensors", b""),
        ("plan.safetensors", b"\xff" * 64),
    ],
)
def test_damaged_plans(folder: Path, refused: Refused, member: str, content: bytes) -> None:
    members = sparsecc.prune("good.onnx").plan.members()
    with zipfile.ZipFile(folder / "a.plan", "w") as archive:
        for name, data in {**members, member: content}.items():
            archive.writestr(name, data)
    with pytest.raises(InvalidModel):
        sparsecc.Plan.load("a.plan")
    refused("inspect", "a.plan")


def test_a_plan_for_another_model(folder: Path, refused: Refused) -> None:
    other = proto(weights=[weight("fc1.weight", 4, 6), weight("fc2.weight", 6, 3)])
    plan = sparsecc.prune(other).plan
    plan.save("a.plan")
    with pytest.raises(PlanConflict, match=r"fc1\.weight"):
        plan.apply("good.onnx")
    with pytest.raises(PlanConflict, match=r"fc1\.weight"):
        sparsecc.verify("good.onnx", "good.onnx", plan=plan)
    assert "another model" in refused("verify", "good.onnx", "good.onnx", "--plan", "a.plan")


# ---------------------------------------------------------------------- hostile models


def external(**entries: str) -> onnx.ModelProto:
    tensor = TensorProto(name="fc1.weight", data_type=FLOAT, dims=[4, 8], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return proto(weights=[tensor, weight("fc2.weight", 8, 3)])


def matmul(left: str, right: str, out: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [left, right], [out], out)


def calling(name: str, callee: str) -> onnx.FunctionProto:
    node = helper.make_node(callee, ["a"], ["b"], domain="local")
    return helper.make_function("local", name, ["a"], ["b"], [node], [helper.make_opsetid("local", 1)])


def doubling(level: int) -> onnx.FunctionProto:
    """A function that calls the one below it twice: ``2**level`` nodes."""
    name = f"f{level - 1}" if level else "Relu"
    domain = "local" if level else ""
    nodes = [
        helper.make_node(name, ["a"], ["t"], domain=domain),
        helper.make_node(name, ["t"], ["b"], domain=domain),
    ]
    opsets = [helper.make_opsetid("local", 1), helper.make_opsetid("", 17)]
    return helper.make_function("local", f"f{level}", ["a"], ["b"], nodes, opsets)


def nested(depth: int) -> bytes:
    """An If within an If within ..., by hand: protobuf does not build what is too deep to read."""

    def field(number: int, content: bytes) -> bytes:
        size, rest = [], len(content)
        while rest > 127:
            size.append(rest & 127 | 128)
            rest >>= 7
        return bytes([number << 3 | 2, *size, rest]) + content

    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    for _ in range(depth):
        branch = field(1, b"then_branch") + field(6, field(1, node)) + b"\xa0\x01\x05"
        node = field(1, b"c") + field(2, b"y") + field(4, b"If") + field(5, branch)
    return GOOD + field(7, field(1, node))


def sized(dims: list[int], **fields: Any) -> onnx.ModelProto:
    tensor = TensorProto(name="fc1.weight", data_type=FLOAT, dims=dims, **fields)
    return proto(weights=[tensor, weight("fc2.weight", 8, 3)])


def filled(*dims: int) -> onnx.ModelProto:
    """A model that asks for a tensor of those sizes at run time."""
    return proto(
        helper.make_node("ConstantOfShape", ["dims"], ["big"], "big"),
        helper.make_node("ReduceSum", ["big"], ["sum"], "sum", keepdims=0),
        matmul("x", "fc1.weight", "a"),
        matmul("a", "fc2.weight", "b"),
        helper.make_node("Add", ["b", "sum"], ["y"], "add"),
        weights=[
            numpy_helper.from_array(np.array(dims, np.int64), "dims"),
            weight("fc1.weight", 4, 8),
            weight("fc2.weight", 8, 3),
        ],
    )


def referring() -> onnx.ModelProto:
    model = proto(helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.1))
    model.graph.node[0].attribute[0].ref_attr_name = "slope"
    return model


def doubled_attribute() -> onnx.ModelProto:
    model = proto(helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.1))
    model.graph.node[0].attribute.append(helper.make_attribute("alpha", 0.2))
    return model


def misfitting() -> onnx.ModelProto:
    """A convolution that cannot be, whose output is declared all the same."""
    model = proto(helper.make_node("Conv", ["x", "fc1.weight"], ["y"]), weights=[weight("fc1.weight", 8)])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, ["batch", 3]))
    return model


def endless() -> onnx.ModelProto:
    """A loop of 2**62 iterations."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Tanh", ["v"], ["w"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("v", FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("w", FLOAT, None)],
    )
    return proto(
        matmul("x", "fc1.weight", "a"),
        helper.make_node("Loop", ["trips", "", "a"], ["b"], "loop", body=body),
        matmul("b", "fc2.weight", "y"),
        weights=[
            numpy_helper.from_array(np.array(2**62), "trips"),
            weight("fc1.weight", 4, 8),
            weight("fc2.weight", 8, 3),
        ],
    )


def unreadable() -> bytes:
    """A name that is not UTF-8, in a place that nothing needs."""
    model = proto()
    model.graph.node[0].doc_string = "QQQQQQQQ"
    return model.SerializeToString().replace(b"QQQQQQQQ", b"\xff" * 8)


HOSTILE: dict[str, Any] = {
    "external data above the folder": lambda: external(location="../secret"),
    "external data deeper above": lambda: external(location="a/../../secret"),
    "external data at an absolute path": lambda: external(location="/etc/passwd"),
    "external data behind a link": lambda: external(location="link"),
    "external data behind a linked folder": lambda: external(location="way/secret"),
    "external data that is missing": lambda: external(location="missing"),
    "external data that is a folder": lambda: external(location="."),
    "external data that is too short": lambda: external(location="good.onnx", offset="100000"),
    "external data with a negative offset": lambda: external(location="good.onnx", offset="-4"),
    "external data with an endless offset": lambda: external(location="good.onnx", offset="9" * 40),
    "external data without a place": lambda: external(),
    "a cycle": lambda: proto(
        matmul("b", "fc1.weight", "a"), matmul("a", "fc2.weight", "b"), matmul("x", "a", "y")
    ),
    "a node that reads itself": lambda: proto(helper.make_node("Add", ["x", "y"], ["y"])),
    "a value that nothing defines": lambda: proto(matmul("x", "nothing", "y")),
    "an output that nothing computes": lambda: proto(matmul("x", "fc1.weight", "z")),
    "a value defined twice": lambda: proto(matmul("x", "fc1.weight", "y"), matmul("x", "fc1.weight", "y")),
    "an unknown operator": lambda: proto(helper.make_node("Frobnicate", ["x"], ["y"])),
    "a function that calls itself": lambda: proto(
        helper.make_node("f", ["x"], ["y"], domain="local"), functions=[calling("f", "f")]
    ),
    "functions that call each other": lambda: proto(
        helper.make_node("f", ["x"], ["y"], domain="local"), functions=[calling("f", "g"), calling("g", "f")]
    ),
    "functions that double": lambda: proto(
        helper.make_node("f30", ["x"], ["y"], domain="local"), functions=[doubling(k) for k in range(31)]
    ),
    "subgraphs without an end": lambda: nested(60),
    "a weight without content": lambda: sized([4, 8]),
    "a weight of another size": lambda: sized([4, 8], raw_data=b"\0" * 12),
    "a weight of absurd size": lambda: sized([1 << 40, 1 << 40], raw_data=b"\0" * 12),
    "a weight of negative size": lambda: sized([-4, -8], raw_data=b"\0" * 128),
    "a weight of unknown type": lambda: (
        sized([4, 8], raw_data=b"\0" * 128)
        and proto(weights=[TensorProto(name="fc1.weight", data_type=99, dims=[4, 8], raw_data=b"\0" * 128)])
    ),
    "an old opset": lambda: proto(opset=7),
    "an opset from the future": lambda: proto(opset=999),
    "no graph": lambda: onnx.ModelProto(ir_version=9, opset_import=[helper.make_opsetid("", 17)]),
    "names that are not UTF-8": unreadable,
    "an input of absurd size": lambda: proto(shape=[1 << 40, 4]),
    "a tensor of absurd size at run time": lambda: filled(1 << 40, 1 << 20),
    "a tensor of negative size at run time": lambda: filled(-5, 3),
    "an attribute of a function that there is not": lambda: referring(),
    "an attribute given twice": lambda: doubled_attribute(),
    "a weight of a hundred thousand axes": lambda: sized([1] * 100_000, raw_data=b"\0" * 4),
    "weights that do not fit": lambda: proto(
        weights=[weight("fc1.weight", 5, 8), weight("fc2.weight", 8, 3)], shape=["batch", 4]
    ),
    "a weight of another rank": lambda: misfitting(),
}
UNSUPPORTED = {"an old opset", "an opset from the future"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_models(tmp_path: Path, folder: Path, refused: Refused, name: str) -> None:
    inner = folder / "model"
    inner.mkdir()
    (folder / "secret").write_bytes(bytes(4 * 8 * 4))
    (inner / "link").symlink_to(folder / "secret")
    (inner / "way").symlink_to(folder)
    (inner / "good.onnx").write_bytes(GOOD)
    made = HOSTILE[name]()
    path = inner / "bad.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    before = state(folder)
    for call in (sparsecc.prune, sparsecc.compile):
        with pytest.raises((InvalidModel, InvalidOption, UnsupportedModel)) as caught:
            call(path)
        assert isinstance(caught.value, UnsupportedModel) or name not in UNSUPPORTED
    assert state(folder) == before
    code = 1 if isinstance(caught.value, UnsupportedModel) else 2
    assert len(refused("prune", path, "-o", "out.onnx", code=code)) > 20
    assert len(refused("compile", path, "-o", "out.scc", code=code)) > 20


def test_a_loop_without_an_end() -> None:
    with pytest.raises(UnsupportedModel, match="does not end"):
        sparsecc.prune(endless())


def test_random_damage_is_either_harmless_or_refused() -> None:
    """Bytes of a good model changed at random: never another exception than our own."""
    random_ = random.Random(1)
    payload = {numpy_helper.to_array(t).tobytes() for t in proto().graph.initializer}
    spots = [i for i in range(len(GOOD)) if not any(p.find(GOOD[i : i + 16]) >= 0 for p in payload)]
    for _ in range(150):
        damaged = bytearray(GOOD)
        for _ in range(random_.choice([1, 1, 2])):
            damaged[random_.choice(spots)] = random_.randrange(256)
        try:
            sparsecc.prune(bytes(damaged), sparsity=0.5)
        except SparseccError:
            continue


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "value", [1.5, 1, 1.0, -1, -0.1, float("nan"), float("inf"), "x", "0.5", True, [0.5]]
)
def test_sparsity_outside_its_domain(folder: Path, refused: Refused, value: Any) -> None:
    with pytest.raises(InvalidOption, match="sparsity"):
        sparsecc.prune("good.onnx", sparsity=value)
    with pytest.raises(InvalidOption, match="sparsity"):
        ChannelPruning(sparsity=value)
    if not isinstance(value, (bool, list)) and value != "0.5":
        assert "sparsity" in refused("prune", "good.onnx", "-o", "out.onnx", f"--sparsity={value}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saliency": "l3x"}, "saliency"),
        ({"saliency": "l-1"}, "saliency"),
        ({"saliency": ""}, "saliency"),
        ({"allocation": "globl"}, "allocation"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"multiple_of": -8}, "multiple_of"),
        ({"min_keep": 0}, "min_keep"),
        ({"include": ["fc1.wieght"]}, "did you mean 'fc1.weight'?"),
        ({"include": ["nothing.*"]}, "no parameter of the model matches 'nothing.*'"),
        ({"exclude": ["head"]}, "no parameter of the model matches 'head'"),
        ({"include": [""]}, "include"),
        ({"recipe": "ChannelPruning()", "sparsity": 0.3}, "either a recipe or sparsity"),
        ({"recipe": "ChannelPruning()", "include": ["fc1"]}, "either a recipe or include"),
        ({"recipe": "ChannelPruning()", "min_keep": 3}, "either a recipe or min_keep"),
    ],
)
def test_options_outside_their_domains(
    folder: Path, refused: Refused, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        sparsecc.prune("good.onnx", **options)
    assert message in str(caught.value)
    arguments = [
        argument
        for name, value in options.items()
        for item in (value if isinstance(value, list) else [value])
        for argument in (f"--{name.replace('_', '-')}", item)
    ]
    assert message in refused("prune", "good.onnx", "-o", "out.onnx", *arguments)


def test_other_options_of_the_api() -> None:
    for options in (
        {"reduction": "avg"},
        {"normaliser": "max2"},
        {"multiple_of": 2.5},
        {"include": [torch.nn.Linear]},
    ):
        with pytest.raises(InvalidOption):
            sparsecc.prune(GOOD, **options)  # type: ignore[arg-type]
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    example = (torch.randn(2, 4),)
    for include in (torch.nn.Conv2d, torch.nn.ReLU, torch.nn.Linear(4, 8), net[1]):
        with pytest.raises(InvalidOption, match="selects nothing"):
            sparsecc.prune(net, example, include=[include])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "the recipe is empty"),
        (" ; ", "the recipe is empty"),
        ("ChanelPruning()", "did you mean 'ChannelPruning'?"),
        ("ChannelPruning(sparsty=0.5)", "did you mean 'sparsity'?"),
        ("ChannelPruning(sparsity=1.5)", "sparsity=1.5"),
        ("ChannelPruning(sparsity='x')", "sparsity='x'"),
        ("ChannelPruning(sparsity=nan)", "recipe step"),
        ("ChannelPruning(0.5)", "write Pass(option=value, ...)"),
        ("ChannelPruning(sparsity=0.5", "recipe step"),
        ("ChannelPruning(sparsity=0.1, sparsity=0.2)", "recipe step"),
        ("ChannelPruning(**{'sparsity': 0.5})", "recipe step"),
        ("ChannelPruning(include='fc1')", "give a tuple"),
        ("ChannelPruning(include=('nothing',))", "no parameter of the model matches"),
        ("ChannelPruning(allocation='x')", "allocation"),
        ("__import__('os').system('touch hacked')", "recipe step"),
        ("ChannelPruning(sparsity=__import__('os').system('touch hacked'))", "recipe step"),
        ("(" * 5000, "recipe step"),
        ("-" * 50_000 + "1", "recipe step"),
        ("DeadChannelElimination(); ChannelPruning()", "cannot mix"),
    ],
)
def test_recipes_that_cannot_be_read(folder: Path, refused: Refused, recipe: str, message: str) -> None:
    for call in (sparsecc.prune, sparsecc.compile):
        with pytest.raises(InvalidOption) as caught:
            call("good.onnx", recipe=recipe)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert message in refused("prune", "good.onnx", "-o", "out.onnx", "--recipe", recipe)
    assert message in refused("compile", "good.onnx", "-o", "out.scc", "--recipe", recipe)


@pytest.mark.parametrize(
    ("target", "error", "code"),
    [
        ("cpx", TargetUnavailable, 1),
        ("sm75-2:4", TargetUnavailable, 1),
        ("cpu-4:4", InvalidOption, 2),
        ("cpu-fp17", InvalidOption, 2),
        ("cpu-4:2", InvalidOption, 2),
        ("", InvalidOption, 2),
        ("../cpu", InvalidOption, 2),
    ],
)
def test_unknown_targets(
    folder: Path, refused: Refused, target: str, error: type[SparseccError], code: int
) -> None:
    with pytest.raises(error):
        sparsecc.compile("good.onnx", target=target)
    with pytest.raises(error):
        sparsecc.compile("missing.onnx", target=target)  # before the model is read
    refused("compile", "good.onnx", "-o", "out.scc", "--target", target, code=code)


# ---------------------------------------------------------------------- example inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1"),
        ((np.zeros((2, 4), np.float32),) * 2, "takes 1"),
        ({"z": np.zeros((2, 4), np.float32)}, "no input is named z"),
        ({"x": np.zeros((2, 5), np.float32)}, "shape"),
        ({"x": np.zeros((2, 4, 1), np.float32)}, "shape"),
        ({"x": np.zeros((2, 4))}, "float64"),
        ({"x": np.zeros((2, 4), np.int64)}, "int64"),
        ({"x": "text"}, "no tensor"),
        ({"x": None}, "no tensor"),
    ],
)
def test_wrong_example_inputs_of_an_onnx_model(inputs: Any, message: str) -> None:
    for call in (sparsecc.prune, sparsecc.compile, sparsecc.analyze):
        with pytest.raises(InvalidOption, match=message):
            call(GOOD, inputs)


def test_wrong_inputs_on_the_command_line(folder: Path, refused: Refused) -> None:
    np.save("wide.npy", np.zeros((2, 5), np.float32))
    np.save("double.npy", np.zeros((2, 4)))
    np.save("good.npy", np.zeros((2, 4), np.float32))
    np.save("objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.savez("several.npz", x=np.zeros(3))
    (folder / "text.npy").write_text("text")
    (folder / "huge.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }".ljust(117)
        + b"\n"
    )
    sparsecc.compile("good.onnx").save("a.scc")
    prune = ("prune", "good.onnx", "-o", "out.onnx")
    for command in (prune, ("run", "a.scc"), ("inspect", "good.onnx"), ("verify", "good.onnx", "good.onnx")):
        for given, message in (
            ("x", "name=file.npy"),
            ("=x", "name=file.npy"),
            ("x=missing.npy", "no file missing.npy"),
            ("x=text.npy", "no array"),
            ("x=objects.npy", "no array"),
            ("x=huge.npy", "no array"),
            ("x=several.npz", "several"),
            ("z=good.npy", "no input is named z"),
            ("x=wide.npy", "shape"),
            ("x=double.npy", "float64"),
        ):
            assert message in refused(*command, "--input", given)
        for given, message in (
            ("batch", "name=size"),
            ("batch=x", "not a positive whole number"),
            ("batch=0", "not a positive whole number"),
            ("batch=-3", "not a positive whole number"),
            ("batch=99999999999999999999", "not a positive whole number"),
            ("time=3", "no dynamic dimension 'time'; it has batch"),
        ):
            assert message in refused(*command, "--dim", given)
        if command[0] != "run":
            both = ("--input", "x=good.npy", "--dim", "batch=3")
            assert "have size 2" in refused(*command, *both)
    assert "twice" in refused(*prune, "--input", "x=good.npy", "--input", "x=good.npy")
    assert "for ONNX models" in refused("prune", "pkg.mod:make", "-o", "out.zip", "--dim", "a=2")


def test_wrong_example_inputs_of_a_pytorch_model() -> None:
    net = torch.nn.Linear(4, 3)
    for inputs in (
        (),
        (torch.randn(2, 5),),
        (torch.randn(2, 4), torch.randn(2, 4)),
        (torch.zeros(2, 4, dtype=torch.int64),),
        {"x": torch.randn(2, 4)},
        "text",
    ):
        with pytest.raises(InvalidOption, match="example_inputs"):
            sparsecc.prune(net, inputs)
    with pytest.raises(InvalidOption, match="example_inputs"):
        sparsecc.prune(net)
    for model in (None, 3, {"a": 1}, lambda x: x):
        with pytest.raises(SparseccError):
            sparsecc.prune(model)


def test_results_of_another_kind(folder: Path) -> None:
    net = torch.nn.Linear(4, 3).eval()
    with pytest.raises(InvalidOption, match="must be one"):
        sparsecc.verify(net, "good.onnx", (torch.randn(2, 4),))
    with pytest.raises(InvalidOption, match="must be one"):
        sparsecc.verify("good.onnx", net)
    with pytest.raises(SparseccError):
        sparsecc.verify(
            "good.onnx",
            proto(shape=["batch", 5], weights=[weight("fc1.weight", 5, 8), weight("fc2.weight", 8, 3)]),
        )
    two = proto(
        matmul("x", "fc1.weight", "a"), matmul("a", "fc2.weight", "y"), matmul("x", "fc1.weight", "z")
    )
    two.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    with pytest.raises(SparseccError):
        sparsecc.verify("good.onnx", two)


# ---------------------------------------------------------------------- places that cannot be written


@pytest.mark.parametrize("place", ["missing/out", "good.onnx/out", "folder", "a" * 300, "nul\0"])
def test_places_that_cannot_be_written(folder: Path, refused: Refused, place: str) -> None:
    (folder / "folder").mkdir()
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    pruned = sparsecc.prune("good.onnx")
    compiled = sparsecc.compile("good.onnx")
    before = state(folder)
    for save in (
        pruned.save,
        pruned.plan.save,
        compiled.save,
        sparsecc.prune(net, (torch.randn(2, 4),), verify=False).save,
    ):
        with pytest.raises(InvalidOption, match="cannot write"):
            save(place)
    assert state(folder) == before
    compiled.save("a.scc")
    for arguments in (
        ("prune", "good.onnx", "-o", place),
        ("slim", "good.onnx", "-o", place),
        ("compile", "good.onnx", "-o", place),
        ("prune", "good.onnx", "-o", "out.onnx", "--plan-out", place),
        ("run", "a.scc", "-o", place),
    ):
        assert "cannot write" in refused(*arguments)


def test_endings_that_would_mislead(folder: Path, refused: Refused) -> None:
    for output in ("out.pt", "out.safetensors", "out.scc"):
        assert "ONNX file" in refused("prune", "good.onnx", "-o", output)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    with pytest.raises(InvalidOption, match="ONNX"):
        sparsecc.prune(net, (torch.randn(2, 4),), verify=False).save("out.onnx")
    with pytest.raises(InvalidOption, match="ONNX"):
        sparsecc.compile("good.onnx").save("out.onnx")
    assert not (folder / "out.onnx").exists()

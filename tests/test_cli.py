"""The command line: what each command prints and writes, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import sparsecc
from sparsecc.artifact import Artifact
from sparsecc.cli import command as command_module
from sparsecc.cli import progress as progress_module
from sparsecc.cli.command import run as run_command
from sparsecc.cli.commands import cli
from sparsecc.errors import (
    InvalidModel,
    InvalidOption,
    PlanConflict,
    TargetRefused,
    TargetUnavailable,
    UnsupportedModel,
    VerificationFailed,
)

ROOT = Path(__file__).resolve().parents[1]
Sparsecc = Callable[..., "Ended"]


class Ended:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        """Standard output, which has to be one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def sparsecc_(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sparsecc:
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        code = run_command(cli, [str(a) for a in arguments])
        return Ended(code, *capfd.readouterr())

    return call


def weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def mlp() -> onnx.ModelProto:
    """``y = relu(x @ fc1 + bias) @ fc2`` with 4 -> 8 -> 3 and a dynamic batch; one hidden unit is dead."""
    dead = np.asarray(numpy_helper.to_array(weight("fc1.weight", 4, 8))).copy()
    dead[:, 5] = 0
    bias = np.asarray(numpy_helper.to_array(weight("fc1.bias", 8))).copy()
    bias[5] = 0
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc1.weight"], ["a"], "fc1"),
            helper.make_node("Add", ["a", "fc1.bias"], ["b"], "bias"),
            helper.make_node("Relu", ["b"], ["c"], "relu"),
            helper.make_node("MatMul", ["c", "fc2.weight"], ["y"], "fc2"),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(dead, "fc1.weight"),
            numpy_helper.from_array(bias, "fc1.bias"),
            weight("fc2.weight", 8, 3),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(mlp(), path)
    return path


FACTORY = """
import torch

print("noise from the user's code")


def small():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return net.eval(), (torch.randn(2, 4),)


def wrong():
    return small()[0], (torch.randn(2, 5),)


def broken():
    raise KeyError("weights")


def interrupted():
    raise KeyboardInterrupt


def nothing():
    return None


number = 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    name = f"nets_{abs(hash(tmp_path)):x}"  # imported modules stay: each test has its own
    (tmp_path / f"{name}.py").write_text(FACTORY)
    return name


def widths(path: Path) -> list[list[int]]:
    return [list(tensor.dims) for tensor in onnx.load(path).graph.initializer]


# ---------------------------------------------------------------------- the command itself


def python(*code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=environment, check=False, timeout=60
    )


ALONE = "import sys; from sparsecc.cli import main; sys.argv[1:] = {}; main()"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prune", "--help"], ["nonsense"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    done = python(
        "-c",
        "import sys; from sparsecc.cli.command import run; from sparsecc.cli.commands import cli\n"
        f"run(cli, {arguments!r})\n"
        "slow = {'torch', 'numpy', 'onnx', 'onnxruntime', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not slow, slow",
    )
    assert done.returncode == 0, done.stderr


def test_python_m_sparsecc() -> None:
    done = python("-m", "sparsecc", "--version")
    assert (done.returncode, done.stdout) == (0, f"sparsecc, version {sparsecc.__version__}\n")
    assert python("-m", "sparsecc", "prune").returncode == 2


@pytest.mark.parametrize(
    "name",
    ["inspect", "prune", "slim", "fold", "quantize", "sensitivity", "compile", "verify", "run", "targets"],
)
def test_every_command_has_help(sparsecc_: Sparsecc, name: str) -> None:
    done = sparsecc_(name, "--help")
    assert done.code == 0
    assert "--json" in done.out
    if name in ("prune", "slim", "fold", "compile"):
        assert "which runs its code" in " ".join(done.out.split())


# ---------------------------------------------------------------------- prune, slim, verify


def test_prune_writes_a_smaller_model_and_its_plan(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    done = sparsecc_("prune", model, "-o", "p.onnx", "--sparsity", 0.5, "--plan-out", "p.plan")
    assert done.code == 0, done.err
    assert widths(tmp_path / "p.onnx") == [[4, 4], [4], [4, 3]]
    for word in ("VERIFIED", "fc1.weight[1]", "4/8", "parameters", "macs", "graph output", "p.onnx, p.plan"):
        assert word in done.out
    assert sparsecc_("verify", model, "p.onnx", "--plan", "p.plan").code == 0
    without = sparsecc_("verify", model, "p.onnx")
    assert without.code == 1
    assert "FAILED" in without.out
    assert "--plan" in without.err


def test_prune_as_json(sparsecc_: Sparsecc, model: Path) -> None:
    done = sparsecc_("prune", model, "-o", "p.onnx", "--json", "--latency")
    document = done.document
    assert document["exit_code"] == 0
    assert document["report"]["after"]["parameters"] == 16 + 4 + 12
    assert document["report"]["latency"]["after_ms"] > 0
    assert document["certificate"]["status"] == "VERIFIED"
    assert "ChannelPruning" in document["recipe"]


def test_options_reach_the_passes(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    arguments = ["prune", model, "-o", "p.onnx"]
    assert sparsecc_(*arguments, "--sparsity", 0.4, "--multiple-of", 3).code == 0
    assert widths(tmp_path / "p.onnx")[0] == [4, 6]
    assert sparsecc_(*arguments, "--sparsity", 0.9, "--min-keep", 7).code == 0
    assert widths(tmp_path / "p.onnx")[0] == [4, 7]
    assert sparsecc_(*arguments, "--exclude", "fc1.*").code == 0
    assert widths(tmp_path / "p.onnx")[0] == [4, 8]
    assert sparsecc_(*arguments, "--include", "fc2", "--saliency", "random", "--seed", 3).code == 0
    assert widths(tmp_path / "p.onnx")[0] == [4, 4]
    done = sparsecc_(*arguments, "--recipe", "ChannelPruning(sparsity=0.25)", "--no-verify", "--json")
    assert done.document["certificate"]["status"] == "UNCHECKED"
    assert widths(tmp_path / "p.onnx")[0] == [4, 6]


def test_errors_name_options_of_the_command_line(sparsecc_: Sparsecc, tmp_path: Path) -> None:
    proto = mlp()
    proto.graph.node.append(helper.make_node("Unheard", ["y"], ["z"], "own", domain="of.ours"))
    proto.graph.output[0].name = "z"
    proto.opset_import.append(helper.make_opsetid("of.ours", 1))
    onnx.save(proto, tmp_path / "own.onnx")
    done = sparsecc_("prune", "own.onnx", "-o", "p.onnx")
    assert done.code == 1
    assert "or pass --no-verify" in done.err
    assert "verify=" not in done.err


def test_the_same_seed_gives_the_same_bytes(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert sparsecc_("prune", model, "-o", name, "--saliency", "random", "--seed", 7).code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_slim_removes_only_what_is_dead(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    done = sparsecc_("slim", model, "-o", "s.onnx")
    assert done.code == 0, done.err
    assert widths(tmp_path / "s.onnx")[0] == [4, 7]
    assert sparsecc_("verify", model, "s.onnx").code == 0


def test_fold_of_stored_weights_changes_nothing(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    done = sparsecc_("fold", model, "-o", "f.onnx")
    assert done.code == 0, done.err
    assert (tmp_path / "f.onnx").read_bytes() == model.read_bytes()


def test_sensitivity(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    """A table, and a model that loses where it says; data are needed, and a table is no other file."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32))
    data = ("--calibration", "x=x.npy", "--calibration-batch", 4)
    done = sparsecc_("sensitivity", model, "-o", "t.json", *data, "--share", 0.25, "--share", 0.5, "--json")
    assert done.code == 0, done.err
    (line,) = json.loads(done.out)["sensitivity"]["lines"]
    assert (line["group"], line["removed"]) == ("fc1.weight[1]", [2, 4])
    assert json.loads((tmp_path / "t.json").read_text()) == json.loads(done.out)["sensitivity"]
    shown = sparsecc_("sensitivity", model, "-o", "t.json", *data, "--loss", "kl", "--updates")
    assert "fc1.weight[1]" in shown.out
    pruned = sparsecc_("prune", model, "-o", "p.onnx", "--sparsity", 0.25, "--allocation", "t.json")
    assert pruned.code == 0, pruned.err
    assert widths(tmp_path / "p.onnx") == [[4, 6], [6], [6, 3]]
    at_once = sparsecc_(
        "prune", model, "-o", "p.onnx", "--sparsity", 0.25, "--allocation", "sensitivity", *data
    )
    assert at_once.code == 0, at_once.err
    assert widths(tmp_path / "p.onnx") == [[4, 6], [6], [6, 3]]
    assert sparsecc_("sensitivity", model, "-o", "t.json").code == 2
    for allocation in ("x.json", "sensitivity"):
        assert sparsecc_("prune", model, "-o", "p.onnx", "--allocation", allocation).code == 2


def test_quantize(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.standard_normal((64, 4)).astype(np.float32))
    done = sparsecc_("quantize", model, "-o", "q.onnx", "--calibration", "x=x.npy", "--json")
    assert done.code == 0, done.err
    report = done.document["report"]
    assert [layer["dtype"] for layer in report["layers"]] == ["int8", "int8"]
    assert report["errors"][0]["sqnr_db"] > 20
    kinds = {n.op_type for n in onnx.load("q.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert sparsecc_("prune", "q.onnx", "-o", "p.onnx").code == 0
    again = sparsecc_("quantize", "q.onnx", "-o", "r.onnx", "--calibration", "x=x.npy")
    assert again.code == 2
    assert "quantised already" in again.err
    assert not Path("r.onnx").exists()
    for arguments in (["-o", "q.scc", "--calibration", "x=x.npy"], ["-o", model, "--calibration", "x=x.npy"]):
        assert sparsecc_("quantize", model, *arguments).code == 2
    dynamic = sparsecc_(
        "quantize", model, "-o", "d.onnx", "--calibration", "x=x.npy", "--activations", "none"
    )
    assert dynamic.code == 0, dynamic.err


def test_a_pytorch_model_by_its_factory(sparsecc_: Sparsecc, factory: str, tmp_path: Path) -> None:
    done = sparsecc_("prune", f"{factory}:small", "-o", "p.zip", "--json")
    assert done.code == 0, done.err
    assert "noise" in done.err
    assert done.document["report"]["after"]["parameters"] == 4 * 4 + 4 + 4 * 3 + 3
    assert set(zipfile.ZipFile(tmp_path / "p.zip").namelist()) == {
        "plan.json",
        "plan.safetensors",
        "weights.safetensors",
    }
    assert sparsecc_("verify", f"{factory}:small", "p.zip").code == 0
    assert sparsecc_("inspect", "p.zip").code == 0
    assert sparsecc_("verify", f"{factory}:small", f"{factory}:small").code == 0
    done = sparsecc_("prune", f"{factory}:small", "-o", "p.onnx")
    assert done.code == 2
    assert "compile --target onnx" in done.err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("{}:wrong", 2, "itself fails on example_inputs"),
        ("{}:broken", 2, "broken() failed: KeyError"),
        ("{}:nothing", 2, "must return (model, example_inputs)"),
        ("{}:number", 2, "is not a function"),
        ("{}:absent", 2, "has no absent"),
        ("{}.py:small", 2, ":small"),
        ("no_such_module:small", 2, "there is no such module here"),
        ("{}:interrupted", 130, "interrupted"),
    ],
)
def test_factories_that_do_not_work(
    sparsecc_: Sparsecc, factory: str, tmp_path: Path, name: str, code: int, message: str
) -> None:
    done = sparsecc_("prune", name.format(factory), "-o", "p.zip")
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not (tmp_path / "p.zip").exists()


# ---------------------------------------------------------------------- compile, run, inspect, targets


def test_compile_run_verify_inspect(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    recipe = "ChannelPruning(sparsity=0.45)"
    done = sparsecc_("compile", model, "-o", "c.scc", "--recipe", recipe, "--latency")
    assert done.code == 0, done.err
    assert "latency (ms)" in done.out
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    np.save("x.npy", x)
    done = sparsecc_("run", "c.scc", "--input", "x=x.npy", "-o", "y.npz", "--rounds", 3)
    assert done.code == 0, done.err
    assert "random" not in done.err
    assert "[5, 3]" in done.out
    assert "median latency" in done.out
    expected = onnxruntime.InferenceSession(Artifact.load("c.scc").read("model.onnx")).run(None, {"x": x})[0]
    np.testing.assert_allclose(np.load("y.npz")["y"], expected, rtol=1e-6)
    assert sparsecc_("verify", model, "c.scc").code == 0
    shown = sparsecc_("inspect", "c.scc")
    for word in (recipe, "cpu", "VERIFIED", "5/8", "model.onnx", "batch"):
        assert word in shown.out
    document = sparsecc_("inspect", "c.scc", "--json").document
    assert document["manifest"]["target"] == "cpu"
    assert document["plan"]["decisions"]


def test_run_without_inputs_says_that_they_are_random(sparsecc_: Sparsecc, model: Path) -> None:
    assert sparsecc_("compile", model, "-o", "c.scc").code == 0
    done = sparsecc_("run", "c.scc", "--dim", "batch=9", "--json", "--rounds", 2, "--threads", 1)
    assert "random values (seed 0) for x" in done.err
    document = done.document
    assert document["made_up"] == ["x"]
    assert document["outputs"] == [{"name": "y", "dtype": "float32", "shape": [9, 3]}]
    assert document["rounds"] == 2


def test_compile_to_a_plain_onnx_file(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    assert sparsecc_("compile", model, "-o", "c.onnx", "--target", "onnx").code == 0
    onnx.checker.check_model(onnx.load(tmp_path / "c.onnx"), full_check=True)
    done = sparsecc_("compile", model, "-o", "d.onnx")
    assert done.code == 2
    assert "--target onnx" in done.err


def test_compile_a_pytorch_model(sparsecc_: Sparsecc, factory: str) -> None:
    recipe = "ChannelPruning(sparsity=0.5)"
    assert sparsecc_("compile", f"{factory}:small", "-o", "c.scc", "--recipe", recipe).code == 0
    assert sparsecc_("verify", f"{factory}:small", "c.scc").code == 0


def test_verify_finds_a_changed_artifact(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    assert sparsecc_("compile", model, "-o", "c.scc").code == 0
    artifact = Artifact.load(tmp_path / "c.scc")
    changed = onnx.ModelProto.FromString(artifact.read("model.onnx"))
    values = numpy_helper.to_array(changed.graph.initializer[0]) * np.float32(1.01)
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, changed.graph.initializer[0].name))
    members = {**artifact.members, "model.onnx": changed.SerializeToString()}
    Artifact(artifact.manifest, members).save(tmp_path / "d.scc")
    done = sparsecc_("verify", model, "d.scc", "--json")
    assert done.code == 1
    assert done.document["certificate"]["status"] == "FAILED"


def test_inspect_a_model(sparsecc_: Sparsecc, model: Path) -> None:
    done = sparsecc_("inspect", model)
    for word in ("fc1.weight[1]", "channel", "fc2.weight[0]", "graph output", "macs", "64"):
        assert word in done.out
    document = sparsecc_("inspect", model, "--json", "--dim", "batch=10").document
    assert document["parameters"] == 4 * 8 + 8 + 8 * 3
    assert document["macs"] == 10 * (4 * 8 + 8 * 3)
    assert [g["size"] for g in document["groups"]] == [8]
    assert document["frozen"][0]["reason"]


def test_targets(sparsecc_: Sparsecc) -> None:
    assert "onnxruntime on the CPU" in sparsecc_("targets").out
    names = [t["name"] for t in sparsecc_("targets", "--json").document["targets"]]
    assert {"cpu", "onnx"} <= set(names)


# ---------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TargetRefused("r"), 1),
        (TargetUnavailable("r"), 1),
        (VerificationFailed("r"), 1),
        (UnsupportedModel("r"), 1),
        (MemoryError(), 1),
        (InvalidOption("r"), 2),
        (InvalidModel("r"), 2),
        (PlanConflict("r"), 2),
        (RuntimeError("r\nmore"), 3),
        (AssertionError(), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    sparsecc_: Sparsecc, model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(sparsecc, "prune", fail)
    done = sparsecc_("prune", model, "-o", "p.onnx")
    assert (done.code, done.out) == (code, "")
    assert len(done.err.strip().splitlines()) == 1
    assert done.err.strip().startswith("sparsecc: ")
    assert ("internal error" in done.err and "report it" in done.err) == (code == 3)
    if code != 130:
        debugged = sparsecc_("prune", model, "-o", "p.onnx", "--debug", "--json")
        assert "Traceback" in debugged.err
        assert debugged.document["exit_code"] == code
        assert debugged.document["error"]["kind"] == type(error).__name__


def test_usage_errors_as_json(sparsecc_: Sparsecc, model: Path) -> None:
    done = sparsecc_("prune", model, "--json")
    assert done.code == 2
    assert done.document["error"]["kind"] == "Usage"
    assert "--output" in done.err


def test_a_failed_verification_writes_nothing(
    sparsecc_: Sparsecc, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecc import pipeline
    from sparsecc.verification import Certificate, Check

    wrong = Certificate("FAILED", "claim", (Check("float64", "relative error", float("inf"), 0.0, "x"),))
    monkeypatch.setattr(pipeline, "certify", lambda *args: wrong)
    (tmp_path / "p.onnx").write_bytes(b"before")
    done = sparsecc_("prune", model, "-o", "p.onnx", "--plan-out", "p.plan")
    assert done.code == 1
    assert (tmp_path / "p.onnx").read_bytes() == b"before"
    assert not (tmp_path / "p.plan").exists()
    document = sparsecc_("verify", model, model, "--json").document  # numbers that JSON lacks
    assert document["certificate"]["status"] in ("VERIFIED", "FAILED")
    assert command_module._json({"x": [float("inf"), float("nan")]}) == '{\n "x": [\n  "inf",\n  "nan"\n ]\n}'


def test_the_input_is_not_overwritten(sparsecc_: Sparsecc, model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    (tmp_path / "link.onnx").symlink_to(model)
    for output in ("m.onnx", "link.onnx", "./m.onnx"):
        for name in ("prune", "slim", "fold", "compile"):
            target = ["--target", "onnx"] if name == "compile" else []
            done = sparsecc_(name, model, "-o", output, *target)
            assert done.code == 2
            assert "--force" in done.err
    assert sparsecc_("prune", model, "-o", "p.onnx", "--plan-out", "m.onnx").code == 2
    assert sparsecc_("prune", model, "-o", "p.onnx", "--plan-out", "p.onnx").code == 2
    assert model.read_bytes() == before
    assert sparsecc_("prune", model, "-o", "m.onnx", "--force").code == 0
    assert widths(model)[0] == [4, 4]


def test_the_external_data_of_the_input_is_not_overwritten(sparsecc_: Sparsecc, tmp_path: Path) -> None:
    path = tmp_path / "e.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, location="e.data", size_threshold=0)
    before = (tmp_path / "e.data").read_bytes()
    assert sparsecc_("prune", path, "-o", "e.data", "--force").code == 2
    assert sparsecc_("compile", path, "-o", "e.data", "--force").code == 2
    with pytest.raises(InvalidOption, match="external data"):
        sparsecc.prune(path).save(tmp_path / "e.data")
    assert sparsecc_("prune", path, "-o", "e.onnx", "--force").code == 0  # its own data goes elsewhere
    assert (tmp_path / "e.data").read_bytes() == before
    assert widths(path)[0] == [4, 4]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_takes_long_shows_its_stages(
    sparsecc_: Sparsecc, model: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(progress_module, "PATIENCE_S", 0.0)
    if terminal:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = sparsecc_("prune", model, "-o", "p.onnx", "--json")
    assert done.code == 0
    assert done.document["exit_code"] == 0
    if not terminal:
        assert "sparsecc: verifying" in done.err


def test_what_is_quick_shows_nothing(
    sparsecc_: Sparsecc, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "PATIENCE_S", 60.0)
    assert sparsecc_("prune", model, "-o", "p.onnx", "--json").err == ""


def test_commands_stand_alone(tmp_path: Path, model: Path) -> None:
    sparsecc.compile(model).save(tmp_path / "c.scc")
    for arguments in (["run", "c.scc", "--rounds", "1"], ["inspect", "c.scc"], ["targets"]):
        done = python("-c", f"import os; os.chdir({str(tmp_path)!r})\n" + ALONE.format(arguments))
        assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_is_no_error(tmp_path: Path, model: Path) -> None:
    script = f"{sys.executable} -m sparsecc inspect {model} --json | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "0"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "sensitivity net.onnx --calibration x=x.npy -o net.onnx",
        "sensitivity net.onnx --calibration x=x.npy -o x.npy",
        "prune net.onnx --calibration x=x.npy --saliency wanda -o a.onnx --plan-out x.npy",
        "prune net.onnx --allocation table.json --sparsity 0.2 -o a.onnx --plan-out table.json",
        "prune source:build -o source.py",
        "compile net.onnx --target onnx --input x=x.npy -o x.npy",
        "compile net.onnx --target onnx --calibration x=x.npy -o ./x.npy",
        "run net.scc --input x=x.npy -o x.npy",
    ],
)
def test_nothing_that_is_read_is_written_over(sparsecc_: Sparsecc, tmp_path: Path, arguments: str) -> None:
    onnx.save(mlp(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
    assert sparsecc_("compile", "net.onnx", "--target", "onnx", "-o", "net.scc").code == 0
    assert sparsecc_("sensitivity", "net.onnx", "--calibration", "x=x.npy", "-o", "table.json").code == 0
    source = "from torch import nn, zeros\n\ndef build():\n    return nn.Linear(4, 4), (zeros(2, 4),)\n"
    (tmp_path / "source.py").write_text(source)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    done = sparsecc_(*arguments.split())
    assert done.code == 2
    assert "cannot write" in done.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_sensitivity_says_that_it_needs_data(sparsecc_: Sparsecc, tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "net.onnx")
    done = sparsecc_("sensitivity", "net.onnx", "-o", "table.json")
    assert done.code == 2
    assert "--calibration is needed: give NAME=FILE.npy" in done.err

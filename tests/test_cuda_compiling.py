"""What a user meets who compiles for sparse tensor cores without a GPU: ranges, sizes, words on speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sparsecc
from sparsecc.cli.commands import cli
from sparsecc.errors import InvalidModel, InvalidOption, TargetRefused
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.passes import NMPattern
from sparsecc.targets.cuda.launch import chosen, kernels_of, picked
from sparsecc.targets.cuda.tune import Times

ALWAYS = {"choose": "always"}


def mlp(width: int = 64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16)).eval()


def pruned(model: nn.Module, x: torch.Tensor) -> Any:
    return sparsecc.prune(model, (x,), recipe=NMPattern()).model


# -- numbers beyond fp16 -----------------------------------------------------------------------------


def large_inputs() -> tuple[nn.Module, torch.Tensor]:
    return mlp(), torch.randn(8, 64) * 3e4


def large_inside() -> tuple[nn.Module, torch.Tensor]:
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e6
        model[2].weight /= 1e6
    return model, torch.randn(8, 64)


def large_weights() -> tuple[nn.Module, torch.Tensor]:
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 2e6
    return model, torch.randn(8, 64)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (large_inputs, "sm80-2:4"),
        (large_inside, "sm80-2:4"),
        (large_weights, "sm80-2:4"),
        (large_inputs, "tensorrt-2:4-fp16"),
        (large_inside, "tensorrt-2:4-fp16"),  # which leaves layers with large weights in float32
    ],
)
def test_numbers_beyond_the_type_are_refused_by_name(make: Any, target: str) -> None:
    """An infinite bound would let everything pass."""
    model, x = make()
    options = ALWAYS if target.startswith("sm") else {}
    with pytest.raises(
        TargetRefused, match=r"reads numbers up to .* float16 ends at 65504: ask for bfloat16"
    ):
        sparsecc.compile(pruned(model, x), (x,), target=target, options=options)
    wide = target.replace("-fp16", "") + "-bf16"
    compiled = sparsecc.compile(pruned(model, x), (x,), target=wide, options=options)
    assert compiled.certificate.status == "VERIFIED"
    assert all(c.bound < float("inf") for c in compiled.certificate.checks)
    assert bool(compiled(x).isfinite().all())


class Ill(nn.Module):
    """A difference of large numbers: rounding its operands leaves nothing of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x + 1000) - self.first(x.new_full((64,), 1000.0)))
        return y * 1e-3


def test_models_of_which_rounding_leaves_nothing_are_refused() -> None:
    torch.manual_seed(0)
    model, x = Ill().eval(), torch.randn(8, 64) * 1e-3
    for target, words in (("sm80-2:4", "float16.*bfloat16"), ("sm80-2:4-bf16", "bfloat16.*own type")):
        with pytest.raises(TargetRefused, match=rf"moves by .* operands of products are rounded to {words}"):
            sparsecc.compile(pruned(model, x), (x,), target=target, options=ALWAYS)


def test_a_model_of_fp16_that_overflows_by_itself_is_compared_where_it_does_not() -> None:
    model, x = mlp(), torch.randn(8, 64)
    with torch.no_grad():
        model[2].weight[0] *= 6e4
        model[2].weight.clamp_(-6e4, 6e4)
    model, x = model.half(), (x * 100).half()
    assert not bool(model(x).isfinite().all())
    compiled = sparsecc.compile(model, (x,), target="sm80", options=ALWAYS)
    assert compiled.certificate.status == "VERIFIED"
    assert all(c.bound < float("inf") for c in compiled.certificate.checks if c.what == "artifact")


# -- sizes -------------------------------------------------------------------------------------------


def rows_of(compiled: sparsecc.Compiled) -> list[tuple[int, bool]]:
    layers = json.loads(compiled.artifact.read("layers.json"))
    return [(entry["rows"], entry["sparse"]) for entry in layers]


@pytest.mark.parametrize(("rows", "pays"), [(4, False), (4096, True)])
def test_example_inputs_decide_whether_the_pattern_pays(
    rows: int, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both dialects, with a batch that may vary."""
    monkeypatch.setenv("SPARSECC_KERNELS", str(tmp_path / "kernels"))  # built once
    model = nn.Sequential(nn.Linear(1024, 1024)).eval()
    x = torch.randn(rows, 1024)
    model = pruned(model, x)
    compiled = sparsecc.compile(model, (x,), target="sm80-2:4")
    assert rows_of(compiled) == [(rows, pays)]
    words = " ".join(compiled.report.notes)
    assert (f"not expected to pay with {rows} rows, as the example inputs have" in words) != pays
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    path = tmp_path / "model.onnx"
    onnx.save(to_onnx(torch.export.export(model, (x,), dynamic_shapes=({0: batch},))), str(path))
    assert rows_of(sparsecc.compile(path, {"input": x}, target="sm80-2:4")) == [(rows, pays)]
    out = tmp_path / "a.scc"
    run = CliRunner().invoke(
        cli, ["compile", str(path), "--target", "sm80-2:4", "--dim", f"batch={rows}", "-o", str(out)]
    )
    assert run.exit_code == 0, run.output
    assert rows_of(sparsecc.load(out)) == [(rows, pays)]


# -- what is pruned ----------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Products of which some gain by 2:4 on an H100 with few rows, and some no kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.large = nn.Linear(1024, 1024)
        self.shared = nn.Linear(1024, 1024)
        self.small = nn.Linear(1024, 12)
        self.volume = nn.Conv3d(4, 8, 1)
        self.lopsided = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 2))
        self.stack = nn.Parameter(torch.randn(2, 512, 64) / 20)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.shared(torch.relu(self.shared(torch.relu(self.large(x)))))
        cube = torch.relu(self.volume(y[:, :512].reshape(-1, 4, 2, 8, 8)))
        rows = torch.einsum("brk,rko->bro", y.reshape(-1, 2, 512), self.stack)
        return self.small(y), self.lopsided(cube[:, :, 0]), rows


@pytest.mark.parametrize("onnx_file", [False, True])
@pytest.mark.parametrize(
    ("target", "options", "wanted"),
    [
        ("sm90-2:4-bf16", None, {"large.weight", "shared.weight"}),
        ("sm90-2:4-bf16", ALWAYS, {"large.weight", "shared.weight", "small.weight", "lopsided.1.weight"}),
        ("sm80-2:4", None, set()),
    ],
)
def test_what_would_stay_dense_keeps_its_weights(
    onnx_file: bool, target: str, options: dict[str, str] | None, wanted: set[str]
) -> None:
    """Without a recipe exactly those weights are pruned that run sparse, by what the artifact holds."""
    pytest.importorskip("tvm")
    model, x = Mixed().eval(), torch.randn(8, 1024)
    given: Any = to_onnx(torch.export.export(model, (x,))) if onnx_file else model
    compiled = sparsecc.compile(given, {"x": x} if onnx_file else (x,), target=target, options=options)
    assert compiled.certificate.status == "VERIFIED"
    pruned_ones = {action.weight for action in compiled.plan.actions}
    rows = json.loads(compiled.artifact.read("layers.json"))
    assert pruned_ones == wanted == {row["weight"] for row in rows if row["sparse"]}
    spared = next((note for note in compiled.report.notes if "keep all of their weights" in note), "")
    assert ("small.weight" in spared) is ("small.weight" not in wanted)
    assert "volume.weight" in spared


@pytest.mark.parametrize(
    ("stays", "gains"),
    [("w*", "wide"), ("layers", "layers.0.weight"), ("a/b", "a/b/c"), ("=w", "w"), ("w[1]", "w1")],
)
def test_names_of_spared_weights_are_no_patterns(stays: str, gains: str) -> None:
    pytest.importorskip("tvm")
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((64, 64)).astype(np.float32) / 8 for name in (stays, gains)}
    nodes = [
        helper.make_node("Gemm", ["x", stays], ["h"], alpha=2.0),  # which no kernel takes
        helper.make_node("MatMul", ["h", gains], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 64]) for n in "xy")
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    compiled = sparsecc.compile(model, {"x": torch.randn(8, 64)}, target="sm80-2:4", options=ALWAYS)
    assert [action.weight for action in compiled.plan.actions] == [gains]


def test_what_was_measured_for_some_rows_runs_with_about_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models keep a dynamic batch: the tile that tuning found has to be taken all the same."""
    pytest.importorskip("tvm")
    times = Times(9.0, {"large": 3.0, "batch16": 5.0})
    monkeypatch.setattr("sparsecc.targets.cuda.tune.meter", lambda arch: lambda layer, dtype: times)
    x = torch.randn(20, 64)
    compiled = sparsecc.compile(pruned(mlp(), x), (x,), target="sm80-2:4", options={"choose": "measured"})
    kernels = kernels_of(compiled.artifact)
    (first, _) = (row["kernels"] for row in json.loads(compiled.artifact.read("layers.json")))
    file = OnnxFile.load(onnx.load_from_string(compiled.artifact.read("model.onnx")))
    node = next(node for node in file.proto.graph.node if node.op_type == "SparseMatMul")
    names = next(a for a in node.attribute if a.name == "kernels").strings
    assert [name.decode() for name in names] == [f"{first[0]}@20", *first[1:]]
    assert len(first) > 1
    own = {name: kernels[name] for name in first}
    large = own[first[0]]
    assert large.config.block_n == max(kernel.config.block_n for kernel in own.values())
    joined = ",".join(name.decode() for name in names)
    taken = {rows: picked(joined, own, rows, rows) for rows in (1, 13, 14, 20, 30, 31, 4096)}
    assert [taken[rows] is large for rows in (14, 20, 30)] == [True] * 3
    assert all(taken[rows] is chosen(list(own.values()), rows) for rows in (1, 13, 31, 4096))
    assert taken[1] is not large
    assert picked(",".join(first), own, 20, 20) is chosen(list(own.values()), 20)


def test_zeros_that_gain_nothing_are_told() -> None:
    x = torch.randn(8, 64)
    compiled = sparsecc.compile(mlp(), (x,), target="sm80-2:4", recipe=NMPattern())
    (note,) = (note for note in compiled.report.notes if "whose zeros gain nothing" in note)
    assert "2 of these" in note
    assert "0.weight, 2.weight" in note


# -- words -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "a.scc"
    x = torch.randn(8, 64)
    compiled = sparsecc.compile(pruned(mlp(), x), (x,), target="sm80-2:4", options=ALWAYS, latency=True)
    assert compiled.report.latency is None
    assert any("latency was not measured" in note and "no GPU" in note for note in compiled.report.notes)
    compiled.save(path)
    return path


def ran(*arguments: str) -> str:
    """The command in a process of its own: nothing else has imported anything."""
    command = [sys.executable, "-m", "sparsecc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels")
def test_inspect_lists_every_layer_and_run_says_what_ran(artifact: Path) -> None:
    listed = json.loads(ran("inspect", str(artifact), "--json"))["layers"]
    assert [(row["size"], row["runs"][:3]) for row in listed] == [("64 x 64", "2:4"), ("16 x 64", "2:4")]
    assert "kernels/ (" in ran("inspect", str(artifact))
    done = json.loads(ran("run", str(artifact), "--json"))
    assert "no GPU" in done["stand_in"]
    assert "no time of the target" in ran("run", str(artifact))


def test_what_was_not_measured_is_told() -> None:
    x = torch.randn(8, 64)
    compiled = sparsecc.compile(pruned(mlp(), x), (x,), target="sm80-2:4", options={"choose": "measured"})
    assert any("2 products were not measured" in note for note in compiled.report.notes)


def test_arguments_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    x = torch.randn(8, 64)
    with pytest.raises(InvalidOption, match="give a dict of the target's options by name"):
        sparsecc.compile(mlp(), (x,), target="sm80-2:4", options="choose=always")  # type: ignore[arg-type]
    with pytest.raises(InvalidModel, match="give the path of an artifact, not a NoneType"):
        sparsecc.load(None)  # type: ignore[arg-type]
    run = CliRunner().invoke(
        cli, ["compile", "x.onnx", "--target", "sm80", "--tune", "--option", "choose=always", "-o", "y.scc"]
    )
    assert run.exit_code == 2
    assert "give one of them" in run.output

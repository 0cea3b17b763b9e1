"""cuSPARSELt through PyTorch: a stand-in that reads memory as the library does, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.cli.commands import cli
from sparsecc.errors import InvalidOption, TargetUnavailable
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.targets.cuda import cusparselt
from sparsecc.targets.cuda import operator as operator_module
from sparsecc.targets.cuda.executor import prefer
from sparsecc.targets.cuda.launch import kernels_of
from sparsecc.targets.cuda.listing import layers_of, rows
from sparsecc.targets.cuda.operator import DTYPES, Operands, computed
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.tune import Times
from tests.test_cuda_target import two_of_four

HALVES = (torch.float16, torch.bfloat16)


class Library:
    """``_cslt_compress`` and the products of torch 2.13, as its cuSPARSELtOps.cpp has them.

    Matrices are rows of memory that begin at an address: a dense operand that is not contiguous is taken for
    the transpose of [n, k], whatever its strides say.
    """

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}
        self.searched: list[int] = []
        self.algorithms: list[int] = []

    def compress(self, sparse: torch.Tensor) -> torch.Tensor:
        m, k = sparse.shape
        assert sparse.is_contiguous()
        assert sparse.dtype in HALVES
        assert m % 16 == 0
        assert k % 16 == 0
        assert ((sparse.view(m, -1, 4) != 0).sum(-1) <= 2).all()
        found = torch.zeros(m, k * 9 // 16, dtype=sparse.dtype)
        self.weights[id(found)] = sparse.clone()
        return found

    def mm(
        self,
        compressed_A: torch.Tensor,
        dense_B: torch.Tensor,
        bias: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        split_k: int = 1,
        split_k_mode: int = -1,
    ) -> torch.Tensor:
        weight = self.weights[id(compressed_A)]
        assert dense_B.dtype == weight.dtype
        assert (bias, alpha, out_dtype) == (None, None, None)
        k, n = dense_B.shape
        assert k == weight.shape[1]
        assert n % 8 == 0
        memory = dense_B if dense_B.is_contiguous() else dense_B.as_strided((n, k), (k, 1)).t()
        assert dense_B.untyped_storage().nbytes() >= 2 * n * k
        y = (weight.float() @ memory.float()).to(weight.dtype)
        self.algorithms.append(alg_id)
        return y.t().contiguous() if transpose_result else y

    def search(
        self,
        compressed_A: torch.Tensor,
        dense_B: torch.Tensor,
        bias: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
    ) -> int:
        self.mm(compressed_A, dense_B, bias, alpha, out_dtype, transpose_result)
        self.algorithms.pop()
        self.searched.append(dense_B.shape[1])
        return 100 + dense_B.shape[1]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    monkeypatch.setattr(torch, "_cslt_compress", stand_in.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in.mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", stand_in.search)
    monkeypatch.setattr(cusparselt, "why_not", lambda: "")
    return stand_in


@pytest.mark.parametrize(
    ("name", "method"),
    [("_cslt_compress", "compress"), ("_cslt_sparse_mm", "mm"), ("_cslt_sparse_mm_search", "search")],
)
def test_the_stand_in_has_the_parameters_of_this_pytorch(name: str, method: str) -> None:
    declared = getattr(torch.ops.aten, name).default._schema.arguments
    ours = list(inspect.signature(getattr(Library, method)).parameters.values())[1:]
    assert len(declared) == len(ours)
    for there, here in zip(declared[1:], ours[1:], strict=True):
        assert there.name == here.name
        if there.has_default_value():
            assert there.default_value == here.default


def test_the_real_product_takes_these_arguments() -> None:
    """On meta tensors, which need no GPU: shapes and types as they come out."""
    weight = cusparselt.Weight(torch.empty(32, 36, dtype=torch.float16, device="meta"), {8: 7})
    y = cusparselt.multiplied(weight, torch.empty(5, 64, dtype=torch.float16, device="meta"))
    assert (tuple(y.shape), y.dtype) == ((5, 32), torch.float16)


def operands(dtype: str, out: int, k: int, shape: list[int], seed: int, **changed: Any) -> Operands:
    random = torch.Generator().manual_seed(seed)
    weight = two_of_four(torch.randn(out, k, generator=random)).to(DTYPES[dtype])
    packed = pack(weight)
    values, metadata = torch.from_numpy(packed.values), torch.from_numpy(packed.metadata)
    x = torch.randn([*shape, k], generator=random)
    given_ = Operands(
        x, values, metadata, None, None, None, out, k, dtype, "none", [], f"{cusparselt.NAME},own"
    )
    return replace(given_, **changed)


def dense(given_: Operands) -> torch.Tensor:
    """The same product without rounded sums, from the unpacked weight."""
    return computed(given_, operator_module._weight(given_), rounded=DTYPES[given_.dtype], wide=torch.float32)


@given(st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_computes_the_operator(library: Library, data: st.DataObject) -> None:
    """Every number of tokens, leading axes, strides of x, and whatever follows the product."""
    dtype = data.draw(st.sampled_from(["fp16", "bf16"]))
    out, k = (16 * data.draw(st.integers(1, 3)) for _ in range(2))
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    seed = data.draw(st.integers(0, 99))
    random = torch.Generator().manual_seed(seed + 1)
    given_ = operands(dtype, out, k, shape, seed)
    if data.draw(st.booleans()):  # not contiguous
        given_ = replace(given_, x=given_.x.repeat_interleave(2, dim=-1)[..., ::2])
    extra = {
        name: torch.randn(out, generator=random) if data.draw(st.booleans()) else None
        for name in ("scale", "bias")
    }
    residual = torch.randn([*shape, out], generator=random) if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(["none", "relu", "gelu", "silu"]))
    given_ = replace(given_, **extra, residual=residual, activation=activation)
    arguments = [getattr(given_, name) for name in Operands.__slots__]
    found, wanted = operator_module._on_gpu(*arguments), dense(given_)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    unit = torch.finfo(DTYPES[dtype]).eps
    raw = dense(replace(given_, scale=None, bias=None, residual=None, activation="none"))
    scale = 1.0 if given_.scale is None else given_.scale.abs()
    assert ((found - wanted).abs() <= 1.2 * unit * raw.abs() * scale + 1e-5).all()  # sums rounded once more


def test_weights_are_compressed_and_algorithms_searched_once(library: Library) -> None:
    given_ = operands("fp16", 32, 64, [5], 0)
    for tokens in (5, 8, 5, 9):
        cusparselt.product(replace(given_, x=torch.randn(tokens, 64)))
    assert len(library.weights) == 1
    assert library.searched == [8, 16]
    assert library.algorithms == [108, 108, 108, 116]


def test_no_search_while_a_graph_is_captured(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "_capturing", lambda: True)
    cusparselt.product(operands("fp16", 32, 64, [5], 0))
    assert library.searched == []
    assert library.algorithms == [0]


@pytest.mark.parametrize(
    "changed",
    [
        {"out": 24},
        {"k": 40},
        {"dtype": "int8"},
        {"conv": [8, 1, 1, 1, 1, 0, 0, 1, 1]},
        {"kernels": "own"},
        {"kernels": ""},
    ],
)
def test_what_it_does_not_take_is_left_to_the_kernels(library: Library, changed: dict[str, Any]) -> None:
    given_ = operands("fp16", 32, 64, [5], 0)
    assert cusparselt.chosen(given_)
    assert not cusparselt.chosen(replace(given_, **changed))


def test_without_it_the_kernels_run(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "why_not", lambda: "no GPU")
    assert not cusparselt.chosen(operands("fp16", 32, 64, [5], 0))


# -- as an option -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.gelu(self.up(x)))
        return y


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tvm")
    path = tmp_path_factory.mktemp("cusparselt") / "net.scc"
    torch.manual_seed(0)
    sparsecc.compile(
        Net().eval(), (torch.randn(3, 32),), target="sm80-2:4", options={"choose": "always"}
    ).save(path)
    return path


@pytest.mark.skipif(not cusparselt.why_not(), reason="this machine has cuSPARSELt")
def test_where_it_is_missing_the_error_says_what_to_do(artifact: Path) -> None:
    with pytest.raises(TargetUnavailable, match=r"PyTorch .* has no cuSPARSELt|finds no GPU") as error:
        sparsecc.load(artifact, options={"engine": "cusparselt"})
    assert "compile without it" in str(error.value)
    with pytest.raises(TargetUnavailable, match="cannot be used here"):
        sparsecc.compile(Net(), (torch.randn(3, 32),), target="sm80-2:4", options={"engine": "cusparselt"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run the artifact")
def test_an_artifact_that_would_run_on_the_cpu_is_refused(artifact: Path, library: Library) -> None:
    with pytest.raises(TargetUnavailable, match="no GPU here is one that the artifact has kernels for"):
        sparsecc.load(artifact, options={"engine": "cusparselt"})


def test_unknown_engines_and_options_are_refused(artifact: Path) -> None:
    with pytest.raises(InvalidOption, match=r"engine must be one of generated, cusparselt; got 'cublas'"):
        sparsecc.load(artifact, options={"engine": "cublas"})
    with pytest.raises(InvalidOption, match=r"no option 'motor'"):
        sparsecc.load(artifact, options={"motor": "cublas"})
    assert sparsecc.load(artifact, options={"engine": "generated"}).start() is not None


def test_the_command_line_has_it(artifact: Path) -> None:
    done = CliRunner().invoke(cli, ["run", str(artifact), "--rounds", "1", "--option", "engine=generated"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["run", str(artifact), "--option", "engine"])
    assert done.exit_code == 2
    assert "NAME=VALUE" in done.output


def test_an_engine_is_put_before_the_kernels(
    artifact: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole artifact as a GPU would run it: one layer by cuSPARSELt, the other by its own kernel."""
    own = set(kernels_of(sparsecc.load(artifact).artifact))
    used: list[bool] = []

    def as_on_gpu(*arguments: Any) -> torch.Tensor:
        engine, *kernels = Operands(*arguments).kernels.split(",")
        assert engine == "cusparselt"
        assert kernels
        assert own.issuperset(kernels)
        used.append(cusparselt.chosen(Operands(*arguments)))
        return (operator_module._on_gpu if used[-1] else operator_module._on_cpu)(*arguments)

    x = torch.randn(3, 32)
    wanted = sparsecc.load(artifact)(x)
    monkeypatch.setattr(cusparselt, "require", lambda device=None: None)
    compiled = sparsecc.load(artifact, options={"engine": "cusparselt"})
    monkeypatch.setattr(torch.ops.sparsecc, "sparse_matmul", as_on_gpu)
    torch.testing.assert_close(compiled(x), wanted, atol=2e-3, rtol=2e-3)
    assert used == [True, False]  # 24 outputs are no multiple of 16


@pytest.mark.parametrize("target", ["sm90-2:4", "sm90-2:4-bf16"])
def test_an_engine_that_takes_nothing_is_refused(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16 on Hopper it is not tried: saying so, not running other kernels under its name."""
    pytest.importorskip("tvm")
    compiled = sparsecc.compile(
        Net().eval(), (torch.randn(3, 32),), target=target, options={"choose": "always"}
    )
    compiled.save(tmp_path / "a.scc")
    monkeypatch.setattr(cusparselt, "require", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        "sparsecc.targets.cuda.launch.device_for", lambda artifact, layers: torch.device("cpu")
    )
    if target == "sm90-2:4-bf16":
        sparsecc.load(tmp_path / "a.scc", options={"engine": "cusparselt"}).start()
        return
    with pytest.raises(TargetUnavailable, match="takes none of the artifact's 2 sparse products"):
        sparsecc.load(tmp_path / "a.scc", options={"engine": "cusparselt"}).start()


def test_graphs_of_others_are_left_alone(tmp_path: Path) -> None:
    sparsecc.compile(Net().eval(), (torch.randn(3, 32),), target="onnx").save(tmp_path / "n.onnx")
    file = OnnxFile.load(tmp_path / "n.onnx")
    before = file.proto.SerializeToString(deterministic=True)
    prefer(file, "cusparselt")
    assert file.proto.SerializeToString(deterministic=True) == before


def test_a_layer_that_was_measured_to_be_faster_with_it_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is named first, and the layer has a kernel for where there is no cuSPARSELt."""
    pytest.importorskip("tvm")
    times = {64: Times(9.0, {"small": 5.0, "cusparselt": 3.0}), 24: Times(9.0, {"small": 5.0})}
    monkeypatch.setattr(
        "sparsecc.targets.cuda.tune.meter", lambda arch: lambda layer, dtype: times[layer.out]
    )
    torch.manual_seed(0)
    compiled = sparsecc.compile(
        Net().eval(), (torch.randn(3, 32),), target="sm80-2:4", options={"choose": "measured"}
    )
    first, second = layers_of(compiled.artifact)
    assert first["kernels"][0] == "cusparselt"
    assert len(first["kernels"]) > 1
    assert "3.0 us with cusparselt" in first["why"]
    assert "cusparselt" not in second["kernels"]
    shown = rows(compiled.artifact)
    assert shown[0]["runs"] == "2:4 fp16, cuSPARSELt"
    assert shown[0]["kernel"] == first["kernels"][1]
    compiled.save(tmp_path / "a.scc")
    torch.testing.assert_close(
        sparsecc.load(tmp_path / "a.scc")(torch.ones(2, 32)), compiled(torch.ones(2, 32))
    )

"""N:M patterns: every group of every patterned weight is looked at by code of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sparsecc
from benchmarks.permutation import greedy, matrix
from sparsecc.cli.command import run as run_command
from sparsecc.cli.commands import cli
from sparsecc.errors import InvalidOption, UnsupportedModel
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.passes import ChannelPruning, NMPattern
from sparsecc.patterns.nm import NM
from sparsecc.patterns.permutation import retained, search
from sparsecc.plan import Mask, Plan
from tests.exported import exported
from tests.oracles import error, fingerprint, forward64
from tests.patterns import CASES
from tests.sampling import every

Array = np.ndarray[Any, Any]


def groups(weight: Any, axis: int, m: int) -> list[list[float]]:
    """Every group of ``m`` consecutive elements along an axis, one by one."""
    array = np.asarray(weight.detach().double() if isinstance(weight, torch.Tensor) else weight, np.float64)
    found = []
    for place in itertools.product(*(range(n) for d, n in enumerate(array.shape) if d != axis)):
        line = [array[(*place[:axis], i, *place[axis:])] for i in range(array.shape[axis])]
        found += [line[i : i + m] for i in range(0, len(line), m)]
    return found


def has_pattern(weight: Any, axis: int, n: int, m: int) -> bool:
    return all(len(g) == m and sum(x != 0 for x in g) <= n for g in groups(weight, axis, m))


def keeps_the_most(before: Any, after: Any, axis: int, n: int, m: int) -> bool:
    """Whether every group keeps as much as any choice of N of its elements, and each as it was."""
    for old, new in zip(groups(before, axis, m), groups(after, axis, m), strict=True):
        best = (
            max(sum(map(abs, some)) for some in itertools.combinations(old, n)) if m <= 8 else _most(old, n)
        )
        if any(b not in (0, a) for a, b in zip(old, new, strict=True)) or sum(map(abs, new)) != best:
            return False
    return True


def _most(group: list[float], n: int) -> float:
    """The most that N elements add up to, taken one by one (there are too many choices to try all)."""
    left, total = [abs(x) for x in group], 0.0
    for _ in range(n):
        total += left.pop(left.index(max(left)))
    return total


def numbers(*shape: int) -> torch.Tensor:
    """Small integers over 8: their sums are exact."""
    return torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def linear(inner: int = 8, outer: int = 6, **options: Any) -> nn.Linear:
    layer = nn.Linear(inner, outer, **options)
    with torch.no_grad():
        layer.weight.copy_(numbers(outer, inner))
    return layer


def pruned(model: nn.Module, inputs: Any, pattern: str = "2:4", **options: Any) -> Any:
    result = sparsecc.prune(model, inputs, recipe=NMPattern(pattern=pattern, **options))
    assert result.certificate.status == "VERIFIED", str(result.certificate)
    return result


def reason(result: Any, weight: str) -> str:
    return next(s.reason for s in result.plan.skips if s.where == weight)


# -- groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3:2", "0:4", "x", "4:4", "2:4:8", "", "-1:4", " 2:4", "2/4", 24, None])
def test_what_is_no_pattern(text: Any) -> None:
    with pytest.raises(InvalidOption, match="give N:M"):
        NMPattern(pattern=text)


def test_options_are_checked() -> None:
    with pytest.raises(InvalidOption, match="tuple of name patterns"):
        NMPattern(include="head")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="permute"):
        NMPattern(permute="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="no parameter"):
        pruned(linear(), (torch.randn(2, 8),), include=("nowhere",))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(0, 99))
def test_masks_keep_the_best_of_every_group(n: int, more: int, axis: int, seed: int) -> None:
    m = n + more
    shape = [2, 3, 2]
    shape[axis] = 2 * m
    weight = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float64)
    keep = NM(n, m).keep(np.abs(weight), axis)
    assert has_pattern(keep, axis, n, m)
    assert keeps_the_most(weight, np.where(keep, weight, 0), axis, n, m)
    assert NM(n, m).holds(np.where(keep, weight, 0), axis)
    assert NM(n, m).holds(weight, axis) == has_pattern(weight, axis, n, m)


def test_of_equal_elements_the_first_are_kept() -> None:
    assert NM(2, 4).keep(np.ones((1, 8)), 1).tolist() == [[True, True, False, False] * 2]
    assert NM(1, 4).keep(np.zeros((1, 4)), 1).tolist() == [[True, False, False, False]]


# -- PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16", "1:2"])
def test_linear_and_convolution(pattern: str) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=1), nn.Flatten(), linear(512, 8)
    )
    with torch.no_grad():
        net[2].weight.copy_(numbers(32, 16, 3, 3))
    before = fingerprint(net)
    result = pruned(net, (torch.randn(2, 3, 8, 8),), pattern)
    assert type(result.model) is nn.Sequential
    for place in (2, 4):
        assert keeps_the_most(net[place].weight, result.model[place].weight, 1, n, m)
        assert has_pattern(result.model[place].weight, 1, n, m)
        assert result.model[place].weight.requires_grad
    assert torch.equal(result.model[0].weight, net[0].weight)
    assert "no multiple of" in reason(result, "0.weight")
    assert fingerprint(net) == before


def test_what_is_told_of_the_layers() -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))
    result = pruned(net, (torch.randn(2, 8),))
    first, second = result.report.patterns
    assert (first.weight, first.axis, first.state, second.weight) == ("0.weight", 1, "pruned", "2.weight")
    assert first.total == net[0].weight.abs().sum().item()
    assert first.kept == result.model[0].weight.abs().sum().item()
    share = (first.kept + second.kept) / (first.total + second.total)
    said = f"2 layers were pruned one-shot to 2:4, keeping {share:.1%} of the magnitude"
    assert f"{said}; accuracy was not checked" in result.report.notes
    assert "2:4: 2 layers pruned one-shot, 0 had it, 0 left dense" in str(result.report)
    assert type(result.report).from_json(result.report.to_json()) == result.report
    assert "2:4 along 0.weight[1]: pruned one-shot" in str(result.plan)


def test_weights_that_have_the_pattern_stay_bit_for_bit() -> None:
    net = nn.Sequential(linear(8, 6), nn.ReLU(), linear(6, 4))
    with torch.no_grad():
        net[0].weight[:, 0::2] = -0.0
        net[0].weight[1] = 0.0
    result = pruned(nn.Sequential(net[0], nn.ReLU(), nn.Linear(6, 4)), (torch.randn(2, 8),))
    assert not any(result.plan.of(Mask))
    assert result.model[0].weight.view(torch.int32).equal(net[0].weight.view(torch.int32))
    assert torch.signbit(result.model[0].weight[0, 0])
    assert [p.state for p in result.report.patterns] == ["there", "dense"]
    assert not any("one-shot" in note for note in result.report.notes)


class Tied(nn.Module):
    """One matrix for two layers, and one that is also a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.first, self.second = linear(8, 8), linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(self.table(ids)))
        return self.head(torch.tanh(self.second(x)))  # type: ignore[no-any-return]


def test_tied_weights_are_masked_once_and_tables_not_at_all() -> None:
    net = Tied()
    result = pruned(net, (torch.randint(0, 12, (2, 3)),))
    assert [m.weight for m in result.plan.of(Mask)] == ["first.weight"]
    assert result.model.first.weight is result.model.second.weight
    assert has_pattern(result.model.first.weight, 1, 2, 4)
    assert torch.equal(result.model.head.weight, net.table.weight)
    assert "also read by index" in reason(result, "table.weight")


class BothWays(nn.Module):
    """Encoder and decoder share a matrix, which sums run along both axes of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight) @ self.weight.t()


def test_a_weight_that_is_summed_along_two_axes_is_left() -> None:
    result = sparsecc.prune(BothWays(), (torch.randn(2, 8),), recipe=NMPattern())
    assert not result.plan.actions
    assert "along several of its axes (0, 1)" in reason(result, "weight")


@pytest.mark.parametrize(
    ("forward", "shape", "axis"),
    [
        (lambda w, x: x @ w, (8, 12), 0),
        (lambda w, x: x @ w.t(), (12, 8), 1),
        (lambda w, x: torch.matmul(w, x.transpose(0, 1)), (12, 8), 1),
        (lambda w, x: torch.addmm(torch.ones(12), x, w), (8, 12), 0),
        (lambda w, x: torch.einsum("bk,kn->bn", x, w), (8, 12), 0),
        (lambda w, x: torch.einsum("nk,bk->bn", w, x), (12, 8), 1),
        (lambda w, x: torch.nn.functional.linear(x, w.to(torch.float32)), (12, 8), 1),
        (lambda w, x: torch.bmm(x[None], w), (1, 8, 12), 1),
    ],
)
def test_the_axis_is_the_one_that_sums_run_along(
    forward: Callable[..., torch.Tensor], shape: tuple[int, ...], axis: int
) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(numbers(*shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self.weight, x)

    net = Product()
    result = pruned(net, (torch.randn(5, 8),))
    assert keeps_the_most(net.weight, result.model.weight, axis, 2, 4)


def test_square_matrices_of_a_residual_stream() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = linear(4, 8), linear(8, 8), linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x)
            return self.down(x + self.mix(x))  # type: ignore[no-any-return]

    net = Residual()
    result = pruned(net, (torch.randn(5, 4),))
    assert keeps_the_most(net.mix.weight, result.model.mix.weight, 1, 2, 4)


DENSE: dict[str, tuple[str, str]] = {
    "depthwise": ("", "depthwise"),
    "conv_transpose": ("", "transposed"),
    "lstm": ("", "recurrent"),
    "weight_normalised": ("", "computed from parameters"),
}


@pytest.mark.parametrize("name", DENSE)
def test_layers_that_cannot_have_the_pattern_say_why(name: str) -> None:
    model, inputs = CASES[name].make()
    result = sparsecc.prune(model, inputs, recipe=NMPattern(), verify=False)
    assert any(DENSE[name][1] in s.reason for s in result.plan.skips), result.plan.skips


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_floats(dtype: torch.dtype) -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4)).to(dtype)
    result = pruned(net, (torch.randn(3, 8, dtype=dtype),))
    assert result.model[0].weight.dtype == dtype
    assert keeps_the_most(net[0].weight, result.model[0].weight, 1, 2, 4)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_left(number: float) -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))
    with torch.no_grad():
        net[0].weight[2, 3] = number
    result = sparsecc.prune(net, (torch.randn(2, 8),), recipe=NMPattern(), verify=False)
    assert "NaN or infinite" in reason(result, "0.weight")
    assert [m.weight for m in result.plan.of(Mask)] == ["2.weight"]


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Linear(8, 4)
    with pytest.raises(UnsupportedModel, match="meta"):
        sparsecc.prune(net, (torch.randn(2, 8, device="meta"),), recipe=NMPattern(), verify=False)


def test_where_no_layer_can_have_the_pattern_the_note_says_so() -> None:
    result = sparsecc.prune(linear(6, 4), (torch.randn(2, 6),), recipe=NMPattern())
    assert any("no layer was given the pattern 2:4" in note for note in result.report.notes)
    assert not result.plan.actions


def test_names_choose_layers() -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))
    result = pruned(net, (torch.randn(2, 8),), exclude=("0",))
    assert [m.weight for m in result.plan.of(Mask)] == ["2.weight"]
    assert reason(result, "0.weight") == "excluded"
    result = pruned(net, (torch.randn(2, 8),), include=("0",))
    assert reason(result, "2.weight") == "not included"


@pytest.mark.parametrize("order", ["NMPattern(); {}", "{}; NMPattern()"])
@pytest.mark.parametrize(
    "other", ["ChannelPruning(sparsity=0.5)", "HeadPruning(sparsity=0.5, head_dims=True)"]
)
def test_after_other_passes_the_pattern_holds_for_what_is_left(order: str, other: str) -> None:
    model, inputs = CASES["vision_transformer"].make()
    result = sparsecc.prune(model, inputs, recipe=order.format(other))
    assert result.certificate.status == "VERIFIED"
    weights = result.model.state_dict()
    pattern = [p for p in result.report.patterns if p.state == "pruned"]
    assert pattern
    assert all(has_pattern(weights[p.weight], p.axis, 2, 4) for p in pattern)
    assert result.plan.decisions


def test_saliency_ranks_elements() -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))
    masks = {}
    for name in ("l1", "l2", "random"):
        result = sparsecc.prune(net, (torch.randn(2, 8),), recipe=NMPattern(), saliency=name, seed=3)
        assert has_pattern(result.model[0].weight, 1, 2, 4)
        masks[name] = next(iter(result.plan.of(Mask))).keep
    assert np.array_equal(masks["l1"], masks["l2"])
    assert not np.array_equal(masks["l1"], masks["random"])


def test_a_plan_survives_storage_and_applies_to_fresh_models(tmp_path: Path) -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    result = pruned(net, (torch.randn(2, 8),), permute=True)
    result.plan.save(tmp_path / "p.plan")
    plan = Plan.load(tmp_path / "p.plan")
    assert plan == result.plan
    assert plan.patterns == result.plan.patterns
    assert fingerprint(plan.apply(net)) == fingerprint(result.model)
    state = plan.apply_state_dict(net.state_dict())
    assert all(torch.equal(state[n], t) for n, t in result.model.state_dict().items())


# -- every graph pattern, in both dialects -------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    every(2, [
        "residual_projection", "dense_concat", "grouped_conv", "conv1d_and_conv3d", "fused_qkv_chunk",
        "attention_einsum", "grouped_queries_expanded", "glu_fused_chunk", "tied_embedding",
        "vision_transformer", "shared_module", "mixture_of_experts", "transformer_encoder_layer",
    ]),
)  # fmt: skip
@pytest.mark.parametrize("permute", [False, True])
def test_graph_patterns(name: str, permute: bool) -> None:
    model, inputs = CASES[name].make()
    result = sparsecc.prune(model, inputs, recipe=NMPattern(pattern="2:4", permute=permute))
    weights = dict(result.applied.program.weights)
    patterned = [p for p in result.report.patterns if p.state == "pruned"]
    assert result.certificate.status == "VERIFIED" or not patterned
    assert all(has_pattern(weights[p.weight], p.axis, 2, 4) for p in patterned)
    for p in patterned:
        assert p.kept == pytest.approx(float(weights[p.weight].detach().abs().sum()), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["residual_projection", "grouped_conv", "fused_qkv_chunk", "vision_transformer", "tied_embedding"]
)
@pytest.mark.parametrize("permute", [False, True])
def test_graph_patterns_in_onnx(name: str, permute: bool) -> None:
    proto = exported(name)
    result = sparsecc.prune(proto, recipe=NMPattern(pattern="2:4", permute=permute))
    assert result.certificate.status == "VERIFIED"
    patterned = [p for p in result.report.patterns if p.state == "pruned"]
    assert patterned
    check_onnx(result.model, patterned, 2, 4)
    if not permute:
        named = {m.weight for m in result.plan.of(Mask)}
        before = {t.name: t.SerializeToString() for t in proto.graph.initializer}
        after = {t.name: t.SerializeToString() for t in result.model.graph.initializer}
        assert {n for n in before if before[n] != after[n]} == named
        assert [n.SerializeToString() for n in proto.graph.node] == [
            n.SerializeToString() for n in result.model.graph.node
        ]


def check_onnx(proto: onnx.ModelProto, patterned: Any, n: int, m: int) -> None:
    """Stored weights have the pattern along the axis that the nodes that read them sum over."""
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for p in patterned:
        assert has_pattern(stored[p.weight], p.axis, n, m), p
        for node in proto.graph.node:
            if p.weight in node.input:
                assert p.axis in _summed(node, list(node.input).index(p.weight), stored[p.weight]), p


def _summed(node: onnx.NodeProto, index: int, weight: Array) -> set[int]:
    flags = {a.name: a.i for a in node.attribute}
    rank = weight.ndim
    if node.op_type == "Gemm":
        return {1 if flags.get("transB") else 0} if index == 1 else {0 if flags.get("transA") else 1}
    if node.op_type == "MatMul":
        return {rank - 2 if index == 1 else rank - 1}
    return {1} if node.op_type == "Conv" else set(range(rank))


# -- ONNX ----------------------------------------------------------------------------------------------


def matmuls(dtype: int = TensorProto.FLOAT, constant: bool = False) -> onnx.ModelProto:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    first, second = (numbers(*s).numpy().astype(kind) for s in ((8, 16), (4, 16)))
    tensors = [numpy_helper.from_array(first, "w0"), numpy_helper.from_array(second, "w1")]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w1"], ["y"], transB=1),
    ]
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["w0"], value=tensors.pop(0)))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["n", 8])],
        [helper.make_tensor_value_info("y", dtype, ["n", 4])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_initializers_and_constant_nodes(dtype: int, constant: bool) -> None:
    result = sparsecc.prune(matmuls(dtype, constant), recipe=NMPattern())
    assert result.certificate.status == "VERIFIED"
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    stored |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t)
        for n in result.model.graph.node
        if n.op_type == "Constant"
    }
    assert keeps_the_most(numbers(8, 16), stored["w0"].astype(np.float64), 0, 2, 4)
    assert keeps_the_most(numbers(4, 16), stored["w1"].astype(np.float64), 1, 2, 4)


def test_external_data(tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "out" / "m.onnx"
    out.parent.mkdir()
    onnx.save(matmuls(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    sparsecc.prune(path, recipe=NMPattern()).save(out)
    stored = {t.name: numpy_helper.to_array(t, str(out.parent)) for t in onnx.load(out).graph.initializer}
    assert keeps_the_most(numbers(8, 16), stored["w0"], 0, 2, 4)


# -- targets, command line -----------------------------------------------------------------------------


def test_a_target_with_a_pattern_prunes_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4)).eval()
    compiled = sparsecc.compile(net, (torch.randn(2, 8),), target="onnx-2:4")
    said = capsys.readouterr().err
    assert "2 layers were pruned one-shot to 2:4, keeping" in said
    assert "accuracy was not checked" in said
    compiled.save(tmp_path / "m.scc")
    loaded = sparsecc.load(tmp_path / "m.scc")
    assert loaded.plan == compiled.plan
    assert loaded.report == compiled.report
    assert loaded.artifact.target == "onnx-2:4"
    x = torch.randn(3, 8)
    want = pruned(net, (torch.randn(2, 8),)).model(x)
    assert torch.allclose(loaded(x), want, atol=1e-5)
    compiled.artifact.save(tmp_path / "m.onnx")
    weights = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer]
    matrices = [w for w in weights if w.ndim == 2]
    assert len(matrices) == 2
    assert all(has_pattern(w, 0, 2, 4) or has_pattern(w, 1, 2, 4) for w in matrices)


def test_a_model_that_has_the_pattern_is_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    net = pruned(nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4)).eval(), (torch.randn(2, 8),)).model
    compiled = sparsecc.compile(net, (torch.randn(2, 8),), target="cpu-2:4")
    assert "one-shot" not in capsys.readouterr().err
    assert not compiled.plan.actions
    assert [p.state for p in compiled.report.patterns] == ["there", "there"]


def test_with_a_recipe_the_pattern_is_not_added_but_missed(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4)).eval()
    compiled = sparsecc.compile(
        net, (torch.randn(2, 8),), target="cpu-2:4", recipe=ChannelPruning(sparsity=0.5)
    )
    assert not any(compiled.plan.of(Mask))
    note = "the recipe leaves 2 layers without the pattern 2:4 of the target: 0.weight, 2.weight"
    assert note in capsys.readouterr().err
    assert any(note in n for n in compiled.report.notes)
    compiled = sparsecc.compile(net, (torch.randn(2, 8),), target="cpu-2:4", recipe=NMPattern(pattern="1:4"))
    assert "without the pattern" not in capsys.readouterr().err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(matmuls(), source)
    recipe = "NMPattern(pattern='1:4', permute=True)"
    assert run_command(cli, ["prune", str(source), "-o", str(out), "--recipe", recipe]) == 0
    assert "pruned one-shot to 1:4" in capsys.readouterr().err
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert has_pattern(stored["w0"], 0, 1, 4)
    assert has_pattern(stored["w1"], 1, 1, 4)
    assert (
        run_command(cli, ["compile", str(source), "-o", str(tmp_path / "m.scc"), "--target", "onnx-2:4"]) == 0
    )
    assert "pruned one-shot to 2:4" in capsys.readouterr().err
    assert (
        run_command(cli, ["prune", str(source), "-o", str(out), "--recipe", "NMPattern(pattern='5:4')"]) == 2
    )


# -- permutation ---------------------------------------------------------------------------------------


def optimum(scores: Array, n: int, m: int) -> float:
    """The most that any order keeps, by trying every way to make groups."""

    def best(left: tuple[int, ...]) -> float:
        if not left:
            return 0.0
        first, rest = left[0], left[1:]
        return max(
            kept((first, *others)) + best(tuple(c for c in rest if c not in others))
            for others in itertools.combinations(rest, m - 1)
        )

    def kept(columns: tuple[int, ...]) -> float:
        return sum(sum(sorted(row[list(columns)])[-n:]) for row in scores)

    return best(tuple(range(scores.shape[1])))


@pytest.mark.parametrize(
    ("n", "m", "columns"), [(2, 4, 8), (1, 4, 8), (2, 4, 12), (1, 2, 8), (3, 4, 12), (4, 8, 16)]
)
def test_small_searches_find_the_optimum_or_nearly(n: int, m: int, columns: int) -> None:
    shares = []
    for seed in range(4):
        scores = np.abs(np.random.default_rng(seed).standard_normal((5, columns)))
        order = search(scores, NM(n, m))
        assert sorted(order.tolist()) == list(range(columns))
        assert retained(scores, NM(n, m), order) >= retained(scores, NM(n, m))
        shares.append(retained(scores, NM(n, m), order) / optimum(scores, n, m))
    assert max(shares) <= 1 + 1e-9
    assert min(shares) > 0.999


def test_searches_keep_as_much_as_plain_exchanges() -> None:
    for seed, shape in enumerate([(16, 24), (8, 32), (40, 32)]):
        scores = matrix(shape, seed)
        assert retained(scores, NM(2, 4), search(scores, NM(2, 4))) >= retained(
            scores, NM(2, 4), greedy(scores)
        )


def test_large_searches_keep_more() -> None:
    scores = matrix((96, 512))
    assert 12 * 96 * 512**2 > 1e8, "too many for the budget: one column of every stripe at a time"
    order = search(scores, NM(2, 4), budget=1e8)
    assert sorted(order.tolist()) == list(range(512))
    assert retained(scores, NM(2, 4), order) > 1.01 * retained(scores, NM(2, 4))


@pytest.mark.parametrize("shape", [(0, 8), (3, 4), (1, 8), (5, 8), (700, 32)])
def test_searches_are_deterministic_and_keep_more(shape: tuple[int, int]) -> None:
    scores = np.abs(np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    order = search(scores, NM(2, 4), budget=1e7)
    assert np.array_equal(order, search(scores, NM(2, 4), budget=1e7))
    assert sorted(order.tolist()) == list(range(shape[1]))
    assert retained(scores, NM(2, 4), order) >= retained(scores, NM(2, 4))


@pytest.mark.parametrize("scores", [np.zeros((4, 16)), np.ones((4, 16))])
def test_nothing_is_reordered_for_nothing(scores: Array) -> None:
    assert np.array_equal(search(scores, NM(2, 4)), np.arange(16))


def test_a_permuted_model_keeps_more_and_computes_the_masked_original() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    inputs = (torch.randn(4, 8),)
    plain, better = pruned(net, inputs), pruned(net, inputs, permute=True)
    assert sum(p.kept for p in better.report.patterns) > sum(p.kept for p in plain.report.patterns)
    assert {d.group for d in better.plan.decisions} == {"0.weight[0]", "2.weight[0]"}
    assert all(len(d.kept) == d.size for d in better.plan.decisions)
    masked = [net.state_dict()[m.weight] * torch.from_numpy(m.keep) for m in better.plan.of(Mask)]
    other = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        for place, weight in zip((0, 2, 4), masked, strict=True):
            other[place].weight.copy_(weight)
    assert error(forward64(better.model, inputs), forward64(other, inputs)) < 1e-12
    assert "in another order" in str(better.plan)
    assert better.report.after["parameters"] == better.report.before["parameters"]


def test_layers_that_have_the_pattern_and_excluded_ones_are_not_reordered() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    inputs = (torch.randn(4, 8),)
    with torch.no_grad():
        net[2].weight[:, 0::2] = 0
    result = pruned(net, inputs, permute=True)
    assert {d.group for d in result.plan.decisions} == {"2.weight[0]"}, "rows may move, columns may not"
    assert has_pattern(result.model[2].weight, 1, 2, 4)
    assert not pruned(net, inputs, permute=True, exclude=("2",)).plan.decisions


def test_permutation_after_pruning_reorders_what_is_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    result = sparsecc.prune(net, (torch.randn(4, 8),), recipe="ChannelPruning(); NMPattern(permute=True)")
    assert result.certificate.status == "VERIFIED"
    assert all(len(d.kept) < d.size for d in result.plan.decisions)
    assert any((np.diff(d.kept) < 0).any() for d in result.plan.decisions)
    assert all(has_pattern(result.model[i].weight, 1, 2, 4) for i in (0, 2, 4))


def test_bfloat16_in_onnx() -> None:
    weight = numbers(8, 16).numpy().astype(ml_dtypes.bfloat16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    result = sparsecc.prune(model, recipe=NMPattern())
    (stored,) = result.model.graph.initializer
    assert keeps_the_most(
        weight.astype(np.float64), numpy_helper.to_array(stored).astype(np.float64), 0, 2, 4
    )
    assert isinstance(result.subject, OnnxSubject)

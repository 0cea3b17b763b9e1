"""The pass over Relax modules, on the processor: what it rewrites, what it leaves, and that results stay."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsecc.errors import InvalidOption, TargetRefused, TargetUnavailable
from sparsecc.targets.relax import Choice, Sparse24
from sparsecc.targets.relax.packing import pack_rows
from tests.relax_modules import ACTIVATIONS, TORCH, Layer, Machine, prune, two_of_four

pytest.importorskip("tvm", reason="the pass works on TVM's modules: pip install 'sparsecc[cuda]'")

import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program


def rewritten(module: Any, **options: Any) -> tuple[Any, list[Choice]]:
    sparse = Sparse24("llvm", **options)
    new = tvm.ir.transform.Sequential([sparse])(module)
    relax.analysis.well_formed(new)
    return new, sparse.choices


def operators(module: Any) -> list[str]:
    """The operators of a module's Relax functions."""
    names: list[str] = []
    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(
                function,
                lambda e: (
                    names.append(e.op.name) if isinstance(e, relax.Call) and hasattr(e.op, "name") else None
                ),
            )
    return names


def check(layer: Layer) -> Any:
    """Rewritten and run, the layer is exact; what was fused is gone."""
    module, choices = rewritten(layer.module())
    assert [choice.sparse for choice in choices] == [True], choices
    left = set(operators(module)) - {"relax.reshape"}
    assert left == {"relax.call_tir"}
    layer.check(Machine(module)(layer.x))
    return module


def normal(*shape: int, dtype: str = "float32", seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(TORCH[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TORCH)
def test_linear(activation: str, dtype: str) -> None:
    weight = two_of_four(10, 24).to(TORCH[dtype])
    check(Layer(normal(37, 24, dtype=dtype), weight, normal(10, dtype=dtype), activation, varying=[0]))


@settings(max_examples=settings().max_examples // 6)
@given(
    st.integers(1, 40), st.integers(1, 37), st.integers(1, 20), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(list(ACTIVATIONS)), st.sampled_from(list(TORCH)), st.integers(0, 99),
)  # fmt: skip
def test_any_linear(
    tokens: int, out: int, groups: int, varies: bool, bias: bool, permuted: bool,
    activation: str, dtype: str, seed: int,
) -> None:  # fmt: skip
    layer = Layer(
        normal(tokens, 4 * groups, dtype=dtype, seed=seed),
        two_of_four(out, 4 * groups, seed=seed).to(TORCH[dtype]),
        normal(out, dtype=dtype, seed=seed + 1) if bias else None,
        activation,
        varying=[0] if varies else [],
        permuted=permuted,
    )
    check(layer)


def test_more_axes() -> None:
    check(Layer(normal(3, 5, 2, 16), two_of_four(12, 16), normal(12), "relu", varying=[0, 1]))


CONVOLUTIONS = {
    "pointwise": ((1, 1), {}),
    "3x3": ((3, 3), {"padding": [1, 1, 1, 1]}),
    "strided": ((3, 3), {"padding": [1, 1, 1, 1], "strides": [2, 2]}),
    "dilated": ((3, 2), {"padding": [2, 1, 2, 1], "dilation": [2, 1]}),
    "padding on one side": ((2, 2), {"padding": [0, 1, 1, 0]}),
    "patches": ((4, 4), {"strides": [4, 4]}),
}


@pytest.mark.parametrize("varying", [(), (0, 2, 3)])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, varying: tuple[int, ...]) -> None:
    kernel, conv = CONVOLUTIONS[case]
    weight = two_of_four(6, 8, *kernel, axis=1)
    check(Layer(normal(2, 8, 8, 12), weight, normal(6), "silu", varying=varying, conv=conv))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_convolution_with_channels_last(dtype: str) -> None:
    conv = {"data_layout": "NHWC", "kernel_layout": "OHWI", "padding": [1, 1, 1, 1]}
    weight = two_of_four(6, 3, 3, 8).to(TORCH[dtype])
    check(Layer(normal(2, 5, 7, 8, dtype=dtype), weight, normal(6, dtype=dtype), "relu", conv=conv))


@pytest.mark.parametrize(("dtype", "wide"), [("float16", "float32"), ("float32", "float64")])
def test_wide_sums_stay_wide(dtype: str, wide: str) -> None:
    weight = two_of_four(8, 16).to(TORCH[dtype])
    check(Layer(normal(9, 16, dtype=dtype), weight, normal(8, dtype=wide), "relu", out_dtype=wide))


def test_rounds_once() -> None:
    """Sums of a float16 model that overflow on the way do not; the result is the nearest float16."""
    x = torch.full((1, 8), 200.0, dtype=torch.float16)
    weight = torch.tensor([[200.0, 200, 0, 0, -200, -200, 0, 0]], dtype=torch.float16)
    module, _ = rewritten(Layer(x, weight, torch.tensor([1.0], dtype=torch.float16)).module())
    assert Machine(module)(x).tolist() == [[1.0]]


# What is left as it is


def left_alone(layer: Layer) -> str:
    """Why a layer is not rewritten; it stays as it is."""
    module = layer.module()
    new, (choice,) = rewritten(module)
    assert not choice.sparse
    tvm.ir.assert_structural_equal(new, module)
    return choice.why


def test_nearly_two_of_four() -> None:
    weight = two_of_four(8, 16)
    row, column = (weight == 0).nonzero()[5]
    weight[row, column] = 1e-30
    assert left_alone(Layer(normal(4, 16), weight)) == "its weight is not 2:4 along the contraction"


def test_two_of_four_along_the_other_axis() -> None:
    assert "not 2:4" in left_alone(Layer(normal(4, 16), two_of_four(16, 16).T.contiguous()))


def test_ragged_contraction() -> None:
    weight = torch.zeros(8, 6)
    assert left_alone(Layer(normal(4, 6), weight)) == "it adds up 6 channels, not a multiple of 4"


def test_groups() -> None:
    conv = {"groups": 2}
    assert (
        left_alone(Layer(normal(1, 8, 4, 4), two_of_four(8, 4, 1, 1, axis=1), conv=conv)) == "it has 2 groups"
    )


def test_negative_zeros_are_zeros() -> None:
    weight = two_of_four(8, 16)
    weight[weight == 0] = -0.0
    check(Layer(normal(4, 16), weight))


def test_weight_that_is_an_argument_is_no_product() -> None:
    builder = relax.BlockBuilder()
    x, w = (
        relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", (2, 8)), ("w", (8, 4)))
    )
    with builder.function("main", [x, w]):
        builder.emit_func_output(builder.emit(relax.op.matmul(x, w)))
    module = builder.finalize()
    new, choices = rewritten(module)
    assert choices == []
    tvm.ir.assert_structural_equal(new, module)


# Whole models


def imported(model: nn.Module, *inputs: torch.Tensor, varying: dict[int, str] | None = None) -> Any:
    names = {name: torch.export.Dim(name, min=2, max=64) for name in (varying or {}).values()}
    shapes = tuple({axis: names[name] for axis, name in (varying or {}).items()} for _ in inputs)
    return from_exported_program(torch.export.export(model, inputs, dynamic_shapes=shapes))


def same(model: nn.Module, module: Any, *xs: torch.Tensor) -> Any:
    """The rewritten module, which is as near to float64 as the original is."""
    new, choices = rewritten(module)
    assert choices
    assert all(choice.sparse for choice in choices), choices
    before, after = Machine(module), Machine(new)
    wide = copy.deepcopy(model).double()
    for x in xs:
        exact = wide(x.double()).detach().numpy()
        bound = 4 * np.abs(before(x) - exact).max() + 8 * 2.0**-24 * np.abs(exact).max()
        assert np.abs(after(x) - exact).max() <= bound
    return new


class Attention(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, 4, 8).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 24), nn.SiLU(), nn.Linear(24, 12, bias=False)
    )


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 12),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape", "varying"),
    [
        (mlp, (5, 3, 16), None),
        (Attention, (3, 7, 32), {0: "batch", 1: "tokens"}),
        (convnet, (3, 4, 9, 11), None),
        (convnet, (3, 4, 9, 11), {0: "batch"}),
    ],
)
def test_models(make: Any, shape: tuple[int, ...], varying: dict[int, str] | None) -> None:
    model = prune(make())
    same(model, imported(model, normal(*shape), varying=varying), normal(*shape, seed=3))


def test_another_batch_than_the_module_was_exported_with() -> None:
    model = prune(mlp())
    module = imported(model, normal(5, 16), varying={0: "batch"})
    same(model, module, *(normal(batch, 16, seed=batch) for batch in (2, 16, 37)))


class Mixer(nn.Module):
    """Mixes positions: the importer repeats the weight for every item of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(16, 24), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.channels(self.tokens(x.transpose(1, 2)).relu().transpose(1, 2))
        return y


@pytest.mark.parametrize("varying", [None, {0: "batch"}])
def test_weights_that_are_repeated_for_a_batch(varying: dict[int, str] | None) -> None:
    model = prune(Mixer())
    module = imported(model, normal(3, 16, 8), varying=varying)
    assert "broadcast_to" in module.script()
    same(model, module, normal(3, 16, 8, seed=3))
    _, choices = rewritten(module)
    assert len(choices) == 2


def test_two_uses_of_one_weight() -> None:
    shared = nn.Linear(16, 16)
    model = prune(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), shared))
    module = imported(model, normal(4, 16))
    new = same(model, module, normal(4, 16))
    constants: list[Any] = []
    relax.analysis.post_order_visit(
        new["main"], lambda e: constants.append(e) if isinstance(e, tvm.ir.GenericConst) else None
    )
    assert len({hash(constant) for constant in constants}) == 3  # values, index, bias
    assert len(new.functions) == 3  # main, with ReLU and without


def test_sum_read_twice_is_not_fused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return torch.relu(y) + y

    model = prune(Both())
    module = imported(model, normal(4, 16))
    assert "relax.nn.relu" in operators(same(model, module, normal(4, 16)))


def test_dense_layers_beside_sparse_ones() -> None:
    model = nn.Sequential(prune(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)).eval()
    module = imported(model, normal(4, 16))
    new, choices = rewritten(module)
    assert [choice.sparse for choice in choices] == [True, False]
    assert "relax.matmul" in operators(new)
    exact = model(normal(4, 16)).detach().numpy()
    np.testing.assert_allclose(Machine(new)(normal(4, 16)), exact, atol=1e-6)


def test_choices_can_be_read() -> None:
    _, (choice,) = rewritten(Layer(normal(4, 16), two_of_four(8, 16)).module())
    assert str(choice) == "main/lv1 [8 x 16] float32: 2:4, from packed weights, in float32"


def test_in_a_pipeline_of_others() -> None:
    """Before and after passes that fold constants, fuse and legalise."""
    model = prune(mlp())
    module = imported(model, normal(5, 16), varying={0: "batch"})
    steps = relax.transform
    pipeline = tvm.ir.transform.Sequential(
        [steps.FoldConstant(), Sparse24("llvm"), steps.DeadCodeElimination(), relax.get_pipeline("zero")]
    )
    new = pipeline(module)
    x = normal(9, 16)
    np.testing.assert_allclose(Machine(new)(x), model(x).detach().numpy(), atol=1e-6)


def test_pipeline_for_processors() -> None:
    """TVM's own, which fuses operators."""
    model = prune(convnet())
    new, _ = rewritten(imported(model, normal(2, 4, 9, 11)))
    x = normal(2, 4, 9, 11)
    made = Machine(new, relax.get_default_pipeline(tvm.target.Target("llvm")))(x)
    np.testing.assert_allclose(made, model(x).detach().numpy(), atol=1e-6)


def test_current_target() -> None:
    with tvm.target.Target("llvm"):
        sparse = Sparse24()
        sparse(Layer(normal(4, 16), two_of_four(8, 16)).module())
    assert sparse.choices[0].sparse


def test_other_targets() -> None:
    with pytest.raises(TargetRefused, match="llvm and cuda; got opencl"):
        Sparse24("opencl")


def test_bad_options() -> None:
    for options in ({"product": "int8"}, {"choose": "never"}, {"tokens": 0}):
        with pytest.raises(InvalidOption):
            Sparse24("llvm", **options)


def test_without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(TargetUnavailable, match="sparsecc\\[cuda\\]"):
        Sparse24("llvm")


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_packing_is_exact(out: int, groups: int, seed: int) -> None:
    matrix = two_of_four(out, 4 * groups, seed=seed).numpy()
    values, index = pack_rows(matrix)
    dense = np.zeros((len(values), groups, 4), np.float32)
    for slot, place in enumerate((index & 3, index >> 2)):
        np.put_along_axis(dense, place[..., None].astype(int), values[..., slot, None], -1)
    assert (dense.reshape(len(values), -1)[:out] == matrix).all()
    assert (index & 3 < index >> 2).all()


def test_outside_of_dataflow_blocks() -> None:
    """Chains that end in another block are cut where the block ends."""
    builder = relax.BlockBuilder()
    weight = two_of_four(8, 16)
    x = relax.Var("x", relax.TensorType((4, 16), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight.T.contiguous().numpy(), "float32")))
            out = builder.emit_output(relax.op.add(y, relax.const(np.ones(8, "float32"))))
        z = builder.emit(relax.op.nn.relu(out))
        z = builder.emit(relax.op.matmul(z, relax.const(two_of_four(4, 8).T.contiguous().numpy(), "float32")))
        builder.emit_func_output(builder.emit(relax.op.nn.relu(z)))
    new, choices = rewritten(builder.finalize())
    assert [choice.sparse for choice in choices] == [True, True]
    assert sorted(operators(new)) == ["relax.call_tir", "relax.call_tir", "relax.nn.relu"]
    given = normal(4, 16)
    exact = torch.relu(torch.relu(given @ weight.T + 1) @ two_of_four(4, 8).T)
    np.testing.assert_allclose(Machine(new)(given), exact.numpy(), atol=1e-5)


def test_functions_that_are_set_apart() -> None:
    module = Layer(normal(4, 16), two_of_four(8, 16)).module()
    (var,) = module.get_global_vars()
    module[var] = module[var].with_attr("Codegen", "other")
    assert rewritten(module)[1] == []


def test_tvm_is_imported_when_the_pass_is_made() -> None:
    code = "import sys, sparsecc.targets.relax; sys.exit(bool({'tvm', 'tvm_ffi'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.relax_pipeline import run_on_processor

    run_on_processor()
    assert capsys.readouterr().out.count("2:4, from packed weights") == 3

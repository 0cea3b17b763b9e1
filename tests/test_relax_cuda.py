"""The pass over Relax modules for CUDA: what it rewrites, and its functions from host to last instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsecc.errors import TargetRefused
from sparsecc.targets.cuda.nvrtc import compile_source
from sparsecc.targets.relax import Choice, Sparse24
from tests.cuda_sim.simulator import COMPILER
from tests.relax_launch import Function
from tests.relax_modules import TORCH, Layer, as_array, two_of_four

pytest.importorskip("tvm", reason="the pass works on TVM's modules: pip install 'sparsecc[cuda]'")

import tvm
from tvm import relax

SM80 = {"kind": "cuda", "arch": "sm_80"}
simulated = pytest.mark.skipif(COMPILER is None, reason="the simulator needs a C++ compiler")


def rewritten(module: Any, **options: Any) -> tuple[Any, list[Choice]]:
    sparse = Sparse24(SM80, **{"choose": "always", **options})
    new = sparse(module)
    relax.analysis.well_formed(new)
    return new, sparse.choices


def integers(*shape: int, dtype: str = "float16", limit: int = 4, seed: int = 0) -> torch.Tensor:
    """Small integers, whose sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(TORCH[dtype])


def sparse_integers(*shape: int, axis: int = -1, dtype: str = "float16") -> torch.Tensor:
    return (two_of_four(*shape, axis=axis) != 0) * integers(*shape, dtype=dtype, seed=1)


def constants_of(module: Any) -> list[Any]:
    """The constants of the module's only call, in its order."""
    found: list[Any] = []
    relax.analysis.post_order_visit(
        module["main"],
        lambda e: found.append(e) if isinstance(e, relax.Call) and e.op.name == "relax.call_tir" else None,
    )
    (call,) = found
    return [each.value.numpy() for each in call.args[1].fields if isinstance(each, tvm.ir.GenericConst)]


def check(layer: Layer, folder: Path, *, element: str = "float16", **options: Any) -> Function:
    """The layer's function, run from its host half, gives exactly the right integers."""
    module, (choice,) = rewritten(layer.module(), **options)
    assert choice.sparse, choice
    ((var, function),) = ((v, f) for v, f in module.functions.items() if not isinstance(f, relax.Function))
    made = Function(function, var.name_hint, folder)
    exact = layer._in_float64(absolute=False)
    out = np.zeros(exact.shape, as_array(torch.zeros(1, dtype=TORCH[layer.out_dtype or layer.dtype])).dtype)
    if layer.conv is None:
        out = out.reshape(-1, out.shape[-1])
    values, metadata, *bias = constants_of(module)
    x = as_array(layer.x.to(TORCH[element]))
    tensors = {
        "x": x if layer.conv is not None else x.reshape(-1, x.shape[-1]),
        "weight": values,
        "metadata": metadata,
        **({"bias": bias[0]} if bias else {}),
        "d": out,
    }
    result, launched, report = made.run(tensors)
    assert not report.errors, f"{report.errors}\n{report.messages}"
    assert report.counts["mma.sp"] > 0
    assert launched.shared_bytes > 0
    rounded = exact.to(TORCH[layer.out_dtype or layer.dtype]).double()
    assert (result.astype(np.float64).reshape(exact.shape) == rounded.numpy()).all()
    return made


@simulated
@pytest.mark.parametrize("varying", [(), (0,)])
@pytest.mark.parametrize("tokens", [5, 200])
def test_linear(tokens: int, varying: tuple[int, ...], tmp_path: Path) -> None:
    layer = Layer(integers(tokens, 80), sparse_integers(72, 80), integers(72), "relu", varying=varying)
    check(layer, tmp_path, tokens=tokens)


@simulated
def test_more_blocks_than_the_tile_was_chosen_for(tmp_path: Path) -> None:
    """A varying number of tokens may be any."""
    layer = Layer(integers(3, 43, 80), sparse_integers(72, 80), integers(72), "relu", varying=[0, 1])
    check(layer, tmp_path, tokens=8)


@simulated
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_float32_rounded_when_asked_for(element: str, tmp_path: Path) -> None:
    layer = Layer(integers(40, 64, dtype="float32"), sparse_integers(24, 64, dtype="float32"), varying=[0])
    check(layer, tmp_path, element=element, product={"float16": "fp16", "bfloat16": "bf16"}[element])


@simulated
def test_bfloat16_model(tmp_path: Path) -> None:
    x, weight, bias = integers(40, 64), sparse_integers(24, 64), integers(24)
    layer = Layer(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), "relu", varying=[0])
    check(layer, tmp_path, element="bfloat16")


@simulated
@pytest.mark.parametrize("varying", [(), (0, 2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_convolution(kernel: tuple[int, int], varying: tuple[int, ...], tmp_path: Path) -> None:
    conv = {"padding": [kernel[0] // 2] * 4, "strides": [2, 1] if kernel == (3, 3) else [1, 1]}
    weight = sparse_integers(24, 8, *kernel, axis=1)
    layer = Layer(integers(2, 8, 7, 6), weight, integers(24), "relu", varying=varying, conv=conv)
    check(layer, tmp_path)


@simulated
def test_convolution_with_channels_last(tmp_path: Path) -> None:
    conv = {"data_layout": "NHWC", "kernel_layout": "OHWI", "padding": [1, 1, 1, 1]}
    weight = sparse_integers(24, 3, 3, 8)
    layer = Layer(integers(2, 7, 6, 8), weight, integers(24), "relu", varying=[0, 1], conv=conv)
    check(layer, tmp_path)


@simulated
def test_machine_code(tmp_path: Path) -> None:
    """What the function compiles to has the sparse instruction, and keeps its sums in registers."""
    pytest.importorskip("nvidia", reason="kernels are compiled with NVRTC: pip install 'sparsecc[cuda]'")
    layer = Layer(integers(200, 128), sparse_integers(128, 128), integers(128), "relu", varying=[0])
    made = check(layer, tmp_path)
    compiled = compile_source(made.text.text, "sm_80")
    assert "mma.sp::ordered_metadata" in compiled.ptx
    assert (compiled.spills, compiled.stack) == (0, 0)


def model() -> Any:
    """Two products with an activation that stays an operator of TVM between them."""
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([n, 64], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            first = relax.const(as_array(two_of_four(64, 64)), "float32")
            y = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(first))))
            y = builder.emit(relax.op.tanh(y))
            second = relax.const(as_array(two_of_four(32, 64)), "float32")
            y = builder.emit(relax.op.matmul(y, builder.emit(relax.op.permute_dims(second))))
            out = builder.emit_output(builder.emit(relax.op.nn.softmax(y)))
        builder.emit_func_output(out)
    return builder.finalize()


def test_whole_module_compiles_in_the_default_pipeline() -> None:
    """Beside TVM's own functions, scheduled by its own rules."""
    new, choices = rewritten(model(), product="fp16")
    assert [choice.sparse for choice in choices] == [True, True]
    target = tvm.target.Target(SM80, host="llvm")
    source = tvm.compile(new, target=target).mod.imports[0].imports[0].inspect_source("cuda")
    assert source.count("mma.sp::ordered_metadata") >= 2
    assert "tanh" in source


@pytest.mark.parametrize(
    ("dtype", "options", "why"),
    [
        ("float32", {}, "there is no 2:4 instruction for float32: product='fp16' or 'bf16' rounds to it"),
        ("float64", {}, "there is no 2:4 instruction for float64"),
        ("float32", {"product": "fp16", "choose": "modelled"}, "mma.sp in fp16, 0.87x expected"),
    ],
)
def test_left_dense(dtype: str, options: dict[str, Any], why: str) -> None:
    module = Layer(integers(4, 16, dtype=dtype), sparse_integers(8, 16, dtype=dtype)).module()
    new, (choice,) = rewritten(module, **options)
    assert not choice.sparse
    assert choice.why.startswith(why)
    tvm.ir.assert_structural_equal(new, module)


def test_weight_too_large_for_the_element_type() -> None:
    module = Layer(integers(4, 16, dtype="float32"), 1e5 * sparse_integers(8, 16, dtype="float32")).module()
    _, (choice,) = rewritten(module, product="fp16")
    assert choice.why == "its weight has values that are not finite in fp16"


def test_padding_on_one_side() -> None:
    layer = Layer(integers(1, 8, 4, 4), sparse_integers(8, 8, 2, 2, axis=1), conv={"padding": [0, 0, 1, 1]})
    _, (choice,) = rewritten(layer.module())
    assert choice.why == "its padding differs between sides"


def test_architecture_without_kernels() -> None:
    with pytest.raises(TargetRefused, match="no 2:4 kernels for sm_75"):
        Sparse24({"kind": "cuda", "arch": "sm_75"})

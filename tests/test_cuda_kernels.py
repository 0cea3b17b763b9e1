"""Generated kernels, run from their own source on the simulator: bit-exact on integers, and free of races."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.targets.cuda.config import ELEMENTS, Epilogue, KernelConfig
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tiles import TILES, WGMMA_TILES, default_config
from tests.cuda_kernels import ACTIVATIONS, Case
from tests.cuda_sim.simulator import COMPILER

pytest.importorskip("tvm", reason="kernels are generated with TVM: pip install 'sparsecc[cuda]'")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the simulator needs a C++ compiler")

FULL = Epilogue(bias=True, activation="relu", residual=True)
DEQUANTISE = Epilogue(scale=True, bias=True, activation="relu", residual=True)


def check(case: Case) -> None:
    result, report = case.run()
    assert not report.errors, f"{report.errors}\n{report.messages}"
    assert report.counts[case.config.instruction] > 0
    assert torch.equal(result.double(), case.expected().to(result.dtype).double())


@pytest.mark.parametrize("tile", TILES)
def test_every_tile(tile: str) -> None:
    check(Case(default_config(tile, "fp16", epilogue=FULL), Problem(72, 200), tokens=37))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["bf16", "int8", "e4m3", "e5m2"])
@pytest.mark.parametrize("tile", [*TILES, *WGMMA_TILES])
def test_every_tile_and_dtype(tile: str, dtype: str) -> None:
    config = default_config(tile, dtype, epilogue=DEQUANTISE, out_dtype="fp32")
    check(Case(config, Problem(264, 520), tokens=131))


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        ("bf16", "bf16"),
        ("bf16", "fp32"),
        ("fp16", "fp32"),
        ("int8", "fp16"),
        ("int8", "bf16"),
        ("int8", "fp32"),
        ("e4m3", "bf16"),
        ("e5m2", "fp16"),
    ],
)
def test_dtypes(dtype: str, out_dtype: str) -> None:
    config = default_config("small", dtype, epilogue=DEQUANTISE, out_dtype=out_dtype)
    check(Case(config, Problem(72, 200), tokens=37))


@pytest.mark.parametrize("tile", ["small", "batch8", "wgmma64"])
def test_dynamic_quantisation(tile: str) -> None:
    epilogue = Epilogue(scale=True, token_scale=True, bias=True)
    check(
        Case(default_config(tile, "int8", epilogue=epilogue, out_dtype="fp32"), Problem(72, 200), tokens=37)
    )


@pytest.mark.parametrize("tile", ["small", "batch8"])
def test_raw_int32_sums(tile: str) -> None:
    check(Case(default_config(tile, "int8"), Problem(33, 256), tokens=9))


@pytest.mark.parametrize("k", [4, 36, 37, 38, 64, 68, 200])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_ragged_k(dtype: str, k: int) -> None:
    """16-byte, 8-byte, 4-byte and single-element copies; K that ends within a tile, a unit, a group."""
    config = default_config("batch16", dtype, epilogue=FULL, out_dtype="fp16")
    check(Case(config, Problem(40, k), tokens=9))


@pytest.mark.parametrize(("out", "tokens"), [(1, 1), (15, 64), (17, 65), (35, 70), (64, 64), (130, 130)])
def test_ragged_rows_and_tokens(out: int, tokens: int) -> None:
    check(Case(default_config("small", epilogue=FULL), Problem(out, 64), tokens=tokens))


@pytest.mark.parametrize("tile", ["batch8", "wgmma64"])
@pytest.mark.parametrize("out", [256, 330])
def test_groups_of_blocks(tile: str, out: int) -> None:
    """More tiles of output features than stand together, and a last group that is not full."""
    config = default_config(tile, epilogue=FULL)
    check(Case(config, Problem(out * config.block_m // 32, 64), tokens=2 * config.block_n + 1))


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("tiles", [1, 2, 6])
def test_pipeline_depths(stages: int, tiles: int) -> None:
    check(Case(KernelConfig(32, 16, 64, 1, 2, 1, stages), Problem(32, 64 * tiles), tokens=16))


@pytest.mark.parametrize(("pixels", "align"), [(48, 8), (36, 4), (38, 2), (37, 1), (48, 1)])
def test_nchw_pointwise(pixels: int, align: int) -> None:
    config = default_config("small", epilogue=FULL, layout="nchw")
    check(Case(config, Problem(72, 100, pixel_align=align), tokens=pixels, batch=2))


@pytest.mark.parametrize(("dtype", "out_dtype"), [("int8", "fp16"), ("bf16", "fp32")])
def test_nchw_dtypes(dtype: str, out_dtype: str) -> None:
    config = default_config("small", dtype, epilogue=DEQUANTISE, layout="nchw", out_dtype=out_dtype)
    check(Case(config, Problem(72, 100, pixel_align=4), tokens=36, batch=2))


@pytest.mark.parametrize("tile", WGMMA_TILES)
def test_wgmma_tiles(tile: str) -> None:
    check(Case(default_config(tile, epilogue=FULL), Problem(72, 360), tokens=37))


@pytest.mark.parametrize("dtype", ["bf16", "int8", "e4m3", "e5m2"])
def test_wgmma_dtypes(dtype: str) -> None:
    config = default_config("wgmma64", dtype, epilogue=DEQUANTISE, out_dtype="fp32")
    check(Case(config, Problem(72, 360), tokens=70))


@pytest.mark.parametrize("k", [4, 37, 64, 130, 192, 256, 500])
def test_wgmma_ragged_k(k: int) -> None:
    check(Case(default_config("wgmma64", epilogue=FULL), Problem(40, k), tokens=9))


def test_wgmma_convolution() -> None:
    conv = Conv(16, (3, 3), (1, 1), (1, 1))
    check(Case(default_config("wgmma64", epilogue=FULL), Problem(40, conv.k, conv), batch=2, size=(8, 9)))


CONVOLUTIONS = {
    "3x3": Conv(16, (3, 3), (1, 1), (1, 1)),
    "3x3, stride 2, 6 channels": Conv(6, (3, 3), (2, 2), (1, 1)),
    "3x3, odd": Conv(7, (3, 3), (2, 1), (1, 2), (1, 2)),
    "1x1, stride 2": Conv(20, (1, 1), (2, 2)),
    "1x1": Conv(20),
    "5x1": Conv(12, (5, 1), (1, 1), (2, 0)),
}


@pytest.mark.parametrize("layout", ["rows", "nchw"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, layout: str) -> None:
    conv = CONVOLUTIONS[name]
    config = KernelConfig(32, 32, 64, 2, 2, 1, 2, layout=layout, epilogue=FULL)
    check(Case(config, Problem(40, conv.k, conv), batch=2, size=(8, 9)))


def test_int8_convolution() -> None:
    conv = Conv(16, (3, 3), (1, 1), (1, 1))
    config = default_config("small", "int8", epilogue=DEQUANTISE, out_dtype="fp16")
    check(Case(config, Problem(40, conv.k, conv), batch=2, size=(8, 9)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small configuration that is allowed, with any sizes."""
    wgmma = draw(st.integers(0, 3)) == 0
    dtype = draw(st.sampled_from(["fp16", "bf16", "int8", "e5m2"]))
    element = ELEMENTS[dtype]
    warps_m = 4 if wgmma else draw(st.sampled_from([1, 2, 3]))
    warps_n, warps_k = (
        (1, 1) if wgmma else draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]))
    )
    layout = "rows" if wgmma else draw(st.sampled_from(["rows", "rows", "nchw"]))
    block_n = max(32 if layout == "nchw" else 8, 8 * warps_n * draw(st.sampled_from([1, 2, 4])))
    config = KernelConfig(
        block_m=16 * warps_m * (1 if wgmma else draw(st.sampled_from([1, 2]))),
        block_n=block_n,
        block_k=128 // element.bytes if wgmma else 64 * warps_k * draw(st.sampled_from([1, 2])),
        warps_m=warps_m,
        warps_n=warps_n,
        warps_k=warps_k,
        stages=draw(st.integers(3 if wgmma else 2, 5)),
        dtype=dtype,
        out_dtype=draw(st.sampled_from([kind for kind in element.outputs if kind != "int32"])),
        layout=layout,
        epilogue=draw(
            st.builds(
                Epilogue, st.booleans(), st.sampled_from(["none", "relu"]), st.booleans(), st.booleans()
            )
        ),
        instruction="wgmma.sp" if wgmma else "mma.sp",
    )
    out, batch, seed = draw(st.integers(1, 200)), draw(st.integers(1, 3)), draw(st.integers(0, 1 << 30))
    if draw(st.booleans()):
        pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
        conv = Conv(
            draw(st.integers(1, 40)),
            draw(pair),
            draw(pair),
            draw(st.tuples(*[st.integers(0, 2)] * 2)),
            draw(pair),
        )
        return Case(
            config,
            Problem(out, conv.k, conv),
            batch=batch,
            size=draw(st.tuples(*[st.integers(7, 11)] * 2)),
            seed=seed,
        )
    align = draw(st.sampled_from([1, 2, 4, 8])) if layout == "nchw" else 1
    tokens = align * draw(st.integers(1, 90 // align))
    return Case(
        config, Problem(out, draw(st.integers(1, 400)), None, align), tokens=tokens, batch=batch, seed=seed
    )


@pytest.mark.nightly
@settings(max_examples=60)
@given(case=cases())
def test_random_kernels(case: Case) -> None:
    check(case)


# Error in units of the last place of float32 at the size of the activation's argument.
ULP = {"none": 0, "relu": 0, "gelu": 3, "gelu_tanh": 4, "silu": 3}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    epilogue = Epilogue(scale=True, bias=True, activation=activation)
    config = default_config("small", epilogue=epilogue, out_dtype="fp32")
    case = Case(config, Problem(64, 128), tokens=64)
    case.scale = case.scale / 64
    case.bias = case.bias / 64
    result, report = case.run()
    assert not report.errors, report.messages
    argument = case.x @ case.weight.T * case.scale.double() + case.bias.double()
    error = (result.double() - case.expected()).abs()
    unit = torch.finfo(torch.float32).eps * argument.abs()
    assert (error <= ULP[activation] * unit).all()
    assert argument.min() < -3
    assert argument.max() > 3


@pytest.mark.parametrize("tile", ["small", "batch8", "wgmma64"])
def test_special_values(tile: str) -> None:
    """NaN passes through relu as in PyTorch; no infinity meets the zeros that fill up K and tokens."""
    config = default_config(tile, epilogue=Epilogue(activation="relu"))
    case = Case(config, Problem(16, 100), tokens=5)
    case.x = case.x.abs() + 1
    case.x[2, 3] = torch.nan
    case.weight[3, 96] = torch.inf
    case.weight[3, 97:] = 0
    result, report = case.run()
    assert not report.errors, report.messages
    assert torch.equal(result.isnan(), case.expected().isnan())
    assert (result[:, 3].isinf() | result[:, 3].isnan()).all()

"""Configurations: what is refused, and that they are plain data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda.config import ARCHES, ELEMENTS, Epilogue, KernelConfig
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tiles import TILES, default_config, tile_for, warpgroup_tile


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("tile", TILES)
def test_defaults_fit_every_architecture(tile: str, dtype: str) -> None:
    config = default_config(tile, dtype)
    for arch, limits in ARCHES.items():
        if limits.capability >= config.element.first_capability:
            assert config.refusal(arch) == ""


WGMMA = {"instruction": "wgmma.sp", "block_m": 64, "warps_m": 4, "warps_n": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp64"}, "dtype must be one of"),
        ({"out_dtype": "int32"}, "out_dtype must be one of"),
        ({"layout": "nhcw"}, "layout must be one of"),
        ({"block_m": 40}, "rows must be a multiple of 16"),
        ({"block_n": 96}, "block_n must be a power of two"),
        ({"block_n": 4}, "tokens must be a multiple of 8"),
        ({"block_k": 32}, "block_k must be a multiple of 64"),
        ({"block_k": 64, "warps_k": 2}, r"block_k must be a multiple of 64 \* warps_k"),
        ({"stages": 1}, "stages must be at least 2"),
        ({"stages": 12}, "bytes of shared memory are more than"),
        ({"block_m": 0}, "positive"),
        ({"block_m": 256, "block_n": 256}, "accumulators"),
        ({"dtype": "int8", "block_k": 128, "epilogue": Epilogue(bias=True)}, "int32 outputs are raw sums"),
        ({"block_m": 1024, "block_n": 64, "warps_m": 32, "warps_n": 2}, "at most 1024 threads"),
        ({"layout": "nchw", "block_n": 8, "warps_n": 1}, "block_n must be at least 32"),
        ({"layout": "nchw", "epilogue": Epilogue(token_scale=True)}, "token_scale is for layout rows"),
        ({"instruction": "wmma"}, "instruction must be one of"),
        ({"instruction": "wgmma.sp"}, "four warps for 64 output features"),
        ({**WGMMA, "block_k": 128}, "tiles of 128 bytes of K"),
        ({**WGMMA, "layout": "nchw"}, "layout rows"),
        ({**WGMMA, "stages": 2}, "at least 3 stages"),
        ({**WGMMA, "block_n": 512}, "at most 256 tokens"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        KernelConfig(**options)  # type: ignore[arg-type]


def test_refusals_of_architectures() -> None:
    assert "compute capability 8.9" in default_config("small", "e4m3").refusal("sm_80")
    big = KernelConfig(block_m=128, block_n=256, warps_m=2, warps_n=4, stages=3)
    assert "135168 bytes of shared memory, sm_86 has 101376" in big.refusal("sm_86")
    assert "wgmma.sp is an instruction of sm_90a" in default_config("wgmma64").refusal("sm_90")
    assert default_config("wgmma64", "e4m3").refusal("sm_90a") == ""
    with pytest.raises(InvalidOption, match="sm_75"):
        big.refusal("sm_75")
    with pytest.raises(InvalidOption, match="activation must be one of"):
        Epilogue(activation="tanh")
    with pytest.raises(InvalidOption, match="tile must be one of"):
        default_config("huge")


def test_plain_data() -> None:
    epilogue = Epilogue(bias=True, activation="silu", residual=True)
    config = default_config("batch32", "bf16", epilogue=epilogue, layout="nchw")
    assert KernelConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    conv = Conv(5, (3, 3), (2, 1), (1, 0), (1, 2))
    problem = Problem(7, conv.k, conv, 4)
    assert Problem.from_dict(json.loads(json.dumps(problem.as_dict()))) == problem
    assert Problem.from_dict(Problem(7, 9).as_dict()) == Problem(7, 9)


def test_sizes() -> None:
    conv = Conv(5, (3, 3), (2, 1), (1, 0), (1, 2))
    assert conv.k == 72
    assert conv.output_size(7, 9) == (4, 5)
    with pytest.raises(InvalidOption, match="smaller than the kernel"):
        conv.output_size(7, 4)
    with pytest.raises(InvalidOption, match="k must be 72"):
        Problem(8, 45, conv)
    with pytest.raises(InvalidOption, match="must be positive"):
        Conv(0)
    with pytest.raises(InvalidOption, match="out and k must be positive"):
        Problem(0, 4)
    with pytest.raises(InvalidOption, match="pixel_align"):
        Problem(4, 4, None, 3)
    assert [tile_for(n) for n in (1, 9, 33, 100, 300, 4096)] == [
        "batch8", "batch16", "batch32", "small", "medium", "large",
    ]  # fmt: skip
    assert tile_for(33, 14336) == "broad32"


def test_the_warpgroups_tile_is_the_one_with_the_fewest_waves() -> None:
    """The products that were measured on an H100 have the tile that was the fastest there."""
    fastest = {
        (64, 4096): "",
        (256, 4096): "wgmma64",
        (256, 14336): "wgmma256",
        (1024, 4096): "wgmma256",
        (2048, 2048): "wgmma256",
        (8192, 8192): "wgmma256",
    }
    assert {size: warpgroup_tile(*size) for size in fastest} == fastest


def test_importing_is_light() -> None:
    code = (
        "import sys, sparsecc, sparsecc.targets, sparsecc.targets.cuda;"
        "assert not {'tvm', 'tvm_ffi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

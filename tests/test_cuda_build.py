"""Compiling kernels without a GPU: registers, shared memory, spills, sparse instructions in machine code."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecc.errors import InvalidModel, InvalidOption, SparseccError, TargetRefused, TargetUnavailable
from sparsecc.targets.cuda import generate, kept
from sparsecc.targets.cuda.build import Kernel, build_gemm
from sparsecc.targets.cuda.config import ARCHES, Epilogue, KernelConfig
from sparsecc.targets.cuda.nvrtc import compile_source
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tiles import TILES, WGMMA_TILES, default_config

pytest.importorskip("tvm", reason="kernels are generated with TVM: pip install 'sparsecc[cuda]'")
pytest.importorskip("nvidia", reason="kernels are compiled with NVRTC: pip install 'sparsecc[cuda]'")

FULL = Epilogue(scale=True, bias=True, activation="gelu", residual=True)
# Sparse instructions of the machine code, by element type.
SASS = {"fp16": "HMMA.SP", "bf16": "HMMA.SP", "int8": "IMMA.SP", "e4m3": "QMMA.SP", "e5m2": "QMMA.SP"}
EMULATED = {("e4m3", "sm_90"), ("e4m3", "sm_90a"), ("e5m2", "sm_90"), ("e5m2", "sm_90a")}


def nvdisasm() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for tool in Path(location).glob("*/bin/nvdisasm"):
            return tool
    return None


def disassembled(cubin: bytes, folder: Path) -> str:
    tool = nvdisasm()
    if tool is None:
        pytest.skip("counting instructions needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    return subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=True).stdout


def instructions(config: KernelConfig) -> int:
    """Sparse instructions that a warp issues for one tile."""
    m = config.block_m // config.warps_m // 16
    n = config.block_n // config.warps_n // 8
    return m * n * config.units // config.warps_k * config.element.steps


def check(kernel: Kernel, folder: Path) -> None:
    config = kernel.config
    count = instructions(config)
    copies, rest = divmod(kernel.ptx.count("mma.sp::ordered_metadata"), count)  # short loops are unrolled
    assert copies >= 1
    assert rest == 0
    for arch, image in kernel.images.items():
        limits = ARCHES[arch]
        assert image.spills == 0
        assert image.stack == 0
        assert image.registers <= min(limits.registers, 65536 // config.threads)
        assert config.shared_bytes <= limits.shared_bytes
        if (config.dtype, arch) in EMULATED:
            continue
        found = len(re.findall(rf"\b{re.escape(SASS[config.dtype])}\.", disassembled(image.cubin, folder)))
        assert found >= count, f"{arch}: {found} sparse instructions, at least {count} expected"
        assert found % count == 0


@pytest.mark.parametrize("tile", TILES)
def test_fp16(tile: str, tmp_path: Path) -> None:
    check(build_gemm(default_config(tile, epilogue=FULL), Problem(4096, 4096), ["sm_80"]), tmp_path)


@pytest.mark.parametrize("tile", ["large", "batch8"])
def test_every_architecture(tile: str, tmp_path: Path) -> None:
    check(build_gemm(default_config(tile, epilogue=FULL), Problem(4096, 4096), list(ARCHES)), tmp_path)


@pytest.mark.parametrize("tile", ["large", "small", "batch16"])
def test_int8(tile: str, tmp_path: Path) -> None:
    config = default_config(tile, "int8", epilogue=FULL, out_dtype="bf16")
    check(build_gemm(config, Problem(1000, 1000), ["sm_80"]), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    check(build_gemm(default_config("large", dtype, epilogue=FULL), Problem(4096, 4096), ["sm_89"]), tmp_path)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("tile", WGMMA_TILES)
def test_wgmma(tile: str, dtype: str, tmp_path: Path) -> None:
    """All products of a tile are there, and none waits for another: one wait for all stands at the end."""
    config = default_config(tile, dtype, epilogue=FULL, out_dtype="fp32")
    image = build_gemm(config, Problem(4096, 4096), ["sm_90a"]).images["sm_90a"]
    assert (image.spills, image.stack, image.serialized) == (0, 0, False)
    assert image.registers <= min(255, 65536 // config.threads)
    sass = disassembled(image.cubin, tmp_path)
    name = {"fp16": "HGMMA.SP", "int8": "IGMMA.SP"}[dtype]
    products = len(re.findall(rf"\b{re.escape(name)}\.", sass))
    assert (
        products >= 4 * config.units * config.element.steps
    )  # three tiles in the loop, one at least after it
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass)) == 1


@pytest.mark.parametrize(("layout", "tile"), [("rows", "small"), ("nchw", "batch32")])
def test_convolution(layout: str, tile: str, tmp_path: Path) -> None:
    conv = Conv(64, (3, 3), (1, 1), (1, 1))
    config = default_config(tile, epilogue=FULL, layout=layout)
    check(build_gemm(config, Problem(64, conv.k, conv), ["sm_80"]), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", SASS)
@pytest.mark.parametrize("layout", ["rows", "nchw"])
@pytest.mark.parametrize("tile", TILES)
def test_everything(tile: str, layout: str, dtype: str, tmp_path: Path) -> None:
    if layout == "nchw" and default_config(tile).block_n < 32:
        pytest.skip("no such tile")
    config = default_config(tile, dtype, epilogue=FULL, layout=layout, out_dtype="fp32")
    native = [arch for arch in ("sm_80", "sm_89", "sm_90", "sm_120") if (dtype, arch) not in EMULATED]
    arches = [arch for arch in native if not config.refusal(arch)]  # what is emulated may spill
    for problem in (Problem(4096, 4096, None, 8), Problem(1001, 1004, None, 4)):
        check(build_gemm(config, problem, arches), tmp_path)


def test_kernel_is_stored_and_loaded() -> None:
    kernel = build_gemm(default_config("small", epilogue=FULL), Problem(100, 64), ["sm_90", "sm_80"])
    assert list(kernel.images) == ["sm_80", "sm_90"]
    assert kernel.ptx_arch == "sm_80"
    assert ".target sm_80" in kernel.ptx
    assert kernel.entry in kernel.ptx
    manifest = json.loads(json.dumps(kernel.manifest()))
    back = Kernel.load(manifest, kernel.files())
    assert back.manifest() == manifest
    assert back.files() == kernel.files()
    assert back.launch(tokens=65) == kernel.launch(tokens=65)
    for broken in ({**manifest, "format": 2}, {**manifest, "source_sha256": "0"}, {"format": 1}):
        with pytest.raises(InvalidModel):
            Kernel.load(broken, kernel.files())
    with pytest.raises(InvalidModel, match="incomplete"):
        Kernel.load(manifest, {})


def test_launches() -> None:
    kernel = build_gemm(default_config("small", epilogue=Epilogue(bias=True)), Problem(100, 64), ["sm_80"])
    launch = kernel.launch(tokens=65)
    assert (launch.grid, launch.block) == ((4, 1, 1), 128)
    assert launch.shared_bytes == kernel.config.shared_bytes
    assert kernel.manifest()["grid"] == ["ceil(tokens / 64) * 2", "1", "1"]
    assert launch.scalars == {"tokens": 65}
    assert set(kernel.parameters) == {"weight", "metadata", "x", "d", "bias", "tokens"}
    assert kernel.traffic(10) == 112 * 64 + 112 * 64 // 8 + 10 * (64 + 100) * 2
    with pytest.raises(InvalidOption, match="tokens of at least 1"):
        kernel.launch(tokens=0)
    conv = Conv(8, (3, 3), (2, 2), (1, 1))
    config = default_config("small", layout="nchw")
    kernel = build_gemm(config, Problem(70, conv.k, conv), ["sm_80"])
    launch = kernel.launch(batch=3, height=17, width=15)
    assert launch.grid == (4, 1, 3)
    assert launch.scalars == {"pixels": 72, "height": 17, "width": 15, "out_width": 8}
    kernel = build_gemm(config, Problem(70, 64, None, 4), ["sm_80"])
    assert kernel.launch(batch=2, pixels=36).scalars == {"pixels": 36}
    with pytest.raises(InvalidOption, match="38 pixels are no multiple of pixel_align 4"):
        kernel.launch(batch=2, pixels=38)


def test_equal_kernels_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config, problem = default_config("batch8"), Problem(64, 256)
    first = build_gemm(config, problem, ["sm_80"])
    monkeypatch.setattr(kept, "gemm_source", None)
    monkeypatch.setattr(kept, "compile_source", None)
    assert build_gemm(default_config("batch8"), Problem(64, 256), ["sm_80"]).images == first.images


@pytest.mark.parametrize("version", ["0.26.0", None])
def test_another_tvm(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if version is None:
        monkeypatch.setitem(sys.modules, "tvm", None)
    else:
        monkeypatch.setattr("tvm.__version__", version)
    with pytest.raises(TargetUnavailable, match=r"TVM.*pip install 'sparsecc\[cuda\]'"):
        generate.gemm_source(default_config("small"), Problem(64, 64), name="kernel")


def test_refusals() -> None:
    with pytest.raises(TargetRefused, match=r"sm_80: e4m3 needs compute capability 8\.9"):
        build_gemm(default_config("small", "e4m3"), Problem(64, 64), ["sm_89", "sm_80"])
    with pytest.raises(InvalidOption, match="sm_75"):
        build_gemm(default_config("small"), Problem(64, 64), ["sm_75"])
    with pytest.raises(InvalidOption, match="at least one"):
        build_gemm(default_config("small"), Problem(64, 64), [])
    with pytest.raises(SparseccError, match=r"cannot compile broken\.cu .*identifier \"y\" is undefined"):
        compile_source("__global__ void f() { y; }", "sm_80", name="broken.cu")

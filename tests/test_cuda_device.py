"""Generated kernels on a real GPU: exact on integers, inside CUDA graphs.  ``make gpu-test``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.targets.cuda.build import Kernel, build_gemm
from sparsecc.targets.cuda.config import ARCHES, Epilogue, KernelConfig
from sparsecc.targets.cuda.driver import driver
from sparsecc.targets.cuda.launch import image_for, start
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tiles import TILES, WGMMA_TILES, default_config
from tests.cuda_kernels import DTYPES, Case
from tests.test_cuda_target import two_of_four

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU with sparse tensor cores; none is here"
)


def arch_for(config: KernelConfig) -> str:
    """The newest architecture that this GPU runs code of and that has the kernel's instructions."""
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    fitting = [
        arch
        for arch in ARCHES.values()
        if arch.capability // 10 == major
        and (arch.capability == here if arch.name.endswith("a") else arch.capability <= here)
        and not config.refusal(arch.name)
    ]
    if not fitting:
        pytest.skip(f"{config.tile_name} ({config.dtype}) does not run on compute capability {major}.{minor}")
    return max(fitting, key=lambda arch: (arch.capability, not arch.name.endswith("a"))).name


def launched(kernel: Kernel, case: Case) -> torch.Tensor:
    """The kernel's result for a case, on the GPU."""
    device = torch.device("cuda")
    torch.empty(1, device=device)
    image = image_for(kernel, *torch.cuda.get_device_capability())
    assert image is not None
    function = driver().function(image, kernel.entry, kernel.config.shared_bytes)
    packed = pack(case.weight.to(DTYPES[kernel.config.dtype]))
    out_dtype = DTYPES[kernel.config.out_dtype]
    tensors: dict[str, Any] = {
        "weight": torch.from_numpy(packed.values),
        "metadata": torch.from_numpy(packed.metadata),
        "x": case.x.to(DTYPES[kernel.config.dtype]),
        "d": torch.full(case.output_shape, -77).to(out_dtype),
        "scale": case.scale.float(),
        "bias": case.bias.float(),
        "residual": case.residual.to(out_dtype),
    }
    there = {name: tensor.contiguous().to(device) for name, tensor in tensors.items()}
    if kernel.problem.conv is not None:
        assert case.size is not None
        launch = kernel.launch(batch=case.batch, height=case.size[0], width=case.size[1])
    elif kernel.config.layout == "nchw":
        launch = kernel.launch(batch=case.batch, pixels=case.tokens)
    else:
        launch = kernel.launch(tokens=case.tokens)
    start(function, kernel, launch, there)
    torch.cuda.synchronize()
    result: torch.Tensor = there["d"].cpu()
    return result


EPILOGUES = (
    Epilogue(),
    Epilogue(bias=True, activation="relu"),
    Epilogue(scale=True, bias=True, residual=True),
)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "e4m3", "e5m2"])
@pytest.mark.parametrize("tile", [*TILES, *WGMMA_TILES])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_every_family_is_exact_on_integers(dtype: str, tile: str, epilogue: Epilogue) -> None:
    out_dtype = "fp32" if dtype == "int8" and not epilogue.empty else ""
    config = default_config(tile, dtype, epilogue=epilogue, out_dtype=out_dtype)
    arch = arch_for(config)
    for out, k, tokens in ((64, 64, 5), (200, 132, 77), (256, 512, 300)):
        case = Case(config, Problem(out, k), tokens=tokens)
        found = launched(build_gemm(config, Problem(out, k), [arch]), case)
        assert torch.equal(found.double(), case.expected().to(DTYPES[config.out_dtype]).double())


@pytest.mark.parametrize(
    "conv", [Conv(16), Conv(12, (3, 3), padding=(1, 1)), Conv(8, (3, 3), (2, 2), (1, 1))]
)
@pytest.mark.parametrize("layout", ["rows", "nchw"])
def test_convolutions_are_exact_on_integers(conv: Conv, layout: str) -> None:
    config = default_config("small", "fp16", layout=layout, epilogue=Epilogue(bias=True))
    case = Case(config, Problem(40, conv.k, conv=conv), batch=2, size=(13, 9))
    found = launched(build_gemm(config, case.problem, [arch_for(config)]), case)
    assert torch.equal(found.double(), case.expected().to(torch.float16).double())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.weight.copy_(two_of_four(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


def test_an_artifact_runs_on_the_gpu_and_equals_its_cpu_form() -> None:
    model, x = Block().eval(), torch.randn(64, 256)
    major, minor = torch.cuda.get_device_capability()
    compiled = sparsecc.compile(model, (x,), target=f"sm{major}{minor}-2:4", options={"choose": "always"})
    assert compiled.start().device.type == "cuda"
    assert compiled.certificate.status == "VERIFIED"
    torch.testing.assert_close(compiled(x), model(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("activations", ["int8", "uint8", None])
def test_a_quantised_artifact_runs_on_the_gpu(activations: str | None) -> None:
    """Its certificate compares each product in integers with the exact one."""
    batches = [(torch.randn(64, 256),) for _ in range(4)]
    pruned = sparsecc.prune(Block().eval(), batches[0], recipe="NMPattern(pattern='2:4')")
    model = sparsecc.quantize(pruned, calibration=batches, activations=activations).model
    major, minor = torch.cuda.get_device_capability()
    compiled = sparsecc.compile(model, target=f"sm{major}{minor}-2:4-int8", options={"choose": "always"})
    assert compiled.start().device.type == "cuda"
    assert compiled.certificate.status == "VERIFIED"
    assert any(check.what == "each product in integers" for check in compiled.certificate.checks)


def test_the_operator_works_in_cuda_graphs() -> None:
    model, x = Block().eval(), torch.randn(64, 256)
    major, minor = torch.cuda.get_device_capability()
    compiled = sparsecc.compile(model, (x,), target=f"sm{major}{minor}-2:4", options={"choose": "always"})
    executor = compiled.start()
    static = x.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        executor.run_named({"x": static})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = executor.run_named({"x": static})
    static.copy_(2 * x)
    graph.replay()
    torch.cuda.synchronize()
    (y,) = found.values()
    torch.testing.assert_close(y.cpu(), model(2 * x), atol=4e-2, rtol=4e-2)

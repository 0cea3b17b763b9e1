"""From a configuration and sizes to CUDA source."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsecc.targets.cuda.activations import source_type
from sparsecc.targets.cuda.config import KernelConfig
from sparsecc.targets.cuda.gemm import write_gemm
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.tile import Tile
from sparsecc.targets.cuda.tvm_build import Emitter, Launch, Signature, Source, emit
from sparsecc.targets.cuda.wgmma import write_wgmma

_WRITERS: Mapping[str, Callable[[Tile], None]] = {"mma.sp": write_gemm, "wgmma.sp": write_wgmma}
_ARCH = {"mma.sp": "sm_80", "wgmma.sp": "sm_90a"}  # what TVM is told; the text serves later ones, too


def gemm_source(config: KernelConfig, problem: Problem, *, name: str) -> Source:
    """CUDA source of ``D = activation(scale * (W X) + bias) + residual``."""

    return emit(signature(config, problem, name), body_of(config, problem), _ARCH[config.instruction])


def body_of(config: KernelConfig, problem: Problem) -> Callable[[Emitter, Launch], None]:
    """What writes the kernel's statements."""

    def body(e: Emitter, launch: Launch) -> None:
        tile = Tile.begin(e, config, problem, launch)
        with e.when(tile.exists):
            _WRITERS[config.instruction](tile)

    return body


def signature(config: KernelConfig, problem: Problem, name: str) -> Signature:
    """The kernel's parameters: tensors by address, then int32 sizes."""
    epilogue = config.epilogue
    optional = [name for name in ("scale", "token_scale", "bias", "residual") if getattr(epilogue, name)]
    tensors = ["weight", "metadata", "x", "d", *optional]
    scalars = source_type(config, problem).scalars
    return Signature(name, tensors, scalars, config.threads, config.shared_bytes)

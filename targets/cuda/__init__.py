"""Kernels for sparse tensor cores: 2:4 weights times dense activations, generated, compiled and described.

    packed = pack(weight)                                      values and metadata, as the hardware reads them
    kernel = build_gemm(config, Problem(out, k), ["sm_80"])    CUDA source (TVM), machine code (NVRTC)
    kernel.launch(tokens=n)                                    what a driver needs to run it

``config`` and ``problem`` are data, ``gemm`` with ``activations`` and ``epilogue`` is the generator,
``tvm_build`` and ``nvrtc`` are the two compilers, which are loaded when a kernel is built.  Tests execute
kernels instruction by instruction (``tests/cuda_sim``); docs/gpu.md says what was seen on hardware.
"""

from sparsecc.targets.cuda.build import Kernel, Launch, build_gemm
from sparsecc.targets.cuda.config import ARCHES, Epilogue, KernelConfig
from sparsecc.targets.cuda.pack import Packed, conv_matrix, is_packable, pack, unpack
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tiles import TILES, default_config, tile_for

__all__ = [
    "ARCHES",
    "TILES",
    "Conv",
    "Epilogue",
    "Kernel",
    "KernelConfig",
    "Launch",
    "Packed",
    "Problem",
    "build_gemm",
    "conv_matrix",
    "default_config",
    "is_packable",
    "pack",
    "tile_for",
    "unpack",
]

"""From a configuration and sizes to a compiled kernel that can be stored, listed and launched.

    kernel = build_gemm(default_config("large", "bf16", epilogue=Epilogue(bias=True)), Problem(4096, 4096))
    launch = kernel.launch(tokens=512)     # grid, block, shared memory, integer arguments
    kernel.images["sm_80"].cubin           # machine code; kernel.ptx for later architectures

Equal configurations and sizes are built once on a machine (``sparsecc.targets.cuda.kept``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sparsecc.errors import InvalidModel, InvalidOption, TargetRefused
from sparsecc.targets.cuda.config import ARCHES, OUTPUT_BYTES, KernelConfig
from sparsecc.targets.cuda.grid import grid, grid_rule
from sparsecc.targets.cuda.kept import compiled, source
from sparsecc.targets.cuda.nvrtc import Compiled
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.roofline import traffic
from sparsecc.targets.cuda.tvm_build import Source

FORMAT = 1
"""Version of the manifest of a kernel."""

_AT_A_TIME = min(8, os.cpu_count() or 1)
"""Compilations at one time; each takes some 150 MB."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to launch a kernel: blocks, threads a block, bytes of dynamic shared memory, integers by name."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    scalars: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Image:
    """Machine code for one architecture, and what it takes (registers a thread, bytes).

    ``serialized``: products of wgmma wait for each other, which costs speed, nothing else.
    """

    arch: str
    cubin: bytes
    registers: int
    spills: int
    stack: int
    serialized: bool


@dataclass(frozen=True, eq=False, slots=True)
class Kernel:
    """A compiled kernel.

    ``parameters`` are its arguments in order: addresses (aligned to 16 bytes) of contiguous tensors

        weight, metadata   as ``pack`` gives them             x    activations
        scale, bias        float32 [out]                      d    output
        token_scale        float32 [tokens]                   residual   like the output

    and int32 sizes, which ``launch`` computes.  ``ptx`` is for ``ptx_arch`` and whatever comes after it.
    """

    config: KernelConfig
    problem: Problem
    entry: str
    parameters: tuple[str, ...]
    source: str
    ptx: str
    ptx_arch: str
    images: Mapping[str, Image]

    def launch(
        self, *, tokens: int = 0, batch: int = 0, height: int = 0, width: int = 0, pixels: int = 0
    ) -> Launch:
        """The launch for run-time sizes, all of them at least 1.

        Products of layout rows take ``tokens``, of layout nchw ``batch`` and ``pixels``; convolutions take
        ``batch``, ``height`` and ``width`` of their input.  Raises ``InvalidOption`` where a size is missing,
        and for pixels that ``pixel_align`` does not divide.
        """
        config, conv = self.config, self.problem.conv
        sizes: dict[str, int] = {}
        if conv is not None:
            _require(batch=batch, height=height, width=width)
            out_height, out_width = conv.output_size(height, width)
            pixels, tokens = out_height * out_width, batch * out_height * out_width
            sizes = {"height": height, "width": width, "out_height": out_height, "out_width": out_width}
        nchw = config.layout == "nchw"
        _require(**({"batch": batch, "pixels": pixels} if nchw else {"tokens": tokens}))
        if nchw and pixels % self.problem.pixel_align:
            raise InvalidOption(f"{pixels} pixels are no multiple of pixel_align {self.problem.pixel_align}")
        sizes |= {"tokens": tokens, "pixels": pixels}
        return Launch(
            grid(config, self.problem, pixels if nchw else tokens, batch if nchw else 1),
            config.threads,
            config.shared_bytes,
            {name: sizes[name] for name in self.parameters if name in sizes},
        )

    def traffic(self, tokens: int) -> int:
        """Bytes that have to cross from and to memory for ``tokens`` rows, each once."""
        config = self.config
        return traffic(
            self.problem,
            tokens,
            element=config.element.bytes,
            output=OUTPUT_BYTES[config.out_dtype],
            residual=config.epilogue.residual,
        )

    def manifest(self) -> dict[str, Any]:
        """Plain data that describes the kernel; ``files`` has what belongs to it."""
        images = {
            arch: {
                "registers": image.registers,
                "spills": image.spills,
                "stack": image.stack,
                "serialized": image.serialized,
                "bytes": len(image.cubin),
            }
            for arch, image in self.images.items()
        }
        return {
            "format": FORMAT,
            "entry": self.entry,
            "parameters": list(self.parameters),
            "config": self.config.as_dict(),
            "problem": self.problem.as_dict(),
            "threads": self.config.threads,
            "shared_bytes": self.config.shared_bytes,
            "grid": list(grid_rule(self.config, self.problem)),
            "ptx_arch": self.ptx_arch,
            "images": images,
            "source_sha256": hashlib.sha256(self.source.encode()).hexdigest(),
        }

    def files(self) -> dict[str, bytes]:
        """What is stored beside the manifest, by file name."""
        cubins = {f"{self.entry}.{arch}.cubin": image.cubin for arch, image in self.images.items()}
        return {f"{self.entry}.cu": self.source.encode(), f"{self.entry}.ptx": self.ptx.encode(), **cubins}

    @classmethod
    def load(cls, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Kernel:
        """The kernel that was stored; needs neither TVM nor NVRTC.  Raises ``InvalidModel``."""
        try:
            if manifest["format"] != FORMAT:
                raise InvalidModel(f"kernel manifest of format {manifest['format']}; this reads {FORMAT}")
            entry = str(manifest["entry"])
            source = files[f"{entry}.cu"]
            if hashlib.sha256(source).hexdigest() != manifest["source_sha256"]:
                raise InvalidModel(f"the source of kernel {entry} is not the one of its manifest")
            images = {
                arch: Image(
                    arch,
                    files[f"{entry}.{arch}.cubin"],
                    *(row[n] for n in ("registers", "spills", "stack", "serialized")),
                )
                for arch, row in manifest["images"].items()
            }
            return cls(
                KernelConfig.from_dict(manifest["config"]),
                Problem.from_dict(manifest["problem"]),
                entry,
                tuple(manifest["parameters"]),
                source.decode(),
                files[f"{entry}.ptx"].decode(),
                str(manifest["ptx_arch"]),
                images,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidModel(f"a kernel manifest is incomplete: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Wanted:
    """One kernel to be built for some architectures."""

    config: KernelConfig
    problem: Problem
    arches: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.arches:
            raise InvalidOption("at least one architecture is needed")
        refusals = [f"{arch}: {why}" for arch in self.arches if (why := self.config.refusal(arch))]
        if refusals:
            config = self.config
            raise TargetRefused(
                f"kernel {config.tile_name} ({config.dtype}) cannot run on " + "; ".join(refusals)
            )


def build_gemm(config: KernelConfig, problem: Problem, arches: Sequence[str] = ("sm_80", "sm_90")) -> Kernel:
    """Generate and compile a kernel for every architecture of ``arches``.

    Raises ``TargetRefused`` with every architecture that cannot run it and why, ``InvalidOption`` for an
    unknown one, ``TargetUnavailable`` where TVM or NVRTC is missing.
    """
    return build_gemms([Wanted(config, problem, tuple(arches))])[0]


def build_gemms(wanted: Iterable[Wanted]) -> list[Kernel]:
    """The kernels in order; raises what ``build_gemm`` raises.

    Machine code is made on all cores (NVRTC runs outside of Python's lock) while TVM writes the next sources.
    """
    made: list[tuple[Wanted, Source]] = []
    jobs: dict[tuple[str, str], Future[Compiled]] = {}
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for one in wanted:
            text = source(one.config, one.problem, kernel_name(one.config, one.problem))
            made.append((one, text))
            for arch in one.arches:
                if (text.text, arch) not in jobs:
                    jobs[text.text, arch] = pool.submit(compiled, text.text, arch)
    return [_kernel(one, text, [jobs[text.text, arch].result() for arch in one.arches]) for one, text in made]


def _kernel(wanted: Wanted, text: Source, built: Sequence[Compiled]) -> Kernel:
    ordered = sorted(built, key=lambda done: list(ARCHES).index(done.arch))
    images = {
        done.arch: Image(done.arch, done.cubin, done.registers, done.spills, done.stack, done.serialized)
        for done in ordered
    }
    first = ordered[0]
    return Kernel(
        wanted.config, wanted.problem, text.entry, text.parameters, text.text, first.ptx, first.arch, images
    )


def kernel_name(config: KernelConfig, problem: Problem) -> str:
    """A name that tells kernels apart: ``sp24_fp16_rows_128x128x64_w2x2x1_s3_4096x1024_bias_relu``."""
    epilogue = config.epilogue
    family = "sp24" if config.instruction == "mma.sp" else "sp24w"
    parts = [family, config.dtype, config.layout, config.tile_name, f"{problem.out}x{problem.k}"]
    if config.out_dtype != config.element.outputs[0]:
        parts.append(f"to_{config.out_dtype}")
    parts += [name for name in ("scale", "token_scale", "bias", "residual") if getattr(epilogue, name)]
    if epilogue.activation != "none":
        parts.append(epilogue.activation)
    if problem.pixel_align != 1:
        parts.append(f"align{problem.pixel_align}")
    if problem.conv is not None:
        conv = problem.conv
        named = {
            "c": (conv.channels,),
            "k": conv.kernel,
            "s": conv.stride,
            "p": conv.padding,
            "d": conv.dilation,
        }
        parts += [key + "x".join(map(str, sizes)) for key, sizes in named.items()]
    return "_".join(parts)


def _require(**sizes: int) -> None:
    missing = [name for name, size in sizes.items() if size < 1]
    if missing:
        raise InvalidOption(f"a launch needs {', '.join(missing)} of at least 1")

"""What one generated kernel is: element type, tile, pipeline, layout and epilogue, checked against hardware.

    D = activation(scale * (W X) + bias) + residual

``W`` [out, k] holds 2:4 weights, ``X`` the activations of ``tokens`` rows (pixels of a convolution count
as rows).  A configuration says nothing of sizes: those are in ``sparsecc.targets.cuda.problem``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sparsecc.errors import InvalidOption

UNIT = 64
"""Weights of one row that one metadata word a lane describes; the packed K is a multiple of it."""

FRAGMENT_BYTES = 512
"""One A fragment of a warp: 32 lanes of 16 bytes, whatever the element type."""


@dataclass(frozen=True, slots=True)
class Element:
    """An element type of weights and activations, and the instructions that multiply it.

    ``instruction`` is a warp's (mma.sp), ``wgmma`` the tail of a warpgroup's (wgmma.mma_async.sp, m64).
    ``steps`` is the number of instructions that a unit of 64 weights takes (PTX ISA: k32 for 16-bit elements,
    k64 for 8-bit ones); ``first_capability`` is the first compute capability that has it.
    """

    bytes: int
    instruction: str
    wgmma: str
    accumulator: str
    outputs: tuple[str, ...]
    first_capability: int

    @property
    def steps(self) -> int:
        return self.bytes


def _element(size: int, name: str, total: str, outputs: tuple[str, ...], capability: int) -> Element:
    k = 64 // size
    return Element(
        size,
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{k}.row.col.{total}.{name}.{name}.{total}",
        f"k{k}.{total}.{name}.{name}",
        {"f32": "float32", "s32": "int32"}[total],
        outputs,
        capability,
    )


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        "fp16": _element(2, "f16", "f32", ("fp16", "fp32"), 80),
        "bf16": _element(2, "bf16", "f32", ("bf16", "fp32"), 80),
        "int8": _element(1, "s8", "s32", ("int32", "fp16", "bf16", "fp32"), 80),
        "e4m3": _element(1, "e4m3", "f32", ("fp16", "bf16", "fp32"), 89),
        "e5m2": _element(1, "e5m2", "f32", ("fp16", "bf16", "fp32"), 89),
    }
)
OUTPUT_BYTES: Mapping[str, int] = MappingProxyType({"fp16": 2, "bf16": 2, "fp32": 4, "int32": 4})
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
LAYOUTS = ("rows", "nchw")
INSTRUCTIONS = ("mma.sp", "wgmma.sp")


@dataclass(frozen=True, slots=True)
class Arch:
    """The limits of one GPU architecture (CUDA C++ programming guide, compute capabilities).

    ``shared_bytes`` is what one block may have, ``threads`` per block, ``registers`` per thread.
    """

    name: str
    capability: int
    shared_bytes: int
    threads: int = 1024
    registers: int = 255


ARCHES: Mapping[str, Arch] = MappingProxyType(
    {
        arch.name: arch
        for arch in (
            Arch("sm_80", 80, 163 << 10),
            Arch("sm_86", 86, 99 << 10),
            Arch("sm_89", 89, 99 << 10),
            Arch("sm_90", 90, 227 << 10),
            Arch("sm_90a", 90, 227 << 10),
            Arch("sm_120", 120, 99 << 10),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What happens to the sums before they are stored, in this order, in float32.

    ``scale`` multiplies by a float32 [out] (dequantisation of 8-bit elements), ``bias`` adds a float32 [out],
    ``activation`` is one of ``ACTIVATIONS``, ``residual`` adds a tensor of the output's shape and type.
    ``token_scale`` multiplies by a float32 [tokens] after ``scale`` (activations quantised token by token).
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False
    scale: bool = False
    token_scale: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InvalidOption(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}"
            )

    @property
    def empty(self) -> bool:
        return self == Epilogue()


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One kernel family member.

    ``block_m`` x ``block_n`` x ``block_k`` is the tile of a block in output features, tokens and elements of
    K; ``warps_m`` x ``warps_n`` x ``warps_k`` are its warps (those along K split every tile and add their
    sums at the end); ``stages`` is the depth of the cp.async pipeline.  ``layout``: ``rows`` has activations
    [tokens, k] and outputs [tokens, out] (nn.Linear, NHWC convolution), ``nchw`` has [batch, k, pixels] and
    [batch, out, pixels].  ``instruction`` is ``mma.sp`` or, on sm_90a, ``wgmma.sp``, for which four warps
    have 64 output features and hold ``weight_stages`` tiles of weights in registers, an even number.
    ``group`` tiles of output features are made side by side (``grid``).  Raises ``InvalidOption`` for what no
    architecture can run.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    warps_m: int = 2
    warps_n: int = 2
    warps_k: int = 1
    stages: int = 3
    dtype: str = "fp16"
    out_dtype: str = ""
    layout: str = "rows"
    epilogue: Epilogue = field(default_factory=Epilogue)
    instruction: str = "mma.sp"
    weight_stages: int = 4
    group: int = 8

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENTS:
            raise InvalidOption(f"dtype must be one of {', '.join(ELEMENTS)}; got {self.dtype!r}")
        if not self.out_dtype:
            object.__setattr__(self, "out_dtype", self.element.outputs[0])
        problems = [message for wrong, message in self._rules() if wrong]
        if problems:
            raise InvalidOption(f"{self}: " + "; ".join(problems))

    def _rules(self) -> list[tuple[bool, str]]:
        """Each rule as (broken, message); later rules hold only where earlier ones do."""
        sizes = (self.block_m, self.block_n, self.block_k, self.warps_m, self.warps_n, self.warps_k)
        if any(size < 1 for size in (*sizes, self.group)):
            return [(True, "sizes and warps must be positive")]
        m, n = self.block_m // self.warps_m, self.block_n // self.warps_n
        return [
            (self.instruction not in INSTRUCTIONS, f"instruction must be one of {INSTRUCTIONS}"),
            *(self._wgmma_rules() if self.instruction == "wgmma.sp" else ()),
            (self.out_dtype not in self.element.outputs, f"out_dtype must be one of {self.element.outputs}"),
            (self.layout not in LAYOUTS, f"layout must be one of {LAYOUTS}"),
            (m * self.warps_m != self.block_m or m % 16 != 0, "a warp's rows must be a multiple of 16"),
            (n * self.warps_n != self.block_n or n % 8 != 0, "a warp's tokens must be a multiple of 8"),
            (self.block_n & (self.block_n - 1) != 0, "block_n must be a power of two"),
            (self.block_k & (self.block_k - 1) != 0, "block_k must be a power of two"),
            (self.block_k % (UNIT * self.warps_k) != 0, f"block_k must be a multiple of {UNIT} * warps_k"),
            (self.layout == "nchw" and self.block_n < 32, "block_n must be at least 32 in layout nchw"),
            (self.epilogue.token_scale and self.layout != "rows", "token_scale is for layout rows"),
            (self.stages < 2, "stages must be at least 2"),
            (self.threads > 1024, "a block has at most 1024 threads"),
            (m * n // 32 > 160, "the accumulators of a warp take more than 160 registers a thread"),
            (
                self.out_dtype == "int32" and not self.epilogue.empty,
                "int32 outputs are raw sums and take no epilogue: ask for a floating out_dtype",
            ),
            (
                self.shared_bytes > max(arch.shared_bytes for arch in ARCHES.values()),
                f"{self.shared_bytes} bytes of shared memory are more than any architecture has",
            ),
        ]

    def _wgmma_rules(self) -> list[tuple[bool, str]]:
        groups = self.block_m == 16 * self.warps_m and self.warps_m % 4 == 0
        return [
            (
                not groups or self.warps_n * self.warps_k != 1,
                "wgmma.sp takes four warps for 64 output features",
            ),
            (self.block_k * self.element.bytes != 128, "wgmma.sp takes tiles of 128 bytes of K"),
            (self.block_n > 256, "wgmma.sp takes at most 256 tokens"),
            (self.layout != "rows", "wgmma.sp is written for layout rows"),
            (self.stages < 3, "wgmma.sp needs at least 3 stages"),
            (
                self.weight_stages < 2 or self.weight_stages % 2 != 0,
                "wgmma.sp needs an even number of tiles of weights in registers",
            ),
        ]

    @property
    def element(self) -> Element:
        return ELEMENTS[self.dtype]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n * self.warps_k

    @property
    def units(self) -> int:
        """Units of 64 weights that one tile has along K."""
        return self.block_k // UNIT

    @property
    def weight_bytes(self) -> int:
        """Compressed weights of one stage."""
        return self.block_m // 16 * self.units * self.element.steps * FRAGMENT_BYTES

    @property
    def metadata_bytes(self) -> int:
        """Metadata of one stage: a word a lane for 16 rows and 64 columns."""
        return self.block_m // 16 * self.units * 128

    @property
    def activation_bytes(self) -> int:
        """Activations of one stage."""
        return self.block_n * self.block_k * self.element.bytes

    @property
    def stage_bytes(self) -> int:
        if self.instruction == "wgmma.sp":  # weights and metadata go straight to registers
            return self.activation_bytes
        return self.weight_bytes + self.metadata_bytes + self.activation_bytes

    @property
    def staging_pitch(self) -> int:
        """Bytes between rows of the staged sums; padded so that no banks conflict."""
        return 4 * (self.block_n + 8 if self.layout == "nchw" else self.block_m + 4)

    @property
    def staging_part_bytes(self) -> int:
        """Staged sums of the warps that have one share of K."""
        return self.staging_pitch * (self.block_m if self.layout == "nchw" else self.block_n)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the pipeline's is used again at the end."""
        return max(self.stages * self.stage_bytes, self.warps_k * self.staging_part_bytes)

    def refusal(self, arch: str) -> str:
        """Why ``arch`` cannot run this kernel; empty when it can.  Raises ``InvalidOption`` if unknown."""
        if arch not in ARCHES:
            raise InvalidOption(
                f"{arch!r} is not an architecture with kernels; there are {', '.join(ARCHES)}"
            )
        limits = ARCHES[arch]
        if self.instruction == "wgmma.sp" and arch != "sm_90a":
            return "wgmma.sp is an instruction of sm_90a"
        if limits.capability < self.element.first_capability:
            return f"{self.dtype} needs compute capability {self.element.first_capability / 10}"
        if self.shared_bytes > limits.shared_bytes:
            return f"{self.shared_bytes} bytes of shared memory, {arch} has {limits.shared_bytes}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` takes back."""
        names = [name for name in self.__slots__ if name != "epilogue"]
        data = {name: getattr(self, name) for name in names}
        epilogue = {name: getattr(self.epilogue, name) for name in self.epilogue.__slots__}
        return {**data, "epilogue": epilogue}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelConfig:
        return cls(**{**data, "epilogue": Epilogue(**data["epilogue"])})

    @property
    def tile_name(self) -> str:
        """``128x128x64_w2x2x1_s3_g8``; of warpgroups ``128x256x64_w8x1x1_s6_r4_g16``."""
        warps = f"w{self.warps_m}x{self.warps_n}x{self.warps_k}"
        held = f"_r{self.weight_stages}" if self.instruction == "wgmma.sp" else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile}_{warps}_s{self.stages}{held}_g{self.group}"

"""Tiles of kernels by name, and which one is for how many tokens.

What is said of Hopper was measured on an H100 (docs/gpu.md); the tiles of mma.sp for more than 64 tokens are
a rule of thumb, which was not measured on the GPUs that have nothing better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda.config import ELEMENTS, Epilogue, KernelConfig

# Names to (block m, n, k in units of 128 bytes of activations; warps m, n, k; stages; tiles of weights in
# registers, of the warpgroup's, whose names begin with "wgmma"; tiles of output features side by side).
_TILES: Mapping[str, tuple[int, int, int, int, int, int, int, int, int]] = MappingProxyType(
    {
        "large": (128, 128, 1, 2, 2, 1, 3, 4, 8),
        "tall": (256, 64, 1, 4, 1, 1, 3, 4, 8),
        "wide": (64, 128, 1, 1, 4, 1, 4, 4, 8),
        "medium": (128, 64, 1, 2, 2, 1, 4, 4, 8),
        "small": (64, 64, 1, 2, 2, 1, 4, 4, 8),
        "broad32": (64, 32, 2, 2, 1, 2, 3, 4, 8),
        "batch32": (32, 32, 4, 2, 1, 4, 3, 4, 8),
        "batch16": (16, 16, 4, 1, 1, 4, 6, 4, 8),
        "batch8": (16, 8, 4, 1, 1, 4, 6, 4, 8),
        "wgmma256": (128, 256, 1, 8, 1, 1, 6, 6, 16),
        "wgmma128": (128, 128, 1, 8, 1, 1, 6, 8, 16),
        "wgmma64": (128, 64, 1, 8, 1, 1, 8, 8, 8),
    }
)
TILES: tuple[str, ...] = tuple(name for name in _TILES if not name.startswith("wgmma"))
WGMMA_TILES: tuple[str, ...] = tuple(name for name in _TILES if name.startswith("wgmma"))

_EIGHT_BIT_STAGES: Mapping[str, int] = MappingProxyType({"wgmma256": 5})
"""Where fewer stages were faster for elements of 8 bits."""

_MULTIPROCESSORS = 132
"""Of an H100; a block of a warpgroup's tile has one for itself."""

_TURN: Mapping[int, float] = MappingProxyType({256: 0.53, 128: 0.33, 64: 0.21})
"""Microseconds that a block with so many tokens takes for 128 bytes of K (H100, bf16)."""

_BROAD = 8192
"""Output features from which on larger blocks fill a GPU with few tokens."""

_FEW_TOKENS = 64
"""Up to which mma.sp, with small blocks, is faster than the warpgroup's instruction."""


def geometry() -> str:
    """Changes with what any name of a tile stands for, so that times of other tiles are not taken for its."""
    return hashlib.sha256(repr((dict(_TILES), dict(_EIGHT_BIT_STAGES))).encode()).hexdigest()[:8]


def default_config(
    tile: str,
    dtype: str = "fp16",
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "",
    layout: str = "rows",
) -> KernelConfig:
    """A configuration by the name of its tile.

    One of ``TILES``, of which ``batch8`` to ``broad32`` are for decoding, or of ``WGMMA_TILES`` for sm_90a.
    """
    if tile not in _TILES:
        raise InvalidOption(f"tile must be one of {', '.join(_TILES)}; got {tile!r}")
    if dtype not in ELEMENTS:
        raise InvalidOption(f"dtype must be one of {', '.join(ELEMENTS)}; got {dtype!r}")
    m, n, lines, warps_m, warps_n, warps_k, stages, weights, group = _TILES[tile]
    if ELEMENTS[dtype].bytes == 1:
        stages = _EIGHT_BIT_STAGES.get(tile, stages)
    return KernelConfig(
        block_m=m,
        block_n=n,
        block_k=lines * 128 // ELEMENTS[dtype].bytes,
        warps_m=warps_m,
        warps_n=warps_n,
        warps_k=warps_k,
        stages=stages,
        dtype=dtype,
        out_dtype=out_dtype,
        layout=layout,
        epilogue=epilogue or Epilogue(),
        instruction="wgmma.sp" if tile in WGMMA_TILES else "mma.sp",
        weight_stages=weights,
        group=group,
    )


def tile_for(tokens: int, out: int = 4096) -> str:
    """The tile of mma.sp for a number of tokens and of output features."""
    few = "broad32" if out >= _BROAD else "batch32"
    for limit, tile in ((8, "batch8"), (16, "batch16"), (_FEW_TOKENS, few), (128, "small"), (512, "medium")):
        if tokens <= limit:
            return tile
    return "large"


def warpgroup_tile(tokens: int, out: int) -> str:
    """The tile of wgmma.sp for a number of tokens and of output features; '' where mma.sp is faster."""
    if tokens <= _FEW_TOKENS:
        return ""
    configs = {tile: default_config(tile) for tile in WGMMA_TILES}
    return min(configs, key=lambda tile: turns(configs[tile], tokens, out))


def turns(config: KernelConfig, tokens: int, out: int) -> float:
    """Microseconds that all blocks of a warpgroup's tile take for 128 bytes of K: waves of equal blocks."""
    blocks = -(-tokens // config.block_n) * -(-out // config.block_m)
    each = _TURN.get(config.block_n, _TURN[256] * config.block_n / 256)
    return -(-blocks // _MULTIPROCESSORS) * each

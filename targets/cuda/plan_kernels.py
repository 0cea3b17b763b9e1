"""Which kernels a layer needs: its element type, epilogue, sizes and tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda.build import Wanted
from sparsecc.targets.cuda.config import ARCHES, KernelConfig
from sparsecc.targets.cuda.layers import Layer
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.tiles import default_config, tile_for, warpgroup_tile

#: images of a target: cubins for these architectures, PTX of the first for whatever comes later
IMAGES: dict[str, tuple[str, ...]] = {
    "sm80": ("sm_80", "sm_86"),
    "sm86": ("sm_86",),
    "sm89": ("sm_89",),
    "sm90": ("sm_90",),
    "sm120": ("sm_120",),
}
OUTPUTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "fp32"}
_FEW, _MANY = 16, 4096
"""Rows beside those of the representative sizes that a layer of varying size gets tiles for."""

_FEWEST_PIXELS = 17
"""Kernels for images have no tiles for fewer pixels than this."""


def element_of(layer: Layer, asked: str | None) -> str:
    """The element type that a layer is multiplied in: as asked for, as in the model, else fp16."""
    if layer.matrix.dtype == torch.int8:
        return "int8"
    return asked or ("bf16" if layer.matrix.dtype == torch.bfloat16 else "fp16")


def wanted(layer: Layer, asked: str | None, arch: str, *, varies: bool, best: str = "") -> Iterator[Wanted]:
    """The kernels for a layer: the tile for its rows, and where these vary those for few and many.

    ``best`` is the tile that was measured to be the fastest for the layer's rows.
    """
    dtype = element_of(layer, asked)
    least = 1 if layer.conv is None else _FEWEST_PIXELS
    counts = (layer.rows, _FEW, _MANY) if varies else (layer.rows,)
    if best and made(best, layer, dtype) is None:
        best = ""
    tiles: list[str] = []
    for place, rows in enumerate(counts):
        if best and not place:
            tiles.append(best)
            continue
        tiles.append(tile_for(max(rows, least), layer.out))
        if arch == "sm90" and (group := warpgroup_tile(rows, layer.out)):
            tiles.append(group)  # GPUs that come after Hopper have PTX of the other
    problem = Problem(layer.out, layer.k, conv=layer.conv)
    for tile in dict.fromkeys(tiles):
        config = made(tile, layer, dtype)
        if config is None:
            continue
        if config.instruction == "wgmma.sp":
            yield Wanted(config, problem, ("sm_90a",))
        else:
            yield Wanted(_fitting(config, arch), problem, IMAGES[arch])


def made(tile: str, layer: Layer, dtype: str) -> KernelConfig | None:
    """The configuration of a tile for a layer; None where the tile is not for its layout."""
    try:
        return default_config(
            tile,
            dtype,
            epilogue=layer.epilogue,
            out_dtype=OUTPUTS[layer.matrix.dtype],
            layout="rows" if layer.conv is None else "nchw",
        )
    except InvalidOption:
        return None


def _fitting(config: KernelConfig, arch: str) -> KernelConfig:
    """The configuration with as many stages as every image of the target has shared memory for."""
    images = IMAGES[arch]
    while config.stages > 2 and any(config.refusal(image) for image in images):
        config = replace(config, stages=config.stages - 1)
    return config


assert all(image in ARCHES for images in IMAGES.values() for image in images)

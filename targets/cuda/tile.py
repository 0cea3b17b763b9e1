"""Where a thread stands in its tile, and where the tile's parts lie in shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecc.targets.cuda.config import OUTPUT_BYTES, Element, KernelConfig
from sparsecc.targets.cuda.grid import feature_tiles, group
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.tvm_build import Buffer, Emitter, Expr, Launch, Number

CHUNK = 16
"""Bytes that one thread copies at a time."""


def swizzle(row: Number, chunk: Number, chunks_per_row: int) -> Number:
    """Where chunk ``chunk`` of row ``row`` lies within its row.

    Any eight consecutive rows at one logical chunk, and any eight consecutive chunks of a row, fall into
    eight different groups of four banks: neither ldmatrix nor the copies have conflicts.
    """
    if chunks_per_row >= 8:
        return chunk ^ (row % 8)
    if chunks_per_row == 1:
        return chunk
    return chunk ^ (row // (8 // chunks_per_row) % chunks_per_row)


def granule(size: int) -> int:
    """The largest copy, in bytes up to 16, that divides ``size`` bytes."""
    return math.gcd(size, CHUNK)


@dataclass(frozen=True, slots=True)
class Tile:
    """The pieces that every part of the generator needs, computed once."""

    e: Emitter
    config: KernelConfig
    problem: Problem
    launch: Launch
    lane: Expr
    warp_m: Expr
    warp_n: Expr
    warp_k: Expr
    m0: Expr
    n0: Expr

    @classmethod
    def begin(cls, e: Emitter, config: KernelConfig, problem: Problem, launch: Launch) -> Tile:
        """Find the thread's place; ``grid`` says which block makes which tile, z counts images."""
        warp = e.let(launch.thread // 32)
        lane = e.let(launch.thread % 32)
        across = config.warps_m * config.warps_n
        together = group(config, problem)
        across_x, groups, _ = launch.block
        feature_tile = groups * together + across_x % together
        return cls(
            e, config, problem, launch, lane,
            warp_m=e.let(warp % config.warps_m),
            warp_n=e.let(warp % across // config.warps_m),
            warp_k=e.let(warp // across),
            m0=e.let(feature_tile * config.block_m),
            n0=e.let(across_x // together * config.block_n),
        )  # fmt: skip

    @property
    def exists(self) -> Expr | None:
        """Whether the block has a tile at all; None where every block has one."""
        tiles = feature_tiles(self.config, self.problem)
        return None if tiles % group(self.config, self.problem) == 0 else self.m0 < self.problem.out

    @property
    def element(self) -> Element:
        return self.config.element

    @property
    def out_bytes(self) -> int:
        return OUTPUT_BYTES[self.config.out_dtype]

    @property
    def shared(self) -> Buffer:
        return self.launch.shared

    @property
    def image(self) -> Expr:
        """The image (layout nchw)."""
        return self.launch.block[2]

    @property
    def thread(self) -> Expr:
        return self.launch.thread

    @property
    def fragments_m(self) -> int:
        """Instructions that a warp issues along the output features."""
        return self.config.block_m // self.config.warps_m // 16

    @property
    def fragments_n(self) -> int:
        """Instructions that a warp issues along the tokens."""
        return self.config.block_n // self.config.warps_n // 8

    @property
    def tiles_k(self) -> int:
        """Tiles along K."""
        return -(-self.problem.units // self.config.units)

    def stage(self, index: Number) -> Number:
        """First byte of a pipeline stage: weights, then metadata, then activations."""
        return index * self.config.stage_bytes

    def shares(self, count: int) -> list[tuple[Expr, Expr | None]]:
        """``count`` equal pieces of work dealt to the threads: (piece, whether there is such a piece)."""
        threads = self.config.threads
        pieces = []
        for start in range(0, count, threads):
            piece = self.thread + start
            pieces.append((piece, None if start + threads <= count else piece < count))
        return pieces

"""The sparse matrix product as a TIRx kernel around ``mma.sp``.

    prologue: fill stages-1 stages with cp.async
    for each tile of K: wait for its stage | barrier | start copying a later tile | multiply this one
    epilogue: add up warps that split K, scale, bias, activation, residual, store (``epilogue``)

Weights and metadata come in fragment order (``pack``), so that a lane reads its own 16 bytes and its own
word; activations are swizzled and read with ldmatrix.  One barrier a tile is enough: a stage is overwritten
one iteration after its last use.
"""

from __future__ import annotations

from sparsecc.targets.cuda.activations import Loader, copy_async, make_loader
from sparsecc.targets.cuda.epilogue import write_epilogue
from sparsecc.targets.cuda.tile import CHUNK, Tile, swizzle
from sparsecc.targets.cuda.tvm_build import Number, Registers

_LANES_OF_METADATA = 128 // CHUNK  # chunks of the metadata of 16 rows and 64 columns


def write_gemm(tile: Tile) -> None:
    """Write the kernel's body."""
    e, config = tile.e, tile.config
    loader = make_loader(tile)
    kind = "float32" if tile.element.accumulator == "float32" else "uint32"  # PTX has untyped registers
    accumulators = e.registers(tile.fragments_m * tile.fragments_n * 4, kind, "sums")
    for i in range(accumulators.size):
        accumulators[i] = e.zero(kind)
    operands = Operands.allocate(tile)

    ahead = config.stages - 1
    for stage in range(ahead):
        if stage < tile.tiles_k:
            load_tile(tile, loader, stage, stage)
        e.ptx("cp.async.commit_group")
    with e.loop(tile.tiles_k) as tile_k:
        e.ptx("cp.async.wait_group", ahead - 1)
        e.barrier()
        if ahead < tile.tiles_k:
            with e.when(tile_k + ahead < tile.tiles_k):
                load_tile(tile, loader, (tile_k + ahead) % config.stages, tile_k + ahead)
        e.ptx("cp.async.commit_group")
        multiply_tile(tile, loader, operands, accumulators, tile_k % config.stages)
    e.ptx("cp.async.wait_group", 0)
    e.barrier()
    write_epilogue(tile, accumulators)


def load_tile(tile: Tile, loader: Loader, stage: Number, tile_k: Number) -> None:
    """Start copying tile ``tile_k`` of weights, metadata and activations to pipeline stage ``stage``."""
    config, start = tile.config, tile.stage(stage)
    load_packed(tile, "weight", start, tile_k, 32 * tile.element.steps)
    load_packed(tile, "metadata", start + config.weight_bytes, tile_k, _LANES_OF_METADATA)
    loader.load(start + config.weight_bytes + config.metadata_bytes, tile_k)


def load_packed(tile: Tile, tensor: str, start: Number, tile_k: Number, unit_chunks: int) -> None:
    """Copy a tile of a packed tensor [out/16, k/64, unit_chunks, 16 bytes]: one run for every 16 rows.

    Past the last rows the last ones are read again, whose results are not stored.  Past K, weights become
    zeros, while metadata is read again, because zeros would not be ordered indices.
    """
    e, config, problem = tile.e, tile.config, tile.problem
    run = config.units * unit_chunks
    whole_rows = problem.row_tiles % (config.block_m // 16) == 0
    whole_units = problem.units % config.units == 0
    for piece, there in tile.shares(config.block_m // 16 * run):
        rows = tile.m0 // 16 + piece // run
        unit = tile_k * config.units + piece % run // unit_chunks
        inside = None if whole_units or tensor == "metadata" else unit < problem.units
        rows = rows if whole_rows else e.minimum(rows, problem.row_tiles - 1)
        unit = unit if whole_units else e.minimum(unit, problem.units - 1)
        chunk = (e.wide(rows) * e.wide(problem.units) + e.wide(unit)) * e.wide(unit_chunks)
        offset = (chunk + e.wide(piece % unit_chunks)) * e.wide(CHUNK)
        with e.when(there):
            copy_async(tile, start + piece * CHUNK, tensor, offset, inside, CHUNK)


class Operands:
    """Registers for one step: A fragments and metadata of the warp's rows, B fragments of its tokens."""

    def __init__(self, weights: Registers, metadata: Registers, activations: Registers) -> None:
        self.weights = weights
        self.metadata = metadata
        self.activations = activations

    @classmethod
    def allocate(cls, tile: Tile) -> Operands:
        e = tile.e
        return cls(
            e.registers(4 * tile.fragments_m, "uint32", "weights"),
            e.registers(tile.fragments_m, "uint32", "indices"),
            e.registers(4 * tile.fragments_n, "uint32", "activations"),
        )


def multiply_tile(
    tile: Tile, loader: Loader, operands: Operands, accumulators: Registers, stage: Number
) -> None:
    """Multiply the tile in pipeline stage ``stage``; warps along K take turns in units of 64 columns."""
    config, steps = tile.config, tile.element.steps
    start = tile.e.let(tile.stage(stage))
    activations = start + config.weight_bytes + config.metadata_bytes
    for turn in range(config.units // config.warps_k):
        unit = turn * config.warps_k + tile.warp_k
        read_metadata(tile, operands.metadata, start + config.weight_bytes, unit)
        for step in range(steps):
            read_weights(tile, operands.weights, start, unit, step)
            read = read_columns if loader.transposed else read_rows
            read(tile, operands.activations, activations, unit * steps + step)
            multiply(tile, operands, accumulators, selector=step)


def read_metadata(tile: Tile, words: Registers, start: Number, unit: Number) -> None:
    """One word a lane for every 16 rows."""
    for i in range(tile.fragments_m):
        block = (tile.warp_m * tile.fragments_m + i) * tile.config.units + unit
        tile.e.ptx("ld.shared.u32", words[i], tile.shared.at(start + (block * 32 + tile.lane) * 4))


def read_weights(tile: Tile, words: Registers, start: Number, unit: Number, step: int) -> None:
    """16 bytes a lane for every 16 rows: the A fragment."""
    for i in range(tile.fragments_m):
        block = (tile.warp_m * tile.fragments_m + i) * tile.config.units + unit
        fragment = block * tile.element.steps + step
        address = tile.shared.at(start + (fragment * 32 + tile.lane) * CHUNK)
        tile.e.ptx("ld.shared.v4.u32", *words.take(4 * i, 4), address)


def read_rows(tile: Tile, words: Registers, start: Number, step: Number) -> None:
    """B fragments from a tile [tokens, k]: matrix j of a step holds bytes 16j to 16j+15 of eight tokens."""
    chunks = tile.config.block_k * tile.element.bytes // CHUNK
    for j in range(tile.fragments_n):
        row = (tile.warp_n * tile.fragments_n + j) * 8 + tile.lane % 8
        place = row * chunks + swizzle(row, step * 4 + tile.lane // 8, chunks)
        address = tile.shared.at(start + place * CHUNK)
        tile.e.ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *words.take(4 * j, 4), address)


def read_columns(tile: Tile, words: Registers, start: Number, step: Number) -> None:
    """B fragments from a tile [k, tokens] of 16-bit elements: matrix j of a step holds k rows 8j to 8j+7."""
    chunks = tile.config.block_n * tile.element.bytes // CHUNK
    for j in range(tile.fragments_n):
        row = step * 32 + tile.lane
        place = row * chunks + swizzle(row, tile.warp_n * tile.fragments_n + j, chunks)
        address = tile.shared.at(start + place * CHUNK)
        tile.e.ptx("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", *words.take(4 * j, 4), address)


def multiply(tile: Tile, operands: Operands, accumulators: Registers, *, selector: int) -> None:
    """sums += W X for one step; the selector says which lanes' metadata counts."""
    for i in range(tile.fragments_m):
        weights = operands.weights.take(4 * i, 4)
        for j in range(tile.fragments_n):
            sums = accumulators.take(4 * (i * tile.fragments_n + j), 4)
            activations = operands.activations.take(4 * j, 4)
            tile.e.ptx(
                tile.element.instruction, *sums, *weights, *activations, *sums, operands.metadata[i], selector
            )

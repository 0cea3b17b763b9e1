"""The sparse matrix product on Hopper, around ``wgmma.mma_async.sp`` (sm_90a).

    prologue: copy stages-2 tiles of activations, load half of the tiles of weights that registers hold
    for each tile of K: wait for its copies | proxy fence | barrier | start copying a later tile |
                        start multiplying this one | wait for the one before |
                        every so many tiles: load the other half
    epilogue: as with ``mma.sp``

A warpgroup multiplies 64 output features; its weights and metadata, which nobody else needs, go from global
memory to registers in the order of ``pack``.  They are loaded many tiles at a time: loads share six
scoreboards, so that tiles which are asked for one by one are waited for together, the newest among them.
Such loads must not be ``.nc``, which the assembler moves to where they are needed.  Activations are read by
the tensor cores from shared memory (128-byte swizzle).  One product is in flight while the next is set up,
so that a stage is free two tiles later; nothing in the loop branches.
"""

from __future__ import annotations

from sparsecc.targets.cuda.activations import make_loader
from sparsecc.targets.cuda.config import Element
from sparsecc.targets.cuda.epilogue import write_epilogue
from sparsecc.targets.cuda.tile import CHUNK, Tile
from sparsecc.targets.cuda.tvm_build import Number, Registers

# Matrix descriptor of activations (PTX ISA, wgmma: Matrix Descriptor Format): the address, and the stride
# from eight rows to the next eight, in units of 16 bytes; 128-byte swizzle, where no leading offset counts.
_DESCRIPTOR = "(1ull << 62) | (64ull << 32) | (1ull << 16)"


def write_wgmma(tile: Tile) -> None:
    """Write the kernel's body."""
    e, config = tile.e, tile.config
    loader = make_loader(tile)
    kind = "float32" if tile.element.accumulator == "float32" else "int32"
    sums = e.registers(tile.fragments_n * 4, kind, "sums")
    for i in range(sums.size):
        sums[i] = e.zero(kind)
    weights = Weights(tile)
    held, half = config.weight_stages, config.weight_stages // 2

    ahead = config.stages - 2
    for stage in range(ahead):
        loader.load(tile.stage(stage), stage)
        e.ptx("cp.async.commit_group")
    for buffer in range(half):
        weights.load(buffer, buffer)

    def step(tile_k: Number, buffer: int) -> None:
        e.ptx("cp.async.wait_group", ahead - 1)
        e.ptx("fence.proxy.async.shared::cta")
        e.barrier()
        loader.load(tile.stage((tile_k + ahead) % config.stages), tile_k + ahead)
        e.ptx("cp.async.commit_group")
        multiply(tile, weights, buffer, sums, tile_k)
        e.ptx("wgmma.wait_group.sync.aligned", 1)
        if buffer % half == 0:  # the last product that read the other half is over
            for i in range(half, held):
                weights.load((buffer + i) % held, tile_k + i)

    rounds = (tile.tiles_k - 1) // held  # the last tile, which may be a short one, comes after the loop
    if rounds:
        with e.loop(rounds) as turn:
            for buffer in range(held):
                step(turn * held + buffer, buffer)
    for tile_k in range(rounds * held, tile.tiles_k):
        step(tile_k, tile_k % held)
    e.ptx("wgmma.wait_group.sync.aligned", 0)
    e.inline(*keep_helper(tile.element, sums.size), sums.at(0))
    e.ptx("cp.async.wait_group", 0)
    e.barrier()
    write_epilogue(tile, sums)


class Weights:
    """Weights and metadata of the warp's 16 rows, for ``weight_stages`` tiles, half of them on their way."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        units, steps, held = tile.config.units, tile.element.steps, range(tile.config.weight_stages)
        # Registers of their own for every tile: none that a product in flight reads may be written.
        self.fragments = [tile.e.registers(4 * units * steps, "uint32", f"weights{i}") for i in held]
        self.words = [tile.e.registers(units, "uint32", f"indices{i}") for i in held]

    def load(self, buffer: int, tile_k: Number) -> None:
        """Load tile ``tile_k``; past the last rows or units of K, the last ones, for nothing."""
        tile, e, problem = self.tile, self.tile.e, self.tile.problem
        steps = tile.element.steps
        rows = tile.m0 // 16 + tile.warp_m
        if problem.row_tiles % tile.config.warps_m:
            rows = e.minimum(rows, problem.row_tiles - 1)
        for i in range(tile.config.units):
            unit = e.minimum(tile_k * tile.config.units + i, problem.units - 1)
            word = (e.wide(rows) * e.wide(problem.units) + e.wide(unit)) * e.wide(32) + e.wide(tile.lane)
            address = tile.launch.tensors["metadata"].at(word * e.wide(4))
            e.ptx("ld.global.u32", self.words[buffer][i], address)
            for step in range(steps):
                block = (e.wide(rows) * e.wide(problem.units) + e.wide(unit)) * e.wide(steps) + e.wide(step)
                chunk = (block * e.wide(32) + e.wide(tile.lane)) * e.wide(CHUNK)
                target = self.fragments[buffer].take(4 * (i * steps + step), 4)
                e.ptx("ld.global.v4.u32", *target, tile.launch.tensors["weight"].at(chunk))


def multiply(tile: Tile, weights: Weights, buffer: int, sums: Registers, tile_k: Number) -> None:
    """Start sums += W X for tile ``tile_k``; the last one, given as a number, may have fewer units."""
    e, steps, units = tile.e, tile.element.steps, tile.config.units
    if isinstance(tile_k, int):
        units = min(units, tile.problem.units - tile_k * units)
    start = e.let(tile.stage(tile_k % tile.config.stages))
    e.ptx("wgmma.fence.sync.aligned")
    for i in range(units * steps):
        name, source = product_helper(tile.element, tile.config.block_n, i % steps)
        words = weights.fragments[buffer].take(4 * i, 4)
        activations = tile.shared.at(start + i * 64)  # an instruction takes 64 bytes of K
        e.inline(name, source, sums.at(0), *words, activations, weights.words[buffer][i // steps])
    e.ptx("wgmma.commit_group.sync.aligned")


def product_helper(element: Element, n: int, selector: int) -> tuple[str, str]:
    """Name and source of a function around one instruction, which TVM's table does not have."""
    count = n // 2
    c_type, constraint = _register(element)
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    scales = {"f16": ", 1, 1, 0", "bf16": ", 1, 1, 0", "s8": ""}.get(element.wgmma.split(".")[-1], ", 1, 1")
    text = (
        f"wgmma.mma_async.sp.sync.aligned.m64n{n}{element.wgmma} {{{sums}}}, {{{a}}}, "
        f"%{count + 4}, %{count + 5}, {selector}, 1{scales};"
    )
    name = f"wgmma_sp_n{n}_{selector}"
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(count))
    inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor), "r"(e)'
    parameters = f"{c_type}* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, void* b, uint32_t e"
    lines = (
        f"__forceinline__ __device__ void {name}({parameters}) {{",
        f"  uint64_t descriptor = ((uint64_t)(__cvta_generic_to_shared(b) & 0x3ffff) >> 4) | {_DESCRIPTOR};",
        f'  asm volatile("{text}" : {outputs} : {inputs} : "memory");',
        "}",
    )
    return name, "\n".join(lines)


def keep_helper(element: Element, count: int) -> tuple[str, str]:
    """Name and source of a function that does nothing, before which no sum may be touched."""
    c_type, constraint = _register(element)
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(count))
    name = f"keep_{count}"
    lines = (
        f"__forceinline__ __device__ void {name}({c_type}* d) {{",
        f'  asm volatile("" : {outputs} : : "memory");',
        "}",
    )
    return name, "\n".join(lines)


def _register(element: Element) -> tuple[str, str]:
    """C type and constraint of a sum."""
    return ("float", "f") if element.accumulator == "float32" else ("int", "r")

"""From sums in registers to the output: scale, bias, activation, residual, store.

The sums go through shared memory as they are (4 bytes each), so that tokens or pixels end up beside each
other as the output has them, warps that split K are added up, and little lives in registers while activations
are computed.  Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sparsecc.targets.cuda.tile import Tile
from sparsecc.targets.cuda.tvm_build import Emitter, Expr, Number, Registers

QUAD = 4
"""Neighbouring outputs that one thread finishes at a time."""

Activation = Callable[[Emitter, Expr], Expr]


def _relu(e: Emitter, x: Expr) -> Expr:
    return e.select(x < e.float32(0.0), e.float32(0.0), x)  # keeps NaN, as PyTorch does


def _gelu(e: Emitter, x: Expr) -> Expr:
    return e.float32(0.5) * x * (e.float32(1.0) + e.call("erf", x * e.float32(math.sqrt(0.5))))


def _gelu_tanh(e: Emitter, x: Expr) -> Expr:
    inner = e.float32(math.sqrt(2 / math.pi)) * (x + e.float32(0.044715) * x * x * x)
    return e.float32(0.5) * x * (e.float32(1.0) + e.call("tanh", inner))


def _silu(e: Emitter, x: Expr) -> Expr:
    return x / (e.float32(1.0) + e.call("exp", e.float32(0.0) - x))


_ACTIVATIONS: Mapping[str, Activation] = {
    "none": lambda e, x: x,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}
_TIR = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "int32": "int32"}


def write_epilogue(tile: Tile, sums: Registers) -> None:
    """Write everything after the main loop; all copies have arrived, and a barrier has been passed."""
    stage_sums(tile, sums)
    tile.e.barrier()
    finish = Finish(tile)
    quads = tile.config.block_m * tile.config.block_n // QUAD
    whole = quads // tile.config.threads
    if whole:
        with tile.e.loop(whole) as turn:
            finish.quad(turn * tile.config.threads + tile.thread)
    if rest := quads - whole * tile.config.threads:
        with tile.e.when(tile.thread < rest):
            finish.quad(whole * tile.config.threads + tile.thread)


def stage_sums(tile: Tile, sums: Registers) -> None:
    """Put the sums of every warp into the tile [tokens, out] or [out, pixels] of its share of K.

    A lane holds rows g and g+8 and columns 2t and 2t+1 of every 16 x 8 block (PTX ISA, C fragment).
    """
    e = tile.e
    for i in range(tile.fragments_m):
        for j in range(tile.fragments_n):
            for half in range(2):
                m = (tile.warp_m * tile.fragments_m + i) * 16 + half * 8 + tile.lane // 4
                n = (tile.warp_n * tile.fragments_n + j) * 8 + tile.lane % 4 * 2
                start = 4 * (i * tile.fragments_n + j) + 2 * half
                pair = [e.bits(value, "uint32") for value in sums.take(start, 2)]
                if tile.config.layout == "nchw":
                    e.ptx("st.shared.v2.u32", tile.shared.at(staged(tile, tile.warp_k, m, n)), *pair)
                    continue
                for q, word in enumerate(pair):
                    e.ptx("st.shared.u32", tile.shared.at(staged(tile, tile.warp_k, m, n + q)), word)


def staged(tile: Tile, part: Number, m: Number, n: Number) -> Number:
    """Byte in shared memory of element (m, n), as the warps of share ``part`` of K have it."""
    row, column = (m, n) if tile.config.layout == "nchw" else (n, m)
    return part * tile.config.staging_part_bytes + row * tile.config.staging_pitch + column * 4


class Finish:
    """Turns four neighbouring sums into outputs."""

    def __init__(self, tile: Tile) -> None:
        e, config = tile.e, tile.config
        self.tile = tile
        self.nchw = config.layout == "nchw"
        rows, columns = config.block_n, config.block_m
        self.rows, columns = (columns, rows) if self.nchw else (rows, columns)
        self.per_row = columns // QUAD
        self.words = e.registers(QUAD, "uint32", "words")
        self.values = e.registers(QUAD, tile.element.accumulator, "values")
        names = [name for name in ("scale", "bias") if getattr(config.epilogue, name)]
        self.factors = {name: e.registers(QUAD, "float32", f"{name}_of") for name in names}
        self.token_scale = e.registers(1, "float32", "scale_of_token")
        self.residual = e.registers(QUAD, f"uint{8 * tile.out_bytes}", "added")
        align = tile.problem.pixel_align if self.nchw else tile.problem.out
        self.width = math.gcd(align, QUAD)

    def quad(self, index: Expr) -> None:
        """Finish the quad ``index`` of the tile."""
        tile, e = self.tile, self.tile.e
        if self.per_row % 8 == 0:
            row, column = e.let(index // self.per_row), e.let(index % self.per_row * QUAD)
        else:  # eight lanes that read the end of a row and the next would have bank conflicts
            row, column = e.let(index % self.rows), e.let(index // self.rows * QUAD)
        m, n = (row, column) if self.nchw else (column, row)
        self.read_sums(m, n)
        self.read_factors(tile.m0 + m)
        if tile.config.epilogue.token_scale:
            self.read_token_scale(tile.n0 + n)
        parts = [self.part(tile.m0 + m, tile.n0 + n, start) for start in range(0, QUAD, self.width)]
        if tile.config.epilogue.residual:
            for start, (offset, inside) in zip(range(0, QUAD, self.width), parts, strict=True):
                self.read_residual(start, offset, inside)
        outputs = [self.output(i) for i in range(QUAD)]
        for start, (offset, inside) in zip(range(0, QUAD, self.width), parts, strict=True):
            self.store(outputs[start : start + self.width], offset, inside)

    def part(self, m: Expr, n: Expr, start: int) -> tuple[Expr, Expr]:
        """Byte offset in the output of a part of the quad, which lies inside as a whole or not at all."""
        tile, e, out = self.tile, self.tile.e, self.tile.problem.out
        m, n = (m, n + start) if self.nchw else (m + start, n)
        limit = tile.launch.scalars["pixels" if self.nchw else "tokens"]
        if self.nchw:
            plane = e.wide(tile.image) * e.wide(out) + e.wide(m)
            offset = plane * e.wide(limit) + e.wide(n)
        else:
            offset = e.wide(n) * e.wide(out) + e.wide(m)
        inside = n < limit
        if out % tile.config.block_m:
            inside = e.all_of(inside, m < out)
        return e.let(offset * e.wide(tile.out_bytes)), inside

    def read_sums(self, m: Expr, n: Expr) -> None:
        """The sums of all shares of K, in a fixed order."""
        tile, e = self.tile, self.tile.e
        for part in range(tile.config.warps_k):
            e.ptx("ld.shared.v4.u32", *self.words.take(0, QUAD), tile.shared.at(staged(tile, part, m, n)))
            for i in range(QUAD):
                value = e.bits(self.words[i], tile.element.accumulator)
                self.values[i] = value if part == 0 else self.values[i] + value

    def read_factors(self, m: Expr) -> None:
        """Scale and bias: of four features, or of one where the quad is pixels.

        Past the last feature the last is read again; what it makes is not stored.
        """
        tile, e, out = self.tile, self.tile.e, self.tile.problem.out
        whole = out % tile.config.block_m == 0
        for name, registers in self.factors.items():
            tensor = tile.launch.tensors[name]
            if not self.nchw and out % QUAD == 0:
                first = m if whole else e.minimum(m, out - QUAD)
                e.ptx("ld.global.nc.v4.f32", *registers.take(0, QUAD), tensor.at(e.wide(first) * e.wide(4)))
                continue
            for i in range(1 if self.nchw else QUAD):
                feature = m + i if whole else e.minimum(m + i, out - 1)
                e.ptx("ld.global.nc.f32", registers[i], tensor.at(e.wide(feature) * e.wide(4)))

    def read_token_scale(self, n: Expr) -> None:
        """The factor of the quad's token; past the last token the last one's, for nothing."""
        e, launch = self.tile.e, self.tile.launch
        token = e.minimum(n, launch.scalars["tokens"] - 1)
        address = launch.tensors["token_scale"].at(e.wide(token) * e.wide(4))
        e.ptx("ld.global.nc.f32", self.token_scale[0], address)

    def read_residual(self, start: int, offset: Expr, inside: Expr) -> None:
        tile, e = self.tile, self.tile.e
        for i in range(start, start + self.width):
            self.residual[i] = e.cast(0, f"uint{8 * tile.out_bytes}")
        with e.when(inside):
            address = tile.launch.tensors["residual"].at(offset)
            e.ptx(f"ld.global.nc.{self.suffix}", *self.residual.take(start, self.width), address)

    def output(self, i: int) -> Expr:
        """Output ``i`` of the quad, rounded, as an unsigned integer of its size."""
        tile, e, config = self.tile, self.tile.e, self.tile.config
        value = self.values[i]
        if config.out_dtype != "int32":
            value = e.cast(value, "float32")
            place = 0 if self.nchw else i
            if config.epilogue.scale:
                value = value * self.factors["scale"][place]
            if config.epilogue.token_scale:
                value = value * self.token_scale[0]
            if config.epilogue.bias:
                value = value + self.factors["bias"][place]
            value = _ACTIVATIONS[config.epilogue.activation](e, value)
        if config.epilogue.residual:
            value = value + e.cast(e.bits(self.residual[i], _TIR[config.out_dtype]), "float32")
        return e.let(e.bits(e.cast(value, _TIR[config.out_dtype]), f"uint{8 * tile.out_bytes}"))

    def store(self, outputs: list[Expr], offset: Expr, inside: Expr) -> None:
        tile, e = self.tile, self.tile.e
        with e.when(inside):
            e.ptx(f"st.global.{self.suffix}", tile.launch.tensors["d"].at(offset), *outputs)

    @property
    def suffix(self) -> str:
        """The type of one access of ``width`` outputs."""
        bits = 8 * self.tile.out_bytes
        return f"u{bits}" if self.width == 1 else f"v{self.width}.u{bits}"

"""Where activations come from, and how they get into shared memory.

A *source* maps (row of the tile's tokens, element of K) to a byte offset; a *loader* copies one tile of a
source into one stage.  Places outside the tensor, past the last token or past K become zeros.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsecc.targets.cuda.config import KernelConfig
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tile import CHUNK, Tile, granule, swizzle
from sparsecc.targets.cuda.tvm_build import Expr, Number

Place = tuple[Expr, "Expr | None"]
"""Byte offset (int64) and whether it is inside."""


class Source(abc.ABC):
    """``granule`` bytes along K lie together, aligned to their size, all inside or all outside."""

    scalars: Sequence[str]
    granule: int

    def __init__(self, tile: Tile) -> None:
        self.tile = tile

    @abc.abstractmethod
    def row(self, n: Expr) -> Any:
        """What is worth computing once for token ``n``."""

    @abc.abstractmethod
    def place(self, row: Any, k: Number) -> Place:
        """Where element ``k`` of a row is."""


def _scaled(tile: Tile, index: Expr) -> Expr:
    return index * tile.e.wide(tile.element.bytes)


class Rows(Source):
    """X [tokens, k], contiguous."""

    scalars = ("tokens",)

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile)
        self.granule = granule(tile.problem.k * tile.element.bytes)

    def row(self, n: Expr) -> tuple[Expr, Expr]:
        e = self.tile.e
        inside = n < self.tile.launch.scalars["tokens"]
        return e.let(e.wide(n) * e.wide(self.tile.problem.k)), inside

    def place(self, row: tuple[Expr, Expr], k: Number) -> Place:
        start, inside = row
        e = self.tile.e
        return _scaled(self.tile, start + e.wide(k)), e.all_of(inside, k < self.tile.problem.k)


class Pixels(Source):
    """X [batch, k, pixels], the rows being the pixels of image ``blockIdx.z``; read element by element."""

    scalars = ("pixels",)

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile)
        self.granule = tile.element.bytes

    def row(self, n: Expr) -> tuple[Expr, Expr]:
        return n, n < self.tile.launch.scalars["pixels"]

    def place(self, row: tuple[Expr, Expr], k: Number) -> Place:
        e, k_all = self.tile.e, self.tile.problem.k
        n, inside = row
        channel = e.wide(self.tile.image) * e.wide(k_all) + e.wide(k)
        offset = channel * e.wide(self.tile.launch.scalars["pixels"]) + e.wide(n)
        return _scaled(self.tile, offset), e.all_of(inside, k < k_all)


@dataclass(frozen=True, slots=True)
class _Window:
    """The input window of one output pixel: its image, the place of its first position, whether it exists."""

    image: Expr
    y: Expr
    x: Expr
    inside: Expr


class _Windows(Source):
    """Input windows of a convolution; K runs over kernel positions, then channels."""

    @property
    def conv(self) -> Conv:
        conv = self.tile.problem.conv
        assert conv is not None
        return conv

    def window(self, image: Expr, pixel: Expr, inside: Expr) -> _Window:
        e, conv = self.tile.e, self.conv
        width = self.tile.launch.scalars["out_width"]
        y = e.quotient(pixel, width) * conv.stride[0] - conv.padding[0]
        x = e.remainder(pixel, width) * conv.stride[1] - conv.padding[1]
        return _Window(e.let(image), e.let(y), e.let(x), inside)

    def locate(self, row: _Window, k: Number) -> tuple[Expr, Expr, Number, Expr]:
        """Height, width and channel of element ``k``, and whether it is inside."""
        conv, scalars = self.conv, self.tile.launch.scalars
        position, channel = k // conv.padded_channels, k % conv.padded_channels
        y = row.y + position // conv.kernel[1] * conv.dilation[0]
        x = row.x + position % conv.kernel[1] * conv.dilation[1]
        inside = self.tile.e.all_of(
            row.inside,
            y >= 0,
            y < scalars["height"],
            x >= 0,
            x < scalars["width"],
            k < conv.k,
            channel < conv.channels,
        )
        return y, x, channel, inside


class NhwcWindows(_Windows):
    """X [batch, height, width, channels]; the rows are output pixels [batch, out_height, out_width]."""

    scalars = ("tokens", "height", "width", "out_height", "out_width")

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile)
        self.granule = granule(self.conv.channels * tile.element.bytes)

    def row(self, n: Expr) -> _Window:
        e, scalars = self.tile.e, self.tile.launch.scalars
        pixels = scalars["out_height"] * scalars["out_width"]
        return self.window(e.quotient(n, pixels), e.remainder(n, pixels), n < scalars["tokens"])

    def place(self, row: _Window, k: Number) -> Place:
        e, scalars = self.tile.e, self.tile.launch.scalars
        y, x, channel, inside = self.locate(row, k)
        line = e.wide(row.image) * e.wide(scalars["height"]) + e.wide(y)
        pixel = line * e.wide(scalars["width"]) + e.wide(x)
        return _scaled(self.tile, pixel * e.wide(self.conv.channels) + e.wide(channel)), inside


class NchwWindows(_Windows):
    """X [batch, channels, height, width]; the rows are the output pixels of image ``blockIdx.z``."""

    scalars = ("pixels", "height", "width", "out_width")

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile)
        self.granule = tile.element.bytes

    def row(self, n: Expr) -> _Window:
        return self.window(self.tile.image, n, n < self.tile.launch.scalars["pixels"])

    def place(self, row: _Window, k: Number) -> Place:
        e, scalars = self.tile.e, self.tile.launch.scalars
        y, x, channel, inside = self.locate(row, k)
        plane = e.wide(row.image) * e.wide(self.conv.channels) + e.wide(channel)
        line = plane * e.wide(scalars["height"]) + e.wide(y)
        return _scaled(self.tile, line * e.wide(scalars["width"]) + e.wide(x)), inside


class Loader(abc.ABC):
    """``transposed``: the tile lies [k, tokens] in shared memory, otherwise [tokens, k]."""

    transposed: bool

    @abc.abstractmethod
    def load(self, stage: Number, tile_k: Number) -> None:
        """Copy tile ``tile_k`` of the activations to shared memory, from byte ``stage`` on."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A thread's copy, the same in every tile: where in the stage it goes, where in a row it is from."""

    there: Expr | None
    target: Expr
    k: Expr
    row: Any


def _piece_target(line: Expr, start: Expr, chunks: int) -> Expr:
    """Byte of a tile with ``chunks`` swizzled chunks a line, for byte ``start`` of line ``line``."""
    return (line * chunks + swizzle(line, start // CHUNK, chunks)) * CHUNK + start % CHUNK


class AsyncRows(Loader):
    """cp.async of 16, 8 or 4 bytes, as wide as the source's granule; neighbours copy what is beside."""

    transposed = False

    def __init__(self, tile: Tile, source: Source) -> None:
        self.tile, self.source = tile, source
        e, size = tile.e, tile.element.bytes
        line = tile.config.block_k * size
        width = source.granule
        self.pieces = []
        for piece, there in tile.shares(tile.config.block_n * line // width):
            row, start = piece // (line // width), piece % (line // width) * width
            target = e.let(_piece_target(row, start, line // CHUNK))
            self.pieces.append(_Piece(there, target, start // size, source.row(tile.n0 + row)))

    def load(self, stage: Number, tile_k: Number) -> None:
        for piece in self.pieces:
            offset, inside = self.source.place(piece.row, tile_k * self.tile.config.block_k + piece.k)
            with self.tile.e.when(piece.there):
                copy_async(self.tile, stage + piece.target, "x", offset, inside, self.source.granule)


class Gather(Loader):
    """Element by element through registers, for what no wide copy can read; neighbours copy other rows."""

    transposed = False

    def __init__(self, tile: Tile, source: Source) -> None:
        self.tile, self.source = tile, source
        e, size = tile.e, tile.element.bytes
        self.elements = e.registers(CHUNK // size, "uint32", "gathered")
        chunks = tile.config.block_k * size // CHUNK
        self.pieces = []
        for piece, there in tile.shares(tile.config.block_n * chunks):
            row, start = piece % tile.config.block_n, piece // tile.config.block_n * CHUNK
            target = e.let(_piece_target(row, start, chunks))
            self.pieces.append(_Piece(there, target, start // size, source.row(tile.n0 + row)))

    def load(self, stage: Number, tile_k: Number) -> None:
        for piece in self.pieces:
            with self.tile.e.when(piece.there):
                self._gather(piece.row, tile_k * self.tile.config.block_k + piece.k)
                self.tile.e.ptx("st.shared.v4.u32", self.tile.shared.at(stage + piece.target), *self._words())

    def _gather(self, row: Any, k: Number) -> None:
        tile, e = self.tile, self.tile.e
        for i in range(self.elements.size):
            offset, inside = self.source.place(row, k + i)
            self.elements[i] = e.word(0)
            with e.when(inside):
                address = tile.launch.tensors["x"].at(offset)
                e.ptx(f"ld.global.nc.u{8 * tile.element.bytes}", self.elements[i], address)

    def _words(self) -> list[Expr]:
        """The elements, put together."""
        size = self.tile.element.bytes
        words = []
        for start in range(0, self.elements.size, 4 // size):
            word = self.elements[start]
            for i in range(1, 4 // size):
                word = word | (self.elements[start + i] << self.tile.e.word(8 * size * i))
            words.append(word)
        return words


class AsyncColumns(Loader):
    """cp.async of X [batch, k, pixels] along the pixels, for ldmatrix to transpose (16-bit elements)."""

    transposed = True

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        e, line = tile.e, tile.config.block_n * tile.element.bytes
        self.width = granule(tile.problem.pixel_align * tile.element.bytes)
        per_line = line // self.width
        self.pieces = []
        for piece, there in tile.shares(tile.config.block_k * per_line):
            k, start = piece // per_line, piece % per_line * self.width
            target = e.let(_piece_target(k, start, line // CHUNK))
            self.pieces.append(_Piece(there, target, k, tile.n0 + start // tile.element.bytes))

    def load(self, stage: Number, tile_k: Number) -> None:
        tile, e = self.tile, self.tile.e
        pixels = tile.launch.scalars["pixels"]
        for piece in self.pieces:
            k = tile_k * tile.config.block_k + piece.k
            line = e.wide(tile.image) * e.wide(tile.problem.k) + e.wide(k)
            offset = _scaled(tile, line * e.wide(pixels) + e.wide(piece.row))
            inside = e.all_of(piece.row < pixels, k < tile.problem.k)
            with e.when(piece.there):
                copy_async(tile, stage + piece.target, "x", offset, inside, self.width)


def copy_async(
    tile: Tile, target: Number, tensor: str, offset: Expr, inside: Expr | None, width: int
) -> None:
    """One cp.async; zeros where it is not inside.

    With src-size 0 nothing is read (PTX ISA, cp.async), so that the address may lie outside the tensor.
    """
    e = tile.e
    kind = "cg" if width == CHUNK else "ca"
    sizes = (width,) if inside is None else (width, e.select(inside, e.word(width), e.word(0)))
    source = tile.launch.tensors[tensor].at(offset)
    e.ptx(f"cp.async.{kind}.shared.global", tile.shared.at(target), source, *sizes)


def source_type(config: KernelConfig, problem: Problem) -> type[Source]:
    """The source of a layout."""
    windowed = problem.conv is not None and not problem.conv.is_pointwise
    table: dict[tuple[str, bool], type[Source]] = {
        ("rows", False): Rows,
        ("rows", True): NhwcWindows,
        ("nchw", False): Pixels,
        ("nchw", True): NchwWindows,
    }
    return table[config.layout, windowed]


def make_loader(tile: Tile) -> Loader:
    """The fastest loader that fits the layout and the alignment."""
    kind = source_type(tile.config, tile.problem)
    size = tile.element.bytes
    if kind is Pixels and size == 2 and tile.problem.pixel_align * size >= 4:
        return AsyncColumns(tile)
    source = kind(tile)
    return AsyncRows(tile, source) if source.granule >= 4 else Gather(tile, source)

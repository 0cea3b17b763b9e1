"""Functions for processors: y = activation(x W^T + bias) from packed 2:4 weights, as plain TIR.

    for tiles of 16 tokens, then of 4, then of 1:
        columns[k, tile] = x of these tokens, transposed (of a convolution: its windows)
        for every 4 output features, in parallel:
            for every group of 4 columns: sums[feature, tile] += value * columns[4 * group + index, tile]

The tokens of a tile are the lanes of vectors, so that an index picks a row and nothing is gathered; LLVM
finds the registers for whatever processor it compiles for.  Sums are float32, of float64 models float64, and
are rounded once, to the output's type.  Not tuned: tiles are fixed, and nothing is blocked for caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsecc.targets.cuda.tvm_build import Expr, Number, load_tvm
from sparsecc.targets.relax.packing import ROWS
from sparsecc.targets.relax.product import GROUP, KEPT, Window

LANES = (16, 4, 1)


@dataclass(frozen=True, slots=True)
class Spec:
    """What one function computes.  Sizes of the input are numbers, or None where they vary.

    ``given`` are those of x: [tokens] of a matrix [tokens, k], [batch, height, width] of images.
    """

    out: int
    k: int
    dtype: str
    out_dtype: str
    bias: bool
    activation: str
    given: tuple[int | None, ...]
    window: Window | None = None

    @property
    def sums(self) -> str:
        """The type in which products are added."""
        return "float64" if "float64" in (self.dtype, self.out_dtype) else "float32"


def function_of(spec: Spec) -> Any:
    """The PrimFunc (x, values, index, bias?, y)."""
    return _Writer(spec).write()


class _Writer:
    """Writes one function."""

    def __init__(self, spec: Spec) -> None:
        tvm = load_tvm()
        self.spec = spec
        self.b = tvm.tirx.script.builder
        self.tirx = tvm.tirx
        self.builder = tvm.script.ir_builder.IRBuilder

    def write(self) -> Any:
        b, spec = self.b, self.spec
        with self.builder() as frame:
            with b.prim_func(s_tir=True):
                b.func_name("sparse24")
                b.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
                names = ["x", "values", "index", *(["bias"] if spec.bias else ()), "y"]
                handles = {name: b.arg(f"{name}_handle", b.handle()) for name in names}
                sizes = [
                    self._size(n, name) for n, name in zip(spec.given, _NAMES[len(spec.given)], strict=True)
                ]
                rows = -(-spec.out // ROWS) * ROWS
                self.values = b.match_buffer(handles["values"], (rows, spec.k // GROUP, KEPT), spec.dtype)
                self.index = b.match_buffer(handles["index"], (rows, spec.k // GROUP), "uint8")
                if spec.bias:
                    self.bias = b.match_buffer(handles["bias"], (spec.out,), spec.sums)
                place = _Matrix if spec.window is None else _Images
                self.place: _Place = place(self, handles["x"], handles["y"], sizes)
                done: Number = 0
                for lanes in LANES:
                    count = (self.place.tokens - done) // lanes
                    if count != 0:
                        self._tiles(lanes, done, count)
                    done = self.place.tokens // lanes * lanes
            return frame.get().without_attr("global_symbol")

    def _size(self, given: int | None, name: str) -> Number:
        return self.tirx.Var(name, "int64") if given is None else given

    def _tiles(self, lanes: int, start: Number, count: Number) -> None:
        """``count`` tiles of ``lanes`` tokens from token ``start`` on."""
        b, spec = self.b, self.spec
        with self.loop(count) as tile:
            first = start + tile * lanes
            columns = b.alloc_buffer((spec.k * lanes,), spec.sums)
            self.place.read(columns, first, lanes)
            with b.parallel(0, -(-spec.out // ROWS)) as block:
                sums = b.alloc_buffer((ROWS * lanes,), spec.sums)
                self._multiply(columns, sums, block, lanes)
                self._store(sums, block, first, lanes)

    def _multiply(self, columns: Any, sums: Any, block: Expr, lanes: int) -> None:
        b, spec = self.b, self.spec
        for r in range(ROWS):
            with b.vectorized(0, lanes) as lane:
                b.buffer_store(sums, self.number(0.0), [r * lanes + lane])
        with self.loop(spec.k // GROUP) as group:
            for r in range(ROWS):
                row = block * ROWS + r
                both = b.Bind(b.Cast("int32", self.index[row, group]))
                for slot, within in enumerate((both & 3, both >> 2)):
                    # not bound to a variable: TVM 0.27 reads the bits of a bound bfloat16 as an integer
                    value = self.wide(self.values[row, group, slot])
                    source = b.Bind((group * GROUP + within) * lanes)
                    with b.vectorized(0, lanes) as lane:
                        at = r * lanes + lane
                        b.buffer_store(sums, sums[at] + value * columns[source + lane], [at])

    def _store(self, sums: Any, block: Expr, first: Expr, lanes: int) -> None:
        b, spec = self.b, self.spec
        for r in range(ROWS):
            row = block * ROWS + r
            with self.when(None if spec.out % ROWS == 0 else row < spec.out), self.loop(lanes) as lane:
                total = sums[r * lanes + lane]
                total = b.Bind(total + self.bias[row] if spec.bias else total)
                done = ACTIVATIONS[spec.activation](self, total)
                self.place.store(first + lane, row, b.Cast(spec.out_dtype, done))

    # What the parts share

    @contextmanager
    def loop(self, extent: Number) -> Iterator[Expr]:
        with self.b.serial(0, extent) as index:
            yield index

    @contextmanager
    def when(self, condition: Expr | None) -> Iterator[None]:
        if condition is None:
            yield
        else:
            with self.b.If(condition), self.b.Then():
                yield

    def wide(self, value: Expr) -> Expr:
        return value if self.spec.dtype == self.spec.sums else self.b.Cast(self.spec.sums, value)

    def number(self, value: float) -> Expr:
        return getattr(self.b, self.spec.sums)(value)


class _Place:
    """Where the inputs and outputs of a token are."""

    tokens: Number

    def __init__(self, writer: _Writer, x: Any, y: Any, sizes: Sequence[Number]) -> None:
        raise NotImplementedError

    def read(self, columns: Any, first: Expr, lanes: int) -> None:
        """Fill ``columns`` [k, lanes] for the tokens from ``first`` on."""
        raise NotImplementedError

    def store(self, token: Expr, feature: Expr, value: Expr) -> None:
        """Store one output."""
        raise NotImplementedError


class _Matrix(_Place):
    """x [tokens, k] and y [tokens, out]."""

    def __init__(self, writer: _Writer, x: Any, y: Any, sizes: Sequence[Number]) -> None:
        spec = writer.spec
        (self.tokens,) = sizes
        self.writer = writer
        self.x = writer.b.match_buffer(x, (self.tokens, spec.k), spec.dtype)
        self.y = writer.b.match_buffer(y, (self.tokens, spec.out), spec.out_dtype)

    def read(self, columns: Any, first: Expr, lanes: int) -> None:
        w = self.writer
        with w.loop(lanes) as lane, w.loop(w.spec.k) as k:
            w.b.buffer_store(columns, w.wide(self.x[first + lane, k]), [k * lanes + lane])

    def store(self, token: Expr, feature: Expr, value: Expr) -> None:
        self.writer.b.buffer_store(self.y, value, [token, feature])


class _Images(_Place):
    """x [batch, channels, height, width] and y [batch, out, height', width'], or channels last in both."""

    def __init__(self, writer: _Writer, x: Any, y: Any, sizes: Sequence[Number]) -> None:
        spec = writer.spec
        assert spec.window is not None
        self.writer, self.window = writer, spec.window
        batch, self.height, self.width = sizes
        self.out_size = output_size(spec.window, self.height, self.width)
        self.pixels = math.prod(self.out_size)
        self.tokens = batch * self.pixels
        shape = self._ordered(batch, spec.window.channels, self.height, self.width)
        self.x = writer.b.match_buffer(x, shape, spec.dtype)
        self.y = writer.b.match_buffer(y, self._ordered(batch, spec.out, *self.out_size), spec.out_dtype)

    def _ordered(self, image: Number, channel: Number, row: Number, column: Number) -> list[Number]:
        named = {"N": image, "C": channel, "H": row, "W": column}
        return [named[axis] for axis in self.window.layout]

    def _pixel(self, token: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, row and column of an output."""
        across = self.out_size[1]
        within = token % self.pixels
        return token // self.pixels, within // across, within % across

    def read(self, columns: Any, first: Expr, lanes: int) -> None:
        w, window = self.writer, self.window
        high, wide = window.kernel
        top, left, _, _ = window.padding
        with w.loop(lanes) as lane:
            image, row, column = map(w.b.Bind, self._pixel(first + lane))
            with w.loop(high) as i, w.loop(wide) as j:
                y = w.b.Bind(row * window.stride[0] - top + i * window.dilation[0])
                x = w.b.Bind(column * window.stride[1] - left + j * window.dilation[1])
                inside = w.tirx.all(y >= 0, y < self.height, x >= 0, x < self.width)
                with w.loop(window.channels) as channel:
                    value = w.wide(self.x[tuple(self._ordered(image, channel, y, x))])
                    k = (i * wide + j) * window.channels + channel
                    read = w.tirx.if_then_else(inside, value, w.number(0.0))
                    w.b.buffer_store(columns, read, [k * lanes + lane])

    def store(self, token: Expr, feature: Expr, value: Expr) -> None:
        image, row, column = self._pixel(token)
        self.writer.b.buffer_store(self.y, value, self._ordered(image, feature, row, column))


def output_size(window: Window, height: Number, width: Number) -> tuple[Number, Number]:
    """Height and width of a convolution's output, of numbers or expressions."""
    top, left, bottom, right = window.padding
    high, wide = (d * (k - 1) + 1 for d, k in zip(window.dilation, window.kernel, strict=True))
    return (
        (height + (top + bottom - high)) // window.stride[0] + 1,
        (width + (left + right - wide)) // window.stride[1] + 1,
    )


def _gelu(w: _Writer, x: Expr) -> Expr:
    return w.number(0.5) * x * (w.number(1.0) + w.tirx.erf(x * w.number(math.sqrt(0.5))))


def _gelu_tanh(w: _Writer, x: Expr) -> Expr:
    inner = w.number(math.sqrt(2 / math.pi)) * (x + w.number(0.044715) * x * x * x)
    return w.number(0.5) * x * (w.number(1.0) + w.tirx.tanh(inner))


def _silu(w: _Writer, x: Expr) -> Expr:
    return x / (w.number(1.0) + w.tirx.exp(w.number(0.0) - x))


def _relu(w: _Writer, x: Expr) -> Expr:
    return w.b.Select(x < w.number(0.0), w.number(0.0), x)  # a NaN stays one


ACTIVATIONS: dict[str, Callable[[_Writer, Expr], Expr]] = {
    "none": lambda w, x: x,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}
_NAMES = {1: ("tokens",), 3: ("batch", "height", "width")}
_OPAQUE = 8  # TVM's OpPatternKind: nothing is fused with the function

"""What a product with a constant weight is, independently of TVM's objects and of who computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GROUP, KEPT = 4, 2


@dataclass(frozen=True, slots=True)
class Window:
    """A convolution over two spatial axes without groups.

    ``padding`` is (top, left, bottom, right); ``layout`` is that of input and output, NCHW or NHWC.
    """

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    layout: str


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """One product with a constant matrix [out, k], and what follows it that can be done in one go.

    ``activation(x @ matrix.T + bias)``; of a convolution, k runs over kernel positions and, fastest, over
    input channels.  ``x`` and ``output`` are Relax expressions: the input, and the variable that holds the
    result.  ``refusal`` says why the product cannot be 2:4; it is empty where it can.
    """

    where: str
    x: Any
    output: Any
    matrix: Array
    window: Window | None = None
    bias: Array | None = None
    activation: str = "none"
    refusal: str = ""

    @property
    def out(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def k(self) -> int:
        return int(self.matrix.shape[1])

    @property
    def dtype(self) -> str:
        """The weight's element type by its name in NumPy, ``bfloat16`` included."""
        return str(self.matrix.dtype.name)


def is_two_of_four(matrix: Array) -> bool:
    """Whether every four consecutive columns (a multiple of four) have at most two non-zeros."""
    groups = (matrix != 0).reshape(len(matrix), -1, GROUP)
    return bool((groups.sum(-1) <= KEPT).all())


@dataclass(frozen=True, slots=True)
class Choice:
    """What became of one product: 2:4 or as it was, and why.  ``where`` is ``function/variable``."""

    where: str
    out: int
    k: int
    dtype: str
    sparse: bool
    why: str

    def __str__(self) -> str:
        what = "2:4" if self.sparse else "dense"
        return f"{self.where} [{self.out} x {self.k}] {self.dtype}: {what}, {self.why}"


FLOATS = ("float64", "float32", "float16", "bfloat16")


def as_float64(values: Array) -> npt.NDArray[np.float64]:
    """Exactly the same numbers in float64."""
    return values.astype(np.float64)

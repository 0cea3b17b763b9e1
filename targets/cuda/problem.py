"""The sizes that a kernel is specialised for.

The number of tokens, and batch, height and width of images, stay run-time parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda.config import UNIT


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution as a matrix product: K runs over kernel positions and, fastest, over input channels.

    ``channels`` are the input channels, padded to ``padded_channels`` (a multiple of 4) at each position, so
    that no group of four weights crosses positions.  Heights come first in every pair.
    """

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        positive = (self.channels, *self.kernel, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise InvalidOption(f"{self}: sizes must be positive, the padding not negative")

    @property
    def padded_channels(self) -> int:
        return -(-self.channels // 4) * 4

    @property
    def k(self) -> int:
        """Columns of the weight matrix [out, positions * padded_channels]."""
        return self.kernel[0] * self.kernel[1] * self.padded_channels

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads the input pixel at the same place only."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output; raises ``InvalidOption`` where there is none."""
        size = [
            (extent + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for extent, pad, dilation, kernel, stride in zip(
                (height, width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]
        if min(size) < 1:
            raise InvalidOption(f"an image of {height} x {width} is smaller than the kernel of {self}")
        return size[0], size[1]


@dataclass(frozen=True, slots=True)
class Problem:
    """Output features, K, and what is known of the memory layout.

    ``pixel_align`` (layout nchw) is a power of two that divides the pixels of one image, the wider copies and
    stores the larger: 8 where height * width is a multiple of 8, 1 where nothing is known.
    """

    out: int
    k: int
    conv: Conv | None = None
    pixel_align: int = 1

    def __post_init__(self) -> None:
        if self.out < 1 or self.k < 1:
            raise InvalidOption(f"out and k must be positive; got {self.out} and {self.k}")
        if self.pixel_align not in (1, 2, 4, 8, 16):
            raise InvalidOption(f"pixel_align must be 1, 2, 4, 8 or 16; got {self.pixel_align}")
        if self.conv is not None and self.conv.k != self.k:
            raise InvalidOption(f"k must be {self.conv.k} for {self.conv}; got {self.k}")

    @property
    def row_tiles(self) -> int:
        """Groups of 16 rows in the packed weights."""
        return -(-self.out // 16)

    @property
    def units(self) -> int:
        """Groups of 64 columns in the packed weights."""
        return -(-self.k // UNIT)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` takes back."""
        conv = None if self.conv is None else {name: getattr(self.conv, name) for name in Conv.__slots__}
        return {"out": self.out, "k": self.k, "conv": conv, "pixel_align": self.pixel_align}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        stored = data["conv"]
        conv: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in (stored or {}).items()
        }
        return cls(**{**data, "conv": None if stored is None else Conv(**conv)})

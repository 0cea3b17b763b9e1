"""2:4 weights in the order in which sparse tensor cores read them.

    W [out, k] -> values [out/16, k/64, steps, 32 lanes, 16 bytes], metadata [out/16, k/64, 32 lanes] (uint32)

``values`` are the A fragments of ``mma.sp`` (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32" with 16-bit
elements, two steps for 64 columns; "... m16n8k64" with 8-bit elements, one step), so that a lane loads 16
consecutive bytes.  A metadata word holds eight nibbles ``index0 | index1 << 2`` with ``index0 < index1``
(``sp::ordered_metadata``): of 16-bit elements, lanes 4g+0 and 4g+1 describe the first 32 columns of rows g
and g+8 (sparsity selector 0), lanes 4g+2 and 4g+3 the other 32 (selector 1); of 8-bit elements, lane 4g+t
describes columns 32*(t/2) to 32*(t/2)+31 of row g + 8*(t%2).  The same words serve ``wgmma.sp`` with A in
registers, each of whose four warps takes 16 rows.

Rows are padded to 16 and columns to 64, with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsecc.errors import InvalidOption

Array = npt.NDArray[Any]

ROWS, COLUMNS, GROUP, KEPT = 16, 64, 4, 2
_LANE = np.arange(32)
_G, _T = _LANE >> 2, _LANE & 3

_BITS: Mapping[str, type[np.unsignedinteger[Any]]] = MappingProxyType(
    {"fp16": np.uint16, "bf16": np.uint16, "int8": np.uint8, "e4m3": np.uint8, "e5m2": np.uint8}
)
_TORCH: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.int8: "int8",
        torch.float8_e4m3fn: "e4m3",
        torch.float8_e5m2: "e5m2",
    }
)

# The two positions that a group keeps, by its mask of elements to keep (bit i: position i).  Groups that keep
# fewer than two store a zero beside them; which, is as in torch.sparse._semi_structured_conversions.
_POSITIONS = np.full((16, KEPT), -1, np.int64)
for _mask, _pair in {
    0b0000: (2, 3), 0b0001: (0, 2), 0b0010: (1, 2), 0b0100: (2, 3), 0b1000: (2, 3), 0b0011: (0, 1),
    0b0101: (0, 2), 0b1001: (0, 3), 0b0110: (1, 2), 0b1010: (1, 3), 0b1100: (2, 3),
}.items():  # fmt: skip
    _POSITIONS[_mask] = _pair


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """Packed 2:4 weights of element type ``dtype``; ``out`` and ``k`` are the sizes before padding."""

    values: npt.NDArray[np.uint8]
    metadata: npt.NDArray[np.uint32]
    out: int
    k: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads to see every weight once."""
        return self.values.nbytes + self.metadata.nbytes


def pack(weight: torch.Tensor) -> Packed:
    """Pack a 2:4 matrix [out, k] of float16, bfloat16, int8, float8_e4m3fn or float8_e5m2.

    Every bit of the kept elements is kept, of NaNs and -0.0 too; where a group stores more than two elements
    and at most two are non-zero, its -0.0 become +0.0.  Raises ``InvalidOption`` for another shape or type,
    and where a group of four columns (the last one filled up with zeros) has more than two non-zeros.
    """
    if weight.dtype not in _TORCH or weight.dim() != 2 or 0 in weight.shape:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TORCH)
        kind = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise InvalidOption(f"packing takes a matrix [out, k] of {known}; got {kind}")
    dtype = _TORCH[weight.dtype]
    bits = weight.detach().cpu().contiguous().view(torch.uint8).numpy().view(_BITS[dtype])
    out, k = bits.shape
    padded = np.zeros((_up(out, ROWS), _up(k, COLUMNS)), bits.dtype)
    padded[:out, :k] = bits
    kept, index = _compress(padded, signed_zero=dtype != "int8")
    return Packed(_to_fragments(kept), _to_words(index, bits.itemsize), out, k, dtype)


def unpack(packed: Packed) -> torch.Tensor:
    """The matrix [out, k] that was packed."""
    kept = _from_fragments(packed.values, _BITS[packed.dtype])
    index = _from_words(packed.metadata, kept.itemsize)
    rows, half = kept.shape
    groups = np.zeros((rows, half // KEPT, GROUP), kept.dtype)
    np.put_along_axis(groups, index, kept.reshape(rows, -1, KEPT), -1)
    dense = np.ascontiguousarray(groups.reshape(rows, 2 * half)[: packed.out, : packed.k])
    dtype = next(dtype for dtype, name in _TORCH.items() if name == packed.dtype)
    return torch.from_numpy(dense.view(np.uint8)).view(dtype)


def is_packable(weight: torch.Tensor) -> bool:
    """Whether every group of four columns of ``weight`` [out, k] has at most two non-zeros."""
    padding = -weight.shape[1] % GROUP
    groups = torch.nn.functional.pad((weight != 0).to(torch.int8), (0, padding)).view(len(weight), -1, GROUP)
    return bool((groups.sum(-1) <= KEPT).all())


def conv_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [out, channels, height, width] as the matrix of ``problem.Conv``.

    [out, height * width * padded channels]: input channels run fastest, filled up to a multiple of 4 with
    zeros, so that 2:4 along the input channels of every kernel position is 2:4 along K.
    """
    if weight.dim() != 4:
        raise InvalidOption(f"a convolution's weight has four axes; got {list(weight.shape)}")
    channels_last = weight.permute(0, 2, 3, 1)
    padding = -weight.shape[1] % GROUP
    filled = channels_last.new_zeros((*channels_last.shape[:3], weight.shape[1] + padding))
    filled[..., : weight.shape[1]] = channels_last
    return filled.flatten(1)


def _compress(bits: Array, *, signed_zero: bool) -> tuple[Array, Array]:
    """Kept elements [rows, k/2] and their positions [rows, k/4, 2] of a padded matrix of bit patterns."""
    groups = bits.reshape(len(bits), -1, GROUP)
    sign = groups.dtype.type(1 << (8 * groups.itemsize - 1))
    stored = groups != 0
    nonzero = stored & (groups != sign) if signed_zero else stored
    weights = np.array([1, 2, 4, 8], np.uint8)
    few = stored.sum(-1) <= KEPT
    mask = (np.where(few[..., None], stored, nonzero) * weights).sum(-1, dtype=np.uint8)
    index = _POSITIONS[mask]
    if (wrong := index[..., 0] < 0).any():
        row, group = np.argwhere(wrong)[0]
        raise InvalidOption(
            f"the weight is not 2:4: {int(wrong.sum())} groups have more than two non-zeros, "
            f"first row {row}, columns {GROUP * group} to {GROUP * group + GROUP - 1}"
        )
    return np.take_along_axis(groups, index, -1).reshape(len(bits), -1), index


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _fragment_places(itemsize: int) -> tuple[Array, Array]:
    """Row and column, in the compressed 16 x 32-byte tile, of every lane's elements: both [32, 16/itemsize].

    A fragment has four registers of 4 bytes: rows g, g+8, g, g+8; bytes 4t to 4t+3 of the first and of the
    second 16 bytes of the compressed row.
    """
    element = np.arange(16 // itemsize)
    register, within = element * itemsize // 4, element % (4 // itemsize)
    row = _G[:, None] + 8 * (register % 2)[None, :]
    column = (_T[:, None] * 4 + 16 * (register // 2)[None, :]) // itemsize + within[None, :]
    return row, column


def _to_fragments(kept: Array) -> npt.NDArray[np.uint8]:
    row, column = _fragment_places(kept.itemsize)
    wide = 32 // kept.itemsize
    tiles = kept.reshape(len(kept) // ROWS, ROWS, -1, kept.itemsize, wide)
    ordered = np.ascontiguousarray(np.moveaxis(tiles, 1, 3)[..., row, column])
    return ordered.view(np.uint8)


def _from_fragments(values: npt.NDArray[np.uint8], kind: type[np.unsignedinteger[Any]]) -> Array:
    ordered = values.view(kind)
    row, column = _fragment_places(ordered.itemsize)
    m16, units, steps, _, _ = ordered.shape
    tiles = np.empty((m16, units, steps, ROWS, 32 // ordered.itemsize), kind)
    tiles[..., row, column] = ordered
    return np.ascontiguousarray(np.moveaxis(tiles, 3, 1)).reshape(m16 * ROWS, -1)


def _word_places(itemsize: int) -> tuple[Array, Array]:
    """Row and group (of the 16 in 64 columns) of every lane's eight nibbles: both [32, 8]."""
    nibble = np.arange(8)
    if itemsize == 2:  # four groups of row g, then the same of row g+8
        return _G[:, None] + 8 * (nibble // 4)[None, :], 4 * _T[:, None] + (nibble % 4)[None, :]
    row = np.broadcast_to((_G + 8 * (_T % 2))[:, None], (32, 8))
    return row, 8 * (_T // 2)[:, None] + nibble[None, :]


def _to_words(index: Array, itemsize: int) -> npt.NDArray[np.uint32]:
    row, group = _word_places(itemsize)
    nibbles = (index[..., 0] | index[..., 1] << 2).astype(np.uint32)
    tiles = np.moveaxis(nibbles.reshape(len(nibbles) // ROWS, ROWS, -1, COLUMNS // GROUP), 1, 2)
    shifted: Array = tiles[:, :, row, group] << (4 * np.arange(8, dtype=np.uint32))
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(shifted, axis=-1)
    return np.ascontiguousarray(words)  # advanced indexing gave the result strides of its own


def _from_words(metadata: npt.NDArray[np.uint32], itemsize: int) -> Array:
    row, group = _word_places(itemsize)
    nibbles = (metadata[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    m16, units, _ = metadata.shape
    tiles = np.empty((m16, units, ROWS, COLUMNS // GROUP), np.int64)
    tiles[:, :, row, group] = nibbles
    flat = np.moveaxis(tiles, 2, 1).reshape(m16 * ROWS, -1)
    return np.stack((flat & 3, flat >> 2), -1)

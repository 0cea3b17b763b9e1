"""Packed 2:4 weights: nothing is lost, and the words are those that others make."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse import _semi_structured_conversions as conversions

from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda.pack import conv_matrix, is_packable, pack, unpack

DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def random_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int, kept: int = 2) -> torch.Tensor:
    """Any bit patterns (NaNs, infinities, -0.0), at most ``kept`` of four columns other than +0.0."""
    generator = torch.Generator().manual_seed(seed)
    out, k = shape
    raw = torch.randint(0, 256, (out, k * dtype.itemsize), dtype=torch.uint8, generator=generator)
    few = torch.randint(0, kept + 1, (out, -(-k // 4), 1), generator=generator)
    rank = torch.rand(out, -(-k // 4), 4, generator=generator).argsort(-1)
    keep = (rank < few).flatten(1)[:, :k].repeat_interleave(dtype.itemsize, 1)
    return torch.where(keep, raw, 0).view(dtype)


@given(
    out=st.integers(1, 40),
    k=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
def test_unpacking_gives_the_same_bits(out: int, k: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_bits((out, k), dtype, seed)
    packed = pack(weight)
    assert torch.equal(bits(unpack(packed)), bits(weight))
    assert packed.values.shape == (-(-out // 16), -(-k // 64), dtype.itemsize, 32, 16)
    assert packed.metadata.shape == (-(-out // 16), -(-k // 64), 32)
    assert packed.values.flags.c_contiguous  # kernels read the memory behind them as it is
    assert packed.metadata.flags.c_contiguous


@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 30))
def test_indices_are_ordered(dtype: torch.dtype, seed: int) -> None:
    words = pack(random_bits((32, 128), dtype, seed)).metadata
    for nibble in range(8):
        index = words >> (4 * nibble)
        assert ((index & 3) < (index >> 2 & 3)).all()


@pytest.mark.parametrize("pattern", list(itertools.product([0.0, -0.0, 1.5], repeat=4)))
def test_every_group_of_four(pattern: tuple[float, ...]) -> None:
    weight = torch.tensor([pattern * 16], dtype=torch.float16)
    if sum(value != 0 for value in pattern) > 2:
        with pytest.raises(InvalidOption, match=r"not 2:4: 16 groups.* row 0, columns 0 to 3"):
            pack(weight)
        assert not is_packable(weight)
        return
    assert is_packable(weight)
    back = unpack(pack(weight))
    assert torch.equal(back, weight)
    stored = sum(value != 0 or str(value) == "-0.0" for value in pattern)
    if stored <= 2:
        assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 192), (32, 320)])
def test_words_equal_pytorchs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """PyTorch's converter for CUTLASS, word for word: only its tiles stand in another order."""
    out, k = shape
    generator = torch.Generator().manual_seed(out + k)
    weight = torch.randint(1, 100, shape, generator=generator)
    few = torch.randint(0, 3, (out, k // 4, 1), generator=generator)
    rank = torch.rand(out, k // 4, 4, generator=generator).argsort(-1)
    weight = torch.where((rank < few).flatten(1), weight, 0).to(dtype)

    with torch._dynamo.config.patch(disable=True):
        values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack(weight)
    words = metadata.contiguous().view(torch.int32).flatten()
    if dtype == torch.int8:  # [k/64][out/16][lane]
        theirs = words.view(k // 64, out // 16, 32).transpose(0, 1)
    else:  # [k/32][out/32][row][two rows of 16 x two halves of 32 columns]: two of four lanes for a selector
        tiles = words.view(k // 64, 2, out // 32, 8, 2, 2)
        theirs = tiles.permute(2, 4, 0, 3, 1, 5).reshape(out // 16, k // 64, 32)
    assert torch.equal(torch.from_numpy(packed.metadata.view("int32")), theirs.contiguous())
    kept = torch.from_numpy(packed.values).view(dtype)
    assert torch.equal(kept.flatten().sort().values, values.flatten().sort().values)
    assert torch.equal(unpack(packed), weight)


def cute(shape: tuple[int, ...], stride: tuple[int, ...], index: int) -> int:
    """A CuTe layout's offset."""
    offset = 0
    for extent, step in zip(shape, stride, strict=True):
        offset += index % extent * step
        index //= extent
    return offset


def test_fragments_are_those_of_wgmma() -> None:
    """CUTLASS 4.2, mma_traits_sm90_gmma_sparse.hpp: ALayout_64x32, ELayout_64x32 (column-major 64 x 32)."""
    weight = torch.zeros(64, 64, dtype=torch.int16)
    weight.view(64, 16, 4)[:, :, ::2] = torch.arange(1, 64 * 32 + 1, dtype=torch.int16).view(64, 16, 2)
    packed = pack(weight.view(torch.float16))
    values = torch.from_numpy(packed.values.view("int16"))  # [m16, 1, 2, lane, 8]
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for value in range(16):
            offset = cute((4, 8, 4), (256, 1, 16), thread) + cute((4, 2, 2), (64, 8, 1024), value)
            row, column = offset % 64, offset // 64
            if column % 4 % 2 == 0:
                register = value // 8 * 2 + value // 4 % 2
                element = 2 * register + value % 4 // 2
                assert values[warp, 0, 0, lane, element] == weight[row, column]
        described = {
            (offset % 64, offset // 64 // 4)
            for value in range(32)
            for offset in [cute((2, 2, 8, 4), (1024, 0, 1, 16), thread) + cute((16, 2), (64, 8), value)]
        }
        quarter = lane % 2
        rows = {16 * warp + lane // 4, 16 * warp + lane // 4 + 8}
        assert described == {(row, 4 * quarter + group) for row in rows for group in range(4)}


def test_conv_matrix_keeps_positions_apart() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2).half()
    matrix = conv_matrix(weight)
    assert matrix.shape == (2, 16)
    assert torch.equal(matrix.view(2, 2, 2, 4)[..., :3].permute(0, 3, 1, 2), weight)
    assert (matrix.view(2, 2, 2, 4)[..., 3] == 0).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 4), "float32"),
        (torch.zeros(4, 4, 4, dtype=torch.float16), r"\[4, 4, 4\]"),
        (torch.zeros(0, 4, dtype=torch.float16), r"\[0, 4\]"),
        (torch.ones(4, 3, dtype=torch.float16), "first row 0, columns 0 to 3"),
    ],
)
def test_what_cannot_be_packed(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        pack(weight)
    with pytest.raises(InvalidOption, match="four axes"):
        conv_matrix(torch.zeros(2, 3))

"""What the GPU benchmark prints and tries, without a GPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu import KINDS, Row, default_configs, page, shapes, variants
from sparsecc.targets.cuda.tiles import TILES, WGMMA_TILES


def test_the_page_says_ratios_and_shares() -> None:
    rows = [
        Row("bf16", 4096, 8192, 8192, 800.0, 500.0, {"large": 700.0, "wgmma256": 400.0}),
        Row("int8", 4096, 8192, 8192, 400.0, None, {"large": 800.0}),
    ]
    text = page(rows, {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13", "cuda": "13.0"})
    first, second = (line for line in text.splitlines() if line.startswith(("| bf16", "| int8")))
    floats = 2 * 4096 * 8192 * 8192 / 400e-6 / 1979e12
    assert first.endswith(f"| 800.0 | 500.0 | 400.0 | wgmma256 | 2.00x | 1.25x | {floats:.0%} |")
    assert second.endswith(f"| 400.0 | - | 800.0 | large | 0.50x | - | {floats / 4:.0%} |")


@pytest.mark.parametrize("dtype", KINDS)
def test_variants_are_of_every_tile_and_differ(dtype: str) -> None:
    found = variants(dtype)
    assert len(set(found.values())) == len(found)
    assert {name.split()[0] for name in found} == {*TILES, *WGMMA_TILES}
    assert set(default_configs(dtype).values()) <= set(found.values())


def test_every_product_is_timed_once() -> None:
    assert len(set(shapes())) == len(shapes()) == 75

"""Writes examples/data/fashion_mnist.npz: the images that the demo and the tests train and test on.

4,000 training images and the first 2,000 test images of Fashion-MNIST (MIT licence), as 8-bit grey values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import path
from benchmarks.datasets import read_idx

OUT = Path(__file__).resolve().parent.parent / "examples" / "data" / "fashion_mnist.npz"


def main() -> None:
    """The command."""
    folder = next(path("dataset-fashion-mnist").rglob("t10k-images-idx3-ubyte*")).parent
    arrays: dict[str, Any] = {}
    for name, stem, count in (("train", "train", 4000), ("test", "t10k", 2000)):
        arrays[f"{name}_images"] = read_idx(next(folder.glob(f"{stem}-images-idx3-ubyte*")))[:count]
        arrays[f"{name}_labels"] = read_idx(next(folder.glob(f"{stem}-labels-idx1-ubyte*")))[:count]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

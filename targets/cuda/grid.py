"""Which block makes which tile of the output.

Blocks run in the order of their x, which counts ``group`` tiles of output features for the first tile of
tokens, the same features for the next tile of tokens, and so on; y counts groups.  The blocks that run at one
time thus cover a nearly square part of the output, and share most of the weights and activations they read.
"""

from __future__ import annotations

from sparsecc.targets.cuda.config import KernelConfig
from sparsecc.targets.cuda.problem import Problem


def feature_tiles(config: KernelConfig, problem: Problem) -> int:
    return -(-problem.out // config.block_m)


def group(config: KernelConfig, problem: Problem) -> int:
    """Tiles of output features that stand beside each other along x."""
    return min(config.group, feature_tiles(config, problem))


def grid(config: KernelConfig, problem: Problem, rows: int, images: int) -> tuple[int, int, int]:
    """Blocks for ``rows`` tokens (pixels of each of the ``images`` in layout nchw, else one image)."""
    together = group(config, problem)
    across = -(-rows // config.block_n) * together
    return across, -(-feature_tiles(config, problem) // together), images


def grid_rule(config: KernelConfig, problem: Problem) -> tuple[str, str, str]:
    """The grid as formulas in the run-time sizes."""
    nchw = config.layout == "nchw"
    together = group(config, problem)
    across = f"ceil({'pixels' if nchw else 'tokens'} / {config.block_n}) * {together}"
    return across, str(-(-feature_tiles(config, problem) // together)), "batch" if nchw else "1"

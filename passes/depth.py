"""Whole residual blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsecc.axes.analysis import Analysis, matches
from sparsecc.blocks import BLOCK_SALIENCIES, Block, bypasses, residual_blocks
from sparsecc.errors import InvalidOption
from sparsecc.plan import Skip
from sparsecc.saliency import Saliency
from sparsecc.transform import Choice, Pass, check_share


@dataclass(frozen=True, kw_only=True)
class DepthPruning(Pass):
    """Removes the least salient residual blocks, found from the graph.

    Before: ``y = x + mlp(norm(x))``.  After: ``y = x``, and the weights of ``mlp`` and ``norm`` are
    gone.  Attention and feed-forward part of a transformer layer are blocks of their own.

    ``sparsity``: share of blocks removed, 0 <= sparsity < 1.  ``blocks``: remove exactly the blocks
    of these names or patterns instead.  ``include`` and ``exclude``: name patterns of blocks or of
    weights in them.  ``rank``: how blocks are ranked; ``magnitude`` is that of a branch's last weights,
    ``influence`` the mean of 1 - cos(x, y), on calibration data.
    """

    sparsity: float = 0.25
    blocks: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rank: str = "magnitude"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        if self.rank not in BLOCK_SALIENCIES:
            raise InvalidOption(f"rank={self.rank!r} is not known; there are {', '.join(BLOCK_SALIENCIES)}")
        for name in ("blocks", "include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise InvalidOption(f"{name}={getattr(self, name)!r}: give a tuple of names, not one string")

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """The least salient blocks, or those that were named."""
        found, skips = residual_blocks(analysis)
        if self.blocks:
            chosen = self._by_name(found)
        else:
            open_, closed = self._allowed(found)
            skips += closed
            chosen = self._least(open_, int(np.floor(len(open_) * self.sparsity + 1e-9)), analysis, saliency)
        return Choice({}, bypasses(analysis, chosen), skips)

    def _by_name(self, found: list[Block]) -> list[Block]:
        for pattern in self.blocks:
            if not any(matches(b.name, (pattern,)) for b in found):
                known = ", ".join(b.name for b in found) or "none"
                raise InvalidOption(f"blocks: no residual block matches {pattern!r}; there are: {known}")
        return [b for b in found if matches(b.name, self.blocks)]

    def _allowed(self, found: list[Block]) -> tuple[list[Block], list[Skip]]:
        open_: list[Block] = []
        skips: list[Skip] = []
        for block in found:
            names = (block.name, *block.weights)
            if any(matches(n, self.exclude) for n in names):
                skips.append(Skip(block.name, "excluded"))
            elif self.include and not any(matches(n, self.include) for n in names):
                skips.append(Skip(block.name, "not included"))
            else:
                open_.append(block)
        return open_, skips

    def _least(
        self, blocks: list[Block], count: int, analysis: Analysis, saliency: Saliency | None
    ) -> list[Block]:
        if not count:
            return []
        measure, made = BLOCK_SALIENCIES[self.rank], saliency or Saliency(analysis)
        scores = np.array(measure(analysis, blocks, made))
        least = set(np.argsort(scores, kind="stable")[:count].tolist())
        return [b for i, b in enumerate(blocks) if i in least]

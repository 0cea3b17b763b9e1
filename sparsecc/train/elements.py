"""Patterns of single elements: unstructured, with a density by layer, and N:M."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecc.densities import DENSITIES
from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM as Ratio
from sparsecc.train.choosing import Chosen, Pattern, Update, staying, top
from sparsecc.train.schedules import Schedule
from sparsecc.train.sites import Site, shapes


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any element may go (Han et al., 2015, section 3).

    ``allocation``: ``uniform`` (each layer loses the same share), ``global`` (all elements are ranked
    together; every layer keeps at least one), ``erk`` or ``er`` (``sparsecc.densities``).
    """

    allocation: str = "uniform"

    def __post_init__(self) -> None:
        if self.allocation not in (*DENSITIES, "global"):
            known = ", ".join([*DENSITIES, "global"])
            raise InvalidOption(f"allocation={self.allocation!r} is not known; there are {known}")

    def counts(self, update: Update) -> dict[str, int]:
        """From the layers' shapes; InvalidOption for global allocation, which depends on scores."""
        if self.allocation == "global":
            raise InvalidOption(
                "allocation='global' gives layers no density of their own; use uniform, erk or er"
            )
        found = DENSITIES[self.allocation](shapes(update.sites), 1 - update.sparsity)
        return {s.name: max(1, staying(s.size, 1 - found[s.name])) for s in update.sites if s.size}

    def choose(self, update: Update) -> Chosen:
        """The elements with the highest scores."""
        if self.allocation == "global":
            return Chosen(self._ranked_together(update))
        counts = self.counts(update)
        return Chosen({n: top(update.ranked(n), counts.get(n, 0)) for n in update.scores})

    def _ranked_together(self, update: Update) -> dict[str, torch.Tensor]:
        ranked = {}
        for site in update.sites:
            scores = update.ranked(site.name)
            ranked[site.name] = torch.where(top(scores, 1), torch.inf, scores)
        kinds = [scores.dtype for scores in ranked.values()]
        wide = torch.float64 if torch.float64 in kinds else torch.float32
        flat = torch.cat([scores.reshape(-1).to(wide) for scores in ranked.values()])
        kept = top(flat, staying(flat.numel(), update.sparsity))
        parts = kept.split([scores.numel() for scores in ranked.values()])
        return {n: p.reshape(ranked[n].shape) for n, p in zip(ranked, parts, strict=True)}


@dataclass(frozen=True)
class NM(Pattern):
    """N of every M consecutive elements along the axis that a layer sums over.

    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (2021),
    section 3.  The schedule ends at sparsity 1 - N / M; on the way there, a target of s keeps the
    smallest number of every M that removes no more than that share.
    """

    pattern: str = "2:4"

    def __post_init__(self) -> None:
        Ratio.parse(self.pattern)

    @property
    def ratio(self) -> Ratio:
        """N and M."""
        return Ratio.parse(self.pattern)

    def check(self, schedule: Schedule, sites: Sequence[Site]) -> None:
        """The schedule has to end at this pattern, and every weight to be made of whole groups."""
        ratio = self.ratio
        final = 1 - ratio.n / ratio.m
        if not math.isclose(schedule.sparsity, final):
            raise InvalidOption(
                f"sparsity={schedule.sparsity}: the pattern {self.pattern} ends at sparsity={final}; give "
                "the schedule that number"
            )
        for site in sites:
            if site.axis is None:
                raise InvalidOption(
                    f"{site.name}: the axis that its sums run along is not known without a graph; give "
                    "example_inputs instead of weights"
                )
            if why := self.why_not(site):
                raise InvalidOption(f"{site.name}: {why}; leave it out")

    def why_not(self, site: Site) -> str:
        """Sums over a width that is no multiple of M."""
        width = None if site.axis is None else site.shape[site.axis]
        if width is None or self.ratio.fits(width):
            return ""
        return f"its sums run over {width} positions, which are no multiple of {self.ratio.m}"

    def counts(self, update: Update) -> dict[str, int]:
        """N of every M."""
        ratio = self._at(update.sparsity)
        return {s.name: s.size // ratio.m * ratio.n for s in update.sites}

    def choose(self, update: Update) -> Chosen:
        """The N highest scores of every M, by ``sparsecc.patterns.nm``."""
        ratio = self._at(update.sparsity)
        masks = {}
        for site in update.sites:
            scores = update.ranked(site.name)
            if ratio.n == ratio.m:
                masks[site.name] = torch.ones_like(scores, dtype=torch.bool)
            else:
                kept = ratio.keep(scores.cpu().numpy(), site.axis or 0)
                masks[site.name] = torch.from_numpy(kept).to(scores.device)
        return Chosen(masks)

    def _at(self, sparsity: float) -> Ratio:
        ratio = self.ratio
        return Ratio(max(ratio.n, staying(ratio.m, sparsity)), ratio.m)

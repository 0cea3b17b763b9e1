"""What passes have in common that put zeros into weights without an N:M pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.densities import DENSITIES
from sparsecc.errors import InvalidOption
from sparsecc.patterns.layers import Layer, computed, layers
from sparsecc.patterns.nm import Array
from sparsecc.patterns.present import Present, present, spread
from sparsecc.patterns.ranking import SCOPES
from sparsecc.patterns.units import REDUCTIONS, Keep, Units, from_grid, grid_sizes, matrix_sizes, to_grid
from sparsecc.plan import Mask, Pattern, Skip
from sparsecc.saliency import NORMALISERS, Saliency
from sparsecc.saliency.magnitude import Unscored
from sparsecc.selection import check_names, selected
from sparsecc.transform import Choice, Pass, check_share


@dataclass(eq=False)
class _Site:
    """A layer that can be masked; ``scores`` are those of its units, -inf where these are zero already."""

    layer: Layer
    scores: Array
    shape: tuple[int, ...]

    def fresh(self, going: Keep) -> bool:
        """Whether something of what goes is not zero yet."""
        return bool((self.scores[going] > -np.inf).any())


@dataclass
class _Found:
    sites: list[_Site] = field(default_factory=list)
    dense: list[Pattern] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MaskingPass(Pass):
    """Zeroes the least salient units of weights; a unit is what subclasses say.

    Units that are zero already go first, so that the share of zeros is the one that was asked for; a layer
    that has it stays as it is, bit for bit.  Of equal units the first are kept, in the order of the
    product's rows, places of its kernel, and channels.
    """

    sparsity: float = 0.5
    scope: str = "layer"
    densities: str = "uniform"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        _check_known("scope", self.scope, SCOPES)
        _check_known("densities", self.densities, DENSITIES)
        if self.scope == "global" and self.densities != "uniform":
            raise InvalidOption(
                f"densities={self.densities!r}: with scope='global' the ranking says how dense layers stay"
            )
        check_names(self.include, self.exclude)

    @property
    def units(self) -> Units:
        """What goes as one."""
        raise NotImplementedError(f"{type(self).__name__} does not define units")

    @property
    def pattern(self) -> str:
        """What the zeros are called in reports."""
        raise NotImplementedError(f"{type(self).__name__} does not define pattern")

    def unit_scores(self, elements: Array) -> Array:
        """Scores of units from a grid of those of elements."""
        return self.units.scores(elements)

    def refusal(self, layer: Layer, shape: tuple[int, ...]) -> str:
        """Why a layer of that shape is left alone, or ''."""
        return self.units.why_not(layer, shape)

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """Masks of every layer that loses something."""
        if not self.sparsity:
            return Choice()
        keeps = analysis.keeps(analysis.given.kept)
        found = self._find(analysis, keeps, saliency or Saliency(analysis))
        seen = {site.layer.weight: matrix_sizes(site.layer, site.shape) for site in found.sites}
        dense = DENSITIES[self.densities](seen, 1 - self.sparsity)
        shares = [1 - dense[site.layer.weight] for site in found.sites]
        gone = SCOPES[self.scope]([site.scores for site in found.sites], shares)
        masks: list[Mask] = []
        told: list[Pattern] = []
        for site, going in zip(found.sites, gone, strict=True):
            if going.any():
                there = present(analysis, keeps, site.layer)
                assert isinstance(there, Present)  # as it was when the site was found
                masks += self._masks(site, there, going)
                told.append(self._told(site, there, going))
            else:
                self._leave(found, site.layer, "none of it is among the least salient")
        return Choice({}, masks, found.skips, [*told, *found.dense])

    def _find(self, analysis: Analysis, keeps: Keeps, saliency: Saliency) -> _Found:
        """Look at every layer."""
        found = _Found()
        for layer, reason in self._layers(analysis, keeps):
            site = reason or self._site(analysis, keeps, layer, saliency)
            if isinstance(site, _Site):
                found.sites.append(site)
            else:
                self._leave(found, layer, site)
        found.skips += [Skip(where, reason) for where, reason in dict(computed(analysis)).items()]
        return found

    def _layers(self, analysis: Analysis, keeps: Keeps) -> Iterator[tuple[Layer, str]]:
        """Layers, and why each is left alone without a look at its values."""
        view, solver = analysis.view, analysis.solver
        chosen = selected(analysis, self.include, self.exclude)
        for layer in layers(analysis):
            if layer.weight not in analysis.given.lost:
                shape = tuple(keeps.count(t) for t in solver.axes[view.weights[layer.weight]])
                yield layer, layer.why or chosen(layer.weight) or self.refusal(layer, shape)

    def _site(self, analysis: Analysis, keeps: Keeps, layer: Layer, saliency: Saliency) -> _Site | str:
        """The layer with the scores of its units, or why it has none."""
        there = present(analysis, keeps, layer)
        if isinstance(there, str):
            return there
        try:
            elements = there.of(saliency.elements(layer.weight))
        except Unscored as error:
            return str(error)
        if not np.isfinite(elements).all():
            return "its scores are NaN or infinite"
        scores = self.unit_scores(to_grid(elements, layer))
        if self.scope == "global":
            flat = scores.reshape(-1).astype(np.float64)
            scores = NORMALISERS[saliency.normaliser](flat).reshape(scores.shape)
        dead = self.units.dead(to_grid(there.values, layer))
        return _Site(layer, np.where(dead, -np.inf, scores), there.values.shape)

    def _leave(self, found: _Found, layer: Layer, reason: str) -> None:
        found.dense.append(Pattern(layer.weight, layer.axis, self.pattern, "dense"))
        found.skips.append(Skip(layer.weight, reason))

    def _masks(self, site: _Site, there: Present, going: Keep) -> Iterator[Mask]:
        """The mask of a layer; none where everything that goes is zero already."""
        if site.fresh(going):
            yield Mask(site.layer.weight, spread(self._kept(site, going), there.indices, there.shape))

    def _told(self, site: _Site, there: Present, going: Keep) -> Pattern:
        left = np.where(self._kept(site, going), there.values, 0)
        return Pattern(
            site.layer.weight,
            site.layer.axis,
            self.pattern,
            "pruned" if site.fresh(going) else "there",
            kept=float(left.sum(dtype=np.float64)),
            total=float(there.values.sum(dtype=np.float64)),
            zeros=left.size - int(np.count_nonzero(left)),
            size=left.size,
        )

    def _kept(self, site: _Site, going: Keep) -> Keep:
        """Elements that stay, shape of what is left of the weight."""
        sizes = grid_sizes(site.layer, site.shape)
        keep: Keep = from_grid(~self.units.elements(going, sizes), site.layer, site.shape)
        return keep


@dataclass(frozen=True, kw_only=True)
class BlockMaskingPass(MaskingPass):
    """Units of several elements; ``reduction`` says how their scores become one."""

    reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_known("reduction", self.reduction, REDUCTIONS)

    def unit_scores(self, elements: Array) -> Array:
        """Scores of units from a grid of those of elements."""
        return self.units.scores(elements, self.reduction)


def _check_known(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise InvalidOption(f"{name}={value!r} is not known; there are {', '.join(known)}")

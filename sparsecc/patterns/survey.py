"""What an N:M pattern makes of the layers of a model, whose other choices are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsecc.axes.analysis import Analysis, Keeps
from sparsecc.patterns.layers import Layer, computed, layers
from sparsecc.patterns.nm import NM, Array
from sparsecc.patterns.present import present, spread
from sparsecc.plan import Mask, Pattern, Skip
from sparsecc.saliency.magnitude import Unscored
from sparsecc.selection import selected

#: element scores of a weight by name, shape of the weight, higher ones are kept
Scores = Callable[[str], Array]


@dataclass(eq=False)
class Site:
    """A weight that can have the pattern, at the positions that earlier passes keep, in their order.

    ``values`` and ``scores`` are the absolute weight and its element scores there, ``indices`` those
    positions along every axis (None: all).
    """

    layer: Layer
    values: Array
    scores: Array
    indices: list[npt.NDArray[np.int64] | None]
    shape: tuple[int, ...]
    has: bool


@dataclass
class Survey:
    """Layers that can have a pattern, and the others with the reason."""

    pattern: NM
    sites: list[Site] = field(default_factory=list)
    dense: list[Pattern] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def survey(
    analysis: Analysis,
    pattern: NM,
    scores: Scores,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Survey:
    """Look at every layer.

    Raises InvalidOption for name patterns that match nothing, UnsupportedModel on the meta device.
    """
    out = Survey(pattern)
    chosen, keeps = selected(analysis, include, exclude), analysis.keeps(analysis.given.kept)
    for layer in layers(analysis):
        if layer.weight in analysis.given.lost:
            continue
        reason = layer.why or chosen(layer.weight)
        site = None if reason else _site(analysis, keeps, pattern, layer, scores)
        if isinstance(site, Site):
            out.sites.append(site)
        else:
            out.dense.append(Pattern(layer.weight, layer.axis, str(pattern), "dense"))
            out.skips.append(Skip(layer.weight, reason or str(site)))
    out.skips += [Skip(where, reason) for where, reason in dict(computed(analysis)).items()]
    return out


def _site(analysis: Analysis, keeps: Keeps, pattern: NM, layer: Layer, scores: Scores) -> Site | str:
    """The layer as a site, or why it is none."""
    view = analysis.view
    width = keeps.count(analysis.solver.axes[view.weights[layer.weight]][layer.axis])
    if not pattern.fits(width):
        return f"its sums run over {width} positions, which are no multiple of {pattern.m}"
    there = present(analysis, keeps, layer)
    if isinstance(there, str):
        return there
    has = pattern.holds(there.values, layer.axis)
    try:
        ranked = there.values if has else there.of(scores(layer.weight))
    except Unscored as error:
        return str(error)
    return Site(layer, there.values, ranked, there.indices, there.shape, has)


def masked(found: Survey) -> tuple[list[Mask], list[Pattern]]:
    """The masks that give every site the pattern, and what is to be told of every layer.

    A site that has the pattern already is left as it is, bit for bit.
    """
    masks: list[Mask] = []
    told: list[Pattern] = []
    for site in found.sites:
        total = float(site.values.sum(dtype=np.float64))
        left = site.values
        if not site.has:
            keep = found.pattern.keep(site.scores, site.layer.axis)
            left = np.where(keep, site.values, 0)
            masks.append(Mask(site.layer.weight, spread(keep, site.indices, site.shape)))
        kept, zeros = float(left.sum(dtype=np.float64)), left.size - int(np.count_nonzero(left))
        state: Literal["pruned", "there"] = "there" if site.has else "pruned"
        told.append(
            Pattern(
                site.layer.weight, site.layer.axis, str(found.pattern), state, kept, total, zeros, left.size
            )
        )
    return masks, [*told, *found.dense]

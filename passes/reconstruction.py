"""Updates of layers whose inputs lost positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass, check_choice


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Pass):
    """Lets what is left of a layer's inputs stand for what went, by least squares on calibration data.

    Before (after ``ChannelPruning``): ``linear[8,16]`` that reads 12 of its 16 inputs.  After: the same 12
    columns with new values, and a bias that takes up the mean of what went, such that the layer's outputs
    are as near as can be to those that it has in the original model.

    ``layers``: ``"cut"``, those that lost inputs, or ``"all"`` that follow.  ``towards``: the outputs of the
    ``"original"`` model, which makes up for earlier layers as well, or the layer's ``"own"``, had it lost
    nothing, which is the safer one in deep language models.  ``rows``: all count alike (``"equal"``), or by
    what is usual over the size of what the layer gives for them (``"relative"``), so that the few tokens with
    massive activations in language models do not decide.  ``damping``: how much an update costs, as a share
    of the mean second moment of the inputs; None finds it for every layer on one batch in eight, and updates
    nothing but the bias where that does best on these.  ``refit=False`` does not use these batches in the
    end either, so that a ``Distillation`` behind it, which holds out the same ones, can judge.  ``include``
    and ``exclude``: name patterns of weights or modules.  Needs calibration data; runs after the passes of a
    recipe that remove anything.
    """

    layers: Literal["cut", "all"] = "cut"
    towards: Literal["original", "own"] = "original"
    rows: Literal["equal", "relative"] = "relative"
    damping: float | None = None
    refit: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choice("layers", self.layers, ("cut", "all"))
        check_choice("towards", self.towards, ("original", "own"))
        check_choice("rows", self.rows, ("equal", "relative"))
        if self.damping is not None and not self.damping > 0:
            raise InvalidOption(f"damping={self.damping!r}: give a positive share, such as 0.01, or None")
        check_names(self.include, self.exclude)

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """New values of the layers."""
        from sparsecc.recovery.least_squares import Options, reconstruct

        found = reconstruct(
            analysis,
            needed(saliency, type(self).__name__),
            options=Options(self.damping, self.layers == "all", self.towards == "own", self.rows, self.refit),
            include=self.include,
            exclude=self.exclude,
        )
        return Choice({}, found.actions, found.skips)

"""Training of what is left, part by part, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.recovery.needs import needed
from sparsecc.saliency import Saliency
from sparsecc.selection import check_names
from sparsecc.transform import Choice, Pass, check_choice, check_count


@dataclass(frozen=True, kw_only=True)
class Distillation(Pass):
    """Trains what is left of a part of the model to give what the part gives in the original one.

    Before (after ``ChannelPruning``): a feed-forward block with 12 of its 16 neurons.  After: the same 12
    with new values of all its weights, of both layers, of norms and biases, found by ``epochs`` passes of
    Adam over the calibration data.  A part ends behind two products in a row, where a single value is all
    that goes on from it, and is trained on what it reads in the pruned model; pruned elements stay zero.
    One batch in eight is not trained on: the values that do best on those are taken, and the old ones if
    none do better (behind ``Reconstruction``, which uses all batches, hardly any do: ``refit=False`` helps).
    Layer-wise distillation, with hints as in Romero et al., "FitNets" (2015), section 2.2, at every part
    instead of one.

    ``layers``: ``"cut"``, parts that lost something, or ``"all"``.  ``towards``: the outputs of the
    ``"original"`` model, which makes up for earlier parts as well, or the part's ``"own"``, had it lost
    nothing.  ``rows``: all count alike (``"equal"``), or by what is usual over their own mean square
    (``"relative"``), so that the few tokens with massive activations in language models do not decide.
    ``rate``: the first step of Adam, as a share of the root mean square of a weight.  ``include``
    and ``exclude``: name patterns of weights or modules.  Needs calibration data, and keeps the activations
    of one part for all of it in memory.  Runs after the passes of a recipe that remove anything.
    """

    epochs: int = 10
    rate: float = 0.02
    layers: Literal["cut", "all"] = "cut"
    towards: Literal["original", "own"] = "original"
    rows: Literal["equal", "relative"] = "relative"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    turn: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        if not self.rate > 0:
            raise InvalidOption(f"rate={self.rate!r}: give a positive share, such as 0.02")
        check_choice("layers", self.layers, ("cut", "all"))
        check_choice("towards", self.towards, ("original", "own"))
        check_choice("rows", self.rows, ("equal", "relative"))
        check_names(self.include, self.exclude)

    def choose(self, analysis: Analysis, saliency: Saliency | None = None) -> Choice:
        """New values of the weights."""
        from sparsecc.recovery.distillation import Schedule, distill

        found = distill(
            analysis,
            needed(saliency, type(self).__name__),
            Schedule(self.epochs, self.rate, self.rows),
            everything=self.layers == "all",
            own=self.towards == "own",
            include=self.include,
            exclude=self.exclude,
        )
        return Choice({}, found.actions, found.skips)

"""When masks are chosen, and how sparse they are then: step -> target sparsity.

A step is an optimizer step; ``at(t)`` is the target after ``t`` of them.  Masks are chosen at ``start``,
then every ``every`` steps, and at ``end``; between these the last target holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.errors import InvalidOption
from sparsecc.transform import check_share


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all schedules; ``sparsity`` is the share of positions that is gone at the end."""

    sparsity: float
    start: int = 0
    end: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        for name, least in (("start", 0), ("end", self.start), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidOption(f"{name}={value!r}: give a number of optimizer steps, at least {least}")

    def updates(self, step: int) -> bool:
        """Whether masks are chosen anew after ``step`` optimizer steps."""
        if not self.start <= step <= self.end:
            return False
        return step == self.end or (step - self.start) % self.every == 0

    def at(self, step: int) -> float:
        """The target sparsity after ``step`` optimizer steps."""
        if step < self.start:
            return 0.0
        last = self.end if step >= self.end else step - (step - self.start) % self.every
        return self.value(last)

    def value(self, step: int) -> float:
        """The target at a step at which masks are chosen."""
        return self.sparsity

    def share(self, step: int) -> float:
        """How much of the time from ``start`` to ``end`` is over, from 0 to 1."""
        return 1.0 if self.end == self.start else (step - self.start) / (self.end - self.start)


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """Everything goes at once, after ``start`` steps (Han et al., "Learning both Weights and Connections
    for Efficient Neural Networks", 2015, section 3, with one round)."""

    def __post_init__(self) -> None:
        if self.end == 0:
            object.__setattr__(self, "end", self.start)
        super().__post_init__()
        if self.end != self.start:
            raise InvalidOption(
                f"end={self.end}: a one-shot schedule prunes once, at start={self.start}; use Constant for "
                "masks that are chosen again at the same sparsity"
            )


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same sparsity from ``start`` on, with masks chosen again until ``end``: for dynamic training."""


@dataclass(frozen=True, kw_only=True)
class Iterative(Schedule):
    """Rounds of pruning and fine-tuning, each of which removes the same share of what is left.

    Han et al. (2015), section 3; the share by round as in Frankle and Carbin, "The Lottery Ticket
    Hypothesis" (2019), section 1: of n rounds, the k-th leaves (1 - sparsity)^(k / n).  The first round is
    at ``start``, the last one at ``end``.
    """

    def value(self, step: int) -> float:
        """1 - (1 - sparsity)^(k / n) in the k-th of n rounds."""
        rounds = -(-(self.end - self.start) // self.every) + 1
        place = -(-(step - self.start) // self.every) + 1
        return float(1 - (1 - self.sparsity) ** (place / rounds))


@dataclass(frozen=True, kw_only=True)
class _Gradual(Schedule):
    """From ``initial`` at ``start`` to ``sparsity`` at ``end``."""

    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("initial", self.initial)
        if self.initial > self.sparsity:
            raise InvalidOption(f"initial={self.initial}: give no more than sparsity={self.sparsity}")


@dataclass(frozen=True, kw_only=True)
class Cubic(_Gradual):
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))^3.

    Zhu and Gupta, "To prune, or not to prune" (2017), eq. 1; t_0 is ``start``, Δt ``every`` and
    t_0 + n Δt ``end``.
    """

    def value(self, step: int) -> float:
        """Eq. 1."""
        return self.sparsity + (self.initial - self.sparsity) * (1 - self.share(step)) ** 3


@dataclass(frozen=True, kw_only=True)
class Exponential(_Gradual):
    """The density falls exponentially from 1 - ``initial`` to 1 - ``sparsity``: the same share of what is
    left goes in the same time."""

    def value(self, step: int) -> float:
        """1 - d_i (d_f / d_i)^share, with densities d = 1 - s."""
        first, last = 1 - self.initial, 1 - self.sparsity
        return float(1 - first * (last / first) ** self.share(step))

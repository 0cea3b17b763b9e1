"""Comparing the speed of two callables on a machine that has other things to do."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sparsecc.errors import InvalidOption


@dataclass(frozen=True, slots=True)
class Latency:
    """Two callables timed alternately.

    ``before_ms`` and ``after_ms`` are medians.  ``ratio`` is the median over the rounds of
    before / after, so that a slow spell of the machine, which hits both halves of a round, cancels:
    above 1 means that the second is faster.  ``low`` and ``high`` are its quartiles.  ``load`` is the
    machine's load average over a minute at the end (None where the system has none), ``threads`` the
    threads that the caller says were used.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    threads: int | None
    load: float | None

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON data, for the report."""
        return asdict(self)

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        load = "" if self.load is None else f", load {self.load:.1f}"
        return (
            f"{self.before_ms:.3g} ms -> {self.after_ms:.3g} ms, {self.ratio:.2f}x "
            f"[{self.low:.2f}, {self.high:.2f}] (median of {self.rounds} interleaved rounds{threads}{load})"
        )


def compare_latency(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    rounds: int = 15,
    warmup: int = 2,
    budget_s: float = 5.0,
    threads: int | None = None,
    settle_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Latency:
    """Time ``a`` (before) and ``b`` (after), one after the other, ``rounds`` times.

    Odd rounds run ``b`` first.  ``warmup`` calls of each come before and do not count.  No round
    starts once ``budget_s`` seconds are spent, but at least one is run.  With ``settle_s`` every timed
    call comes after that many seconds of rest and one call that does not count: for runtimes whose
    threads keep spinning after a call, and would take the processor from the other callable.
    """
    if rounds < 1 or warmup < 0 or not budget_s > 0:
        raise InvalidOption(
            "rounds must be at least 1, warmup at least 0 and budget_s positive; "
            f"got {rounds}, {warmup}, {budget_s}"
        )
    start = clock()
    for _ in range(warmup):
        a()
        b()
        if clock() - start > budget_s / 2:
            break
    before: list[float] = []
    after: list[float] = []

    def seconds(call: Callable[[], object]) -> float:
        if settle_s > 0:
            sleep(settle_s)
            call()
        begin = clock()
        call()
        return clock() - begin

    while len(before) < rounds and (not before or clock() - start < budget_s):
        if len(before) % 2:
            after.append(seconds(b))
            before.append(seconds(a))
        else:
            before.append(seconds(a))
            after.append(seconds(b))
    tick = 1e-9  # a clock that did not move must not divide by zero
    ratios = [x / max(y, tick) for x, y in zip(before, after, strict=True)]
    low, ratio, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return Latency(
        before_ms=statistics.median(before) * 1e3,
        after_ms=statistics.median(after) * 1e3,
        ratio=ratio,
        low=low,
        high=high,
        rounds=len(ratios),
        threads=threads,
        load=_load(),
    )


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None

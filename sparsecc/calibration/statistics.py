"""Statistics of a model on calibration data, each collected when it is first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from sparsecc.calibration.data import CalibrationData
from sparsecc.calibration.gradients import GRADIENTS, flow, leaves, outputs_of
from sparsecc.calibration.lockstep import watched
from sparsecc.calibration.moments import MOMENTS, Moments
from sparsecc.calibration.readings import Readings, readings
from sparsecc.calibration.resume import Progress
from sparsecc.errors import InvalidOption, SparseccError, summary
from sparsecc.memory import out_of_memory
from sparsecc.subject import Step, Subject

#: told (batches done, batches in all or None, what is collected)
Advance = Callable[[int, int | None, str], None]


@contextmanager
def blaming() -> Iterator[None]:
    """Say that it is on calibration data where operators of the model fail."""
    try:
        yield
    except Exception as error:  # whatever the operators raise
        if isinstance(error, SparseccError) or out_of_memory(error):
            raise
        raise InvalidOption(
            f"calibration: the model fails on a batch: {type(error).__name__}: {summary(error)}; "
            "check the batch's shapes and values"
        ) from error


class Statistics:
    """What criteria and reconstruction ask of calibration data.

    Moments are sums over the rows that layers read; layers that read the same value share them.  They are
    collected in one pass over the data for everything that is asked for together.
    """

    def __init__(self, subject: Subject, data: CalibrationData, advance: Advance | None = None) -> None:
        self.subject = subject
        self.data = data
        self.advance = advance or (lambda done, count, what: None)
        self._moments: dict[str, Moments] = {}
        self._have: set[str] = set()
        self._gradients: dict[str, dict[str, torch.Tensor]] = {}
        #: what trials on the data found, for those who ask again (a plan that is made anew)
        self.trials: dict[Any, float] = {}

    @cached_property
    def readings(self) -> Readings:
        """The products that read weights."""
        return readings(self.subject.analysis)

    # -- moments ------------------------------------------------------------------------------

    def collect(self, names: Collection[str]) -> None:
        """Sum those moments, in one pass over the data."""
        lacking = frozenset(names) - self._have
        if not lacking:
            return
        unknown = lacking - MOMENTS.keys()
        if unknown:
            raise InvalidOption(f"{sorted(unknown)} are no statistics; there are {', '.join(MOMENTS)}")
        so_far = Progress(self.data.resume, self._key(lacking) if self.data.resume is not None else "")
        skipped = so_far.done
        for batch in self.batches(", ".join(sorted(lacking))):
            if skipped:
                skipped -= 1
                continue
            seen: set[tuple[Any, ...]] = set()

            def watch(step: Step, outputs: tuple[Any, ...], seen: set[tuple[Any, ...]] = seen) -> None:
                for source, reading in {r.source: r for r in self.readings.at.get(step.call, ())}.items():
                    if source not in seen:
                        seen.add(source)
                        moments = so_far.moments.setdefault(reading.name, Moments())
                        moments.add(reading, step, outputs[0], lacking)

            with torch.no_grad(), blaming():
                watched(self.subject.stepping(self.inputs(batch)), watch)
            so_far.advance()
        so_far.write()
        for name, moments in so_far.moments.items():
            have = self._moments.setdefault(name, Moments(moments.count))
            have.sums.update(moments.sums)
        self._have |= lacking

    def _key(self, names: frozenset[str]) -> str:
        return f"{self.subject.fingerprint()} {' '.join(sorted(names))}"

    def moments(self, weight: str, *names: str) -> Moments | None:
        """Sums over the rows that a weight is multiplied with; None where no product reads it as a matrix."""
        if weight not in self.readings:
            return None
        self.collect(names)
        total: Moments | None = None
        for name in dict.fromkeys(r.name for r in self.readings.of[weight]):
            part = self._moments[name]
            total = part if total is None else total + part
        return total

    def per_element(self, weight: str, name: str) -> torch.Tensor | None:
        """The average of a moment for every element of a weight, in its shape; None without a product."""
        found = self.moments(weight, name)
        if found is None:
            return None
        shape = torch.Size(self.subject.view.weights[weight].shape)
        first = self.readings.of[weight][0]
        average = first.completed(found.average(name))
        per_group = math.prod(shape) // max(average.numel(), 1)
        return first.stored(average[:, None].expand(-1, per_group, -1), shape)

    # -- gradients ----------------------------------------------------------------------------

    def gradient(self, weight: str, name: str) -> torch.Tensor:
        """The average over batches of what ``GRADIENTS`` calls ``name``; InvalidOption without a loss."""
        if name not in self._gradients:
            self._gradients[name] = self._averaged(name)
        found = self._gradients[name]
        if weight not in found:
            raise InvalidOption(f"{weight!r} is no float parameter: it has no gradient")
        return found[weight]

    def _averaged(self, name: str) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        count = 0
        for batch in self.batches(name):
            weights = leaves(self.subject)
            inputs = self.inputs(batch)

            def loss(
                given: dict[str, torch.Tensor], inputs: Any = inputs, batch: Any = batch
            ) -> torch.Tensor:
                with blaming():
                    outputs = outputs_of(self.subject, inputs, given)
                with torch.enable_grad():
                    return self.data.loss_of(self.subject.structured(outputs), batch)  # type: ignore[no-any-return]

            for key, value in GRADIENTS[name](loss, weights, count).items():
                value = value.detach()
                total[key] = total[key].add_(value) if key in total else value.clone()
            count += 1
        return {key: value.div_(count) for key, value in total.items()}

    @cached_property
    def flow(self) -> dict[str, torch.Tensor]:
        """SynFlow's scores of every float parameter; the data only says in which shapes."""
        inputs, _ = self.subject.inputs(0, 0)
        return flow(self.subject, inputs)

    # -- data ---------------------------------------------------------------------------------

    def batches(self, what: str) -> Any:
        """The batches, with word of each that is done; raises InvalidOption where there are none."""
        try:
            count = len(self.data)
        except TypeError:
            count = None
        done = 0
        self.advance(0, count, what)
        for batch in self.data:
            yield batch
            done += 1
            self.advance(done, count, what)
        if not done:
            raise InvalidOption("calibration: there are no batches")

    def inputs(self, batch: Any) -> Any:
        """The model's inputs in a batch; raises InvalidOption where they do not fit."""
        given = self.data.inputs_of(batch)
        try:
            return self.subject.bound(given)
        except InvalidOption as error:
            raise InvalidOption(
                f"calibration: a batch does not fit the model: {error}; CalibrationData(batches, "
                "inputs=lambda batch: ...) says which part of a batch the model takes"
            ) from error

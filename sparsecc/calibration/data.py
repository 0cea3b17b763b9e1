"""Calibration data: what a model is run on to learn which of its weights matter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsecc.errors import InvalidOption


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Batches, how the model's inputs are made of one, and what its outputs are worth.

    ``batches``: anything that can be iterated (several times, where several statistics are needed): a
    ``DataLoader``, a list of example inputs.  ``inputs(batch)`` gives the model's inputs as
    ``example_inputs`` does (a tuple of positional or a dict of keyword inputs; for ONNX by name or in
    order); without it the batch itself is that.  ``loss(outputs, batch)`` is a scalar, larger for worse
    outputs; criteria that use gradients need it.  ``limit`` bounds the number of batches.  ``resume``: a
    file that moments are kept in while they are collected, so that an interrupted run goes on after the last
    batch that is in them; the batches have to come in the same order.
    """

    batches: Iterable[Any]
    inputs: Callable[[Any], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    limit: int | None = None
    resume: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, Mapping) or not isinstance(self.batches, Iterable):
            raise InvalidOption("calibration: give an iterable of batches, such as a list or a DataLoader")
        if iter(self.batches) is self.batches:
            raise InvalidOption(
                "calibration: the batches can be read once only (a generator or an iterator); "
                "give a list or a DataLoader"
            )
        if self.limit is not None and (isinstance(self.limit, bool) or self.limit < 1):
            raise InvalidOption(f"limit={self.limit!r}: give a positive number of batches")

    @classmethod
    def of(cls, given: Any) -> CalibrationData:
        """Calibration data, or an iterable of batches that are inputs themselves."""
        return given if isinstance(given, cls) else cls(given)

    def __iter__(self) -> Iterator[Any]:
        for count, batch in enumerate(self.batches):
            if self.limit is not None and count >= self.limit:
                return
            yield batch

    def __len__(self) -> int:
        """Number of batches; TypeError where the iterable does not tell."""
        count = len(self.batches)  # type: ignore[arg-type]
        return count if self.limit is None else min(count, self.limit)

    def inputs_of(self, batch: Any) -> Any:
        """The model's inputs in a batch."""
        return batch if self.inputs is None else self.inputs(batch)

    def loss_of(self, outputs: Any, batch: Any) -> Any:
        """The loss of a batch; raises InvalidOption without one."""
        if self.loss is None:
            raise InvalidOption(
                "this saliency uses gradients: give CalibrationData(batches, inputs=..., loss=...), "
                "with loss(outputs, batch) a scalar"
            )
        return self.loss(outputs, batch)

"""The float model that is quantised, whatever it was given as, and how batches become its inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from sparsecc.calibration import CalibrationData
from sparsecc.errors import InvalidOption, UnsupportedModel
from sparsecc.lowered import lowered
from sparsecc.onnxfile.model import EncodeError, OnnxFile, to_numpy
from sparsecc.pipeline import Pruned, run
from sparsecc.plan import Pattern
from sparsecc.subject import Subject

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Source:
    """A float model as ONNX.  ``promised``: patterns that a plan put into weights, by weight."""

    file: OnnxFile
    subject: Subject
    promised: Mapping[str, tuple[Pattern, ...]]

    @classmethod
    def of(cls, model: Any, example_inputs: Any, dynamic_shapes: Any) -> Source:
        """A model of any kind, or a ``Pruned``."""
        pruned = as_pruned(model, example_inputs, dynamic_shapes)
        file, _ = lowered(pruned.subject, pruned.applied)
        names = _names(file, pruned.subject.view.tied)
        promised: dict[str, tuple[Pattern, ...]] = {}
        for pattern in pruned.plan.patterns:
            if pattern.state != "dense":
                name = names.get(pattern.weight, pattern.weight)
                promised[name] = (*promised.get(name, ()), pattern)
        return cls(contained(file.inlined()), pruned.subject, promised)

    def feeds(self, data: CalibrationData, batch: Any) -> Feeds:
        """A batch as inputs of the ONNX model, by name."""
        try:
            bound = self.subject.bound(data.inputs_of(batch))
        except InvalidOption as error:
            raise InvalidOption(
                f"calibration: a batch does not fit the model: {error}; CalibrationData(batches, "
                "inputs=lambda batch: ...) says which part of a batch the model takes"
            ) from error
        flat = list(bound.values()) if isinstance(bound, dict) else list(bound)
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        names = [value.name for value in self.file.inputs]
        if len(tensors) != len(names):
            raise InvalidOption(f"a batch has {len(tensors)} tensors, the lowered model takes {len(names)}")
        return {
            name: np.ascontiguousarray(to_numpy(tensor.detach().cpu()))
            for name, tensor in zip(names, tensors, strict=True)
        }


def as_pruned(model: Any, example_inputs: Any, dynamic_shapes: Any) -> Pruned:
    """A ``Pruned`` as it is, and any other model as the result of no pass.

    Raises InvalidOption for example inputs beside a ``Pruned``.
    """
    if not isinstance(model, Pruned):
        return run(model, example_inputs, [], verify=False, dynamic_shapes=dynamic_shapes)
    if example_inputs is not None:
        raise InvalidOption("example_inputs: a Pruned knows those of the model that it was made from")
    return model


def _names(file: OnnxFile, tied: Mapping[str, str]) -> dict[str, str]:
    """Canonical name of a weight -> the one of its names that it has in the file."""
    return {first: name for name, first in tied.items() if name in file.initializers}


def contained(file: OnnxFile) -> OnnxFile:
    """The model with its weights in one message; raises UnsupportedModel where it does not fit one."""
    if not file.payloads and not any(t.external_data for t in file.proto.graph.initializer):
        return file
    with tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        path = Path(folder, "model.onnx")
        file.save(path)
        whole = onnx.load(str(path))
    try:
        whole.ByteSize()
    except EncodeError as error:
        raise UnsupportedModel(
            "models over 2 GB are not quantised: one message does not hold them"
        ) from error
    return OnnxFile.load(whole)

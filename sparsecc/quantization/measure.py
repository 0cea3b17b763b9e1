"""By how much the outputs of a quantised model differ from those of the float one, on given batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsecc.errors import UnsupportedModel, summary
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.quantization.result import Error
from sparsecc.quantization.source import Feeds


def measured(before: OnnxFile, after: OnnxFile, batches: Iterable[Feeds]) -> tuple[Error, ...]:
    """Errors of every output of floats over all batches, both models on onnxruntime.

    Raises UnsupportedModel where onnxruntime does not run one of them.
    """
    names = [value.name for value in before.proto.graph.output]
    wanted = _session(before, "float")
    integers = any("Integer" in node.op_type for node in after.proto.graph.node)
    ways = (False,) if integers else (False, True)
    quantised = {exact: _session(after, "quantised", exact=exact) for exact in ways}
    sums = {(name, exact): Sums() for name in names for exact in quantised}
    for feeds in batches:
        truth = _ran(wanted, names, feeds)
        for exact, session in quantised.items():
            for name, ours, found in zip(names, truth, _ran(session, names, feeds), strict=True):
                if np.asarray(ours).dtype.kind == "f":
                    sums[name, exact].add(ours, found)
    return tuple(
        replace(sums[name, False].error(name), exact_db=_exact(sums.get((name, True))))
        for name in names
        if sums[name, False].batches
    )


def _exact(found: Sums | None) -> float:
    return math.nan if found is None else found.error("").sqnr_db


@dataclass
class Sums:
    """Energy of an output and of what it is off by, over all batches that were added."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    batches: int = 0

    def add(self, wanted: Any, got: Any) -> None:
        """A batch of arrays."""
        difference = got.astype(np.float64) - wanted
        self.signal += float(np.square(wanted, dtype=np.float64).sum())
        self.noise += float(np.square(difference).sum())
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))
        self.batches += 1

    def error(self, name: str) -> Error:
        """What was found, under the output's name."""
        ratio = self.signal / self.noise if self.noise else math.inf
        return Error(
            output=name,
            sqnr_db=10 * math.log10(ratio) if ratio > 0 else -math.inf,
            relative=math.sqrt(1 / ratio) if ratio else math.inf,
            largest=self.largest,
            batches=self.batches,
        )


def _session(file: OnnxFile, which: str, *, exact: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(file.to_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own for each status
        raise UnsupportedModel(f"onnxruntime cannot load the {which} model: {summary(error)}") from error


def _ran(session: Any, names: list[str], feeds: Feeds) -> list[Any]:
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # likewise
        raise UnsupportedModel(f"onnxruntime cannot run the model on a batch: {summary(error)}") from error

"""How much a part of a model changes what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsecc.calibration.lockstep import watched
from sparsecc.calibration.statistics import Statistics, blaming
from sparsecc.graph import Value
from sparsecc.subject import Step


def influences(statistics: Statistics, pairs: Sequence[tuple[Value, Value, int | None]]) -> list[float]:
    """1 - mean cosine between two values, along an axis (None: over whole samples), for every pair.

    Men et al., "ShortGPT" (2024), eq. 2: block influence, for the value that a block reads and that which
    it gives.  0 for values that are never computed.
    """
    wanted = {value for pair in pairs for value in pair[:2]}
    sums = [0.0] * len(pairs)
    counts = [0] * len(pairs)
    for batch in statistics.batches("block influence"):
        seen: dict[Value, torch.Tensor] = {}

        def watch(step: Step, outputs: tuple[Any, ...], seen: dict[Value, torch.Tensor] = seen) -> None:
            for value, tensor in (
                *zip(step.call.inputs, step.operands, strict=True),
                *zip(step.call.outputs, outputs, strict=False),
            ):
                if value in wanted and isinstance(tensor, torch.Tensor):
                    seen.setdefault(value, tensor)

        with torch.no_grad(), blaming():
            watched(statistics.subject.stepping(statistics.inputs(batch)), watch)
        for place, (source, output, axis) in enumerate(pairs):
            if source in seen and output in seen:
                cosine = _cosines(seen[source], seen[output], axis)
                sums[place] += float((1 - cosine).sum())
                counts[place] += cosine.numel()
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]


def _cosines(a: torch.Tensor, b: torch.Tensor, axis: int | None) -> torch.Tensor:
    a, b = torch.broadcast_tensors(a.double(), b.double())
    if axis is None:
        a, b, axis = a.reshape(len(a), -1), b.reshape(len(b), -1), 1
    return torch.nn.functional.cosine_similarity(a, b, axis)

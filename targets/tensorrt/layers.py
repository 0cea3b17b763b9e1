"""What an artifact holds, product by product: the verdict of the checker and what the surgery did."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel
from sparsecc.targets.tensorrt.prepare import Prepared
from sparsecc.targets.tensorrt.rule import sparsity

LAYERS = "layers.json"
WIDE = 256
"""Widths from where NVIDIA found sparse kernels to win: github.com/NVIDIA/TensorRT/issues/3849."""


def layers(prepared: Prepared) -> list[dict[str, Any]]:
    """One entry for each product with a constant weight, as JSON data.

    ``product`` is the output of the product in the original model, ``rounds`` the type that it was not
    computed in before, ``done`` what the surgery did.
    """
    found = []
    for row in sparsity(prepared.file):
        product = prepared.origin.get(row.output, row.output)
        done = list(prepared.notes.get(product, ()))
        found.append(
            {**asdict(row), "product": product, "rounds": prepared.rounds.get(product, ""), "done": done}
        )
    return found


def layers_of(artifact: Artifact) -> list[dict[str, Any]]:
    """The entries of an artifact.  Raises ``InvalidModel`` for damaged ones."""
    try:
        return [dict(entry) for entry in json.loads(artifact.read(LAYERS))]
    except (ValueError, TypeError) as error:
        raise InvalidModel(f"the artifact's {LAYERS} cannot be read: {error}") from error


def rows(artifact: Artifact) -> list[dict[str, str]]:
    """The entries as a table for people."""
    return [
        {
            "product": entry["op"],
            "weight": entry["weight"],
            "size": " x ".join(map(str, entry["shape"])),
            "type": entry["dtype"],
            "axis": "" if entry["axis"] is None else str(entry["axis"]),
            "sparse": "eligible" if entry["holds"] else "dense",
            "why": entry["why"],
            "done": "; ".join(entry["done"]),
        }
        for entry in layers_of(artifact)
    ]


def summary(artifact: Artifact) -> list[str]:
    """How many products are eligible and why the others are not, in one or two sentences."""
    entries = layers_of(artifact)
    eligible = [entry for entry in entries if entry["holds"]]
    reasons = Counter(_kind(entry["why"]) for entry in entries if not entry["holds"])
    dense = "; ".join(f"{count} stay dense: {why}" for why, count in reasons.most_common(4))
    notes = [
        f"TensorRT's rule for sparse weights holds for {len(eligible)} of {len(entries)} products"
        + (f"; {dense}" if dense else "")
    ]
    if eligible:
        wide = sum(_is_wide(entry) for entry in eligible)
        notes.append(
            f"{wide} of these {len(eligible)} have both widths above {WIDE}, from where NVIDIA found sparse "
            "kernels to win; TensorRT picks by timing, and nothing here has been measured on hardware"
        )
    return notes


def _kind(why: str) -> str:
    """A reason without its numbers of groups, so that equal ones count together."""
    return "their weights are not 2:4 along the sums" if "hold more than two" in why else why


def _is_wide(entry: dict[str, Any]) -> bool:
    """Whether inputs (times kernel positions) and outputs of a product are both wide."""
    shape, axis = entry["shape"], entry["axis"]
    if entry["op"] == "Conv":
        return bool(shape[0] > WIDE and math.prod(shape[1:]) > WIDE)
    return bool(shape[axis] > WIDE and shape[1 - axis] > WIDE)

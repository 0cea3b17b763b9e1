"""What an artifact for sparse tensor cores holds, layer by layer, for people."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel
from sparsecc.targets.cuda.build import Kernel
from sparsecc.targets.cuda.launch import chosen, device_for, kernels_of

LAYERS = "layers.json"


def layers_of(artifact: Artifact) -> list[dict[str, Any]]:
    """One entry for each product with a constant weight.  Raises ``InvalidModel`` for damaged ones."""
    try:
        return [dict(entry) for entry in json.loads(artifact.read(LAYERS))]
    except (ValueError, TypeError) as error:
        raise InvalidModel(f"the artifact's {LAYERS} cannot be read: {error}") from error


def rows(artifact: Artifact) -> list[dict[str, str]]:
    """A table: the kernel named is the one for the layer's own number of rows."""
    kernels = kernels_of(artifact)
    found = []
    for entry in layers_of(artifact):
        own = [kernels[name] for name in entry["kernels"] if name in kernels]
        kernel = chosen(own, max(1, entry["rows"])) if own else None
        found.append(
            {
                "weight": entry["weight"],
                "size": f"{entry['out']} x {entry['k']}",
                "rows": str(entry["rows"]),
                "runs": f"2:4 {entry['dtype']}" if entry["sparse"] else "dense",
                **_of_kernel(kernel, entry),
                "why": entry["why"],
            }
        )
    return found


def _of_kernel(kernel: Kernel | None, entry: dict[str, Any]) -> dict[str, str]:
    if kernel is None:
        return {"tile": "", "registers": "", "shared": "", "reads and writes": ""}
    registers = max(image.registers for image in kernel.images.values())
    return {
        "tile": kernel.config.tile_name,
        "registers": str(registers),
        "shared": f"{kernel.config.shared_bytes / 1024:.0f} KiB",
        "reads and writes": f"{kernel.traffic(max(1, entry['rows'])) / 1e6:.3g} MB",
    }


def summary(artifact: Artifact) -> list[str]:
    """How many layers run sparse and why the others do not, in one or two sentences."""
    layers = layers_of(artifact)
    sparse = sum(bool(entry["sparse"]) for entry in layers)
    reasons = Counter(
        "2:4 is not expected to pay at their size" if entry["expected"] else entry["why"]
        for entry in layers
        if not entry["sparse"]
    )
    dense = "; ".join(f"{count} stay dense: {why}" for why, count in reasons.most_common(4))
    notes = [
        f"{sparse} of {len(layers)} products run on sparse tensor cores" + (f"; {dense}" if dense else "")
    ]
    if sparse and device_for(artifact, layers).type == "cpu":
        notes.append(
            "no GPU here runs the kernels: they were compiled, the artifact was checked in its CPU form"
        )
    if sparse:
        notes.append("the speed of the kernels has not been measured on hardware")
    return notes

"""What an artifact for sparse tensor cores holds, layer by layer, for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel
from sparsecc.patterns.lacking import listed
from sparsecc.target import TargetSpec
from sparsecc.targets.cuda.build import Kernel
from sparsecc.targets.cuda.choice import UNMEASURED
from sparsecc.targets.cuda.config import OUTPUT_BYTES
from sparsecc.targets.cuda.launch import chosen, device_for, kernels_of
from sparsecc.targets.cuda.layers import LACKING
from sparsecc.targets.cuda.roofline import GPUS, Gpu, Roof, roof

LAYERS = "layers.json"


def layers_of(artifact: Artifact) -> list[dict[str, Any]]:
    """One entry for each product with a constant weight.  Raises ``InvalidModel`` for damaged ones."""
    try:
        return [dict(entry) for entry in json.loads(artifact.read(LAYERS))]
    except (ValueError, TypeError) as error:
        raise InvalidModel(f"the artifact's {LAYERS} cannot be read: {error}") from error


def rows(artifact: Artifact) -> list[dict[str, str]]:
    """A table: the kernel named is the one for the layer's own number of rows.

    ``at least`` is its roof on the GPU that the target is named for, see ``sparsecc.targets.cuda.roofline``.
    """
    kernels = kernels_of(artifact)
    gpu = GPUS[TargetSpec.parse(artifact.target).arch]
    found = []
    for entry in layers_of(artifact):
        kernel = _kernel(kernels, entry)
        found.append(
            {
                "weight": entry["weight"],
                "size": f"{entry['out']} x {entry['k']}",
                "rows": str(entry["rows"]),
                "runs": _runs(entry),
                **_of_kernel(kernel, entry, gpu),
                "why": entry["why"],
            }
        )
    return found


def _runs(entry: dict[str, Any]) -> str:
    if not entry["sparse"]:
        return "dense"
    return f"2:4 {entry['dtype']}" + (", cuSPARSELt" if "cusparselt" in entry["kernels"] else "")


def _kernel(kernels: Mapping[str, Kernel], entry: dict[str, Any]) -> Kernel | None:
    own = [kernels[name] for name in entry["kernels"] if name in kernels]
    return chosen(own, max(1, entry["rows"])) if own else None


def _of_kernel(kernel: Kernel | None, entry: dict[str, Any], gpu: Gpu) -> dict[str, str]:
    if kernel is None:
        return dict.fromkeys(("kernel", "tile", "registers", "shared", "reads and writes", "at least"), "")
    registers = max(image.registers for image in kernel.images.values())
    least = _roof(kernel, entry, gpu)
    return {
        "kernel": kernel.entry,
        "tile": kernel.config.tile_name,
        "registers": str(registers),
        "shared": f"{kernel.config.shared_bytes / 1024:.0f} KiB",
        "reads and writes": f"{least.bytes / 1e6:.3g} MB",
        "at least": f"{least.microseconds:.3g} us ({least.limit})",
    }


def _roof(kernel: Kernel, entry: dict[str, Any], gpu: Gpu) -> Roof:
    config = kernel.config
    return roof(
        gpu,
        kernel.problem,
        max(1, entry["rows"]),
        element=config.element.bytes,
        output=OUTPUT_BYTES[config.out_dtype],
        residual=config.epilogue.residual,
    )


def summary(artifact: Artifact) -> list[str]:
    """How many layers run sparse and why the others do not, in one or two sentences."""
    layers = layers_of(artifact)
    sparse = sum(bool(entry["sparse"]) for entry in layers)
    dense = [entry for entry in layers if not entry["sparse"]]
    rows = sorted({entry["rows"] for entry in dense if entry["expected"]})
    no_gain = _NO_GAIN.format(" to ".join(str(n) for n in dict.fromkeys((*rows[:1], *rows[-1:]))))
    reasons = Counter(no_gain if entry["expected"] else entry["why"] for entry in dense)
    left = "; ".join(f"{count} stay dense: {why}" for why, count in reasons.most_common(4))
    notes = [f"{sparse} of {len(layers)} products run on sparse tensor cores" + (f"; {left}" if left else "")]
    idle = [entry["weight"] for entry in dense if entry["expected"] and not entry["why"].startswith(LACKING)]
    if idle:
        notes.append(
            f"{len(idle)} of these have 2:4 weights, whose zeros gain nothing where they stay dense: "
            f"{listed(list(dict.fromkeys(idle)))}"
        )
    if unmeasured := sum(UNMEASURED in entry["why"] for entry in layers):
        notes.append(f"{unmeasured} products were not measured: no GPU here runs them")
    if sparse:
        notes.append(_least(artifact, layers))
    if sparse and device_for(artifact, layers).type == "cpu":
        notes.append(
            "no GPU here runs the kernels: they were compiled, the artifact was checked in its CPU form"
        )
    if not all(entry.get("timed", False) for entry in layers if entry["sparse"]):  # older ones say nothing
        notes.append("the speed of the kernels has not been measured on hardware, at these sizes")
    return notes


#: of a dense layer, whose rows are those of the example inputs
_NO_GAIN = "2:4 is not expected to pay with {} rows, as the example inputs have (choose=always: anyway)"


def _least(artifact: Artifact, layers: list[dict[str, Any]]) -> str:
    """The sum of all roofs, and of which GPU."""
    gpu, kernels = GPUS[TargetSpec.parse(artifact.target).arch], kernels_of(artifact)
    roofs = [_roof(kernel, entry, gpu) for entry in layers if (kernel := _kernel(kernels, entry)) is not None]
    total = sum(one.microseconds for one in roofs)
    return (
        f"a bound, no measurement: by its published peaks the {gpu.name} needs {total:.3g} us for these "
        "products, at the sizes of the example inputs"
    )

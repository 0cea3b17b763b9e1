"""Prunes a checkpoint on disk, layer by layer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.checkpoint.meta import meta_subject
from sparsecc.checkpoint.shards import Shards
from sparsecc.checkpoint.writer import ShardWriter, check_known
from sparsecc.errors import InvalidOption
from sparsecc.fx.subject import TorchSubject
from sparsecc.fx.weights import WeightActions
from sparsecc.memory import give_back
from sparsecc.pipeline import decide, given
from sparsecc.plan import Bypass, Mask, Pattern, Plan, Skip, Write
from sparsecc.recovery.layerwise import LayerwiseOptions, prune_layers
from sparsecc.saliency import Saliency
from sparsecc.transform import Pass

#: files beside the weights that belong to a checkpoint
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".md")


@dataclass(frozen=True)
class PrunedCheckpoint:
    """Where the result is, what was cut, and what was done to every layer."""

    path: Path
    plan: Plan
    patterns: tuple[Pattern, ...]
    skips: tuple[Skip, ...]


def prune_checkpoint(
    model: torch.nn.Module,
    example_inputs: Any,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    passes: Sequence[Pass],
    *,
    calibration: Any,
    saliency: Callable[[Analysis, Statistics], Saliency] | None = None,
    advance: Callable[[int, int | None, str], None] | None = None,
) -> PrunedCheckpoint:
    """Prune the weights in ``source``, a file or a folder, into a new folder ``output``.

    ``model`` is made inside ``parameters_on_meta()``.  Of the passes one may prune layer by layer
    (``SparseGPT``, ``Wanda``): a weight is in memory while its layer is worked on, and in its place on
    disk afterwards; what is held is one layer, its moments, and the activations of all calibration batches.
    Other passes decide first, reading one weight after the other, and weights are cut as they are written.
    Raises InvalidOption where ``output`` is there already; a failure leaves nothing behind.
    """
    if Path(output).exists():
        raise InvalidOption(f"{output}: is there already; give the name of a new folder")
    layerwise = [p for p in passes if isinstance(p, LayerwiseOptions)]
    if len(layerwise) > 1 or any(p.turn > 0 and p not in layerwise for p in passes):
        raise InvalidOption(
            "a checkpoint is pruned by passes that remove positions and by one that works layer by layer; "
            "prune the model in memory for others"
        )
    shards = Shards(source)
    check_known(shards.entries)
    subject = meta_subject(model, example_inputs, shards)
    statistics = Statistics(subject, CalibrationData.of(calibration), advance)
    scores = Saliency(subject.analysis) if saliency is None else saliency(subject.analysis, statistics)
    plan = decide(subject.analysis, [p for p in passes if p not in layerwise], scores)
    parent = Path(output).absolute().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=".prune-") as folder:
        work = Path(folder) / "result"
        work.mkdir()
        patterns, skips = _write(work, shards, subject, statistics, plan, layerwise)
        os.replace(work, output)
    return PrunedCheckpoint(Path(output), plan, tuple(patterns), (*plan.skips, *skips))


def _write(
    work: Path,
    shards: Shards,
    subject: TorchSubject,
    statistics: Statistics,
    plan: Plan,
    layerwise: Sequence[Any],
) -> tuple[list[Pattern], list[Skip]]:
    actions = WeightActions(plan)
    shapes = {
        name: tuple(actions.edit(name, torch.empty(entry.shape, device="meta")).shape)
        for name, entry in shards.entries.items()
        if name in actions.takes
    }
    writer = ShardWriter(work, shards.entries, shapes)

    def sink(name: str, value: torch.Tensor, keep: torch.Tensor) -> None:
        writer.put(name, actions.edit(name, value))
        give_back()

    patterns: list[Pattern] = []
    skips: list[Skip] = []
    for step in layerwise:
        kept = subject.kept(plan)
        analysis = subject.analysis.after(given(subject.analysis, kept, _beyond(plan)))
        found = prune_layers(
            analysis, statistics, step.method(), include=step.include, exclude=step.exclude, sink=sink
        )
        patterns += found.patterns
        skips += found.skips
    for name in sorted(writer.left):
        writer.put(name, actions.edit(name, shards[name]))
    _copy_beside(shards.path, work)
    return patterns, skips


def _beyond(plan: Plan) -> list[Any]:
    """Actions that do not follow from the kept positions."""
    return [a for a in plan.actions if isinstance(a, (Bypass, Mask, Write))]


def _copy_beside(source: Path, work: Path) -> None:
    """Configuration, tokenizer and index."""
    if not source.is_dir():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _BESIDE:
            shutil.copyfile(file, work / file.name)
    index = work / "model.safetensors.index.json"
    if index.exists():
        told = json.loads(index.read_text())
        total = sum(f.stat().st_size for f in work.glob("*.safetensors"))
        told.setdefault("metadata", {})["total_size"] = total
        index.write_text(json.dumps(told, indent=2, sort_keys=True))

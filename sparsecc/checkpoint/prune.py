"""Prunes a checkpoint on disk, layer by layer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from sparsecc.axes.analysis import Analysis
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.checkpoint.check import compared
from sparsecc.checkpoint.configuration import CONFIG, document, is_huggingface
from sparsecc.checkpoint.conversion import opened, writer
from sparsecc.checkpoint.load import PLAN, written
from sparsecc.checkpoint.meta import MetaSubject
from sparsecc.checkpoint.shards import Shards
from sparsecc.checkpoint.writer import check_known
from sparsecc.errors import InvalidOption
from sparsecc.fx.subject import AppliedTorch
from sparsecc.fx.weights import WeightActions, renamed
from sparsecc.memory import give_back
from sparsecc.pipeline import decide, given
from sparsecc.plan import Bypass, Mask, Pattern, Plan, Skip, Write
from sparsecc.recovery.layerwise import LayerwiseOptions, prune_layers
from sparsecc.saliency import Saliency
from sparsecc.transform import Pass
from sparsecc.verification import Certificate

#: files beside the weights that belong to a checkpoint
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".md")


@dataclass(frozen=True)
class PrunedCheckpoint:
    """Where the result is, what was cut, and what was done to every layer.

    ``from_pretrained``: whether transformers loads the folder; where not, ``load_checkpoint`` does, and
    ``notes`` say why.
    """

    path: Path
    plan: Plan
    patterns: tuple[Pattern, ...]
    skips: tuple[Skip, ...]
    certificate: Certificate
    from_pretrained: bool
    notes: tuple[str, ...] = ()


def prune_checkpoint(
    model: torch.nn.Module,
    example_inputs: Any,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    passes: Sequence[Pass],
    *,
    calibration: Any = None,
    saliency: Callable[[Analysis, Statistics], Saliency] | None = None,
    verify: bool = True,
    advance: Callable[[int, int | None, str], None] | None = None,
) -> PrunedCheckpoint:
    """Prune the weights in ``source``, a file or a folder, into a new folder ``output``.

    ``model`` is made inside ``parameters_on_meta()``.  Of the passes one may prune layer by layer
    (``SparseGPT``, ``Wanda``): a weight is in memory while its layer is worked on, and in its place on
    disk afterwards; what is held is one layer, its moments, and the activations of all calibration batches.
    Passes that remove positions decide first, reading one weight after the other, and weights are cut as they
    are written; they need no ``calibration`` unless their criterion does.

    Where widths or layers go, ``config.json`` gets the fields with which the model's class is the pruned
    model, if there are such values; otherwise it is left out, so that nothing loads the folder wrongly, and
    the plan is written, with which ``load_checkpoint`` loads it.  ``verify``: read the result again and
    compare it with the masked original in float64, on inputs like the example's.  Raises
    InvalidOption where ``output`` is there already, VerificationFailed; a failure leaves nothing behind.
    """
    if Path(output).exists():
        raise InvalidOption(f"{output}: is there already; give the name of a new folder")
    layerwise = [p for p in passes if isinstance(p, LayerwiseOptions)]
    if len(layerwise) > 1 or any(p.turn > 0 and p not in layerwise for p in passes):
        raise InvalidOption(
            "a checkpoint is pruned by passes that remove positions and by one that works layer by layer; "
            "prune the model in memory for others"
        )
    if verify and any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves(example_inputs)):
        raise InvalidOption("example_inputs are on the meta device: give some with values, or verify=False")
    if calibration is None and (layerwise or saliency is not None):
        raise InvalidOption("give calibration data: layers are pruned, or ranked, by what they read")
    shards = opened(source, model)
    check_known(shards.entries)
    subject = MetaSubject(model, example_inputs, shards)
    statistics = Statistics(subject, CalibrationData.of(() if calibration is None else calibration), advance)
    scores = Saliency(subject.analysis) if saliency is None else saliency(subject.analysis, statistics)
    plan = decide(subject.analysis, [p for p in passes if p not in layerwise], scores)
    applied = subject.apply(plan, subject.kept(plan)) if plan else None
    parent = Path(output).absolute().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=".prune-") as folder:
        work = Path(folder) / "result"
        work.mkdir()
        patterns, skips = _write(work, shards, subject, statistics, plan, applied, layerwise)
        notes = _describe(work, shards, subject, applied)
        why = (
            "values were pruned layer by layer"
            if layerwise
            else "verify=False"
            if plan
            else "nothing was cut"
        )
        certificate = Certificate("UNCHECKED", "pruned(x) = masked(x)", why=why)
        if applied is not None and verify and not layerwise:
            again = written(model, example_inputs, applied, work)
            certificate = compared(subject, applied.plan, subject.kept(plan), again)
            certificate.require()
        os.replace(work, output)
    loads = is_huggingface(Path(output))
    return PrunedCheckpoint(
        Path(output),
        plan if applied is None else applied.plan,
        tuple(patterns),
        (*plan.skips, *skips),
        certificate,
        loads,
        notes,
    )


def _write(
    work: Path,
    shards: Shards,
    subject: MetaSubject,
    statistics: Statistics,
    plan: Plan,
    applied: AppliedTorch | None,
    layerwise: Sequence[Any],
) -> tuple[list[Pattern], list[Skip]]:
    actions = WeightActions(plan)
    tied = subject.program.tied

    def edited(name: str, value: torch.Tensor) -> torch.Tensor:
        return actions.edit(tied.get(name, name), value)

    names = renamed(plan if applied is None else applied.plan, shards)
    shapes = {
        name: tuple(edited(name, torch.empty(shards.entries[name].shape, device="meta")).shape)
        for name in names
        if tied.get(name, name) in actions.takes
    }
    target = writer(shards, work, shapes, names)

    def sink(name: str, value: torch.Tensor, keep: torch.Tensor) -> None:
        target.put(name, edited(name, value))
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
    for name in sorted(target.left):
        target.put(name, edited(name, shards[name]))
    _copy_beside(shards.path, work, target.files)
    return patterns, skips


def _describe(
    work: Path, shards: Shards, subject: MetaSubject, applied: AppliedTorch | None
) -> tuple[str, ...]:
    """Write the configuration that describes the result, or the plan in its place; returns notes."""
    before = subject.program.module
    if applied is None or before is None:
        return ()
    if applied.described:
        told = document(shards.path, before, applied.model)
        (work / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        return tuple(applied.notes)
    applied.plan.save(work / PLAN)
    how = f"load the result with sparsecc.checkpoint.load_checkpoint, by {PLAN}"
    if applied.plan.form == "graph":
        how += f" and with example inputs ({applied.notes[0]})"
    if not is_huggingface(work):
        return (how,)
    (work / CONFIG).unlink()
    why = applied.undescribed or "none could be made for it"
    return (f"no {CONFIG} was written, because it would not describe the result ({why}): {how}",)


def _beyond(plan: Plan) -> list[Any]:
    """Actions that do not follow from the kept positions."""
    return [a for a in plan.actions if isinstance(a, (Bypass, Mask, Write))]


def _copy_beside(source: Path, work: Path, files: Mapping[str, str]) -> None:
    """Configuration, tokenizer and index; ``files`` says where every tensor is."""
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
        told["weight_map"] = dict(files)
        index.write_text(json.dumps(told, indent=2, sort_keys=True))

"""Loads pruned checkpoints, by their configuration or by the plan that stands beside the weights."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsecc.checkpoint.configuration import CONFIG, configured
from sparsecc.checkpoint.conversion import opened
from sparsecc.checkpoint.meta import EmptySubject, MetaSubject, Weights, parameters_on_meta
from sparsecc.checkpoint.shards import Shards
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.fx.capture import Program, find_ties
from sparsecc.fx.editor import edit
from sparsecc.fx.program_module import program_module
from sparsecc.fx.subject import AppliedTorch
from sparsecc.plan import Plan

#: the plan beside weights that no configuration describes
PLAN = "sparsecc.plan"


def load_checkpoint(
    model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any = None
) -> nn.Module:
    """The pruned model that a folder holds, where no ``config.json`` describes it.

    ``model`` is made as the original was, inside ``parameters_on_meta()``; it is left as it was.  It comes
    back as its class, or, where that cannot express the plan, as its graph, for which ``example_inputs`` are
    needed.  Raises InvalidOption where they are missing, InvalidModel where the folder lacks the plan or
    weights, PlanConflict where ``model`` is not what was pruned.
    """
    shards = opened(folder, model)
    plan = Plan.load(Path(folder) / PLAN)
    cut = _cut(model, plan, shards, example_inputs)
    state = cut.state_dict(keep_vars=True)
    ties = find_ties(state)
    lacking = sorted(n for n in state if n not in shards and ties.get(n, n) not in shards)
    if lacking:
        raise InvalidModel(f"{folder}: holds no {', '.join(lacking[:5])}; give the folder as it was written")
    own = {n: shards[n].to(t.dtype) for n, t in state.items() if n not in ties}
    cut.load_state_dict(own, strict=False, assign=True)
    for alias, name in ties.items():
        holder, _, leaf = alias.rpartition(".")
        cut.get_submodule(holder).register_parameter(leaf, cut.get_parameter(name))
    return cut


def _cut(model: nn.Module, plan: Plan, shards: Shards, example_inputs: Any) -> nn.Module:
    """The pruned model without values."""
    with parameters_on_meta():
        if plan.form == "class":
            found: nn.Module = plan.apply(model)
            return found
        if example_inputs is None:
            raise InvalidOption("this checkpoint is loaded as a graph: give example_inputs")
        subject = EmptySubject(model, example_inputs, shards)
        slim = edit(replace(subject.program, weights=subject.blank), plan)
        return program_module(slim, training=model.training)


def written(model: nn.Module, example_inputs: Any, applied: AppliedTorch, folder: Path) -> Program:
    """What a user gets from a folder, its weights read one by one."""
    shards = opened(folder, model)
    if applied.plan.form == "graph":
        assert applied.program is not None
        weights = applied.program.weights
        own = {n: t for n, t in weights.items() if not t.is_meta}
        return replace(applied.program, weights=Weights(weights, shards, own))  # type: ignore[arg-type]
    with parameters_on_meta():
        if applied.described:
            made = configured(applied.model, json.loads((folder / CONFIG).read_text()))
        else:
            made = _cut(model, Plan.load(folder / PLAN), shards, example_inputs).eval()
    return MetaSubject(made, example_inputs, shards).program

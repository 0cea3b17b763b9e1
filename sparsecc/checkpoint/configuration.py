"""The ``config.json`` of a pruned checkpoint: that of the original, with the fields that changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparsecc.fx.config import quiet
from sparsecc.fx.module import Diverged
from sparsecc.reference.torch_run import default_dtype

CONFIG = "config.json"


def document(source: Path, before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """What ``config.json`` has to say of ``after``, where ``source`` holds that of ``before``.

    Without one in ``source``, or where ``source`` is a single file, all fields are written.
    """
    old, new = _fields(before), _fields(after)
    try:
        told = json.loads((source / CONFIG).read_text())
    except (OSError, ValueError):
        told = None
    if not isinstance(told, dict):
        return {**new, "architectures": [type(after).__name__]}
    return _updated(told, old, new)


def configured(like: nn.Module, told: Mapping[str, Any]) -> nn.Module:
    """The class of ``like`` made from a configuration as it is on disk, in its dtype and evaluation mode.

    Raises Diverged where it refuses it.
    """
    config: Any = like.config
    dtype = next((p.dtype for p in like.parameters() if p.is_floating_point()), None)
    try:
        with quiet(), default_dtype(dtype):
            read = type(config).from_dict(copy.deepcopy(dict(told)))
            for name, value in vars(config).items():  # how to compute, which is on no disk
                if name.startswith("_") and "implementation" in name:
                    setattr(read, name, value)
            made: nn.Module = type(like)(read)
    except Exception as error:  # the model's own code refuses, in its own way
        raise Diverged("config", f"cannot be loaded: {type(error).__name__}: {error}") from error
    return made.eval()


def is_huggingface(source: Path) -> bool:
    """Whether a folder has a configuration from which transformers would load it."""
    try:
        told = json.loads((source / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and bool({"model_type", "architectures"} & told.keys())


def _fields(module: nn.Module) -> dict[str, Any]:
    config: Any = module.config
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def _updated(told: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``told`` with what differs between ``old`` and ``new``, also inside of parts."""
    out = dict(told)
    for name, value in new.items():
        before = old.get(name)
        if value == before:
            continue
        nested = all(isinstance(v, dict) for v in (value, before, told.get(name)))
        out[name] = _updated(told[name], before or {}, value) if nested else value
    return out

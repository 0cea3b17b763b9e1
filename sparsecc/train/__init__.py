"""Sparse training: masks, schedules and methods that attach to an ordinary PyTorch loop.

    sparsifier = Sparsifier(model, optimizer, schedule=Cubic(sparsity=0.9, end=1000, every=50),
                            example_inputs=(x,))
    ...
    loss.backward(); optimizer.step(); sparsifier.step()

The names are loaded when they are first used.  Callbacks for other loops stand in
``sparsecc.train.lightning`` and ``sparsecc.train.huggingface``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecc.train.dynamic import SET, RigL
    from sparsecc.train.elements import NM, Unstructured
    from sparsecc.train.regularisers import L1, GroupLasso, Growing
    from sparsecc.train.schedules import Constant, Cubic, Exponential, Iterative, OneShot, Schedule
    from sparsecc.train.slimming import slim
    from sparsecc.train.sparsifier import Slimmed, Sparsifier
    from sparsecc.train.srste import SRSTE
    from sparsecc.train.structured import Structured

_HOMES = {
    "dynamic": ("SET", "RigL"),
    "elements": ("NM", "Unstructured"),
    "regularisers": ("L1", "GroupLasso", "Growing"),
    "schedules": ("Constant", "Cubic", "Exponential", "Iterative", "OneShot", "Schedule"),
    "slimming": ("slim",),
    "sparsifier": ("Slimmed", "Sparsifier"),
    "srste": ("SRSTE",),
    "structured": ("Structured",),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "L1",
    "NM",
    "SET",
    "SRSTE",
    "Constant",
    "Cubic",
    "Exponential",
    "GroupLasso",
    "Growing",
    "Iterative",
    "OneShot",
    "RigL",
    "Schedule",
    "Slimmed",
    "Sparsifier",
    "Structured",
    "Unstructured",
    "slim",
]


def __getattr__(name: str) -> Any:
    home = _NAMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sparsecc.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

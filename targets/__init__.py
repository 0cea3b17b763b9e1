"""The targets of this distribution, by name; each is imported when it is asked for.

``sparsecc.targets()`` lists every target, including those of plug-ins.
"""

from __future__ import annotations

import sys
from types import ModuleType

if __name__ != "sparsecc.targets":
    raise ImportError(f"import sparsecc.targets, not {__name__}: a second copy would be a second table")

from sparsecc.target import TargetTable, register, targets

register("cpu", "sparsecc.targets.cpu:Cpu")
register("onnx", "sparsecc.targets.onnx:Onnx")
register("tensorrt", "sparsecc.targets.tensorrt.target:Tensorrt")
for _arch in ("sm80", "sm86", "sm89", "sm90", "sm120"):
    register(_arch, f"sparsecc.targets.cuda.target:{_arch.capitalize()}")


class _Callable(ModuleType):
    """Lets ``sparsecc.targets()`` work whichever of the function and the package is bound to the name."""

    def __call__(self) -> TargetTable:
        return targets()


sys.modules[__name__].__class__ = _Callable

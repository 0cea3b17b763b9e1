"""sparsecc: a compiler for pruned and sparse neural networks.

    compiled = sparsecc.compile(model, example_inputs, target="cpu", recipe="ChannelPruning(sparsity=0.5)")

The public names are loaded when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecc.api import (
        Compiled,
        Pruned,
        analyze,
        compile,
        fold,
        load,
        prune,
        sensitivity,
        slim,
        targets,
        verify,
    )
    from sparsecc.axes.analysis import Analysis
    from sparsecc.calibration.data import CalibrationData
    from sparsecc.errors import (
        InvalidModel,
        InvalidOption,
        PlanConflict,
        SparseccError,
        TargetRefused,
        TargetUnavailable,
        UnsupportedModel,
        VerificationFailed,
    )
    from sparsecc.plan import Plan
    from sparsecc.probing.table import Sensitivity
    from sparsecc.quantization import Quantised, QuantisedProgram, quantize, quantize_program
    from sparsecc.report import Report
    from sparsecc.verification.certificate import Certificate

__version__ = "0.1.0"

_HOMES = {
    "sparsecc.api": (
        "Compiled",
        "Pruned",
        "analyze",
        "compile",
        "fold",
        "load",
        "prune",
        "sensitivity",
        "slim",
        "targets",
        "verify",
    ),
    "sparsecc.axes.analysis": ("Analysis",),
    "sparsecc.calibration.data": ("CalibrationData",),
    "sparsecc.errors": (
        "InvalidModel",
        "InvalidOption",
        "PlanConflict",
        "SparseccError",
        "TargetRefused",
        "TargetUnavailable",
        "UnsupportedModel",
        "VerificationFailed",
    ),
    "sparsecc.plan": ("Plan",),
    "sparsecc.probing.table": ("Sensitivity",),
    "sparsecc.quantization": ("Quantised", "QuantisedProgram", "quantize", "quantize_program"),
    "sparsecc.report": ("Report",),
    "sparsecc.verification.certificate": ("Certificate",),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Analysis",
    "CalibrationData",
    "Certificate",
    "Compiled",
    "InvalidModel",
    "InvalidOption",
    "Plan",
    "PlanConflict",
    "Pruned",
    "Quantised",
    "QuantisedProgram",
    "Report",
    "Sensitivity",
    "SparseccError",
    "TargetRefused",
    "TargetUnavailable",
    "UnsupportedModel",
    "VerificationFailed",
    "analyze",
    "compile",
    "fold",
    "load",
    "prune",
    "quantize",
    "quantize_program",
    "sensitivity",
    "slim",
    "targets",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("sparsecc.train")
    home = _NAMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sparsecc' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

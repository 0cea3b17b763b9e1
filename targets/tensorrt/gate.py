"""Whether TensorRT-RTX takes a model: its own parser and builder, on the CPU, with no GPU and no driver.

TensorRT-RTX is TensorRT for desktop GPUs; its wheels hold the same ONNX parser.  Acceptance says that a model
is well formed for TensorRT, not how fast it runs: sparse kernels are picked on the GPU.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sparsecc.errors import TargetUnavailable
from sparsecc.targets.tensorrt.build_engine import BuildFailed, Range, build, logger_of

MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """``ok``, or ``why`` not, in TensorRT-RTX's words; size of the engine and time that it took."""

    ok: bool
    why: str = ""
    engine_bytes: int = 0
    seconds: float = 0.0
    version: str = ""

    def __bool__(self) -> bool:
        return self.ok


def runtime() -> ModuleType | None:
    """TensorRT-RTX, if it is installed and loads."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):
            continue
    return None


def accepted(
    model: bytes | str | Path,
    profiles: Mapping[str, Range] | None = None,
    *,
    capabilities: Sequence[str] = CAPABILITIES[:1],
) -> Acceptance:
    """Parse and build an ONNX model (bytes, or a path beside which its weights lie).

    ``profiles`` of dynamic sizes are made up where none are given; ``capabilities`` are those of the GPUs to
    build for, which need not be there.  Raises ``TargetUnavailable`` where TensorRT-RTX is not installed, and
    what loading a model raises.
    """
    from sparsecc.onnxfile.model import OnnxFile
    from sparsecc.targets.tensorrt.profiles import profiles as made_up

    trt = runtime()
    if trt is None:
        raise TargetUnavailable("TensorRT-RTX is not installed here: pip install 'sparsecc[tensorrt-rtx]'")
    ranges = made_up(OnnxFile.load(model)).ranges if profiles is None else profiles
    version, log = str(trt.__version__), logger_of(trt)
    started = time.perf_counter()
    try:
        engine = build(trt, model, ranges, log, capabilities=list(capabilities))
    except BuildFailed as error:
        return Acceptance(False, str(error), 0, time.perf_counter() - started, version)
    return Acceptance(True, "", len(engine), time.perf_counter() - started, version)

"""Compiles a kernel for the simulator (once for each source) and runs it on NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.cuda_sim.translate import translate

Array = npt.NDArray[Any]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
_HERE = Path(__file__).parent
_COMMON = ("-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", "-w", f"-I{_HERE}")
_MACHINE = (*_COMMON, "-O2")
# Local variables that nothing set hold a pattern that no test expects.
_KERNEL = (*_COMMON, "-O0", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern")
_CACHE = Path(tempfile.gettempdir()) / f"sparsecc-cuda-sim-{os.getuid()}"


@dataclass(frozen=True)
class Report:
    """What a run did: errors and instructions by kind, and the first messages."""

    errors: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    messages: str = ""


class Simulator:
    """One kernel.  ``tensors`` names its pointer parameters; ``outputs`` are those that it may write."""

    def __init__(
        self,
        source: str,
        entry: str,
        parameters: Sequence[str],
        tensors: Sequence[str],
        outputs: Sequence[str] = ("d",),
    ) -> None:
        self.tensors = [name for name in parameters if name in tensors]
        self.scalars = [name for name in parameters if name not in tensors]
        self.outputs = set(outputs)
        self._library = ctypes.CDLL(str(build(translate(source, entry, parameters, self.tensors))))

    def run(
        self,
        tensors: Mapping[str, Array],
        scalars: Mapping[str, int],
        grid: Sequence[int],
        threads: int,
        shared: int,
    ) -> Report:
        """Run every block; outputs are written in place."""
        arrays = [tensors[name] for name in self.tensors]
        for array in arrays:
            assert array.flags.c_contiguous
            assert array.ctypes.data % 16 == 0, "tensors begin at multiples of 16 bytes"
        report = ctypes.create_string_buffer(1 << 16)
        what = _Run(
            (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays)),
            (ctypes.c_int64 * len(arrays))(*(array.nbytes for array in arrays)),
            (ctypes.c_int * len(arrays))(*(name in self.outputs for name in self.tensors)),
            len(arrays), (ctypes.c_uint * 3)(*grid), threads, shared, ctypes.addressof(report), len(report),
        )  # fmt: skip
        values = (ctypes.c_int * len(self.scalars))(*(scalars[name] for name in self.scalars))
        self._library.run(ctypes.byref(what), values)
        return _parse(report.value.decode())


def aligned(array: Array) -> Array:
    """A copy that begins at a multiple of 16 bytes, and with nothing behind it that belongs to it."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def build(code: str) -> Path:
    """Compile a translated kernel to a shared library; equal code is compiled once."""
    machine = _compile((_HERE / "sim.cpp").read_text(), _MACHINE, ())
    return _compile(code, _KERNEL, (machine,))


def _compile(code: str, flags: Sequence[str], libraries: Sequence[Path]) -> Path:
    assert COMPILER is not None
    linked = [part for library in libraries for part in (str(library), f"-Wl,-rpath,{library.parent}")]
    identity = (code, (_HERE / "sim.h").read_text(), COMPILER, *flags, *linked)
    library = _CACHE / f"lib{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:32]}.so"
    if library.exists():
        return library
    _CACHE.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        file = Path(folder) / "kernel.cpp"
        file.write_text(code)
        made = file.with_suffix(".so")
        command = [COMPILER, *flags, "-o", str(made), str(file), *linked]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"the simulator's compiler refuses the kernel:\n{result.stderr[:4000]}")
        made.replace(library)
    return library


class _Run(ctypes.Structure):
    """``sim::Run``."""

    _fields_ = (
        ("data", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("writable", ctypes.POINTER(ctypes.c_int)),
        ("tensors", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("report", ctypes.c_void_p),
        ("room", ctypes.c_int),
    )


def _parse(text: str) -> Report:
    found: dict[str, dict[str, int]] = {"error": {}, "count": {}}
    rest = []
    for line in text.splitlines():
        kind, _, remainder = line.partition(" ")
        if kind in found:
            name, _, number = remainder.rpartition(" ")
            found[kind][name] = int(number)
        else:
            rest.append(line)
    return Report(found["error"], found["count"], "\n".join(rest))

"""CUDA source to machine code through NVRTC, from pip wheels: no toolkit, no driver, no GPU.

The wheels are nvidia-cuda-nvrtc (the compiler), nvidia-cuda-runtime (cuda_fp16.h, cuda_bf16.h) and
nvidia-cuda-cccl (cuda/std/cstdint).  They share the folder ``nvidia/cu13`` or older layouts beside it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsecc.errors import SparseccError, TargetUnavailable

_INSTALL = "pip install 'sparsecc[cuda]'"
_USAGE = re.compile(r"Used (?P<registers>\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_STACK = re.compile(r"(\d+) bytes stack frame")
_STATIC = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one architecture.

    ``registers`` are per thread, the rest is in bytes: ``spills`` stored and loaded, ``stack`` per thread,
    ``static_shared`` per block, beside the dynamic shared memory that the launch asks for.  ``serialized``:
    the compiler could not keep wgmma instructions in flight and says so.
    """

    arch: str
    cubin: bytes
    ptx: str
    registers: int
    spills: int
    stack: int
    static_shared: int
    serialized: bool


def compile_source(source: str, arch: str, *, name: str = "kernel.cu") -> Compiled:
    """Compile a source with one kernel for ``arch`` (``sm_80``, ``sm_90a``).

    Raises ``TargetUnavailable`` where the wheels are missing, ``SparseccError`` with the compiler's log where
    the source does not compile.
    """
    options = [*flags(arch), *(f"--include-path={folder}" for folder in include_paths())]
    program = _Program(_library(), source, name)
    try:
        log = program.compile(options)
        cubin, ptx = program.get("CUBIN"), program.get("PTX").rstrip(b"\0").decode()
    finally:
        program.destroy()
    usage = _USAGE.search(log)
    if usage is None:
        raise SparseccError(f"NVRTC's log for {name} on {arch} names no registers: {log[:400]!r}")
    return Compiled(
        arch=arch,
        cubin=cubin,
        ptx=ptx,
        registers=int(usage["registers"]),
        spills=sum(int(stores) + int(loads) for stores, loads in _SPILLS.findall(log)),
        stack=sum(map(int, _STACK.findall(log))),
        static_shared=sum(map(int, _STATIC.findall(log))),
        serialized="wgmma" in log and "serialized" in log,
    )


def flags(arch: str) -> list[str]:
    """What NVRTC is told beside where headers are."""
    return [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]


def version() -> str:
    """NVRTC's version, such as ``13.5``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def include_paths() -> tuple[str, ...]:
    """Folders with cuda_fp16.h and with CCCL's headers."""
    found = []
    for header in ("cuda_fp16.h", "cuda/std/cstdint"):
        places = (
            folder / header for root in _roots() for folder in (root / "include", root / "include/cccl")
        )
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise TargetUnavailable(f"compiling kernels needs the header {header}: {_INSTALL}")
        found.append(str(place.parents[header.count("/")]))
    return tuple(dict.fromkeys(found))


def _roots() -> Iterator[Path]:
    """The folders of NVIDIA's wheels: ``nvidia/cu13`` of the current ones, ``nvidia/cuda_nvrtc`` of older."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted((path for path in Path(location).iterdir() if path.is_dir()), reverse=True)


@cache
def _library() -> ctypes.CDLL:
    for root in _roots():
        for file in sorted(root.glob("lib/libnvrtc.so.*")):
            if ".alt." not in file.name:
                return ctypes.CDLL(str(file))
    raise TargetUnavailable(f"compiling kernels needs NVRTC: {_INSTALL}")


class _Program:
    """An ``nvrtcProgram``."""

    def __init__(self, library: ctypes.CDLL, source: str, name: str) -> None:
        self._library = library
        self._name = name
        self._handle = ctypes.c_void_p()
        self._check(
            library.nvrtcCreateProgram(
                ctypes.byref(self._handle), source.encode(), name.encode(), 0, None, None
            )
        )

    def compile(self, options: list[str]) -> str:
        """Compile, and give back the log."""
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self._library.nvrtcCompileProgram(self._handle, len(options), array)
        log = self.get("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise SparseccError(f"NVRTC cannot compile {self._name} ({options[0]}): {log.strip()[:2000]}")
        return log

    def get(self, what: str) -> bytes:
        """``nvrtcGet<what>``."""
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(self._handle, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(self._handle, buffer))
        return buffer.raw

    def destroy(self) -> None:
        self._library.nvrtcDestroyProgram(ctypes.byref(self._handle))

    def _check(self, status: int) -> None:
        if status:
            text = self._library.nvrtcGetErrorString
            text.restype = ctypes.c_char_p
            raise SparseccError(f"NVRTC: {text(status).decode()} ({self._name})")

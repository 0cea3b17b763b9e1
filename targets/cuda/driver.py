"""The few calls of the CUDA driver that launching a stored kernel takes, through ctypes.

torch has made the context by the time that they are called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from sparsecc.errors import SparseccError, TargetUnavailable

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")

#: C types of the arguments of each call that is used (cuda.h); handles are pointers
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuModuleLoadData": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p),
    "cuModuleGetFunction": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_char_p),
    "cuFuncSetAttribute": (ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (
        ctypes.c_void_p,
        *(ctypes.c_uint,) * 6,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
    ),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class Driver:
    """The driver library ``library``; every call raises ``SparseccError`` with the driver's own words."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, kinds in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = kinds
            function.restype = ctypes.c_int

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            words = (text.value or b"unknown error").decode(errors="replace")
            raise SparseccError(f"{name} failed with CUDA error {status}: {words}")

    def function(self, image: bytes, entry: str, shared_bytes: int) -> int:
        """The handle of a kernel in a cubin or PTX text, with ``shared_bytes`` of dynamic shared memory."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
        assert function.value is not None
        return function.value

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        stream: int,
        cells: Sequence[Any],
    ) -> None:
        """Launch on a stream with the arguments in ``cells``: C values in the order of the kernel."""
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        self._call("cuLaunchKernel", function, *grid, block, 1, 1, shared_bytes, stream, pointers, None)


@cache
def driver() -> Driver:
    """The driver of this machine; raises ``TargetUnavailable`` where there is none."""
    for name in _LIBRARIES:
        try:
            return Driver(ctypes.CDLL(name))
        except OSError:
            continue
    raise TargetUnavailable("no CUDA driver is installed here (libcuda.so.1)")

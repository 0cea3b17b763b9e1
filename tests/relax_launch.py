"""Running a CUDA function of a Relax module without a GPU: its host half, and its kernel on the simulator.

TVM compiles the host half to C.  It is given tensors that claim to lie on a GPU; what it then asks of the
driver (arguments, grid, threads, shared memory) is recorded, and the kernel of the very module runs so.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt

from sparsecc.targets.cuda.tvm_build import _source
from tests.cuda_sim.simulator import COMPILER, Report, Simulator, aligned

Array: TypeAlias = npt.NDArray[Any]

_RECORDER = """
extern "C" {
int64_t launched[64];
int launched_count = 0;
int TVMFFIEnvModLookupFromImports(TVMFFIObjectHandle, const char* name, TVMFFIObjectHandle* out) {
  const char* end = name + strlen(name) - 7;
  *out = (void*)(int64_t)(end > name && !strcmp(end, "_kernel") ? 1 : 2);
  return 0;
}
int TVMFFIFunctionCall(TVMFFIObjectHandle function, TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  if ((int64_t)function != 1) return 0;
  launched_count = count;
  for (int i = 0; i < count; ++i) launched[i] = args[i].v_int64;
  return 0;
}
void TVMFFIErrorSetRaisedFromCStrParts(const char*, const char** parts, int32_t count) {
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
}
}
"""
_TYPES = "using half = unsigned short;\nusing nv_bfloat16 = unsigned short;\n"  # only pointers to them occur
_CODES = {"float": 2, "uint": 1, "int": 0, "bfloat": 4}
_CUDA, _DL_TENSOR = 2, 7


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip

    @classmethod
    def of(cls, array: Array) -> _DLTensor:
        kind = re.sub(r"\d", "", array.dtype.name)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*(stride // array.itemsize for stride in array.strides))
        bits = 8 * array.itemsize
        return cls(array.ctypes.data, _CUDA, 0, array.ndim, _CODES[kind], bits, 1, shape, strides, 0)


class _Any(ctypes.Structure):
    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_void_p))


@dataclass(frozen=True)
class Launched:
    """What the host half asked for."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    scalars: Mapping[str, int]


class Function:
    """One function of a module: host half and kernel, as TVM makes them."""

    def __init__(self, function: Any, name: str, folder: Path, arch: str = "sm_80") -> None:
        import tvm

        target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "c"})
        built = tvm.compile(tvm.IRModule({name: function.with_attr("global_symbol", name)}), target=target)
        self.text = _source(self._untyped(built.mod.imports[0].inspect_source("cuda")), name)
        self.arguments = list(self.text.parameters)
        self._host = self._compiled(built.mod.inspect_source("c"), name, folder)
        self._call = getattr(self._host, f"__tvm_ffi_{name}")
        self._call.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Any), ctypes.c_int32, ctypes.POINTER(_Any))

    @staticmethod
    def _untyped(text: str) -> str:
        """Tensors as bytes, which is how the kernel reads them in any case."""
        text = re.sub(r"\w+\* __restrict__ (\w+)_tensor_ptr", r"uchar* __restrict__ \1_ptr", text)
        return re.sub(r"\(\(uchar\*\)(\w+)_tensor_ptr\)|\b(\w+)_tensor_ptr", r"\1\2_ptr", text)

    @staticmethod
    def _compiled(source: str, name: str, folder: Path) -> ctypes.CDLL:
        import tvm
        import tvm_ffi

        assert COMPILER is not None
        includes = [Path(package.__path__[0], "include") for package in (tvm, tvm_ffi)]
        file = folder / "host.cpp"
        file.write_text(f"#include <cstdio>\n#include <cstring>\n{_TYPES}{source}\n{_RECORDER}")
        made = file.with_suffix(".so")
        flags = [
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-w",
            "-Wl,-Bsymbolic",
            *(f"-I{path}" for path in includes),
        ]
        subprocess.run([COMPILER, *flags, "-o", str(made), str(file)], check=True)
        return ctypes.CDLL(str(made))

    def launch(self, tensors: Mapping[str, Array]) -> Launched:
        """Call the host half with tensors, in the function's order."""
        views = [_DLTensor.of(array) for array in tensors.values()]
        given = (_Any * len(views))(*(_Any(_DL_TENSOR, 0, ctypes.addressof(view)) for view in views))
        assert self._call(None, given, len(views), _Any()) == 0
        count = ctypes.c_int.in_dll(self._host, "launched_count").value
        asked = list((ctypes.c_int64 * 64).in_dll(self._host, "launched"))[:count]
        kernel, (x, threads, y, z, shared, *_) = asked[: len(self.arguments)], asked[len(self.arguments) :]
        by_name = dict(zip(self.arguments, kernel, strict=True))
        assert all(by_name[name] == array.ctypes.data for name, array in tensors.items() if name in by_name)
        scalars = {name: value for name, value in by_name.items() if name not in tensors}
        return Launched((x, y, z), threads, shared, scalars)

    def run(self, tensors: Mapping[str, Array]) -> tuple[Array, Launched, Report]:
        """The output ``d``, what was launched, and what the simulator has to say."""
        arrays = {name: aligned(array) for name, array in tensors.items()}
        launched = self.launch(arrays)
        simulator = Simulator(self.text.text, self.text.entry, self.text.parameters, list(tensors))
        report = simulator.run(
            arrays, launched.scalars, launched.grid, launched.threads, launched.shared_bytes
        )
        return arrays["d"], launched, report

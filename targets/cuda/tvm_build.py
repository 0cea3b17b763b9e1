"""What knows TVM: writing TIRx kernels, turning them into CUDA source or into functions of other modules.

TVM is needed where kernels are built, never where they run.  Its interface moves from release to release,
so that the versions are pinned (requirements/constraints.txt); everything else here is written against
``Emitter``, a dozen operations.

Memory is touched through PTX instructions alone (``ptx``), with addresses in bytes; what a kernel does is
thereby the list of its instructions, which tests execute one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from sparsecc.errors import SparseccError, TargetUnavailable

if TYPE_CHECKING:
    from typing import TypeAlias

Expr: TypeAlias = Any  # a TIR expression; TVM publishes no types
Number: TypeAlias = Any  # an expression or a Python number

PINS = {"tvm": "0.27.0.post1", "tvm_ffi": "0.1.14.post1"}
"""Versions that the calls below were written for; with tvm_ffi 0.1.15 TVM crashes (a segmentation fault)."""

_UNBOUNDED = 1 << 40  # extent of a byte buffer whose real size is known at run time only
_PROTOTYPE = (
    r'extern "C" __global__ void(?: __launch_bounds__\(\d+\))? {name}_kernel\((?P<parameters>[^)]*)\);'
)


# TVM's own first lines include much of CCCL and the half-precision headers, which takes NVRTC four times as
# long as a kernel does.  This is what the kernels here need of them.
_PRELUDE = """\
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <cstdint>
#endif
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
"""
_HEADERS = {"half": "cuda_fp16.h", "nv_bfloat16": "cuda_bf16.h"}
_FIRST_HELPER = "__forceinline__ __device__"


@dataclass(frozen=True, slots=True)
class Source:
    """CUDA source: ``parameters`` are the kernel's parameters in the order in which it takes them."""

    text: str
    entry: str
    parameters: tuple[str, ...]


class Buffer:
    """Bytes in global or shared memory."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def at(self, offset: Number) -> Expr:
        """The address ``offset`` bytes in."""
        return self._handle.ptr_to([offset])


class Registers:
    """An array of thread-local values; indices are Python integers, so that it lives in registers."""

    def __init__(self, handle: Any, size: int, store: Callable[[int, Number], None]) -> None:
        self._handle = handle
        self._store = store
        self.size = size

    def __getitem__(self, index: int) -> Expr:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self._handle[index]

    def __setitem__(self, index: int, value: Number) -> None:
        self._store(index, value)

    def at(self, index: int) -> Expr:
        """The address of a value, for functions that take the whole array and are inlined."""
        return self._handle.ptr_to([index])

    def take(self, start: int, count: int) -> list[Expr]:
        """``count`` consecutive values, as operands of an instruction."""
        return [self[start + i] for i in range(count)]


class Emitter:
    """Appends statements to the kernel that is being written; expressions are TIR's."""

    def __init__(self, tvm: _Tvm, name_of: Callable[[str, Any], Any]) -> None:
        self._tvm = tvm
        self._b = tvm.builder
        self._name_of = name_of

    # Expressions

    def cast(self, value: Number, dtype: str) -> Expr:
        return self._b.Cast(dtype, value)

    def wide(self, value: Number) -> Expr:
        """``value`` as int64; byte offsets into tensors need it."""
        return self._b.Cast("int64", value) if not isinstance(value, int) else self._b.int64(value)

    def word(self, value: int) -> Expr:
        return self._b.uint32(value)

    def float32(self, value: float) -> Expr:
        return self._b.float32(value)

    def zero(self, dtype: str) -> Expr:
        return getattr(self._b, dtype)(0)

    def select(self, condition: Expr, yes: Number, no: Number) -> Expr:
        """Both sides are computed."""
        return self._b.Select(condition, yes, no)

    def all_of(self, *conditions: Expr) -> Expr:
        """The conjunction of conditions."""
        return reduce(self._b.And, conditions)

    def minimum(self, left: Number, right: Number) -> Expr:
        return self._b.min(left, right)

    def quotient(self, left: Number, right: Number) -> Expr:
        """Division of non-negative integers."""
        return self._b.truncdiv(left, right)

    def remainder(self, left: Number, right: Number) -> Expr:
        return self._b.truncmod(left, right)

    def bits(self, value: Expr, dtype: str) -> Expr:
        """``value`` read as another type of the same size."""
        return self._b.reinterpret(dtype, value)

    def call(self, function: str, value: Expr) -> Expr:
        """``erf``, ``exp`` or ``tanh`` in float32."""
        return getattr(self._b, function)(value)

    # Statements

    def let(self, value: Number) -> Number:
        """A value that is computed once."""
        return value if isinstance(value, int) else self._b.Bind(value)

    def registers(self, size: int, dtype: str, name: str) -> Registers:
        handle = self._name_of(name, self._b.alloc_local((size,), dtype))
        return Registers(handle, size, lambda i, value: self._b.buffer_store(handle, value, [i]))

    def inline(self, function: str, source: str, *operands: Number) -> None:
        """A call of a function whose CUDA source is given, for instructions that TVM's table lacks."""
        self._b.evaluate(self._tvm.script.cuda.func_call(function, *operands, source_code=source))

    def ptx(self, instruction: str, *operands: Number) -> None:
        """One instruction of TVM's PTX table, in the spelling of the PTX ISA."""
        self._b.evaluate(self._tvm.script.ptx[instruction](*operands))

    def barrier(self) -> None:
        """``__syncthreads()``."""
        self._b.evaluate(self._tvm.script.cuda.cta_sync())

    @contextmanager
    def loop(self, extent: int) -> Iterator[Expr]:
        """A loop that stays one."""
        with self._b.serial(0, extent) as index:
            yield index

    @contextmanager
    def when(self, condition: Expr | None) -> Iterator[None]:
        """A branch; None is always true."""
        if condition is None:
            yield
        else:
            with self._b.If(condition), self._b.Then():
                yield


@dataclass(frozen=True, slots=True)
class Launch:
    """What a kernel body is given: where it runs and what it works on."""

    block: tuple[Expr, Expr, Expr]
    thread: Expr
    shared: Buffer
    tensors: dict[str, Buffer]
    scalars: dict[str, Expr]


@dataclass(frozen=True, slots=True)
class Signature:
    """Parameters by name, threads of a block, and bytes of dynamic shared memory."""

    name: str
    tensors: Sequence[str]
    scalars: Sequence[str]
    threads: int
    shared_bytes: int


def emit(signature: Signature, body: Callable[[Emitter, Launch], None], arch: str) -> Source:
    """The CUDA source of the kernel that ``body`` writes.  Raises ``TargetUnavailable`` without TVM."""
    tvm = _Tvm()
    b = tvm.builder
    with tvm.ir_builder() as frame:
        with b.prim_func():
            b.func_name(signature.name)
            handles = {name: b.arg(f"{name}_handle", b.handle()) for name in signature.tensors}
            scalars = {name: b.arg(name, b.int32()) for name in signature.scalars}
            tensors = {
                name: Buffer(
                    tvm.named(name, b.match_buffer(handle, (b.int64(_UNBOUNDED),), "uint8", align=16))
                )
                for name, handle in handles.items()
            }
            b.device_entry()
            block = b.cta_id([1 << 20, 1 << 15, 1 << 15])
            thread = b.thread_id([signature.threads])
            shared = b.alloc_buffer((signature.shared_bytes,), "uint8", scope="shared.dyn", align=1024)
            launch = Launch(tuple(block), thread, Buffer(tvm.named("shared", shared)), tensors, scalars)
            body(Emitter(tvm, tvm.named), launch)
        function = frame.get()
    return _source(tvm.cuda(function, arch), signature.name)


def _source(text: str, name: str) -> Source:
    match = re.search(_PROTOTYPE.format(name=re.escape(name)), text)
    if match is None:
        raise SparseccError(f"TVM's source has no kernel {name}_kernel; is TVM {PINS['tvm']} installed?")
    declared = [part.split()[-1].lstrip("*") for part in match["parameters"].split(",")]
    kernel = text[text.index(_FIRST_HELPER) :]
    headers = [file for word, file in _HEADERS.items() if re.search(rf"\b{word}\b", kernel)]
    text = "".join(f"#include <{file}>\n" for file in headers) + _PRELUDE + kernel
    return Source(text, f"{name}_kernel", tuple(part.removesuffix("_ptr") for part in declared))


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as whoever calls a function passes it: sizes (or their names, where they vary) and type."""

    shape: tuple[int | str, ...]
    dtype: str


def emit_function(
    signature: Signature,
    tensors: Mapping[str, Tensor],
    sizes: Callable[[Mapping[str, Number]], tuple[Mapping[str, Number], Sequence[Number]]],
    body: Callable[[Emitter, Launch], None],
    target: Any,
) -> Any:
    """The kernel that ``body`` writes as a PrimFunc of typed tensors that launches it, for ``target``.

    ``tensors`` are the function's arguments in order.  ``sizes`` gives the kernel's integers by name and its
    grid, from the varying sizes by name.  The function is lowered so far that TVM's default pipelines take
    it beside functions of their own; TVM's pass for TIRx alone would refuse those.
    """
    tvm = _Tvm()
    b = tvm.builder
    with tvm.ir_builder() as frame:
        with b.prim_func():
            b.func_name(signature.name)
            handles = {name: b.arg(f"{name}_handle", b.handle()) for name in tensors}
            varying: dict[str, Any] = {}
            typed = {}
            for name, tensor in tensors.items():
                shape = [
                    varying.setdefault(size, tvm.variable(size)) if isinstance(size, str) else size
                    for size in tensor.shape
                ]
                typed[name] = b.match_buffer(handles[name], shape, tensor.dtype, align=16)
                tvm.named(f"{name}_tensor", typed[name])
            scalars, blocks = sizes({name: b.Cast("int32", size) for name, size in varying.items()})
            b.device_entry()
            block = b.cta_id(list(blocks))
            thread = b.thread_id([signature.threads])
            shared = b.alloc_buffer((signature.shared_bytes,), "uint8", scope="shared.dyn", align=1024)
            bytes_of = {
                name: Buffer(tvm.named(name, b.decl_buffer((_UNBOUNDED,), "uint8", data=tensor.data)))
                for name, tensor in typed.items()
            }
            wanted = {name: scalars[name] for name in signature.scalars}
            launch = Launch(tuple(block), thread, Buffer(tvm.named("shared", shared)), bytes_of, wanted)
            body(Emitter(tvm, tvm.named), launch)
        function = frame.get()
    return tvm.lowered(function, signature.name, target)


def load_tvm() -> Any:
    """The module ``tvm``, imported now (2 to 5 seconds); ``TargetUnavailable`` without the right version."""
    try:
        import tvm
        import tvm.relax
        import tvm.s_tir
        import tvm.script.ir_builder
        import tvm.script.tirx
        import tvm.target
        import tvm.tirx.script.builder
    except ImportError as error:
        raise TargetUnavailable(
            f"generating kernels needs TVM ({error}): pip install 'sparsecc[cuda]'"
        ) from error
    if tvm.__version__ != PINS["tvm"]:
        raise TargetUnavailable(
            f"kernels are generated with TVM {PINS['tvm']}, and {tvm.__version__} is installed: "
            "pip install 'sparsecc[cuda]'"
        )
    return tvm


class _Tvm:
    """TVM's modules, imported when a kernel is written."""

    def __init__(self) -> None:
        self._tvm = load_tvm()
        self.builder = self._tvm.tirx.script.builder
        self.script = self._tvm.script.tirx
        self.ir_builder = self._tvm.script.ir_builder.IRBuilder

    def named(self, name: str, value: Any) -> Any:
        """``value`` under ``name`` in the source."""
        return self.ir_builder.name(name, value)

    def variable(self, name: str) -> Any:
        """A size that varies (int64, as sizes are)."""
        return self._tvm.tirx.Var(name, "int64")

    def lowered(self, function: Any, name: str, target: Any) -> Any:
        """A TIRx function as plain TIR with thread bindings: the first steps of TVM's pipeline ``tirx``."""
        steps = self._tvm.tirx.transform
        module = steps.BindTarget(target)(self._tvm.IRModule({name: function}))
        for step in (
            steps.LowerTIRx(),
            self._tvm.s_tir.transform.UnifyThreadBinding(),
            steps.StmtSimplify(),
            steps.LowerTIRxOpaque(),
        ):
            module = step(module)
        return module[name].without_attr("target").without_attr("global_symbol")

    def cuda(self, function: Any, arch: str) -> str:
        """Lower a function and give back its CUDA source."""
        target = self._tvm.target.Target({"kind": "cuda", "arch": arch})
        module = self._tvm.IRModule({"main": function})
        built = self._tvm.compile(module, target=target, tir_pipeline="tirx")
        return str(built.mod.imports[0].inspect_source("cuda"))

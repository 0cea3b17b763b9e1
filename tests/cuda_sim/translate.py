"""CUDA source -> C++ for the simulator: every inline PTX instruction becomes a call into ``sim.h``.

The kernel's own statements stay as they are.  Which instructions exist, and what they mean, stands in
``INSTRUCTIONS``; anything else is an error, as is memory that is touched without an instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_ASM = re.compile(r'asm volatile\("(?P<text>[^"]*)"(?P<operands>(?:[^;"]|"[^"]*")*)\);')
_OPERAND = re.compile(r'"(?P<constraint>[^"]*)"\((?P<name>\w+(?:\[\d+\])?)\)')
_POINTER = re.compile(r"uchar\* __restrict__ (\w+)")
_SHARED = re.compile(r"extern __shared__ __align__\((\d+)\) uchar (\w+)\[\];")
_INDEXED = re.compile(r"(\w+)\[(\d+)\]")
_INCLUDES = re.compile(r"^#include <cuda_\w+\.h>$", re.MULTILINE)

Arguments = Sequence[str]
Rule = Callable[[re.Match[str], Arguments], str]

_TYPES = {"u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "f32": "float"}
_ELEMENTS = {
    "m16n8k32.row.col.f32.f16.f16.f32": "fp16",
    "m16n8k32.row.col.f32.bf16.bf16.f32": "bf16",
    "m16n8k64.row.col.s32.s8.s8.s32": "s8",
    "m16n8k64.row.col.f32.e4m3.e4m3.f32": "e4m3",
    "m16n8k64.row.col.f32.e5m2.e5m2.f32": "e5m2",
}


class UnknownInstruction(Exception):
    """An instruction that ``INSTRUCTIONS`` does not have."""


def _cp_async(match: re.Match[str], args: Arguments) -> str:
    target, source, size, *bytes_read = args
    if match[1] == "cg" and size != "16":
        raise UnknownInstruction(f"cp.async.cg of {size} bytes")
    return f"sim::cp_async({target}, {source}, {size}, {bytes_read[0] if bytes_read else size})"


def _load(function: str) -> Rule:
    def rule(match: re.Match[str], args: Arguments) -> str:
        *registers, address = args
        _check_vector(match, registers)
        return f"sim::{function}<{_TYPES[match['type']]}>({', '.join([address, *registers])})"

    return rule


def _store(function: str) -> Rule:
    def rule(match: re.Match[str], args: Arguments) -> str:
        address, *values = args
        _check_vector(match, values)
        return f"sim::{function}<{_TYPES[match['type']]}>({', '.join([address, *values])})"

    return rule


def _check_vector(match: re.Match[str], registers: Sequence[str]) -> None:
    if len(registers) != int(match["vector"] or 1):
        raise UnknownInstruction(f"{match[0]} of {len(registers)} registers")


def _ldmatrix(match: re.Match[str], args: Arguments) -> str:
    *registers, address = args
    return f"sim::ldmatrix_x4<{str(bool(match[1])).lower()}>({', '.join([address, *registers])})"


def _mma_sp(match: re.Match[str], args: Arguments) -> str:
    *operands, selector = args
    return f"sim::mma_sp<sim::Element::{_ELEMENTS[match[1]]}, {selector}>({', '.join(operands)})"


def _wgmma_sp(match: re.Match[str], args: Arguments) -> str:
    n = int(match["n"])
    sums, (a0, a1, a2, a3, descriptor, e, selector, *scales) = args[: n // 2], args[n // 2 :]
    places = [_INDEXED.fullmatch(name) for name in sums]
    if [place and (place[1], int(place[2])) for place in places] != [("d", i) for i in range(n // 2)]:
        raise UnknownInstruction(f"{match[0]} with sums that are not d[0], d[1], ...")
    if scales != _SCALES[match["types"].split(".")[-1]]:
        raise UnknownInstruction(f"{match[0]} with scales {scales}")
    element = f"sim::Element::{_WGMMA[match['types']]}"
    return f"sim::wgmma_sp<{element}, {n}, {selector}>(d, {a0}, {a1}, {a2}, {a3}, {descriptor}, {e})"


# Accumulate, and signs and (16-bit elements) the transposition of B as they are.
_SCALES = {
    "f16": ["1", "1", "1", "0"],
    "bf16": ["1", "1", "1", "0"],
    "s8": ["1"],
    "e4m3": ["1", "1", "1"],
    "e5m2": ["1", "1", "1"],
}
_WGMMA = {
    "k32.f32.f16.f16": "fp16",
    "k32.f32.bf16.bf16": "bf16",
    "k64.s32.s8.s8": "s8",
    "k64.f32.e4m3.e4m3": "e4m3",
    "k64.f32.e5m2.e5m2": "e5m2",
}

INSTRUCTIONS: list[tuple[str, Rule]] = [
    (r"cp\.async\.(ca|cg)\.shared\.global", _cp_async),
    (r"cp\.async\.commit_group", lambda match, args: "sim::cp_async_commit()"),
    (r"cp\.async\.wait_group", lambda match, args: f"sim::cp_async_wait({args[0]})"),
    (r"ld\.shared(?:\.v(?P<vector>[24]))?\.(?P<type>u32)", _load("ld_shared")),
    (r"st\.shared(?:\.v(?P<vector>[24]))?\.(?P<type>u32)", _store("st_shared")),
    (r"ld\.global(?:\.nc)?(?:\.v(?P<vector>[24]))?\.(?P<type>u8|u16|u32|f32)", _load("ld_global")),
    (r"st\.global(?:\.v(?P<vector>[24]))?\.(?P<type>u16|u32)", _store("st_global")),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16", _ldmatrix),
    (
        rf"mma\.sp::ordered_metadata\.sync\.aligned\.({'|'.join(map(re.escape, _ELEMENTS))})",
        _mma_sp,
    ),
    (
        rf"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(?P<n>\d+)(?P<types>{'|'.join(map(re.escape, _WGMMA))})",
        _wgmma_sp,
    ),
    (r"wgmma\.fence\.sync\.aligned", lambda match, args: "sim::wgmma_fence()"),
    (r"wgmma\.commit_group\.sync\.aligned", lambda match, args: "sim::wgmma_commit()"),
    (r"wgmma\.wait_group\.sync\.aligned", lambda match, args: f"sim::wgmma_wait({args[0]})"),
    (r"fence\.proxy\.async\.shared::cta", lambda match, args: "sim::proxy_fence()"),
    (r"", lambda match, args: ""),  # ties registers to a place in the code; does nothing
]


def translate(source: str, entry: str, parameters: Sequence[str], tensors: Sequence[str]) -> str:
    """C++ with ``extern "C" int run(...)``, which runs kernel ``entry`` of a CUDA source on the simulator.

    ``parameters`` are the kernel's, in order; those in ``tensors`` are taken from the tensors given to
    ``run`` by their place in ``tensors``, the others from its integers, in order.
    Raises ``UnknownInstruction``.
    """
    text = _INCLUDES.sub("", source)
    text = _ASM.sub(lambda match: _call(match["text"], match["operands"]) + ";", text)
    text = _POINTER.sub(r"sim::Bytes \1", text)
    text = _SHARED.sub(r"sim::Bytes \2 = sim::shared_memory();", text)
    for rest in ("asm", "__shared__", "uchar*"):
        if re.search(rf"(?<!\w){re.escape(rest)}(?!\w)", text):
            raise UnknownInstruction(f"{rest!r} in a form that the simulator does not know")
    scalars = [name for name in parameters if name not in tensors]
    arguments = [
        f"sim::Bytes{{(uint8_t*)tensors[{tensors.index(name)}]}}"
        if name in tensors
        else f"scalars[{scalars.index(name)}]"
        for name in parameters
    ]
    return f'#include "sim.h"\n{text}\n{_RUN % {"entry": entry, "arguments": ", ".join(arguments)}}'


_RUN = """
static void** tensors;
static const int* scalars;
static void body() { %(entry)s(%(arguments)s); }
extern "C" int run(const sim::Run* what, const int* values) {
  tensors = what->data;
  scalars = values;
  return sim::launch(body, *what);
}
"""


def _call(text: str, operands: str) -> str:
    """The call that stands for one ``asm volatile`` statement."""
    names = [match["name"] for match in _OPERAND.finditer(operands)]
    opcode, _, rest = text.strip().rstrip(";").partition(" ")
    if ";" in rest:
        raise UnknownInstruction(f"several instructions in one statement: {text}")
    parts = [part for part in re.split(r"[\s,{}\[\]]+", rest) if part]
    args = [names[int(part[1:])] if part.startswith("%") else part for part in parts]
    for pattern, rule in INSTRUCTIONS:
        if match := re.fullmatch(pattern, opcode):
            return rule(match, args)
    raise UnknownInstruction(text)

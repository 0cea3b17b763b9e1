"""Bugs planted in kernels, each of which the simulator has to find.

A mutation changes the source that TVM wrote, or a function of the generator; it is found by a wrong result
(``wrong``) or by one of the simulator's own errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsecc.targets.cuda import activations, epilogue, gemm, wgmma
from sparsecc.targets.cuda.activations import Gather, Rows
from sparsecc.targets.cuda.config import Epilogue, KernelConfig
from sparsecc.targets.cuda.epilogue import Finish
from sparsecc.targets.cuda.generate import gemm_source
from sparsecc.targets.cuda.pack import Packed, pack
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.wgmma import Weights
from tests.cuda_kernels import DTYPES, Case, source_of
from tests.cuda_sim.simulator import COMPILER
from tests.cuda_sim.translate import UnknownInstruction, translate
from tests.sampling import every

pytest.importorskip("tvm", reason="kernels are generated with TVM: pip install 'sparsecc[cuda]'")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the simulator needs a C++ compiler")

_EPILOGUE = Epilogue(bias=True, activation="relu", residual=True)
CASES = {
    "rows": (KernelConfig(64, 32, 64, 2, 2, 1, 3, epilogue=_EPILOGUE), Problem(72, 424)),
    "decode": (KernelConfig(32, 8, 128, 2, 1, 2, 3, epilogue=_EPILOGUE), Problem(72, 424)),
    "int8": (KernelConfig(64, 32, 128, 2, 2, 1, 3, "int8", "fp16", epilogue=_EPILOGUE), Problem(72, 424)),
    "nchw": (
        KernelConfig(64, 32, 64, 2, 2, 1, 3, layout="nchw", epilogue=_EPILOGUE),
        Problem(72, 200, None, 4),
    ),
    "quantised": (
        KernelConfig(
            64, 32, 128, 2, 2, 1, 3, "int8", "fp32", epilogue=Epilogue(scale=True, token_scale=True)
        ),
        Problem(72, 360),
    ),
    "wgmma": (KernelConfig(64, 32, 64, 4, 1, 1, 5, instruction="wgmma.sp"), Problem(72, 616)),
    "gather": (KernelConfig(64, 32, 64, 2, 2, 1, 3, epilogue=_EPILOGUE), Problem(72, 363)),
}


def case_of(name: str) -> Case:
    config, problem = CASES[name]
    return Case(config, problem, tokens=44)


@dataclass(frozen=True)
class Mutation:
    """One bug: ``text`` changes the source, ``patch`` the generator, ``packing`` the packed weights."""

    expect: str
    text: Callable[[str], str] | None = None
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    packing: Callable[[Packed], None] | None = None
    case: str = "rows"


def nth(pattern: str, replacement: str, index: int = 0) -> Callable[[str], str]:
    """Replace one match; negative indices count from the end."""

    def mutate(text: str) -> str:
        match = list(re.finditer(pattern, text))[index]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return mutate


def everywhere(pattern: str, replacement: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, replacement, text)


BARRIER = r"\n +tvm_builtin_cuda_cta_sync\(\);"
COMMIT = r"\n +tvm_builtin_ptx_cp_async_commit_group_async_commit_group\(\);"


def barrier_if(condition: str) -> str:
    return f"\n if ({condition}) tvm_builtin_cuda_cta_sync();"


def next_stage(original: Any, tile: Any, loader: Any, operands: Any, sums: Any, stage: Any) -> None:
    original(tile, loader, operands, sums, (stage + 1) % 3)


def fills_next_stage(original: Any, tile: Any, loader: Any, stage: Any, tile_k: Any) -> None:
    original(tile, loader, (stage + 1) % 3, tile_k)


def fills_another_stage(original: Any, tile: Any, loader: Any, stage: Any, tile_k: Any) -> None:
    original(tile, loader, stage if isinstance(stage, int) else (stage + 2) % 3, tile_k)


def reads_next_row(original: Any, tile: Any, words: Any, start: Any, step: Any) -> None:
    original(tile, words, start + 128, step)


def copies_at_the_end(original: Any, tile: Any, sums: Any) -> None:
    original(tile, sums)
    gemm.load_packed(tile, "weight", 0, 0, 64)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace ``owner.name`` by ``around(original, *args)``."""
    original = getattr(owner, name)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    return patch


def no_swizzle(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gemm, activations):
        monkeypatch.setattr(module, "swizzle", lambda row, chunk, chunks: chunk)


def swizzle_of_reads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "swizzle", lambda row, chunk, chunks: chunk)


def without_k_guard(original: Any, self: Rows, row: Any, k: Any) -> Any:
    return original(self, row, k)[0], row[1]


def without_token_guard(original: Any, self: Finish, m: Any, n: Any, start: int) -> Any:
    offset, _ = original(self, m, n, start)
    return offset, m + start < self.tile.problem.out


def without_feature_guard(original: Any, self: Finish, m: Any, n: Any, start: int) -> Any:
    offset, _ = original(self, m, n, start)
    return offset, n < self.tile.launch.scalars["tokens"]


def reads_one_token_more(original: Any, self: Rows, n: Any) -> Any:
    start, _ = original(self, n)
    return start, n < self.tile.launch.scalars["tokens"] + 1


def no_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(epilogue._ACTIVATIONS, "relu", lambda e, x: x)  # type: ignore[arg-type]


def multiplies_next_tile(original: Any, tile: Any, weights: Any, buffer: int, sums: Any, tile_k: Any) -> None:
    original(tile, weights, buffer, sums, tile_k + 1)


def loads_in_use(original: Any, self: Weights, buffer: int, tile_k: Any) -> None:
    held = self.tile.config.weight_stages
    original(self, buffer if isinstance(tile_k, int) else (buffer + held // 2) % held, tile_k)


def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelConfig, "staging_pitch", property(lambda self: 4 * self.block_m))


def zero_metadata(
    original: Any, tile: Any, target: Any, tensor: str, offset: Any, inside: Any, width: int
) -> None:
    """What zero-filled metadata past K would be."""
    if tensor == "metadata":
        inside = offset < 0
    original(tile, target, tensor, offset, inside, width)


def forgets_last_share(original: Any, self: Finish, m: Any, n: Any) -> None:
    tile = self.tile
    for i in range(4):
        self.values[i] = tile.e.float32(0.0)
    address = tile.shared.at(epilogue.staged(tile, 0, m, n))
    tile.e.ptx("ld.shared.v4.u32", *self.words.take(0, 4), address)
    for i in range(4):
        self.values[i] = tile.e.bits(self.words[i], "float32")


def gathers_transposed(original: Any, self: Gather) -> Any:
    words = original(self)
    return [words[1], words[0], *words[2:]]


def swap_indices(packed: Packed) -> None:
    low = packed.metadata & 0x33333333
    packed.metadata[...] = low << 2 | (packed.metadata >> 2 & 0x33333333)


def swap_lanes(packed: Packed) -> None:
    packed.metadata[...] = packed.metadata.reshape(-1, 8, 2, 2)[:, :, ::-1].reshape(packed.metadata.shape)


def swap_rows(packed: Packed) -> None:
    packed.values[...] = packed.values.reshape(-1, 4, 4)[:, [1, 0, 2, 3]].reshape(packed.values.shape)


SELECT = r"%16, ([01]);"
LDMATRIX = r"x4\.shared\.b16 \{"
FIRST_WEIGHTS = r"(tvm_builtin_ptx_ld_vec_shared_v4_u32\()weights_ptr\[4\], weights_ptr\[5\]"
WGMMA_WAIT = r"(wgmma\.wait_group\.sync\.aligned )"
COPY = r"cp\.async\.cg(\.shared\.global \[%0\], \[%1\], )16"

MUTATIONS = {
    "no barrier in the loop": Mutation("race", nth(BARRIER, "")),
    "no barrier before the epilogue": Mutation("race", nth(BARRIER, "", 1)),
    "no barrier after staging": Mutation("race", nth(BARRIER, "", 2)),
    "barrier for half of the block": Mutation("divergence", nth(BARRIER, barrier_if("threadIdx.x < 64"))),
    "barrier for half of a warp": Mutation("divergence", nth(BARRIER, barrier_if("threadIdx.x % 32 < 16"))),
    "waits for one group too few": Mutation("in-flight", everywhere(r"wait_group 1;", "wait_group 2;")),
    "never waits": Mutation("in-flight", everywhere(r"wait_group 1;", "wait_group 9;")),
    "no commit in the loop": Mutation("in-flight", nth(COMMIT, "", -1)),
    "no commit in the prologue": Mutation("in-flight", nth(COMMIT, "")),
    "selector 0 for both halves": Mutation("wrong", everywhere(SELECT, "%16, 0;")),
    "selectors swapped": Mutation("wrong", lambda t: re.sub(SELECT, lambda m: f"%16, {1 - int(m[1])};", t)),
    "ldmatrix transposes": Mutation("wrong", everywhere(LDMATRIX, "x4.trans.shared.b16 {")),
    "ldmatrix does not transpose": Mutation("wrong", everywhere(r"\.trans\.shared", ".shared"), case="nchw"),
    "ldmatrix reads the next row": Mutation("wrong", patch=wrap(gemm, "read_rows", reads_next_row)),
    "sums not reset": Mutation("wrong", nth(r"\n  sums_ptr\[0\] = [^;]*;", "")),
    "one sum used twice": Mutation("wrong", nth(r"sums_ptr\[1\], sums_ptr\[2\]", "sums_ptr[2], sums_ptr[2]")),
    "stores past the last token": Mutation("bounds", patch=wrap(Finish, "part", without_token_guard)),
    "stores past the last feature": Mutation(
        "overwritten", patch=wrap(Finish, "part", without_feature_guard)
    ),
    "reads past the last token": Mutation("bounds", patch=wrap(Rows, "row", reads_one_token_more)),
    "no guard along K": Mutation("bounds", patch=wrap(Rows, "place", without_k_guard)),
    "bias of another feature": Mutation("wrong", nth(r"&\(bias_ptr\[", "&(bias_ptr[16 + ")),
    "residual of other features": Mutation("wrong", nth(r"&\(residual_ptr\[", "&(residual_ptr[8 + ")),
    "scale of the next token": Mutation(
        "wrong", nth(r"&\(token_scale_ptr\[", "&(token_scale_ptr[4 + "), case="quantised"
    ),
    "no activation": Mutation("wrong", patch=no_activation),
    "no swizzle": Mutation("bank-conflict", patch=no_swizzle),
    "swizzle of reads only": Mutation("wrong", patch=swizzle_of_reads_only),
    "staging without padding": Mutation("bank-conflict", patch=unpadded),
    "multiplies the next stage": Mutation("in-flight", patch=wrap(gemm, "multiply_tile", next_stage)),
    "fills the stage in use": Mutation("race", patch=wrap(gemm, "load_tile", fills_next_stage)),
    "fills a stage too late": Mutation("race", patch=wrap(gemm, "load_tile", fills_another_stage)),
    "registers of a fragment swapped": Mutation(
        "wrong", everywhere(FIRST_WEIGHTS, r"\1weights_ptr[5], weights_ptr[4]")
    ),
    "copies half": Mutation("uninitialised", everywhere(COPY, r"cp.async.ca\g<1>8")),
    "metadata zero-filled": Mutation("metadata", patch=wrap(gemm, "copy_async", zero_metadata)),
    "metadata unordered": Mutation("metadata", packing=swap_indices),
    "metadata of other lanes": Mutation("wrong", packing=swap_lanes),
    "metadata of other lanes, int8": Mutation("wrong", packing=swap_lanes, case="int8"),
    "weights in another order": Mutation("wrong", packing=swap_rows),
    "a share of K forgotten": Mutation(
        "wrong", patch=wrap(Finish, "read_sums", forgets_last_share), case="decode"
    ),
    "gathered words swapped": Mutation(
        "wrong", patch=wrap(Gather, "_words", gathers_transposed), case="gather"
    ),
    "store is misaligned": Mutation("misaligned", nth(r"&\(d_ptr\[", "&(d_ptr[2 + ")),
    "reads its output": Mutation("read-only", everywhere(r"&\(residual_ptr\[", "&(d_ptr[")),
    "wgmma: no barrier": Mutation("race", nth(BARRIER, ""), case="wgmma"),
    "wgmma: no proxy fence": Mutation(
        "proxy", everywhere(r"fence\.proxy\.async\.shared::cta;", ""), case="wgmma"
    ),
    "wgmma: no fence": Mutation("fence", everywhere(r"wgmma\.fence\.sync\.aligned;", ""), case="wgmma"),
    "wgmma: no commit": Mutation(
        "wrong", everywhere(r"wgmma\.commit_group\.sync\.aligned;", ""), case="wgmma"
    ),
    "wgmma: never waits": Mutation("race", everywhere(WGMMA_WAIT + "1;", r"\g<1>9;"), case="wgmma"),
    "wgmma: stores without waiting": Mutation(
        "wrong", everywhere(WGMMA_WAIT + "0;", r"\g<1>1;"), case="wgmma"
    ),
    "wgmma: waits for one copy too few": Mutation(
        "in-flight", everywhere(r"async\.wait_group 2;", "async.wait_group 3;"), case="wgmma"
    ),
    "wgmma: half of the K advance": Mutation("wrong", nth(r"\+ 64\)\]", "+ 32)]"), case="wgmma"),
    "wgmma: stride of the descriptor": Mutation(
        "wrong", everywhere(r"64ull << 32", "32ull << 32"), case="wgmma"
    ),
    "wgmma: selectors swapped": Mutation(
        "wrong", lambda t: re.sub(r"%21, ([01]), 1", lambda m: f"%21, {1 - int(m[1])}, 1", t), case="wgmma"
    ),
    "wgmma: not swizzled": Mutation("wrong", patch=swizzle_of_reads_only, case="wgmma"),
    "wgmma: multiplies the next tile": Mutation(
        "in-flight", patch=wrap(wgmma, "multiply", multiplies_next_tile), case="wgmma"
    ),
    "wgmma: weights of another tile": Mutation(
        "wrong", patch=wrap(Weights, "load", loads_in_use), case="wgmma"
    ),
    "copies in flight at the end": Mutation(
        "left-over", patch=wrap(gemm, "write_epilogue", copies_at_the_end)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_without_a_bug(name: str) -> None:
    case = case_of(name)
    result, report = case.run()
    assert not report.errors, report.messages
    assert torch.equal(result.double(), case.expected().to(result.dtype).double())


@pytest.mark.parametrize("name", every(2, MUTATIONS))
def test_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    case = case_of(mutation.case)
    original = source_of(case.config, case.problem).text
    text = original
    if mutation.patch is not None:
        mutation.patch(monkeypatch)
        text = gemm_source(case.config, case.problem, name="kernel").text
    if mutation.text is not None:
        text = mutation.text(text)
    packed = pack(case.weight.to(DTYPES[case.config.dtype]))
    if mutation.packing is not None:
        mutation.packing(packed)
    else:
        assert text != original, "the mutation changes nothing"
    result, report = case.run(text, packed)
    found = set(report.errors)
    if not torch.equal(result.double(), case.expected().to(result.dtype).double()):
        found.add("wrong")
    assert mutation.expect in found, f"found {found}\n{report.messages}"


@pytest.mark.parametrize(
    "statement",
    [
        'asm volatile("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0};" : "=f"(x));',
        'asm volatile("cp.async.cg.shared.global [%0], [%1], 8;" : : "r"(x), "l"(y));',
        'asm volatile("ld.shared.v4.u32 {%0}, [%1];" : "=r"(x) : "r"(y));',
        'asm volatile("bar.sync 0;" : : );',
        'asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; }" : : );',
        'asm("membar.gl;");',
        "extern __shared__ float buffer[];",
        "uchar* raw;",
    ],
)
def test_unknown_instructions_are_errors(statement: str) -> None:
    with pytest.raises(UnknownInstruction):
        translate(statement, "kernel", (), ())

"""Times generated 2:4 kernels beside cuBLASLt and cuSPARSELt on the GPU at hand: ``make gpu-bench``.

    ours      every tile of this package's kernels, the fastest of them
    dense     torch.nn.functional.linear with the same weight (cuBLASLt)
    sparse    cuSPARSELt through torch, with its search of algorithms, where this build of torch has it

All run in one process, in turn, timed by CUDA events after warming up; medians of the rounds are reported,
with the ratio to dense and the share of the sparse tensor cores' published peak.  Results that differ from
the dense product are an error.  Writes docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from sparsecc.targets.cuda import cusparselt

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

SQUARES = tuple((n, n, n) for n in (1024, 2048, 4096, 8192))
#: (out, k) of the linear layers of Llama and Qwen models of 1B to 8B parameters
LINEARS = (
    (2048, 2048), (8192, 2048), (2048, 8192), (3072, 3072), (8192, 3072), (3072, 8192),
    (3584, 3584), (18944, 3584), (3584, 18944), (4096, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
TOKENS = (1, 16, 64, 256, 1024, 4096)

#: published peaks of sparse tensor cores in 16-bit floats with sums in float32, TFLOP/s of the dense product
#: (vendor data sheets)
PEAKS = {"A100": 624.0, "H100 PCIe": 1513.0, "H100": 1979.0, "H200": 1979.0, "4090": 330.4, "L40S": 733.0}


@dataclass(frozen=True)
class Row:
    """Microseconds of one product [tokens, k] x [k, out]; NaN where an engine cannot run it."""

    dtype: str
    tokens: int
    out: int
    k: int
    dense: float
    sparse: float
    ours: float
    tile: str


def shapes() -> Iterator[tuple[int, int, int]]:
    """(tokens, out, k) of every product that is timed."""
    yield from SQUARES
    for out, k in LINEARS:
        yield from ((tokens, out, k) for tokens in TOKENS)


def timed(function: Callable[[], object], rounds: int) -> Callable[[], float]:
    """A measurement of one round in microseconds, after warming up."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()

    def measure() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(rounds):
            function()
        end.record()
        end.synchronize()
        return 1000.0 * float(start.elapsed_time(end)) / rounds

    return measure


def two_of_four(out: int, k: int, dtype: torch.dtype) -> Tensor:
    """A random 2:4 weight on the GPU."""
    weight = torch.randn(out, k, device="cuda", dtype=dtype) / k**0.5
    groups = weight.view(out, -1, 4)
    kept = groups.abs().topk(2, -1).indices
    return torch.zeros_like(groups).scatter_(-1, kept, groups.gather(-1, kept)).view(out, k)


def ours(weight: Tensor, x: Tensor, dtype: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A function for every tile that this GPU can run."""
    from sparsecc.errors import TargetRefused
    from sparsecc.targets.cuda import TILES, Problem, build_gemm, default_config, pack
    from sparsecc.targets.cuda.config import WGMMA_TILES
    from sparsecc.targets.cuda.driver import driver
    from sparsecc.targets.cuda.launch import image_for, start

    major, minor = torch.cuda.get_device_capability()
    packed = pack(weight.cpu())
    values, metadata = (torch.from_numpy(a).cuda() for a in (packed.values, packed.metadata))
    for tile in (*TILES, *WGMMA_TILES):
        config = default_config(tile, dtype)
        try:
            arch = f"sm_{major}{minor}" + ("a" if config.instruction == "wgmma.sp" else "")
            kernel = build_gemm(config, Problem(*weight.shape), [arch])
        except TargetRefused:
            continue
        image = image_for(kernel, major, minor)
        assert image is not None
        function = driver().function(image, kernel.entry, kernel.config.shared_bytes)
        launch = kernel.launch(tokens=len(x))

        def run(launch=launch, function=function, kernel=kernel) -> Tensor:  # type: ignore[no-untyped-def]
            y = torch.empty(len(x), len(weight), device="cuda", dtype=x.dtype)
            start(function, kernel, launch, {"weight": values, "metadata": metadata, "x": x, "d": y})
            return y

        yield tile, run


def row(dtype: str, tokens: int, out: int, k: int, rounds: int) -> Row:
    """Time one product on every engine, in turn."""
    weight = two_of_four(out, k, DTYPES[dtype])
    x = torch.randn(tokens, k, device="cuda", dtype=DTYPES[dtype])
    wanted = F.linear(x, weight)
    engines: dict[str, Callable[[], Tensor]] = {"dense": lambda: F.linear(x, weight)}
    if not cusparselt.why_not() and cusparselt.takes(out, k, dtype, convolution=False):
        compressed = cusparselt.compressed(weight)
        engines["sparse"] = lambda: cusparselt.multiplied(compressed, x)
    engines.update(ours(weight, x, dtype))
    bound = 4 * torch.finfo(DTYPES[dtype]).eps * float(wanted.abs().max())
    for name, function in engines.items():
        if float((function() - wanted).abs().max()) > bound:
            raise SystemExit(f"{name} is wrong on {dtype} {tokens} x {k} x {out}")
    measures = {name: timed(function, rounds) for name, function in engines.items()}
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(9):
        for name, measure in measures.items():
            found[name].append(measure())
    medians = {name: statistics.median(times) for name, times in found.items()}
    tile = min((name for name in medians if name not in ("dense", "sparse")), key=medians.__getitem__)
    missing = float("nan")
    return Row(dtype, tokens, out, k, medians["dense"], medians.get("sparse", missing), medians[tile], tile)


def page(rows: list[Row], gpu: str) -> str:
    """The table in Markdown."""
    peak = next((value for name, value in PEAKS.items() if name in gpu), float("nan"))
    columns = [
        "dtype",
        "tokens",
        "out x k",
        "dense",
        "cuSPARSELt",
        "ours",
        "tile",
        "over dense",
        "over cuSPARSELt",
        "of peak",
    ]
    lines = [
        "# 2:4 products on the GPU",
        "",
        f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}; microseconds, medians of interleaved "
        "rounds, written by `make gpu-bench`.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for r in rows:
        share = 2e-6 * r.tokens * r.out * r.k / r.ours / peak
        times = f"{r.dense:.1f} | {r.sparse:.1f} | {r.ours:.1f} | {r.tile}"
        ratios = f"{r.dense / r.ours:.2f}x | {r.sparse / r.ours:.2f}x | {share:.0%}"
        lines.append(f"| {r.dtype} | {r.tokens} | {r.out} x {r.k} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command; without a GPU it says so and changes nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=20, help="launches per measurement")
    parser.add_argument("--squares", action="store_true", help="square products only")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        console.print("no NVIDIA GPU here: nothing was measured")
        return 0
    sizes = list(SQUARES if chosen.squares else shapes())
    work = [(dtype, *size) for dtype in chosen.dtypes for size in sizes]
    rows = [row(*one, chosen.rounds) for one in track(work, "products", console=console)]
    if chosen.json:
        print(json.dumps([asdict(r) for r in rows]))
    PAGE.write_text(page(rows, torch.cuda.get_device_name()))
    console.print(f"written: {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

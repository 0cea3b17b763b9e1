"""Times generated 2:4 kernels beside cuBLASLt and cuSPARSELt on the GPU at hand: ``make gpu-bench``.

    ours      every tile of this package's kernels, the fastest of them
    dense     torch.nn.functional.linear (int8: torch._int_mm, 8-bit floats: torch._scaled_mm) with the same
              weight, all by cuBLASLt
    sparse    cuSPARSELt through torch, with its search of algorithms and of splits of K

Every engine is a CUDA graph of many products, which go around as many copies of weights and activations as
do not fit into the GPU's cache, so that neither Python nor a warm cache is measured.  The graphs take turns;
medians are reported, with the ratios to dense and to cuSPARSELt and the share of the sparse tensor cores'
published peak.  Results that differ from the dense product are an error.  Writes docs/gpu.json, docs/gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cuda_graphs import microseconds
from sparsecc.errors import InvalidOption
from sparsecc.targets.cuda import cusparselt
from sparsecc.targets.cuda.config import KernelConfig
from sparsecc.targets.cuda.measured import FILE as measured_file
from sparsecc.targets.cuda.pack import Packed, pack
from sparsecc.targets.cuda.tiles import TILES, WGMMA_TILES, default_config, tile_for, warpgroup_tile

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE, PAGE = DOCS / "gpu.json", DOCS / "gpu.md"
CHOICES = DOCS.parent / "targets" / "cuda" / measured_file

SQUARES = tuple((n, n, n) for n in (1024, 2048, 4096, 8192))
#: (out, k) of the linear layers of Llama and Qwen models of 1B to 8B parameters
LINEARS = (
    (2048, 2048), (8192, 2048), (2048, 8192), (3072, 3072), (8192, 3072), (3072, 8192),
    (3584, 3584), (18944, 3584), (3584, 18944), (4096, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
TOKENS = (1, 16, 64, 256, 1024, 4096)

#: published peaks of sparse tensor cores with 16-bit floats, TFLOP/s of the dense product (vendor data
#: sheets); 8-bit elements have twice as many
PEAKS = {"A100": 624.0, "H100 PCIe": 1513.0, "H100": 1979.0, "H200": 1979.0, "4090": 330.4, "L40S": 733.0}

_TURNS = 7
_TARGET = 4000.0
"""Microseconds that one graph takes, about."""
_HOPELESS = 3.0
"""Tiles that take so many times as long as the fastest so far are not measured on."""
_PAD = 32
"""Rows to which activations in 8-bit elements are padded for cuBLASLt and cuSPARSELt, which want them so."""


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of one product [tokens, k] x [k, out]; ``sparse`` is None where cuSPARSELt cannot."""

    dtype: str
    tokens: int
    out: int
    k: int
    dense: float
    sparse: float | None
    tiles: dict[str, float]

    @property
    def tile(self) -> str:
        return min(self.tiles, key=self.tiles.__getitem__)

    @property
    def ours(self) -> float:
        return self.tiles[self.tile]


@dataclass(frozen=True, slots=True)
class Kind:
    """An element type here: torch's, that of the output, the dense product, random values."""

    element: torch.dtype
    out: torch.dtype
    dense: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Sequence[int]], Tensor]


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.t())


def _scaled_mm(x: Tensor, weight: Tensor) -> Tensor:
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _normal(dtype: torch.dtype) -> Callable[[Sequence[int]], Tensor]:
    return lambda shape: torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def _integers(shape: Sequence[int]) -> Tensor:
    return torch.randint(-100, 101, tuple(shape), device="cuda", dtype=torch.int8)


KINDS = {
    "fp16": Kind(torch.float16, torch.float16, F.linear, _normal(torch.float16)),
    "bf16": Kind(torch.bfloat16, torch.bfloat16, F.linear, _normal(torch.bfloat16)),
    "int8": Kind(torch.int8, torch.int32, _int_mm, _integers),
    "e4m3": Kind(torch.float8_e4m3fn, torch.bfloat16, _scaled_mm, _normal(torch.float8_e4m3fn)),
}


def shapes() -> list[tuple[int, int, int]]:
    """(tokens, out, k) of every product that is timed."""
    linears = ((tokens, out, k) for out, k in LINEARS for tokens in TOKENS)
    return list(dict.fromkeys((*SQUARES, *linears)))


def two_of_four(kind: Kind, out: int, k: int) -> Tensor:
    """A random 2:4 weight on the GPU."""
    groups = kind.draw((out, k)).float().view(out, -1, 4)
    kept = groups.abs().topk(2, -1).indices
    kept_values = torch.zeros_like(groups).scatter_(-1, kept, groups.gather(-1, kept)).view(out, k)
    return kept_values.to(kind.element)


@lru_cache(1)
def weight_of(dtype: str, out: int, k: int) -> tuple[Tensor, Packed]:
    """A random 2:4 weight on the GPU, and as the kernels read it."""
    weight = two_of_four(KINDS[dtype], out, k)
    return weight, pack(weight.cpu())


@dataclass(eq=False, slots=True)
class Product:
    """One product with as many copies of its operands as the cache does not hold."""

    dtype: str
    tokens: int
    out: int
    k: int
    weights: list[Tensor] = field(init=False)
    inputs: list[Tensor] = field(init=False)
    packed: Packed = field(init=False)

    def __post_init__(self) -> None:
        size = self.kind.element.itemsize
        least = (
            size * (self.out * self.k // 2 + self.tokens * self.k)
            + self.kind.out.itemsize * self.out * self.tokens
        )
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = 1 + 2 * cache // least if least < 4 * cache else 1
        weight, self.packed = weight_of(self.dtype, self.out, self.k)
        self.weights = [weight] + [weight.clone() for _ in range(copies - 1)]
        self.inputs = [self.kind.draw((self.tokens, self.k)) for _ in range(copies)]

    def __str__(self) -> str:
        return f"{self.dtype} {self.tokens} x {self.k} x {self.out}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.dtype]

    def padded(self) -> list[Tensor]:
        """The inputs with as many rows as cuBLASLt and cuSPARSELt take in 8-bit elements."""
        if self.kind.element.itemsize > 1 or self.tokens % _PAD == 0:
            return self.inputs
        return [F.pad(x.view(torch.int8), (0, 0, 0, -self.tokens % _PAD)).view(x.dtype) for x in self.inputs]


Steps = list[Callable[[], Tensor]]
"""The same product with each copy of its operands."""


def dense(product: Product) -> Steps:
    """cuBLASLt."""
    pairs = zip(product.padded(), product.weights, strict=True)
    return [lambda x=x, w=w: product.kind.dense(x, w) for x, w in pairs]  # type: ignore[misc]


def sparse(product: Product) -> Steps:
    """cuSPARSELt with the algorithm and the split of K that its own search finds."""
    inputs = product.padded()
    rows = len(inputs[0])
    columns = [F.pad(x, (0, 0, 0, -rows % 8)).t() if rows % 8 else x.t() for x in inputs]
    held = [torch._cslt_compress(weight) for weight in product.weights]
    out = None if product.kind.element.itemsize > 1 else product.kind.out
    algorithm, split, mode, _ = torch._C._cusparselt.mm_search(held[0], columns[0], None, None, out, True)  # type: ignore[attr-defined]
    found = {"alg_id": algorithm, "split_k": split, "split_k_mode": mode, "out_dtype": out}
    return [
        lambda w=w, x=x: torch._cslt_sparse_mm(w, x, transpose_result=True, **found)  # type: ignore[misc]
        for w, x in zip(held, columns, strict=True)
    ]


def ours(product: Product, config: KernelConfig) -> Steps | None:
    """A generated kernel; None where this GPU cannot run it."""
    from sparsecc.errors import TargetRefused
    from sparsecc.targets.cuda.build import build_gemm
    from sparsecc.targets.cuda.driver import driver
    from sparsecc.targets.cuda.launch import image_for, start
    from sparsecc.targets.cuda.problem import Problem

    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if config.instruction == "wgmma.sp" else "")
    try:
        kernel = build_gemm(config, Problem(product.out, product.k), [arch])
    except TargetRefused:
        return None
    image = image_for(kernel, major, minor)
    assert image is not None
    function = driver().function(image, kernel.entry, kernel.config.shared_bytes)
    launch = kernel.launch(tokens=product.tokens)
    held = [torch.from_numpy(array).cuda() for array in (product.packed.values, product.packed.metadata)]

    def run(values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        y = torch.empty(product.tokens, product.out, device="cuda", dtype=product.kind.out)
        start(function, kernel, launch, {"weight": values, "metadata": metadata, "x": x, "d": y})
        return y

    copies = [(held[0].clone(), held[1].clone(), x) for x in product.inputs]
    return [lambda copy=copy: run(*copy) for copy in copies]  # type: ignore[misc]


def graph_of(steps: Steps) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of whole turns around the copies, about ``_TARGET`` microseconds long, and its products."""
    for step in steps[:3]:
        step()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for step in steps:
        step()
    end.record()
    end.synchronize()
    each = 1000 * start.elapsed_time(end) / len(steps)
    turns = max(1, min(round(_TARGET / each / len(steps)), 1 + 400 // len(steps)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for step in steps:
                step()
    return graph, turns * len(steps)


def _safe(dtype: str) -> bool:
    """Whether cuSPARSELt may be tried in an element type on this GPU."""
    return dtype != "fp16" or cusparselt.takes(64, 64, dtype, convolution=False)


def measured(product: Product, configs: dict[str, KernelConfig], console: Console) -> Row:
    """Time one product on every engine, in turn."""
    wanted = product.kind.dense(product.padded()[0], product.weights[0])[: product.tokens]
    scale = float(wanted.float().abs().max())
    bound = 0.0 if wanted.dtype == torch.int32 else 4 * torch.finfo(wanted.dtype).eps * scale
    engines: dict[str, Callable[[], Steps | None]] = {"dense": lambda: dense(product)}
    if not cusparselt.why_not() and _safe(product.dtype):
        engines["sparse"] = lambda: sparse(product)
    engines |= {name: (lambda config=config: ours(product, config)) for name, config in configs.items()}  # type: ignore[misc]
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    first: dict[str, float] = {}
    held: list[Steps] = []
    for name, made in engines.items():
        try:
            steps = made()
        except RuntimeError as error:
            if name != "sparse":
                raise
            console.print(f"cuSPARSELt, {product}: {error}")
            continue
        if steps is None:
            continue
        off = float((steps[0]()[: product.tokens].double() - wanted.double()).abs().max())
        if off > bound:
            raise SystemExit(
                f"{name} is wrong on {product}: off by {off}, where the largest output is {scale}"
            )
        graph, count = graph_of(steps)
        first[name] = microseconds(graph, count)
        own = [first[n] for n in first if n not in ("dense", "sparse")]
        if name in ("dense", "sparse") or first[name] <= _HOPELESS * min(own):
            graphs[name] = graph, count
            held.append(steps)  # a graph does not hold what it reads
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_TURNS):
        for name, (graph, count) in graphs.items():
            seen[name].append(microseconds(graph, count))
    medians = {name: round(statistics.median(times), 2) for name, times in seen.items()}
    sizes = (product.dtype, product.tokens, product.out, product.k)
    return Row(*sizes, medians.pop("dense"), medians.pop("sparse", None), medians)


def default_configs(dtype: str) -> dict[str, KernelConfig]:
    """Every tile in an element type."""
    out_dtype = "bf16" if dtype == "e4m3" else ""
    return {tile: default_config(tile, dtype, out_dtype=out_dtype) for tile in (*TILES, *WGMMA_TILES)}


def variants(dtype: str) -> dict[str, KernelConfig]:
    """Every tile with other depths of its pipelines and other orders of its blocks."""
    found = {}
    for tile, config in default_configs(dtype).items():
        held = {config.weight_stages, 4, 8} if tile in WGMMA_TILES else {config.weight_stages}
        depths = (config.stages, config.stages + 1)
        for stages, weights, group in itertools.product(depths, sorted(held), (8, 16)):
            try:
                other = replace(config, stages=stages, weight_stages=weights, group=group)
            except InvalidOption:  # more shared memory than any GPU has
                continue
            found[f"{tile} s{stages} r{weights} g{group}"] = other
    return found


# -- the page -----------------------------------------------------------------------------------------

_HEAD = (
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
)


def page(rows: Sequence[Row], about: dict[str, str]) -> str:
    """The table in Markdown."""
    peak = next((value for name, value in PEAKS.items() if name in about["gpu"]), float("nan"))
    lines = [
        "# 2:4 products on the GPU",
        "",
        f"{about['gpu']}, torch {about['torch']}, CUDA {about['cuda']}; written by `make gpu-bench`.",
        "Microseconds, medians of interleaved CUDA graphs that go around more copies of the operands than",
        "the cache holds.",
        "`of peak`: of the published peak of the sparse tensor cores; `tile`: the fastest of them.",
        "`dense` is cuBLASLt: `F.linear`, in int8 `torch._int_mm`, in e4m3 `torch._scaled_mm`; cuSPARSELt is",
        "PyTorch's, with the algorithm and the split of K that its search finds.  A dash: it was not run (in",
        "fp16 on Hopper its search executes an illegal instruction, after which the process has no GPU).",
        "",
        "## Linear layers of Llama and Qwen models of 1B to 8B parameters",
        "",
        "With the tile that a layer gets: median ratio, the least and the largest, over twelve sizes.",
        f"In int8 cuBLASLt and cuSPARSELt get {_PAD} rows at least, which is what they take.",
        "",
        *summary(rows),
        "",
        "Layers for which the tile that they get is slower than cuBLASLt stay dense (`choose=modelled` reads",
        "these times); with 256 tokens and many more inputs than outputs only a part of the GPU is busy.",
        "",
        "## Every product",
        "",
        f"| {' | '.join(_HEAD)} |",
        "|---" * len(_HEAD) + "|",
    ]
    for r in rows:
        share = 2e-6 * r.tokens * r.out * r.k / r.ours / (peak * (3 - KINDS[r.dtype].element.itemsize))
        other = ("-", "-") if r.sparse is None else (f"{r.sparse:.1f}", f"{r.sparse / r.ours:.2f}x")
        lines.append(
            f"| {r.dtype} | {r.tokens} | {r.out} x {r.k} | {r.dense:.1f} | {other[0]} | {r.ours:.1f} "
            f"| {r.tile} | {r.dense / r.ours:.2f}x | {other[1]} | {share:.0%} |"
        )
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """Least, median and largest ratios by element type and tokens, of the layers of language models."""
    lines = ["| dtype | tokens | over dense | over cuSPARSELt |", "|---|---|---|---|"]
    for dtype, tokens in itertools.product(dict.fromkeys(r.dtype for r in rows), TOKENS):
        some = [r for r in rows if (r.dtype, r.tokens) == (dtype, tokens) and (r.out, r.k) in LINEARS]
        times = [float(built(r)[-1]) for r in some]
        dense = [r.dense / ours for r, ours in zip(some, times, strict=True)]
        other = [r.sparse / ours for r, ours in zip(some, times, strict=True) if r.sparse]
        if len(some) == len(LINEARS):
            lines.append(f"| {dtype} | {tokens} | {_spread(dense)} | {_spread(other)} |")
    return lines


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"


def about() -> dict[str, Any]:
    """What the figures were measured with."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "arch": f"sm{major}{minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main() -> int:
    """The command; without a GPU it says so and changes nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--squares", action="store_true", help="square products only")
    parser.add_argument("--variants", action="store_true", help="tiles in variants; prints, writes nothing")
    parser.add_argument("--json", action="store_true", help="print the rows, write nothing")
    chosen = parser.parse_args()
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        console.print("no NVIDIA GPU here: nothing was measured")
        return 0
    sizes = list(SQUARES) if chosen.squares else shapes()
    work = [(dtype, *size) for dtype in chosen.dtypes for size in sizes]
    rows = [
        measured(Product(*one), (variants if chosen.variants else default_configs)(one[0]), console)
        for one in track(work, "products", console=console)
    ]
    if chosen.json or chosen.variants:
        print(json.dumps({"about": about(), "rows": [asdict(row) for row in rows]}))
        return 0
    write(rows, about())
    console.print(f"written: {TABLE.name}, {PAGE.name}, {CHOICES.name}")
    return 0


def write(rows: Sequence[Row], about: dict[str, str]) -> None:
    """The rows as they are, the page, and what layers are chosen by (of this architecture alone)."""
    shown = ",\n ".join(json.dumps(asdict(row)) for row in rows)
    TABLE.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n {shown}\n]}}\n')
    PAGE.write_text(page(rows, about))
    chosen = json.loads(CHOICES.read_text()) if CHOICES.exists() else {}
    chosen[about["arch"]] = {"gpu": about["gpu"], "rows": [built(row) for row in rows]}
    tables = (
        f'"{arch}": {{"gpu": {json.dumps(one["gpu"])}, "rows": [\n '
        + ",\n ".join(map(json.dumps, one["rows"]))
        + "\n]}"
        for arch, one in sorted(chosen.items())
    )
    CHOICES.write_text("{" + ",\n".join(tables) + "}\n")


def built(row: Row) -> list[Any]:
    """What ``sparsecc.targets.cuda.measured`` reads: the tile that a layer gets, not the best one."""
    rule = warpgroup_tile(row.tokens, row.out) or tile_for(row.tokens, row.out)
    tile = rule if rule in row.tiles else row.tile
    return [row.dtype, row.tokens, row.out, row.k, row.dense, tile, row.tiles[tile]]


if __name__ == "__main__":
    sys.exit(main())

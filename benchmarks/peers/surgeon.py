"""SparseGPT on one layer beside llm-compressor's: ``python -m benchmarks.peers.surgeon``.

Both get the same weight and second moment in float32, on the same threads; runs alternate.  Of the peer only
the file with the algorithm is loaded, because its package imports what pins other versions of PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.tasks.hub import transformers
from sparsecc.recovery.obs import Columns, patterned, surgeon, unstructured

_FILE = "modifiers/pruning/sparsegpt/sgpt_sparsify.py"
DAMPING = 0.01
#: name -> (ours, the peer's n and m of what goes)
CASES: dict[str, tuple[Columns, int, int]] = {
    "2:4": (patterned(2, 4), 2, 4),
    "50 %": (unstructured(0.5), 0, 0),
}


def peer(file: str = _FILE) -> Any:
    """One of the peer's files as a module; SystemExit with what to install where it is missing."""
    found = importlib.util.find_spec("llmcompressor")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "llm-compressor is missing: pip install --no-deps llmcompressor==0.14.0.1 loguru==0.7.3"
        )
    transformers()  # the peer imports it
    spec = importlib.util.spec_from_file_location(
        Path(file).stem, Path(found.submodule_search_locations[0]) / file
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of correlated inputs of different scales."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator) / size**0.5
    x = torch.randn(2 * size, size, generator=generator) @ mix
    x *= torch.randn(size, generator=generator).exp()
    return torch.randn(size, size, generator=generator), x.T @ x / (2 * size)


def theirs(module: Any, weight: torch.Tensor, hessian: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The peer's updated weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    with torch.no_grad():
        _, found = module.sparsify_weight(linear, {linear: hessian}, 0.5, n, m, 128, DAMPING, False)
    return found  # type: ignore[no-any-return]


def error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    """Share of the outputs' second moment that is lost."""
    change = (found - weight).double()
    h = hessian.double()
    return float(((change @ h) * change).sum() / ((weight.double() @ h) * weight.double()).sum())


@dataclass(frozen=True)
class Line:
    """Medians in seconds, shares of the outputs' second moment that are lost, and how many zeros agree."""

    case: str
    ours_s: float
    theirs_s: float
    ratio: float
    ours_error: float
    theirs_error: float
    same_zeros: float


def compare(name: str, size: int, rounds: int) -> Line:
    """Both on the same layer, in turn."""
    columns, n, m = CASES[name]
    module = peer()
    weight, hessian = layer(size)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        start = time.perf_counter()
        ours, _ = surgeon(weight, hessian.clone(), columns, damping=DAMPING)
        middle = time.perf_counter()
        other = theirs(module, weight, hessian.clone(), n, m)
        times["ours"].append(middle - start)
        times["theirs"].append(time.perf_counter() - middle)
    return Line(
        name,
        statistics.median(times["ours"]),
        statistics.median(times["theirs"]),
        statistics.median(b / a for a, b in zip(*times.values(), strict=True)),
        error(weight, ours, hessian),
        error(weight, other, hessian),
        float(((ours == 0) == (other == 0)).float().mean()),
    )


def main() -> int:
    """The command; exit code 1 where the peer is faster."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.surgeon", description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found = [compare(name, chosen.size, chosen.rounds) for name in CASES]
    rows = [asdict(line) for line in found]
    if chosen.json:
        print(json.dumps({"size": chosen.size, "threads": chosen.threads, "rows": rows}))
    else:
        table = Table(title=f"SparseGPT, {chosen.size} x {chosen.size}, {chosen.threads} thread(s)")
        for name in rows[0]:
            table.add_column(name)
        for row in rows:
            table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
        Console().print(table, f"load average {os.getloadavg()[0]:.1f}")
    return int(any(line.ratio < 1 for line in found))


if __name__ == "__main__":
    sys.exit(main())

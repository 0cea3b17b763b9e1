"""Memory that pruning a checkpoint on disk takes: ``python -m benchmarks.checkpoint`` (Linux).

A synthetic transformer in the proportions of Llama, larger than the memory that the process may take, is
written to disk block by block and pruned to 2:4.  Resident memory is compared with that before pruning.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from sparsecc.checkpoint import parameters_on_meta, prune_checkpoint
from sparsecc.checkpoint.shards import Entry
from sparsecc.checkpoint.writer import ShardWriter
from sparsecc.passes import SparseGPT, Wanda

MB = 1 << 20


class Block(nn.Module):
    """Attention and a gated feed-forward part."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x[N,L,D] -> y[N,L,D]``"""
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        out: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Model(nn.Module):
    """A table, blocks and a head."""

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 1000, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids[N,L] -> logits[N,L,V]``"""
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.table(ids))))
        return logits


def write(model: nn.Module, folder: Path) -> None:
    """Random weights, one at a time."""
    file = folder / "model.safetensors"
    entries = {n: Entry(file, "F32", tuple(p.shape), {}) for n, p in model.named_parameters()}
    writer = ShardWriter(folder, entries, {})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        noise = torch.randn(parameter.shape, generator=generator)
        writer.put(name, torch.ones_like(noise) if parameter.dim() == 1 else noise * scale)


def resident(field: str) -> int:
    """A line of this process' status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=2752)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--limit", type=int, default=600, help="MB that the process may take for data")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--method", choices=["SparseGPT", "Wanda"], default="SparseGPT")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with parameters_on_meta():
        model = Model(chosen.width, chosen.hidden, chosen.depth).eval()
    block = sum(p.numel() * 4 for p in model.blocks[0].parameters())
    whole = sum(p.numel() * 4 for p in model.parameters())
    length = 256
    batches = [torch.randint(0, 1000, (1, length)) for _ in range(chosen.batches)]
    rows = chosen.batches * length
    activations = rows * 4 * (3 * chosen.width + 3 * chosen.hidden)
    recipe = SparseGPT(pattern="2:4") if chosen.method == "SparseGPT" else Wanda(pattern="2:4")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        write(model, source)
        prune_checkpoint(  # once with nothing to do: capture and libraries belong to the baseline
            model, (batches[0],), source, Path(folder) / "warm", [type(recipe)(exclude=("*",))],
            calibration=batches[:1],
        )  # fmt: skip
        base = resident("VmRSS")
        resource.setrlimit(
            resource.RLIMIT_DATA, (resident("VmData") + chosen.limit * MB, resource.RLIM_INFINITY)
        )
        Path("/proc/self/clear_refs").write_text("5")  # peaks count from here
        start = time.perf_counter()
        prune_checkpoint(model, (batches[0],), source, Path(folder) / "result", [recipe], calibration=batches)
        seconds = time.perf_counter() - start
    over = resident("VmHWM") - base
    found = {
        "model_mb": whole / MB,
        "block_mb": block / MB,
        "limit_mb": chosen.limit,
        "activations_mb": activations / MB,
        "over_baseline_mb": over / MB,
        "blocks": (over - activations) / block,
        "seconds": seconds,
    }
    if chosen.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            Console().print(f"{name:>18} {value:.2f}")
    return int(found["blocks"] > 2.2)


if __name__ == "__main__":
    raise SystemExit(main())

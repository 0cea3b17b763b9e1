"""Whole decoder layers on the GPU at hand, compiled and dense: ``python -m benchmarks.gpu_model``.

Two layers with the widths of Llama 3.2 1B (RMSNorm, rotary positions, grouped-query attention, SwiGLU),
random weights, bfloat16, one sequence.  Beside the artifact, of which the certificate is printed: the dense
module as it is and by torch.compile.  All are CUDA graphs that take turns; medians.  Writes
docs/gpu-model.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cuda_graphs import captured, microseconds

WIDTH, INNER, HEADS, GROUPS, LAYERS = 2048, 8192, 32, 8, 2
TOKENS = (1, 16, 128, 1024)
TARGET = "sm90-2:4-bf16"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu-model.md"
_TURNS, _CALLS = 15, 20


class Layer(nn.Module):
    """One decoder layer; x[1, tokens, WIDTH]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.before, self.between = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * head, bias=False) for _ in range(2))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        angles = torch.arange(tokens)[:, None] * 5e5 ** -(torch.arange(0, head, 2) / head)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos().to(torch.bfloat16))
        self.register_buffer("sin", angles.sin().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (self._heads(layer(y)) for layer in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(found.transpose(1, 2).flatten(2))
        y = self.between(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out

    def _heads(self, y: Tensor) -> Tensor:
        heads: Tensor = y.unflatten(-1, (-1, WIDTH // HEADS))
        return heads.transpose(1, 2)

    def _turned(self, y: Tensor) -> Tensor:
        half = y.shape[-1] // 2
        found: Tensor = y * self.cos + torch.cat([-y[..., half:], y[..., :half]], -1) * self.sin
        return found


def model(tokens: int) -> nn.Module:
    """The layers, in evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(tokens) for _ in range(LAYERS))).to(torch.bfloat16).eval()


def compiled(tokens: int, *, verify: bool = True) -> Any:
    """The artifact for a number of tokens."""
    import sparsecc

    return sparsecc.compile(
        model(tokens), (torch.randn(1, tokens, WIDTH).to(torch.bfloat16),), target=TARGET, verify=verify
    )


def measured(tokens: int, console: Console) -> list[str]:
    """A line of the table."""
    begin = time.perf_counter()
    artifact = compiled(tokens)
    took, layers = time.perf_counter() - begin, artifact.artifact
    executor, dense = artifact.start(), model(tokens).cuda()
    x = torch.randn(1, tokens, WIDTH, device="cuda").to(torch.bfloat16)
    name = executor.signature.inputs[0].name
    with torch.inference_mode():
        fused = torch.compile(dense)
        calls: dict[str, Callable[[], object]] = {
            "dense": lambda: dense(x),
            "torch.compile": lambda: fused(x),
            "artifact": lambda: executor.run_named({name: x}),
        }
        graphs = {word: captured(call, _CALLS) for word, call in calls.items()}
        seen: dict[str, list[float]] = {word: [] for word in graphs}
        for _ in range(_TURNS):
            for word, graph in graphs.items():
                seen[word].append(microseconds(graph, _CALLS))
    medians = {word: statistics.median(times) for word, times in seen.items()}
    from sparsecc.targets.cuda.listing import layers_of

    rows = layers_of(layers)
    sparse = f"{sum(row['sparse'] for row in rows)} of {len(rows)}"
    ours = medians["artifact"]
    console.print(f"{tokens} tokens: {medians}, {artifact.certificate.status}, {took:.0f} s")
    return [
        str(tokens), sparse, *(f"{medians[word]:.1f}" for word in calls),
        f"{medians['dense'] / ours:.2f}x", f"{medians['torch.compile'] / ours:.2f}x",
        artifact.certificate.status,
    ]  # fmt: skip


_HEAD = (
    "tokens", "products 2:4", "dense", "torch.compile", "artifact", "over dense", "over torch.compile",
    "certificate",
)  # fmt: skip


def page(lines: list[list[str]], gpu: str) -> str:
    """The table in Markdown."""
    return "\n".join(
        [
            "# Whole decoder layers on the GPU",
            "",
            f"{LAYERS} layers with the widths of Llama 3.2 1B, random weights, bfloat16, one sequence,",
            f"compiled for `{TARGET}` without a recipe; microseconds, medians of CUDA graphs that take",
            f"turns; {gpu}, torch {torch.__version__}; written by `python -m benchmarks.gpu_model`.",
            "",
            f"| {' | '.join(_HEAD)} |",
            "|---" * len(_HEAD) + "|",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
        ]
    )


def main() -> int:
    """The command; without a GPU it says so and changes nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--build", action="store_true", help="only build and keep the kernels; needs no GPU")
    chosen = parser.parse_args()
    console = Console(stderr=True)
    if chosen.build:
        for tokens in TOKENS:
            console.print(f"{tokens} tokens: {compiled(tokens, verify=False).artifact.target} built")
        return 0
    if not torch.cuda.is_available():
        console.print("no NVIDIA GPU here: nothing was measured")
        return 0
    lines: list[list[str]] = []
    for tokens in TOKENS:
        lines.append(measured(tokens, console))
        PAGE.write_text(page(lines, torch.cuda.get_device_name()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

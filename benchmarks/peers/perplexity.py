"""SmolLM2 pruned with llm-compressor's algorithms: ``python -m benchmarks.peers.perplexity``.

Its own files do the pruning (``benchmarks.peers.surgeon`` says why not its package); the loop around them
is its sequential pipeline: a decoder layer reads what the pruned layers before it give, its products are
measured in one pass, then pruned.  Calibration text and scored text are those of ``make bench-accuracy``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.accuracy.calibration import CALIBRATION
from benchmarks.accuracy.store import load as measured
from benchmarks.models import MODELS, as_predict
from benchmarks.peers.surgeon import DAMPING, peer

_SPARSEGPT = "modifiers/pruning/sparsegpt/sgpt_sparsify.py"
_WANDA = "modifiers/pruning/wanda/wanda_sparsify.py"
#: method -> the key that our row has in docs/accuracy.json
OURS = {
    ("SparseGPT", "50 %"): "smollm2/SparseGPT(sparsity=0.5, exclude=('*lm_head*',))/l2/16",
    ("SparseGPT", "2:4"): "smollm2/SparseGPT(pattern='2:4', exclude=('*lm_head*',))/l2/16",
    ("Wanda", "50 %"): "smollm2/Wanda(sparsity=0.5, exclude=('*lm_head*',))/l2/16",
    ("Wanda", "2:4"): "smollm2/Wanda(pattern='2:4', exclude=('*lm_head*',))/l2/16",
}
#: a linear layer's new weight, from what was accumulated of its inputs
Prune = Callable[[nn.Module, torch.Tensor], torch.Tensor]
#: what to start with, how an input is added, and what is made of it
Method = tuple[Callable[..., torch.Tensor], Callable[..., Any], Prune]


def sparse_gpt(n: int, m: int) -> Method:
    """The peer's SparseGPT at its defaults."""
    file = peer(_SPARSEGPT)

    def prune(module: nn.Module, hessian: torch.Tensor) -> torch.Tensor:
        _, found = file.sparsify_weight(module, {module: hessian}, 0.5, n, m, 128, DAMPING, False)
        return found  # type: ignore[no-any-return]

    return file.make_empty_hessian, file.accumulate_hessian, prune


def wanda(n: int, m: int) -> Method:
    """The peer's Wanda."""
    file = peer(_WANDA)

    def prune(module: nn.Module, scalars: torch.Tensor) -> torch.Tensor:
        return file.sparsify_weight(module, {module: scalars}, 0.5, n, m)  # type: ignore[no-any-return]

    return file.make_empty_row_scalars, file.accumulate_row_scalars, prune


METHODS: dict[str, Callable[[int, int], Method]] = {"SparseGPT": sparse_gpt, "Wanda": wanda}
PATTERNS = {"50 %": (0, 0), "2:4": (2, 4)}


class _Enough(Exception):
    """The first layer's inputs are known."""


@torch.no_grad()
def prune(model: Any, chunks: list[torch.Tensor], method: Method) -> None:
    """Prune all linear layers of the decoder, one decoder layer after the other."""
    layers = model.model.layers
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise _Enough

    handle = layers[0].register_forward_pre_hook(first, with_kwargs=True)
    for ids in chunks:
        with contextlib.suppress(_Enough):
            model(input_ids=ids)
    handle.remove()
    for layer in layers:
        _prune_layer(layer, given, method)
        given = [((_hidden(layer(*args, **kwargs)), *args[1:]), kwargs) for args, kwargs in given]


def _hidden(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs  # type: ignore[no-any-return]


def _prune_layer(layer: nn.Module, given: list[tuple[Any, Any]], method: Method) -> None:
    empty, add, new = method
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    sums: dict[nn.Module, tuple[torch.Tensor, int]] = {m: (empty(m), 0) for m in linears}

    def read(module: nn.Module, args: tuple[torch.Tensor, ...], outputs: Any) -> None:
        sums[module] = add(args[0], module, *sums[module])

    handles = [m.register_forward_hook(read) for m in linears]
    for args, kwargs in given:
        layer(*args, **kwargs)
    for handle in handles:
        handle.remove()
    for module in linears:
        module.weight.copy_(new(module, sums.pop(module)[0]))


@dataclass(frozen=True)
class Line:
    """Perplexity of one method and pattern; ``ours`` None where `make bench-accuracy` has no such row yet."""

    method: str
    pattern: str
    ours: float | None
    theirs: float
    seconds: float

    @property
    def behind(self) -> bool:
        """Whether the peer's result is better."""
        return self.ours is not None and self.theirs < self.ours


def compare(method: str, pattern: str) -> Line:
    """Prune with the peer's files, score, and look ours up."""
    torch.set_num_threads(1)
    chunks = [batch["input_ids"] for batch in CALIBRATION["smollm2"](16)]
    entry = MODELS["smollm2"]
    model = entry.load().model
    start = time.perf_counter()
    prune(model, chunks, METHODS[method](*PATTERNS[pattern]))
    seconds = time.perf_counter() - start
    theirs = dict(entry.score(as_predict(model)))["perplexity"]
    ours = measured()["rows"].get(OURS[method, pattern], {}).get("scores", {}).get("perplexity")
    return Line(method, pattern, ours, theirs, seconds)


def main() -> int:
    """The command; exit code 1 where the peer's perplexity is lower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.perplexity", description=__doc__)
    parser.add_argument("--method", choices=list(METHODS), default=None)
    parser.add_argument("--pattern", choices=list(PATTERNS), default=None)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    console = Console(stderr=chosen.json)
    found = []
    for method, pattern in OURS:
        if chosen.method not in (None, method) or chosen.pattern not in (None, pattern):
            continue
        console.print(f"{method}, {pattern} ...")
        found.append(compare(method, pattern))
    if chosen.json:
        print(json.dumps([asdict(line) for line in found]))
    else:
        table = Table(title="SmolLM2-135M, perplexity (16 chunks of 512 tokens to calibrate with)")
        for name in ("method", "pattern", "ours", "theirs", "their s"):
            table.add_column(name)
        for line in found:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in asdict(line).values()))
        console.print(table)
    return int(any(line.behind for line in found))


if __name__ == "__main__":
    sys.exit(main())

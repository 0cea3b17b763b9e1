"""How much memory planning takes beyond the model: peak resident memory of a process of its own."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.nets import Transformer
from benchmarks.peers.isolated import answer

Made = tuple[nn.Module, Any]


def _smollm2() -> Made:
    """SmolLM2-135M's architecture with random weights."""
    from benchmarks.tasks.hub import transformers

    hub = transformers()
    config = hub.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return hub.LlamaForCausalLM(config), {"input_ids": torch.ones(2, 8, dtype=torch.long)}


def _transformer(layers: int, width: int) -> Made:
    return Transformer(layers, width, width // 64), (torch.randn(2, 8, 64),)


MODELS: dict[str, Callable[[], Made]] = {
    "SmolLM2-135M": _smollm2,
    "transformer, 32 layers, d=1024": lambda: _transformer(32, 1024),
}


@dataclass(frozen=True)
class Peak:
    """Megabytes: weights, and what analysing and planning added at their peak."""

    model: str
    weights: float
    extra: float

    @property
    def limit(self) -> float:
        """2 % of the weights and 200 MB."""
        return 0.02 * self.weights + 200


def peak(name: str) -> Peak:
    """Measured in a fresh process."""
    return Peak(name, **answer("benchmarks.peers.memory", name))


def _resident(key: str) -> float:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) / 1e3


def main() -> None:
    """Print the megabytes of one model as JSON."""
    from sparsecc.axes import Analysis
    from sparsecc.fx.capture import capture
    from sparsecc.fx.reader import read
    from sparsecc.passes import ChannelPruning, HeadPruning
    from sparsecc.pipeline import decide

    torch.set_num_threads(1)
    model, inputs = MODELS[sys.argv[1]]()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    program = capture(model.eval(), inputs)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _resident("VmRSS")
    decide(Analysis(read(program)), [ChannelPruning(), HeadPruning(head_dims=True)])
    print(json.dumps({"weights": weights, "extra": _resident("VmHWM") - before}))


if __name__ == "__main__":
    main()

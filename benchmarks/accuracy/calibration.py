"""Calibration data of the real models; none of it is in what they are scored on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.datasets import fashion_mnist, other_photographs, wikipedia
from benchmarks.tasks import imagenet, language, ocr_rec, ocr_text, sentences, vad
from sparsecc.calibration import CalibrationData


def fashion(count: int) -> CalibrationData:
    """Batches of 128 training images, with their labels for the loss."""
    images, labels = fashion_mnist("train")
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: 128 * count]
    batches = [(x[part], y[part]) for part in chosen.split(128)]
    return CalibrationData(
        batches, inputs=lambda batch: (batch[0],), loss=lambda out, batch: F.cross_entropy(out, batch[1])
    )


def mini_lm(count: int) -> CalibrationData:
    """Batches of 16 sentences from between the leads and the later parts that queries are taken from."""
    found = [
        sentence
        for article in wikipedia()
        for sentence in sentences.SENTENCE_END.split(
            article.text[sentences.LEAD_LETTERS : sentences.LATER_FROM]
        )
        if 40 < len(sentence) < 400
    ]
    test = {*sentences.retrieval().queries}
    rng = random.Random(0)
    rng.shuffle(found)
    kept = [s for s in found if s not in test][: 16 * count]
    batches = [sentences.tokens(kept[at : at + 16]) for at in range(0, len(kept), 16)]
    return CalibrationData(batches)


def smol_lm2(count: int) -> CalibrationData:
    """Chunks of 512 tokens from articles other than those that are scored, one article after the other."""
    long = [a.text for a in wikipedia() if len(a.text) > language.LONG_ARTICLE]
    ids = [
        language.tokenizer()(text, return_tensors="pt").input_ids[0] for text in long[: -language.ARTICLES]
    ]
    rounds = range(max(len(i) for i in ids) // language.LENGTH)
    chunks = [
        i[None, r * language.LENGTH : (r + 1) * language.LENGTH]
        for r in rounds
        for i in ids
        if len(i) >= (r + 1) * language.LENGTH
    ]
    return CalibrationData(
        [{"input_ids": c} for c in chunks[:count]],
        loss=lambda out, batch: _next_token(out, batch["input_ids"]),
    )


def _next_token(outputs: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def recogniser(count: int) -> CalibrationData:
    """Rendered lines whose text none of the scored lines has."""
    test = {line.text for line in ocr_text.lines()}
    rng = random.Random(1)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        line = ocr_text.render_line(rng)
        if line.text not in test:
            found.append({"x": torch.from_numpy(ocr_rec.network_input(line.pixels))})
    return CalibrationData(found)


def photographs(count: int) -> CalibrationData:
    """Batches of five crops, one of each photograph that is not scored; without labels."""
    found = imagenet.cut(other_photographs(), count, 1).unflatten(0, (-1, count))
    return CalibrationData([(batch,) for batch in found.unbind(1)])


def speech(count: int) -> CalibrationData:
    """Blocks of 128 frames of people who name playing cards, with noise between them."""
    frames = torch.from_numpy(vad.track("cards", 1).frames)
    state = torch.from_numpy(vad.no_state())
    return CalibrationData([{"input": b, "h": state, "c": state} for b in frames.split(128)[:count]])


#: model -> calibration data of so many batches
CALIBRATION: dict[str, Callable[[int], CalibrationData]] = {
    "resnet20": fashion,
    "vgg": fashion,
    "efficientnet_lite0": photographs,
    "minilm": mini_lm,
    "smollm2": smol_lm2,
    "ppocr_rec": recogniser,
    "silero_vad": speech,
}

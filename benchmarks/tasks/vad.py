"""Silero VAD on LibriVox speech between stretches of noise: accuracy per frame of 32 ms.

The labels come from the loudness of the clean recording; frames in between are not counted.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks import data
from benchmarks.datasets import RATE_HZ, Floats, recordings
from benchmarks.tasks.common import Loaded, Predict, Scores, outputs

MODEL = "silero_vad/data/silero_vad_16k_sequence.onnx"
FRAME, CONTEXT, HIDDEN = 512, 64, 128
BLOCK_FRAMES = 256
PAUSE_S, NOISE_RMS = 2, 0.003
SPEECH_RMS, SILENCE_RMS, WINDOW_S = 0.02, 0.004, 0.1
SPEECH, SILENCE, UNKNOWN = 1, 0, -1

Labels = npt.NDArray[np.int8]


class Track(NamedTuple):
    """``frames[N,576]`` (each with the end of the one before) and ``labels[N]``."""

    frames: Floats
    labels: Labels


def loudness(samples: Floats) -> Floats:
    """Root mean square over a tenth of a second around each sample."""
    window = int(WINDOW_S * RATE_HZ)
    power = np.convolve(samples.astype(np.float64) ** 2, np.ones(window) / window, "same")
    return np.sqrt(np.maximum(power, 0)).astype(np.float32)


def sample_labels(speech: Floats) -> Labels:
    """Which samples of a recording are clearly speech or clearly silence."""
    level = loudness(speech)
    return np.select([level > SPEECH_RMS, level < SILENCE_RMS], [SPEECH, SILENCE], UNKNOWN).astype(np.int8)


def frame_label(samples: Labels) -> int:
    """Speech or silence where nearly the whole frame is, unknown elsewhere."""
    if (samples == SPEECH).mean() > 0.8:
        return SPEECH
    return SILENCE if (samples == SILENCE).mean() > 0.95 else UNKNOWN


@cache
def track(name: Literal["librivox", "cards"] = "librivox", seed: int = 0) -> Track:
    """Recordings, each after two seconds of noise, cut into frames; the default is what is scored."""
    rng = np.random.default_rng(seed)
    sounds: list[Floats] = []
    labels: list[Labels] = []
    for speech in recordings(name):
        noise = rng.normal(0, NOISE_RMS, PAUSE_S * RATE_HZ).astype(np.float32)
        sounds += [noise, speech]
        labels += [np.zeros(len(noise), np.int8), sample_labels(speech)]
    count = sum(map(len, sounds)) // FRAME
    frames = np.concatenate(sounds)[: count * FRAME].reshape(count, FRAME)
    per_sample = np.concatenate(labels)[: count * FRAME].reshape(count, FRAME)
    context = np.vstack([np.zeros((1, CONTEXT), np.float32), frames[:-1, -CONTEXT:]])
    per_frame = np.array([frame_label(row) for row in per_sample], np.int8)
    return Track(np.hstack([context, frames]), per_frame)


def no_state() -> Floats:
    """The hidden or cell state before the first frame."""
    return np.zeros((1, 1, HIDDEN), np.float32)


def probabilities(predict: Predict) -> Floats:
    """The probability of speech in each frame, the state carried from block to block."""
    hidden, cell = no_state(), no_state()
    found = []
    frames = track().frames
    for start in range(0, len(frames), BLOCK_FRAMES):
        block = frames[start : start + BLOCK_FRAMES]
        speech, hidden, cell = outputs(predict(input=block, h=hidden, c=cell))
        found.append(speech)
    return np.concatenate(found)


@cache
def dense_decisions() -> npt.NDArray[np.bool_]:
    """What the dense network decides for each frame."""
    return probabilities(load().predict) > 0.5


def load() -> Loaded:
    """The published network; the example is a second of speech."""
    example = {"input": track().frames[64:96], "h": no_state(), "c": no_state()}
    return Loaded(data.path("silero-vad", MODEL), example)


def score(predict: Predict) -> Scores:
    """``accuracy`` on labelled frames, and ``agreement`` with the dense network on all of them."""
    decided = probabilities(predict) > 0.5
    labels = track().labels
    known = labels != UNKNOWN
    return {
        "accuracy": float((decided == (labels == SPEECH))[known].mean()),
        "agreement": float((decided == dense_decisions()).mean()),
    }

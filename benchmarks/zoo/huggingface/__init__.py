"""Hugging Face architectures, each from a tiny configuration with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from benchmarks.zoo.entry import Built, Entry
from benchmarks.zoo.huggingface import (
    decoders,
    encoder_decoders,
    experts,
    mixed,
    recurrent,
    series,
    sound,
    text_encoders,
    vision,
)
from benchmarks.zoo.huggingface.common import Inputs, Options
from benchmarks.zoo.torchvision_ops import define

TABLES = (text_encoders, decoders, experts, recurrent, encoder_decoders, vision, sound, mixed, series)


def _build(model: str, options: Options, inputs: Callable[[], Inputs]) -> Built:
    define()
    made = getattr(importlib.import_module("transformers"), model)
    config = made.config_class(**options)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "use_cache", False):
            part.use_cache = False  # type: ignore[union-attr]
    return Built(made(config), inputs())


def entries() -> list[Entry]:
    """Every line of the tables."""
    return [
        Entry("hf", name, partial(_build, model, options, inputs), tiny=True)
        for table in TABLES
        for name, model, options, inputs in table.LINES
    ]

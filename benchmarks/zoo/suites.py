"""All entries of the zoo, and the sample that continuous integration prunes."""

from __future__ import annotations

from functools import cache

from benchmarks.zoo import huggingface, timm_models, torchvision_models
from benchmarks.zoo.entry import Entry


@cache
def entries() -> tuple[Entry, ...]:
    """Every entry, by suite."""
    return (*torchvision_models.entries(), *timm_models.entries(), *huggingface.entries())


@cache
def _by_key() -> dict[str, Entry]:
    return {entry.key: entry for entry in entries()}


def find(suite: str, name: str) -> Entry:
    """The entry of that suite and name; raises KeyError."""
    return _by_key()[f"{suite}/{name}"]

"""Passes that other distributions add through the entry-point group ``sparsecc.passes``."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import pytest

from sparsecc import passes
from sparsecc.axes.analysis import Analysis
from sparsecc.recipe import steps
from sparsecc.transform import Choice, Pass


@dataclass(frozen=True, kw_only=True)
class Nothing(Pass):
    """Leaves everything alone."""

    strength: int = 1

    def choose(self, analysis: Analysis, saliency: Any = None) -> Choice:
        """No choice."""
        return Choice()


def _entries(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    entries = [importlib.metadata.EntryPoint(n, v, "sparsecc.passes") for n, v in values.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: entries)


def test_a_plug_in_can_be_named_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    _entries(monkeypatch, Nothing=f"{__name__}:Nothing")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: Nothing)
    (step,) = steps("Nothing(strength=2)", passes.known())
    assert step == Nothing(strength=2)


def test_a_broken_plug_in_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _entries(monkeypatch, Broken="no.such.module:Thing", Wrong="math:pi")
    with pytest.warns(UserWarning, match="plug-in"):
        assert passes.known() == passes.PASSES


def test_a_plug_in_cannot_replace_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _entries(monkeypatch, ChannelPruning="anything:Nothing")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: Nothing)
    assert passes.known()["ChannelPruning"] is passes.ChannelPruning

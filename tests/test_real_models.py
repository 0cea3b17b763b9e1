"""Random plans on the real models: whatever goes, pruned(x) = masked(x) in float64.

Needs ``make data``; run by ``make test-nightly``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.data import DataError
from benchmarks.models import MODELS
from sparsecc.lowering import lower
from sparsecc.pipeline import open_subject
from sparsecc.subject import Subject
from sparsecc.verification.check import FLOAT64_BOUND, distance

_SUBJECTS: dict[str, Subject] = {}


def _subject(name: str) -> Subject:
    if name not in _SUBJECTS:
        try:
            loaded = MODELS[name].load()
        except (DataError, ModuleNotFoundError) as error:
            pytest.skip(f"run `make data` and `make setup-bench`: {error}")
        _SUBJECTS.clear()
        _SUBJECTS[name] = open_subject(
            loaded.model, loaded.example_inputs, dynamic_shapes=loaded.dynamic_shapes
        )
    return _SUBJECTS[name]


@pytest.mark.nightly
@pytest.mark.data
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 0.9))
def test_random_plans(name: str, seed: int, share: float) -> None:
    """Random positions of every group go, at least one stays; several sizes are tried."""
    subject = _subject(name)
    generator = np.random.default_rng(seed)
    kept = {}
    for group in subject.analysis.groups:
        mask = generator.random(group.size) >= share
        mask[generator.integers(group.size)] = True
        kept[group.name] = mask
    kept = subject.analysis.feasible(kept)
    plan = lower(subject.analysis, kept)
    applied = subject.apply(plan, kept)
    inputs, _ = subject.inputs(seed % 3, seed % 2)
    masked = subject.masked(applied.plan, kept, inputs, torch.float64)
    for ours, theirs in zip(applied.run(inputs, torch.float64), masked, strict=True):
        error, scale = distance(ours, theirs)
        assert error <= FLOAT64_BOUND * scale

"""How far the outputs of a pruned model are from those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsecc.errors import InvalidOption

#: (flat outputs, those of the model as it was) -> a number of 0 or more
Divergence = Callable[[Sequence[Any], Sequence[Any]], float]


def relative_error(outputs: Sequence[Any], before: Sequence[Any]) -> float:
    """Sum of squared differences over the sum of squares, mean over all outputs that hold floats."""
    errors = []
    for new, old in _floats(outputs, before):
        old = old.double()
        size = float(old.square().sum())
        error = float((new.double() - old).square().sum())
        errors.append(error / size if size > 0 else error)
    return sum(errors) / len(errors)


def kl(outputs: Sequence[Any], before: Sequence[Any]) -> float:
    """Kullback-Leibler divergence of what the first output's last axis says as logits, mean over the rows."""
    new, old = _floats(outputs, before)[0]
    if not old.dim():
        raise InvalidOption("the first output is one number and no logits: measure another loss")
    rows = [t.reshape(-1, t.shape[-1]) for t in (new, old)]
    total = sum(_divergence(p, q) for p, q in zip(*(r.split(_ROWS) for r in rows), strict=True))
    return total / max(len(rows[0]), 1)


#: rows that are compared at a time: distributions over large vocabularies take memory
_ROWS = 128


def _divergence(new: torch.Tensor, old: torch.Tensor) -> float:
    wanted, got = (t.float().log_softmax(-1) for t in (old, new))
    terms = torch.nn.functional.kl_div(got, wanted, reduction="none", log_target=True)
    return float(terms.sum(dtype=torch.float64))


def _floats(outputs: Sequence[Any], before: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = [
        (new, old)
        for new, old in zip(outputs, before, strict=True)
        if isinstance(old, torch.Tensor) and old.is_floating_point() and old.numel()
    ]
    if not found:
        raise InvalidOption("no output of the model holds floats: give a loss of your own")
    return found

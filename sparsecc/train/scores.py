"""Scores of single elements by which masks are chosen: magnitude, movement, random, or a function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsecc.errors import InvalidOption

#: a parameter's name and its whole tensor -> scores of its shape; higher ones are kept
Scorer = Callable[[str, torch.Tensor], torch.Tensor]
SALIENCIES = ("magnitude", "movement", "random")


def check(saliency: str | Scorer) -> None:
    """Raise InvalidOption for an unknown name."""
    if not callable(saliency) and saliency not in SALIENCIES:
        raise InvalidOption(
            f"saliency={saliency!r} is not known; there are {', '.join(SALIENCIES)}, and functions of a "
            "parameter's name and tensor"
        )


def magnitude(name: str, weight: torch.Tensor) -> torch.Tensor:
    """|w| (Han et al., 2015, section 3), in float32 or float64."""
    return (weight if weight.dtype == torch.float64 else weight.float()).abs()


def moved(total: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add -w dL/dw to the scores of movement pruning, in place.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), section 4, eq. 2, summed over
    steps.  Scores of masked weights stand still, since these weights are zero.
    """
    total.sub_(weight.to(total.dtype) * gradient.to(total.dtype))


def checked(name: str, scores: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a user's function gave; raises InvalidOption where its shape is wrong or it holds NaN."""
    if scores.shape != weight.shape:
        raise InvalidOption(
            f"saliency: scores of {name!r} have shape {tuple(scores.shape)}, its weight {tuple(weight.shape)}"
        )
    if bool(scores.isnan().any()):
        raise InvalidOption(f"{name}: its scores hold NaN; the training has diverged, or saliency is wrong")
    return scores.detach()

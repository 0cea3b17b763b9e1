"""What a Sparsifier knows that its options do not say."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sparsecc.axes.terms import Keep
from sparsecc.train.snapshots import Snapshot

Tensors = dict[str, torch.Tensor]


@dataclass(eq=False)
class State:
    """This process's parts of tensors, by name of the parameter.

    ``masks``: True where a weight stays.  ``latents``: values of all weights, where masked ones have some.
    ``moved``: scores of movement pruning.  ``candidates``: masks of what ``Growing`` lets stay.  ``groups``:
    positions of coupled groups that stay.  ``count``: optimizer steps done.
    ``stays``: how many elements of whole parameters stay.
    """

    masks: Tensors
    generator: torch.Generator
    latents: Tensors = field(default_factory=dict)
    moved: Tensors = field(default_factory=dict)
    candidates: Tensors = field(default_factory=dict)
    groups: dict[str, Keep] = field(default_factory=dict)
    count: int = 0
    stays: dict[str, int] = field(default_factory=dict)
    saved: Snapshot | None = None

    def kinds(self) -> dict[str, Tensors]:
        """What there is of each parameter, by the prefix under which it is stored."""
        return {
            "mask": self.masks,
            "latent": self.latents,
            "moved": self.moved,
            "candidate": self.candidates,
        }

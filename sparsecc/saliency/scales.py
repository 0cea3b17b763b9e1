"""Scales of normalisation layers as saliency.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017), section 3: a channel
matters as much as the scale that its BatchNorm multiplies it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from sparsecc.errors import InvalidOption
from sparsecc.graph import View
from sparsecc.saliency.magnitude import Criterion, Reads, Scores

if TYPE_CHECKING:
    import torch

#: operators that normalise -> the operand that scales the result
_SCALES = {"batch_norm": 1, "instance_norm": 1, "group_norm": 1, "layer_norm": 1, "skip_layer_norm": 2}


def norm_scales(view: View) -> frozenset[str]:
    """Vectors that normalisation operators scale their results with."""
    found = (
        call.inputs[_SCALES[call.op]]
        for call in view.calls
        if call.op in _SCALES and len(call.inputs) > _SCALES[call.op]
    )
    return frozenset(v.weight for v in found if v is not None and v.weight is not None and len(v.shape) == 1)


@dataclass(frozen=True)
class NormScale(Criterion):
    """|gamma| of the norm layers of a group (batch, instance, group, layer and RMS norm).

    Groups without one are left alone: nothing else is put in its place.
    """

    reads: ClassVar[Reads] = "scales"
    unknown: ClassVar[str] = "no norm layer scales its positions (saliency 'bn')"

    def scores(
        self, name: str, weight: torch.Tensor, axes: Sequence[int], statistics: Any = None
    ) -> list[Scores]:
        """|gamma|.  Raises InvalidOption for weights that are no vectors."""
        if weight.dim() != 1:
            raise InvalidOption(f"saliency 'bn' reads scales of norm layers, and {name} is none; {_INSTEAD}")
        scales: Scores = weight.detach().double().abs().cpu().numpy()
        return [scales for _ in axes]

    def elements(self, name: str, weight: torch.Tensor, statistics: Any = None) -> npt.NDArray[Any]:
        """Raises InvalidOption: scales say nothing of single weights."""
        raise InvalidOption(f"saliency 'bn' ranks channels, not single weights; {_INSTEAD}")


_INSTEAD = "use l1, l2 or another magnitude there"

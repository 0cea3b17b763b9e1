"""How far rounding inside moves what a graph computes: the masked original, with results off by a hair."""

from __future__ import annotations

import torch

from sparsecc.axes.analysis import Keeps
from sparsecc.graph import Call, View
from sparsecc.reference.masked import Default, Masked, Tensors

#: how the names of operators begin that round to integers, in both dialects
_ROUNDING = (
    "quantize",
    "dynamicquantize",
    "qlinear",
    "qgemm",
    "quantized_decomposed.quantize",
    "fake_quantize",
    "_fake_quantize",
)


def rounds(view: View, call: Call) -> bool:
    """Whether a call rounds numbers to integers, or to what integers stand for."""
    return view.semantics is not None and view.semantics.function(call).startswith(_ROUNDING)


class Nudged(Masked):
    """Masked semantics, where each quantiser reads numbers that are off by up to one unit in the last place.

    With ``sums`` what products and reductions give is off as well.  The unit is that of the largest number,
    as sums of another order differ by such.  Which numbers move, up or down, is drawn at random.
    """

    def __init__(self, keeps: Keeps, seed: int, *, sums: bool = False) -> None:
        super().__init__(keeps)
        self._sums = sums
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, call: Call, operands: Tensors, default: Default) -> tuple[torch.Tensor, ...]:
        """The outputs of a call, given its operands."""
        if rounds(self.keeps.analysis.view, call) and operands and operands[0] is not None:
            operands = [self._moved(operands[0]), *operands[1:]]
        outputs = super().__call__(call, operands, default)
        facts = self._facts.get(call)
        if not self._sums or facts is None or not (facts.contractions or facts.reductions):
            return outputs
        return tuple(self._moved(y) if isinstance(y, torch.Tensor) else y for y in outputs)

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or not x.numel():
            return x
        largest = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).abs().max()
        ways = torch.randint(-1, 2, x.shape, generator=self._random).to(x)
        return x + ways * (largest * torch.finfo(x.dtype).eps)


def masking(keeps: Keeps, nudge: int | None = None, dtype: torch.dtype | None = None) -> Masked:
    """Masked semantics, nudged where there is a seed: of a run in float64 all sums are."""
    return Masked(keeps) if nudge is None else Nudged(keeps, nudge, sums=dtype is torch.float64)

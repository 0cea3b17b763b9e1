"""Whether weights of 8 bits keep the zeros and the patterns of the float weights that they were made from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sparsecc.errors import VerificationFailed
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.patterns.hardware import as_nm
from sparsecc.patterns.layers import Layer as Product
from sparsecc.patterns.layers import layers
from sparsecc.patterns.nm import NM
from sparsecc.plan import Pattern
from sparsecc.quantization.result import Layer

#: looked for in every weight, whether it was promised or not
_TWO_OF_FOUR = NM(2, 4)


def check_zeros(
    before: OnnxFile, after: OnnxFile, promised: Mapping[str, Sequence[Pattern]]
) -> tuple[Layer, ...]:
    """Every product's weight in both models, and the patterns that it has in the second.

    Raises VerificationFailed where a zero became another number, and where a promised pattern or share of
    zeros is not there.
    """
    ours, theirs = _Weights(before), _Weights(after)
    told: dict[str, Sequence[Pattern]] = {}
    for weight, patterns in promised.items():
        made = ours.made_from(weight)
        if not made:
            raise VerificationFailed(
                f"the pattern of {weight!r} cannot be checked: no product of the lowered model reads it"
            )
        told |= dict.fromkeys(made, patterns)
    lines: list[Layer] = []
    for name in ours.products:
        stored = theirs.made_from(name)
        if not stored and name in told:
            raise VerificationFailed(f"the pattern of {name!r} cannot be checked: the weight is gone")
        for other in stored:
            values = ours.values(name), theirs.values(other)
            lines.append(compared(name, other, *values, theirs.dtype(other), told.get(name, ())))
    return tuple(lines)


class _Weights:
    """Weights of products, with the axis that is summed along last."""

    def __init__(self, file: OnnxFile) -> None:
        self.subject = OnnxSubject(file)
        self.products: dict[str, Product] = {p.weight: p for p in layers(self.subject.analysis)}

    def made_from(self, name: str) -> list[str]:
        """What a weight is called, transposed or quantised or not."""
        words = re.compile(rf"{re.escape(name)}(_Transposed(_\d+)?)?(_quantized(_\d+)?)?")
        return [n for n in self.products if words.fullmatch(n)]

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """The real numbers."""
        weight = self.subject.view.weight(name).float().numpy()
        return np.moveaxis(weight, self.products[name].axis, -1)

    def dtype(self, name: str) -> str:
        """The element type that is stored."""
        return self.subject.view.weights[name].dtype


def compared(
    name: str,
    stored: str,
    before: npt.NDArray[np.float32],
    after: npt.NDArray[np.float32],
    dtype: str,
    promised: Sequence[Pattern],
) -> Layer:
    """A weight before and after, as real numbers whose last axis is the one that is summed along.

    Raises VerificationFailed where a zero or what was promised is gone.
    """
    if before.shape != after.shape:
        raise VerificationFailed(f"{stored!r} has shape {after.shape}, made from {name!r} of {before.shape}")
    if lost := int(np.count_nonzero((before == 0) & (after != 0))):
        raise VerificationFailed(f"{lost} zeros of {name!r} are other numbers in {stored!r}")
    zeros = after.size - int(np.count_nonzero(after))
    for pattern in promised:
        _require(name, pattern, after, zeros)
    held = dict.fromkeys([*(p.pattern for p in promised), *_found(before, after)])
    return Layer(
        weight=name,
        stored=stored,
        dtype=dtype,
        patterns=tuple(held),
        zeros_before=before.size - int(np.count_nonzero(before)),
        zeros=zeros,
        size=after.size,
    )


def _require(name: str, pattern: Pattern, after: npt.NDArray[np.float32], zeros: int) -> None:
    nm = as_nm(pattern.pattern)
    if nm is not None and not (nm.fits(after.shape[-1]) and nm.holds(after, -1)):
        raise VerificationFailed(f"{name!r} was pruned to {nm} and does not have it as integers")
    if after.size == pattern.size and zeros < pattern.zeros:
        raise VerificationFailed(f"{name!r} was pruned to {pattern.zeros} zeros and has {zeros} as integers")


def _found(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> Iterator[str]:
    if _TWO_OF_FOUR.fits(after.shape[-1]) and _TWO_OF_FOUR.holds(before, -1):
        yield str(_TWO_OF_FOUR)

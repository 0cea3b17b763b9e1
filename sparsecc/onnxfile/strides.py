"""Index tensors that run through memory in equal steps: what ``as_strided`` becomes in ONNX.

The exporter of PyTorch writes it as a Gather from a flattened tensor, at sums of ranges times strides. Where
these go through the memory once and in order, the Gather is a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from sparsecc.onnxfile.shapes import Shapes

#: nodes between an index tensor and the ranges that it is made of, at most
_DEPTH = 64


@dataclass(frozen=True)
class Steps:
    """``index[i0, i1, ...] = start + i0 * strides[0] + i1 * strides[1] + ...``, each below its size.

    ``varies`` marks axes that are as long as something that is computed while the model runs.
    """

    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    varies: tuple[bool, ...]

    @property
    def contiguous(self) -> bool:
        """Whether it is 0, 1, 2, ... in the order of memory."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.start == 0

    @property
    def count(self) -> int:
        """How many positions there are."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Tracer:
    """Finds the steps of index tensors; ``made`` maps values to the nodes that compute them.

    ``stored`` reads an initializer or constant, None for other names.
    """

    shapes: Shapes
    made: Mapping[str, NodeProto]
    stored: Callable[[str], npt.NDArray[np.int64] | None]
    _found: dict[str, Steps | None] = field(default_factory=dict)

    def steps(self, name: str, depth: int = 0) -> Steps | None:
        """The steps of a tensor of integers; None where it has none, or where they are not known."""
        if name not in self._found:
            self._found[name] = self._traced(name, depth)
        return self._found[name]

    def _traced(self, name: str, depth: int) -> Steps | None:
        known = self.numbers(name)
        if known is not None:
            return _fitted(known)
        node = self.made.get(name)
        rule = None if node is None else _RULES.get(node.op_type)
        shape = self.shapes.get(name).shape
        if node is None or rule is None or shape is None or depth > _DEPTH:
            return None
        found = rule(self, node, tuple(shape), depth + 1)
        return found if found is not None and found.sizes == tuple(shape) else None

    def numbers(self, name: str) -> npt.NDArray[np.int64] | None:
        """The numbers of a tensor that is stored, or computed from stored ones: the same for any inputs."""
        found = self.stored(name)
        if found is None and not self.shapes.dims:  # every size is fixed
            found = self.shapes.get(name).known
        if found is None and (node := self.made.get(name)) is not None and node.op_type in _COPIES:
            found = self.numbers(node.input[0])
            shape = self.shapes.get(name).shape
            found = found.reshape(shape) if found is not None and shape is not None else None
        return None if found is None or found.dtype.kind not in "iu" else found.astype(np.int64)


def _fitted(numbers: npt.NDArray[np.int64]) -> Steps | None:
    if not numbers.size:
        return None
    start = int(numbers.flat[0])
    strides = []
    for dim, size in enumerate(numbers.shape):
        second = tuple(int(d == dim) for d in range(numbers.ndim))
        strides.append(int(numbers[second]) - start if size > 1 else 0)
    grid = np.full(numbers.shape, start, np.int64)
    for dim, (size, stride) in enumerate(zip(numbers.shape, strides, strict=True)):
        grid += (np.arange(size) * stride).reshape([-1 if d == dim else 1 for d in range(numbers.ndim)])
    fixed = (False,) * numbers.ndim
    return Steps(start, numbers.shape, tuple(strides), fixed) if np.array_equal(grid, numbers) else None


def _range(t: Tracer, node: NodeProto, shape: tuple[int, ...], depth: int) -> Steps | None:
    start, delta = t.numbers(node.input[0]), t.numbers(node.input[2])
    varies = t.numbers(node.input[1]) is None
    if start is None or delta is None or (varies and shape[0] == 1):  # its stride would not show
        return None
    return Steps(int(start.flat[0]), shape, (int(delta.flat[0]),), (varies,))


def _mul(t: Tracer, node: NodeProto, shape: tuple[int, ...], depth: int) -> Steps | None:
    for value, factor in (node.input, reversed(node.input)):
        number = t.numbers(factor)
        if number is not None and number.size == 1 and number.ndim <= len(shape):
            found, by = t.steps(value, depth), int(number.flat[0])
            return (
                None
                if found is None
                else replace(found, start=found.start * by, strides=tuple(n * by for n in found.strides))
            )
    return None


def _add(t: Tracer, node: NodeProto, shape: tuple[int, ...], depth: int) -> Steps | None:
    parts = [t.steps(name, depth) for name in node.input]
    start, strides, varies = 0, [0] * len(shape), [False] * len(shape)
    for part in parts:
        if part is None:
            return None
        start += part.start
        for place, (size, stride) in enumerate(
            zip(reversed(part.sizes), reversed(part.strides), strict=True)
        ):
            if size > 1:
                strides[-1 - place] += stride
                varies[-1 - place] |= part.varies[-1 - place]
    return Steps(start, shape, tuple(strides), tuple(varies))


def _moved(t: Tracer, node: NodeProto, shape: tuple[int, ...], depth: int) -> Steps | None:
    """Axes of size 1 come and go; the others stay in their order."""
    found = t.steps(node.input[0], depth)
    if found is None:
        return None
    real = [p for p in zip(found.sizes, found.strides, found.varies, strict=True) if p[0] != 1]
    if [n for n, *_ in real] != [n for n in shape if n != 1]:
        return None
    rest = iter(real)
    axes = [(1, 0, False) if n == 1 else next(rest) for n in shape]
    return Steps(found.start, shape, tuple(s for _, s, _ in axes), tuple(v for *_, v in axes))


def _same(t: Tracer, node: NodeProto, shape: tuple[int, ...], depth: int) -> Steps | None:
    return t.steps(node.input[0], depth)


def _cast(t: Tracer, node: NodeProto, shape: tuple[int, ...], depth: int) -> Steps | None:
    """Smaller integers wrap around."""
    wide = (TensorProto.INT32, TensorProto.INT64)
    return (
        t.steps(node.input[0], depth) if any(a.name == "to" and a.i in wide for a in node.attribute) else None
    )


#: what gives the numbers of a stored tensor another form
_COPIES = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape"})

_RULES: dict[str, Callable[[Tracer, NodeProto, tuple[int, ...], int], Steps | None]] = {
    "Range": _range,
    "Mul": _mul,
    "Add": _add,
    "Unsqueeze": _moved,
    "Squeeze": _moved,
    "Reshape": _moved,
    "Cast": _cast,
    "Identity": _same,
}

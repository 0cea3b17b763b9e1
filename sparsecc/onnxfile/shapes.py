"""Shapes of every value of an ONNX graph, by executing it on tensors without data.

The operators of the reference run on meta tensors; integers that follow from sizes and constants
are computed along (``known``), with a note of where each one was moved from (``origin``).  Dynamic
dimensions get representative sizes, found by trial: an assignment under which every node fits, and
a second one that shows which sizes depend on the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.abstract import Execution
from sparsecc.onnxfile.cells import Cell, Origin, Tags
from sparsecc.onnxfile.dims import DimKey, Problem, dim_key
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.tensors import LACKING

__all__ = ["DimKey", "Info", "Origin", "Shapes", "dim_key", "dims_of", "infer"]


@dataclass(slots=True)
class Info:
    """What is known of one value.

    ``shape`` is None where it could not be determined, ``why`` then says why.  ``known`` holds the
    values of small integer (and tiny float) tensors that follow from sizes and constants,
    ``varies`` which of them change with the dynamic dimensions.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None = None
    known: npt.NDArray[Any] | None = None
    dynamic: tuple[bool, ...] = ()
    varies: npt.NDArray[np.bool_] | None = None
    why: str = ""
    _tags: npt.NDArray[np.int64] | None = None
    _table: Tags | None = None

    @property
    def settled(self) -> bool:
        """Whether the values are known, and the same whatever the sizes of the inputs are."""
        varies = any(self.dynamic) or (self.varies is not None and bool(self.varies.any()))
        return self.known is not None and not varies

    @property
    def origin(self) -> npt.NDArray[Any] | None:
        """For known integers an array of ``Origin`` or None, element by element."""
        if self.known is None or self._tags is None or self._table is None:
            return None
        table = self._table
        found = np.empty(self.known.size, dtype=object)
        for place, tag in enumerate(self._tags.reshape(-1).tolist()):
            found[place] = table.origin(tag)
        return found.reshape(self.known.shape)


@dataclass(slots=True)
class Shapes:
    """The result of ``infer``: one ``Info`` per value of the main graph, and the sizes used.

    ``dims`` holds the representative size of every dynamic dimension, ``other`` those of the second
    assignment (None when only one was found).  ``failed`` names nodes that no assignment fitted, and
    ``misfits`` holds their outputs, which may have declared shapes all the same.
    """

    values: dict[str, Info]
    dims: dict[DimKey, int]
    other: dict[DimKey, int] | None
    failed: list[str] = field(default_factory=list)
    misfits: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Info:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def get(self, name: str) -> Info:
        """What is known of a value; an empty ``Info`` for names that the graph lacks."""
        return self.values.get(name, _NOTHING)

    @property
    def dynamic(self) -> dict[str, tuple[bool, ...]]:
        """Per value, which of its dimensions depend on the sizes of the inputs."""
        return {name: info.dynamic for name, info in self.values.items()}


_NOTHING = Info(None, why="no such value")


def dims_of(model: OnnxFile, sizes: Mapping[str, Sequence[int]]) -> dict[DimKey, int]:
    """Dynamic dimensions of inputs that have the given sizes; raises InvalidOption where two sizes differ."""
    dims: dict[DimKey, int] = {}
    for info in model.inputs:
        given = sizes.get(info.name)
        if given is None:
            continue
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.dim_value > 0:
                continue
            size, key = given[axis], dim_key(info.name, axis, dim.dim_param)
            if dims.setdefault(key, size) != size:
                raise InvalidOption(
                    f"the example inputs have sizes {dims[key]} and {size} for {key!r}; give one size"
                )
    return dims


def infer(model: OnnxFile, dims: Mapping[DimKey, int] | None = None) -> Shapes:
    """Shapes, known integers and dynamic dimensions of every value of the (inlined) main graph.

    ``dims`` gives sizes for dynamic dimensions, by symbolic name or ``(input, axis)``; the others are
    searched for.  Nodes that cannot be executed abstractly leave their outputs unknown.
    Raises ``InvalidOption`` for dimensions that the model does not have.
    """
    model = model.inlined()
    problem = Problem(model, dict(dims or {}))
    first, assignment = problem.first()
    counted = problem.counted(assignment)
    if counted is not None:
        return _result(model, counted[0], counted[1], assignment, counted[2])
    second, other = problem.second(assignment)
    return _result(model, first, second, assignment, other)


def _result(
    model: OnnxFile,
    first: Execution,
    second: Execution | None,
    assignment: dict[DimKey, int],
    other: dict[DimKey, int] | None,
) -> Shapes:
    values: dict[str, Info] = {}
    for name in (*model.initializers, *first.cells):
        if name and name not in values:
            cell = first.cells.get(name) or first.weight(name)
            twin = second.cells.get(name) if second is not None else None
            values[name] = _info(cell, twin, first.tags)
    if second is None and assignment:
        _mark_declared(model, values, assignment)
    failed = [*first.failed]
    return Shapes(values, assignment, other, failed, frozenset(first.misfits))


def _info(cell: Cell, twin: Cell | None, table: Tags) -> Info:
    if not isinstance(cell.value, torch.Tensor):
        return Info(None, why=cell.why or "a sequence")
    shape = tuple(cell.value.shape)
    dynamic = (False,) * len(shape)
    if twin is not None and isinstance(twin.value, torch.Tensor) and twin.value.ndim == len(shape):
        dynamic = tuple(a != b for a, b in zip(shape, twin.value.shape, strict=True))
    elif twin is not None:
        dynamic = (True,) * len(shape)
    known = varies = tags = None
    if cell.known is not None:
        known = (cell.known.float() if cell.known.dtype in LACKING else cell.known).numpy()
        if twin is not None and twin.known is not None and twin.known.shape == cell.known.shape:
            varies = (cell.known != twin.known).numpy()
        elif twin is not None:
            varies = np.ones(known.shape, dtype=np.bool_)
        tags = None if cell.tags is None else cell.tags.numpy()
    return Info(shape, cell.value.dtype, known, dynamic, varies, "", tags, table)


def _mark_declared(model: OnnxFile, values: dict[str, Info], sizes: Mapping[DimKey, int]) -> None:
    """Dynamic dimensions by declaration alone, where no second assignment was found."""
    graph = model.proto.graph
    for info in (*graph.input, *graph.value_info, *graph.output):
        found = values.get(info.name)
        dims = info.type.tensor_type.shape.dim
        if found is None or found.shape is None or len(dims) != len(found.shape):
            continue
        found.dynamic = tuple(
            dim.dim_value <= 0 and dim_key(info.name, axis, dim.dim_param) in sizes
            for axis, dim in enumerate(dims)
        )

"""Representative sizes of dynamic dimensions: an assignment under which every node fits, and a second one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from onnx import TensorProto, ValueInfoProto

from sparsecc.errors import InvalidOption, summary
from sparsecc.onnxfile.abstract import COUNTING, Execution, Misfit
from sparsecc.onnxfile.cells import MAX_KNOWN, MAX_KNOWN_FLOATS, Cell
from sparsecc.onnxfile.model import TORCH_DTYPES, OnnxFile, to_torch
from sparsecc.reference.onnx_ops.registry import DataDependent, Value
from sparsecc.reference.onnx_run import build_program

DimKey: TypeAlias = "str | tuple[str, int]"
"""A dynamic dimension: its symbolic name, or input and axis where it has none of its own."""

_STEP_BUDGET = 400_000
_ANONYMOUS = frozenset({"", "?", "-1", "None", "unk", "unknown", "*"})
_FALLBACK_SIZES = (
    1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 512, 576, 640, 768, 1024, 1536,
    16000,
)  # fmt: skip
COUNTS = (37, 41)
_BATCHES = (3, 5, 2, 7)
_LENGTHS = (5, 7, 11, 13, 17, 19, 23, 29)
_SPATIAL = (96, 160, 224, 352, 416, 544)

_Trial: TypeAlias = "tuple[dict[DimKey, int], tuple[int, ...], Execution | Misfit]"
"""Sizes that were tried, how far the run came with them, and its outcome."""


@dataclass(slots=True)
class _Symbol:
    """A dynamic dimension: where it occurs, and sizes worth trying, best first."""

    key: DimKey
    places: list[tuple[str, int]]
    pool: tuple[int, ...]


class Problem:
    """A model and the search for sizes of its dynamic dimensions."""

    def __init__(self, model: OnnxFile, given: dict[DimKey, int]) -> None:
        self.model = model
        self.program = build_program(model, model.proto.graph, model.order)
        self.inputs = {value.name: value for value in model.inputs}
        self._declared = {v.name: v for v in (*model.proto.graph.output, *model.proto.graph.value_info)}
        self._constants: dict[int, tuple[Value, torch.Tensor | None]] = {}
        self.symbols = _symbols(self.inputs)
        self.given = self._checked(given)
        self._budget = _STEP_BUDGET
        self._sizes: Mapping[DimKey, int] = {}
        self.count: int | None = None

    def _checked(self, given: dict[DimKey, int]) -> dict[DimKey, int]:
        by_place = {place: symbol.key for symbol in self.symbols.values() for place in symbol.places}
        found: dict[DimKey, int] = {}
        for key, size in given.items():
            name = key if key in self.symbols else by_place.get(key) if isinstance(key, tuple) else None
            if name is None:
                known = ", ".join(map(str, self.symbols)) or "none"
                raise InvalidOption(f"the model has no dynamic dimension {key!r}; it has: {known}")
            if size < 1:
                raise InvalidOption(f"dynamic dimension {key!r}: size {size} is not positive")
            found[name] = int(size)
        return found

    def spend(self) -> None:
        self._budget -= 1
        if self._budget < -_STEP_BUDGET:
            raise DataDependent("abstract execution takes too many steps")

    @property
    def exhausted(self) -> bool:
        return self._budget <= 0

    def constant(self, tensor: TensorProto) -> tuple[Value, torch.Tensor | None]:
        """A weight without data, and its values when it is small."""
        cached = self._constants.get(id(tensor))
        if cached is not None:
            return cached
        dtype = TORCH_DTYPES.get(tensor.data_type, torch.int8)
        count = math.prod(tensor.dims)
        known = None
        limit = MAX_KNOWN_FLOATS if dtype.is_floating_point else MAX_KNOWN
        if count <= limit and tensor.data_type != TensorProto.STRING:
            found = to_torch(self.model.read(tensor))
            known = found.clone() if found is not None else None
        value = torch.empty(tuple(tensor.dims), dtype=dtype, device="meta")
        return self._constants.setdefault(id(tensor), (value, known))

    def declared_cell(self, name: str) -> Cell | None:
        """A value as the model declares it, when that is complete under the current sizes."""
        info = self._declared.get(name)
        if info is None or not info.type.HasField("tensor_type"):
            return None
        declared = info.type.tensor_type
        dtype = TORCH_DTYPES.get(declared.elem_type)
        if not declared.HasField("shape") or dtype is None:
            return None
        sizes = []
        for dim in declared.shape.dim:
            size = dim.dim_value if dim.dim_value > 0 else self._sizes.get(dim.dim_param or "?", 0)
            if size < 1:
                return None
            sizes.append(size)
        return Cell(torch.empty(sizes, dtype=dtype, device="meta"))

    # ------------------------------------------------------------------ runs

    def execute(self, sizes: Mapping[DimKey, int], *, tolerant: bool = False) -> Execution:
        """One abstract run; raises ``Misfit`` at the first node that does not fit."""
        self._sizes = sizes
        execution = Execution(self, tolerant)
        execution.run({name: self._input(info, sizes) for name, info in self.inputs.items()})
        return execution

    def _input(self, info: ValueInfoProto, sizes: Mapping[DimKey, int]) -> Cell:
        declared = info.type.tensor_type
        if not info.type.HasField("tensor_type") or not declared.HasField("shape"):
            return Cell(None, why=f"input {info.name!r} declares no shape")
        shape = []
        for axis, dim in enumerate(declared.shape.dim):
            key = dim_key(info.name, axis, dim.dim_param)
            shape.append(dim.dim_value if dim.dim_value > 0 else sizes[key])
        dtype = TORCH_DTYPES.get(declared.elem_type)
        if dtype is None:
            return Cell(None, why=f"input {info.name!r} has a type that torch lacks")
        try:
            return Cell(torch.empty(shape, dtype=dtype, device="meta"))
        except (RuntimeError, TypeError) as error:  # sizes that overflow
            return Cell(None, why=f"input {info.name!r} has an impossible shape: {summary(error)}")

    def _progress(self, sizes: Mapping[DimKey, int]) -> tuple[tuple[int, ...], Execution | Misfit]:
        """How many nodes fit, and the finished run or the misfit."""
        try:
            return (len(self.program.steps),), self.execute(sizes)
        except Misfit as misfit:
            return misfit.position, misfit

    # ------------------------------------------------------------------ first assignment

    def first(self) -> tuple[Execution, dict[DimKey, int]]:
        """A run with sizes that fit, found by hill climbing over the node that fails first."""
        sizes = _starting_sizes(self.symbols, self.given)
        best, outcome = self._progress(sizes)
        while isinstance(outcome, Misfit) and not self.exhausted:
            found = self._better(sizes, best, outcome)
            if found is None:
                break
            sizes, best, outcome = found
        if isinstance(outcome, Execution):
            return outcome, sizes
        return self.execute(sizes, tolerant=True), sizes

    def _better(self, sizes: dict[DimKey, int], best: tuple[int, ...], misfit: Misfit) -> _Trial | None:
        """The change of one or two dimensions that lets the most further nodes fit."""
        chosen: _Trial | None = None
        for trial in self._trials(sizes, misfit):
            if self.exhausted:
                break
            reached, outcome = self._progress(trial)
            if reached > max(best, chosen[1] if chosen else ()):
                chosen = trial, reached, outcome
                if isinstance(outcome, Execution):
                    break
        return chosen

    def _trials(self, sizes: dict[DimKey, int], misfit: Misfit) -> Iterable[dict[DimKey, int]]:
        """Assignments that differ in what the failing node hints at, likely ones first."""
        free = [key for key in self.symbols if key not in self.given]
        hinted = sorted({size for shape in misfit.shapes for size in shape if size > 0})
        for key in free:
            for another in self.symbols:
                if another != key and sizes[another] != sizes[key]:
                    yield {**sizes, key: sizes[another]}
        for key in free:
            for size in hinted:
                if size != sizes[key]:
                    yield {**sizes, key: size}
        for key in free:
            for size in (*_FALLBACK_SIZES, *self.symbols[key].pool):
                if size != sizes[key] and size not in hinted:
                    yield {**sizes, key: size}
        for scale in (64, 48, 16, 1):
            spatial = [key for key in free if self.symbols[key].pool[0] >= 32]
            yield {**sizes, **{key: scale * p for key, p in zip(spatial, (3, 5, 7, 11, 13), strict=False)}}

    # ------------------------------------------------------------------ second assignment

    def second(self, sizes: dict[DimKey, int]) -> tuple[Execution | None, dict[DimKey, int] | None]:
        """A run with as many other sizes as fit; dimensions of equal size vary together."""
        if not sizes:
            return None, None
        classes = self._classes(sizes)
        options: dict[DimKey, list[int]] = {}
        everything = dict(sizes)
        taken = set(sizes.values())
        for key, members in classes.items():
            options[key] = _other_sizes(self.symbols[key], sizes[key], taken)
            taken.add(options[key][0])
            everything.update(dict.fromkeys(members, options[key][0]))
        _, outcome = self._progress(everything)
        if isinstance(outcome, Execution):
            return outcome, everything
        current = dict(sizes)
        last: Execution | None = None
        for key, members in classes.items():
            for size in options[key]:
                trial = {**current, **dict.fromkeys(members, size)}
                _, outcome = self._progress(trial)
                if isinstance(outcome, Execution):
                    current, last = trial, outcome
                    break
        return (last, current) if last is not None else (None, None)

    def counted(
        self, sizes: dict[DimKey, int]
    ) -> tuple[Execution, Execution, dict[DimKey, int] | None] | None:
        """Both runs with sizes in place of what depends on data; None where nothing does, or they do not fit.

        Only two runs that differ tell which sizes these are.
        """
        if not any(node.op_type in COUNTING for node in self.model.proto.graph.node):
            return None
        self.count = COUNTS[0]
        _, one = self._progress(sizes)
        self.count = COUNTS[1]
        two, other = self.second(sizes) if sizes else (self._progress(sizes)[1], None)
        self.count = None
        if isinstance(one, Execution) and isinstance(two, Execution):
            return one, two, other
        return None

    def _classes(self, sizes: Mapping[DimKey, int]) -> dict[DimKey, list[DimKey]]:
        """Dimensions by size: those that were given the same one vary together."""
        classes: dict[int, list[DimKey]] = {}
        for key in self.symbols:
            classes.setdefault(sizes[key], []).append(key)
        return {members[0]: members for members in classes.values()}


def dim_key(name: str, axis: int, param: str) -> DimKey:
    """How a dynamic dimension of an input is called: by its symbol, else by place."""
    return (name, axis) if param in _ANONYMOUS else param


def _symbols(inputs: Mapping[str, ValueInfoProto]) -> dict[DimKey, _Symbol]:
    symbols: dict[DimKey, _Symbol] = {}
    for name, info in inputs.items():
        declared = info.type.tensor_type
        if not info.type.HasField("tensor_type"):
            continue
        floats = TORCH_DTYPES.get(declared.elem_type, torch.int64).is_floating_point
        rank = len(declared.shape.dim)
        for axis, dim in enumerate(declared.shape.dim):
            if dim.dim_value > 0:
                continue
            key = dim_key(name, axis, dim.dim_param)
            pool: tuple[int, ...] = _LENGTHS
            if axis == 0:
                pool = _BATCHES
            elif floats and rank >= 4 and axis >= 2:
                pool = _SPATIAL
            symbol = symbols.setdefault(key, _Symbol(key, [], pool))
            symbol.places.append((name, axis))
    return symbols


def _starting_sizes(symbols: Mapping[DimKey, _Symbol], given: Mapping[DimKey, int]) -> dict[DimKey, int]:
    """Distinct sizes; axes without a name of their own that lead their inputs share the batch size."""
    sizes: dict[DimKey, int] = {}
    taken = set(given.values())
    batch: int | None = None
    for key, symbol in symbols.items():
        if key in given:
            sizes[key] = given[key]
        elif isinstance(key, tuple) and key[1] == 0 and batch is not None:
            sizes[key] = batch
        else:
            sizes[key] = next((size for size in symbol.pool if size not in taken), symbol.pool[0])
            taken.add(sizes[key])
        if isinstance(key, tuple) and key[1] == 0 and batch is None:
            batch = sizes[key]
    return sizes


def _other_sizes(symbol: _Symbol, size: int, taken: Iterable[int]) -> list[int]:
    """Sizes to try in place of ``size``, none of them in use."""
    used = set(taken)
    multiples = [size * factor for factor in (2, 3, 4)] if size >= 8 else [size + 2, size * 2, size + 1]
    wanted = [*(s for s in symbol.pool if s > size), *multiples, size + 8, size + 16, size + 32, size // 2, 1]
    fresh = [s for s in dict.fromkeys(wanted) if s > 0 and s not in used]
    return fresh or [size + 1]

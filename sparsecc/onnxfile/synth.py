"""Inputs for a model that comes without any: drawn from types, and from what integers index.

Floats are standard normal.  An integer input that indexes an axis of n positions is uniform in
[0, n), one that says how many of them count in [1, n]; one that is compared or turned into a float is
a mask of mostly ones; a scalar that selects a branch takes a value that the model compares it with.
What was chosen is written down.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from onnx import NodeProto, ValueInfoProto

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import TORCH_DTYPES, OnnxFile, graphs, type_name
from sparsecc.onnxfile.shapes import DimKey, Shapes, dim_key, infer
from sparsecc.onnxfile.site import attribute
from sparsecc.reference.onnx_run import check_input

_PASSES = frozenset(
    {
        "Cast", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Identity", "Transpose", "Expand", "Tile",
        "Slice", "Split", "Concat", "Clip", "Min", "Max", "Dropout",
    }
)  # fmt: skip
#: (operator, input) -> the input with the axis that its integers index, and that axis (None: the attribute's)
_INDEXED: dict[tuple[str, int], tuple[int, int | None]] = {
    **{(name, 1): (0, None) for name in ("Gather", "GatherElements", "ScatterElements")},
    ("EmbedLayerNormalization", 0): (2, 0), ("EmbedLayerNormalization", 1): (4, 0),
    ("EmbedLayerNormalization", 8): (3, 0), ("RoiAlign", 2): (0, 0),
    ("RotaryEmbedding", 1): (2, 0), ("RotaryEmbedding", 3): (1, 0),
}  # fmt: skip
#: (operator, input) -> the input with the axis of which its integers say how much counts, that axis, and the
#: attribute that may name another one
_COUNTED: dict[tuple[str, int], tuple[int, int, str]] = {
    **{(name, 4): (0, 0, "layout") for name in ("LSTM", "GRU", "RNN")},
    ("ReverseSequence", 1): (0, 0, "time_axis"), ("Attention", 6): (1, -2, ""),
    ("Attention", 3): (0, 1, ""), ("MultiHeadAttention", 4): (1, 1, ""),
}  # fmt: skip
_MASKING = frozenset({("EmbedLayerNormalization", 7), ("Attention", 3), ("MultiHeadAttention", 4)})
_COMPARED = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_SHARE_OF_ONES = 0.9
MAX_ELEMENTS = 1 << 28
"""Elements of one input; larger ones have to be given."""


class Synthesised(NamedTuple):
    """Inputs by name, and one line on each of them."""

    inputs: dict[str, torch.Tensor]
    notes: list[str]


@dataclass(slots=True)
class _Uses:
    """What becomes of an integer input on its way through the graph."""

    low: int = 0
    high: int | None = None
    indexes: str = ""
    compared: list[int] = field(default_factory=list)
    mask: bool = False

    def limit(self, count: int, offset: int, where: str) -> None:
        """The value plus ``offset`` indexes ``count`` positions."""
        self.low = max(self.low, -offset)
        if self.high is None or count - offset < self.high:
            self.high, self.indexes = count - offset, where

    def number(self, count: int, offset: int, where: str) -> None:
        """The value plus ``offset`` is a number of positions: at least one, at most ``count``."""
        self.limit(count + 1, offset, where)
        self.low = max(self.low, 1 - offset)


def synthesise(
    model: OnnxFile,
    shapes: Shapes | Mapping[DimKey, int] | None = None,
    seed: int = 0,
    overrides: Mapping[str, torch.Tensor] | None = None,
) -> Synthesised:
    """Inputs for one run of ``model``, the same for the same seed.

    ``shapes`` gives the sizes of the dynamic dimensions, by assignment or as the result of
    ``infer``; without it they are inferred.  ``overrides`` are taken as they are.
    Raises ``InvalidOption`` for overrides that do not fit, and for inputs that have to be overridden.
    """
    model = model.inlined()
    given = dict(overrides or {})
    names = [value.name for value in model.inputs]
    unknown = sorted(set(given) - {value.name for value in model.proto.graph.input})
    if unknown:
        raise InvalidOption(f"no input is named {', '.join(unknown)}; the model takes {', '.join(names)}")
    found = shapes if isinstance(shapes, Shapes) else infer(model, shapes)
    sizes = found.dims if shapes is None or isinstance(shapes, Shapes) else {**found.dims, **shapes}
    readers = _readers(model)
    inputs: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    for info in model.inputs:
        if info.name in given:
            check_input(info, given[info.name])
            inputs[info.name] = given[info.name]
            notes.append(f"{info.name}: given, {_shown(given[info.name])}")
            continue
        tensor, how = _draw(model, info, sizes, found, readers, _generator(seed, info.name))
        inputs[info.name] = tensor
        notes.append(f"{info.name}: {_shown(tensor)}, {how}")
    return Synthesised(inputs, notes)


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream per input, so that overriding one does not change the others."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"


def _draw(
    model: OnnxFile,
    info: ValueInfoProto,
    sizes: Mapping[DimKey, int],
    shapes: Shapes,
    readers: Mapping[str, list[tuple[NodeProto, int]]],
    generator: torch.Generator,
) -> tuple[torch.Tensor, str]:
    declared = info.type.tensor_type
    dtype = TORCH_DTYPES.get(declared.elem_type)
    if not info.type.HasField("tensor_type") or dtype is None or not declared.HasField("shape"):
        kind = type_name(declared.elem_type) if info.type.HasField("tensor_type") else "no tensor"
        raise InvalidOption(f"input {info.name!r} ({kind}) cannot be made up; give it as an example input")
    shape = [
        dim.dim_value if dim.dim_value > 0 else sizes[dim_key(info.name, axis, dim.dim_param)]
        for axis, dim in enumerate(declared.shape.dim)
    ]
    if math.prod(shape) > MAX_ELEMENTS:
        raise InvalidOption(
            f"input {info.name!r} of shape {shape} is too large to make up; give an example input"
        )
    if dtype.is_complex or dtype.is_floating_point:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype), "standard normal"
    if dtype == torch.bool:
        draws = torch.rand(shape, generator=generator) < _SHARE_OF_ONES
        return draws, f"true with probability {_SHARE_OF_ONES}"
    uses = _Uses()
    _follow(model, info.name, shapes, readers, uses)
    return _integers(info.name, shape, dtype, uses, generator)


def _integers(
    name: str, shape: list[int], dtype: torch.dtype, uses: _Uses, generator: torch.Generator
) -> tuple[torch.Tensor, str]:
    if uses.high is not None:
        low, high = max(uses.low, 0), max(uses.high, max(uses.low, 0) + 1)
        draws = torch.randint(low, high, shape, generator=generator)
        return draws.to(dtype), f"uniform in [{low}, {high}), {uses.indexes}"
    if uses.compared and not shape:
        value = max(uses.compared)
        return torch.tensor(value, dtype=dtype), f"{value}, which the model compares it with"
    if len(set(uses.compared)) > 2:
        low, high = min(uses.compared), max(uses.compared)
        draws = torch.randint(low, high + 1, shape, generator=generator)
        return draws.to(dtype), f"uniform in [{low}, {high}], which the model compares it with"
    if not shape:
        value = 16000 if "sr" in name.lower().split("_") or "rate" in name.lower() else 1
        return torch.tensor(value, dtype=dtype), f"{value}"
    if uses.mask or uses.compared:
        draws = (torch.rand(shape, generator=generator) < _SHARE_OF_ONES).to(dtype)
        draws[..., :1] = 1  # a row of zeros would mask everything
        return draws, f"a mask, 1 with probability {_SHARE_OF_ONES}"
    return torch.randint(0, 2, shape, generator=generator).to(dtype), "uniform in [0, 2), use unknown"


# ---------------------------------------------------------------------- what integers are used for


def _readers(model: OnnxFile) -> dict[str, list[tuple[NodeProto, int]]]:
    """Which nodes read a value, in the graph and its subgraphs, and at which input."""
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for graph in graphs(model.proto):
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name:
                    readers.setdefault(name, []).append((node, place))
    return readers


def _follow(
    model: OnnxFile,
    name: str,
    shapes: Shapes,
    readers: Mapping[str, list[tuple[NodeProto, int]]],
    uses: _Uses,
) -> None:
    """Collect the uses of a value, also after it was moved, cast or shifted by a constant."""
    pending, seen = [(name, 0)], {name}
    while pending:
        value, offset = pending.pop()
        for node, place in readers.get(value, ()):
            for following in _use(model, node, place, offset, shapes, uses):
                if following[0] not in seen:
                    seen.add(following[0])
                    pending.append(following)


def _use(
    model: OnnxFile, node: NodeProto, place: int, offset: int, shapes: Shapes, uses: _Uses
) -> Iterator[tuple[str, int]]:
    """Note one use; yields the values that carry the numbers on, with their offset."""
    kind = node.op_type
    given = shapes.get(node.input[place]).shape
    if (kind, place) in _INDEXED:
        source, at = _INDEXED[kind, place]
        shape = shapes.get(node.input[source]).shape
        axis = attribute(node, "axis", 0) if at is None else at
        if shape:
            uses.limit(shape[axis], offset, f"indexes {node.input[source]!r}")
    elif (kind, place) in _MASKING and given is not None and len(given) > 1:
        uses.mask = True
    elif (kind, place) in _COUNTED:
        source, axis, said = _COUNTED[kind, place]
        shape = shapes.get(node.input[source]).shape
        if shape:
            uses.number(shape[attribute(node, said, axis)], offset, f"counts along {node.input[source]!r}")
    elif kind == "GatherND" and place == 1:
        shape = shapes.get(node.input[0]).shape
        if shape:
            uses.limit(min(shape), offset, f"indexes {node.input[0]!r}")
    elif kind == "OneHot" and place == 0:
        depth = shapes.get(node.input[1]).known
        if depth is not None:
            uses.limit(int(depth.reshape(-1)[0]), offset, "one-hot encoded")
    elif kind in _COMPARED:
        uses.compared += [number - offset for number in _numbers(model, shapes, node.input[1 - place])]
        uses.mask = True
    elif kind in ("Add", "Sub"):
        numbers = _numbers(model, shapes, node.input[1 - place])
        if kind == "Sub" and place == 1:
            uses.mask = True
        elif numbers:
            shift = max(numbers)
            yield node.output[0], offset + shift if kind == "Add" else offset - min(numbers)
    elif kind in ("Where", "Not", "And", "Mul", "ReduceSum", "CumSum"):
        uses.mask = True
    elif (kind in _PASSES and place == 0) or kind == "Concat":
        if kind == "Cast":
            wanted = next((a.i for a in node.attribute if a.name == "to"), 0)
            dtype = TORCH_DTYPES.get(wanted, torch.int64)
            uses.mask = uses.mask or dtype == torch.bool or dtype.is_floating_point
        yield from ((output, offset) for output in node.output if output)
    elif kind == "Gather":
        yield node.output[0], offset


def _numbers(model: OnnxFile, shapes: Shapes, name: str) -> list[int]:
    """The integers behind a constant; empty where they are not known."""
    known = shapes.get(name).known
    if known is None and (name in model.initializers or name in model.constants):
        known = model.array(name)
    if known is None:
        known = _inner_constant(model, name)
    if known is None or known.dtype.kind not in "iuf" or known.size > 1 << 16:
        return []
    return sorted({int(number) for number in np.asarray(known).reshape(-1).tolist()})


def _inner_constant(model: OnnxFile, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """A constant that is defined within a subgraph."""
    for graph in graphs(model.proto):
        for tensor in graph.initializer:
            if tensor.name == name:
                return model.read(tensor)
        for node in graph.node:
            if node.op_type == "Constant" and name in node.output:
                values = [a.t for a in node.attribute if a.name == "value"]
                return model.read(values[0]) if values else None
    return None

"""The operator table of the ONNX reference, and what an operator sees of its node.

An operator is a function ``(ctx, *inputs) -> value | tuple of values``, registered by name and the
first opset that it holds for.  Values are torch tensors (also on the meta device), numpy arrays
for element types that torch lacks (4-bit, 2-bit, strings), lists for sequences, None if absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from sparsecc.errors import UnsupportedModel
from sparsecc.onnxfile.model import TORCH_DTYPES, to_torch, type_name

Value: TypeAlias = "torch.Tensor | npt.NDArray[Any] | list[Any] | None"
OpFunction: TypeAlias = "Callable[..., Any]"
Kind = Literal["compute", "moves", "raw"]
"""compute: half precision is computed in float32 and rounded, as runtimes do.  moves: elements are
only moved, so that tags can be moved in their place.  raw: gets its inputs as they are."""

PROMOTED = (torch.float16, torch.bfloat16, torch.float32)
"""Types that become the runner's ``dtype`` when it has one."""


class DataDependent(Exception):
    """Abstract execution needs a value that is not known before the model runs."""


@dataclass(frozen=True, slots=True)
class Op:
    """An entry of the table: ``function`` holds from opset ``since`` on."""

    name: str
    since: int
    kind: Kind
    function: OpFunction


_TABLE: dict[str, list[Op]] = {}


def op(*names: str, since: int = 1, kind: Kind = "compute") -> Callable[[OpFunction], OpFunction]:
    """Register a function for operators of the default domain, or ``domain::Name``."""

    def register(function: OpFunction) -> OpFunction:
        for name in names:
            entries = _TABLE.setdefault(name, [])
            entries.append(Op(name, since, kind, function))
            entries.sort(key=lambda entry: -entry.since)
        return function

    return register


def find(domain: str, op_type: str, opset: int) -> Op | None:
    """The entry that holds at an opset, None for operators that the table lacks."""
    name = op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}"
    return next((entry for entry in _TABLE.get(name, ()) if entry.since <= opset), None)


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python data; tensors and graphs stay protos."""
    return {attribute.name: _attribute(attribute) for attribute in node.attribute}


def _attribute(attribute: AttributeProto) -> Any:
    kind = attribute.type
    if kind == AttributeProto.INT:
        return attribute.i
    if kind == AttributeProto.FLOAT:
        return attribute.f
    if kind == AttributeProto.STRING:
        return attribute.s.decode("utf-8", "replace")
    if kind == AttributeProto.INTS:
        return list(attribute.ints)
    if kind == AttributeProto.FLOATS:
        return list(attribute.floats)
    if kind == AttributeProto.STRINGS:
        return [text.decode("utf-8", "replace") for text in attribute.strings]
    return onnx.helper.get_attribute_value(attribute)


class Ctx:
    """What an operator sees of its node: attributes, opset, number types, known values.

    ``dtype`` is the type that floats are promoted to, None for the model's own.  ``abstract`` is
    set where tensors have no values; ``known`` then holds those that are known, by identity, and
    ``count`` a size that stands for all sizes that depend on data.
    """

    __slots__ = ("abstract", "attrs", "call", "count", "dtype", "index", "known", "node", "opset", "read")

    def __init__(
        self,
        node: NodeProto,
        opset: int,
        *,
        index: int = 0,
        dtype: torch.dtype | None = None,
        read: Callable[[TensorProto], npt.NDArray[Any]] | None = None,
    ) -> None:
        self.node = node
        self.opset = opset
        self.index = index
        self.dtype = dtype
        self.read = read or onnx.numpy_helper.to_array
        self.attrs = attributes(node)
        self.abstract = False
        self.known: Mapping[int, torch.Tensor] = {}
        self.count: int | None = None
        self.call: Callable[[GraphProto, Sequence[Value]], list[Value]] | None = None

    def copy(self) -> Ctx:
        """The same node for one execution, so that ``call`` and ``known`` can be set."""
        twin = Ctx.__new__(Ctx)
        for slot in Ctx.__slots__:
            setattr(twin, slot, getattr(self, slot))
        return twin

    # ------------------------------------------------------------------ attributes

    def has(self, name: str) -> bool:
        return name in self.attrs

    def integer(self, name: str, default: int = 0) -> int:
        return int(self.attrs.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.attrs.get(name, default))

    def real(self, name: str, default: float = 0.0) -> float:
        return float(self.attrs.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        return str(self.attrs.get(name, default))

    def integers(self, name: str) -> list[int] | None:
        value = self.attrs.get(name)
        return None if value is None else [int(item) for item in value]

    def reals(self, name: str) -> list[float] | None:
        value = self.attrs.get(name)
        return None if value is None else [float(item) for item in value]

    def texts(self, name: str) -> list[str] | None:
        value = self.attrs.get(name)
        return None if value is None else [str(item) for item in value]

    def tensor(self, name: str) -> Value:
        """A tensor attribute, promoted like any constant."""
        return self.constant(self.read(self.attrs[name]))

    def graph(self, name: str) -> GraphProto:
        graph: GraphProto = self.attrs[name]
        return graph

    @property
    def n_outputs(self) -> int:
        return len(self.node.output)

    def wants(self, output: int) -> bool:
        """Whether the node has that output."""
        return output < len(self.node.output) and bool(self.node.output[output])

    # ------------------------------------------------------------------ values and types

    def constant(self, array: npt.NDArray[Any]) -> Value:
        """A constant of the model as a value of the execution."""
        tensor = to_torch(array)
        if tensor is None:
            return array
        return self.promote(tensor)

    def promote(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.dtype is not None and tensor.dtype in PROMOTED:
            return tensor.to(self.dtype)
        return tensor

    def torch_dtype(self, elem_type: int) -> torch.dtype | None:
        """The torch type that stands for an ONNX element type here; None if torch has none."""
        dtype = TORCH_DTYPES.get(elem_type)
        if dtype in PROMOTED and self.dtype is not None:
            return self.dtype
        return dtype

    def need_dtype(self, elem_type: int) -> torch.dtype:
        dtype = self.torch_dtype(elem_type)
        if dtype is None:
            raise UnsupportedModel(f"{self.node.op_type}: {type_name(elem_type)} is not supported here")
        return dtype

    def values(self, tensor: Value) -> torch.Tensor:
        """The numbers of an input; raises ``DataDependent`` where only its shape is known."""
        if isinstance(tensor, np.ndarray):
            found = to_torch(tensor)
            if found is None:
                raise UnsupportedModel(f"{self.node.op_type}: expected numbers, got {tensor.dtype}")
            return found
        if not isinstance(tensor, torch.Tensor):
            raise DataDependent(f"{self.node.op_type} needs a tensor, got {type(tensor).__name__}")
        if not tensor.is_meta:
            return tensor
        known = self.known.get(id(tensor))
        if known is None:
            raise DataDependent(f"{self.node.op_type} needs the values of an input")
        return known

    def int_list(self, tensor: Value) -> list[int]:
        """A 1-d (or scalar) input as Python integers."""
        return [int(item) for item in self.values(tensor).reshape(-1).tolist()]

    def item(self, tensor: Value) -> Any:
        """A scalar input as a Python number."""
        return self.values(tensor).reshape(-1)[0].item()

    def hidden(self, tensor: torch.Tensor) -> bool:
        """Whether only the shape of an input is known."""
        return tensor.is_meta and id(tensor) not in self.known

    def counted(self) -> int:
        """A size that depends on data; raises ``DataDependent`` where none may stand for it."""
        if self.count is None:
            raise DataDependent(f"how much {self.node.op_type} puts out depends on data")
        return self.count

    def run(self, name: str, args: Sequence[Value]) -> list[Value]:
        """Execute the subgraph in an attribute; names of outer graphs are visible to it."""
        if self.call is None:
            raise DataDependent(f"{self.node.op_type} runs a subgraph")
        return self.call(self.graph(name), args)


def need(tensor: Value) -> torch.Tensor:
    """An input that has to be a tensor of a type that torch has."""
    if isinstance(tensor, torch.Tensor):
        return tensor
    kind = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
    raise UnsupportedModel(f"a tensor of numbers is needed here, not {kind}")


def beside(x: torch.Tensor, array: npt.NDArray[Any]) -> torch.Tensor:
    """Numbers that were computed here, where ``x`` is; what was there before is not copied again."""
    array = np.ascontiguousarray(array)
    if x.device.type == "cpu":
        return torch.from_numpy(array)
    found = _copied(array.tobytes(), array.dtype.str, array.shape, x.device)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


#: what CUDA graphs read must not be freed
_captured: list[torch.Tensor] = []


@lru_cache(256)
def _copied(content: bytes, dtype: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy()).to(device)


def positive_axis(axis: int, rank: int) -> int:
    """``axis`` counted from the front; raises ``IndexError`` outside of the rank."""
    if not -rank <= axis < max(rank, 1):
        raise IndexError(f"axis {axis} is outside of rank {rank}")
    return axis % rank if rank else 0


def broadcast(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The shape that two shapes broadcast to; raises ``ValueError`` where they do not."""
    rank = max(len(first), len(second))
    a, b = [1] * (rank - len(first)) + [*first], [1] * (rank - len(second)) + [*second]
    for left, right in zip(a, b, strict=True):
        if left != right and 1 not in (left, right):
            raise ValueError(f"shapes {list(first)} and {list(second)} do not broadcast")
    return [right if left == 1 else left for left, right in zip(a, b, strict=True)]

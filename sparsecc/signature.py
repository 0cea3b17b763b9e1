"""How a compiled model is called and what it gives back, as plain data.

A signature replaces the user's code when an artifact is loaded: it says which argument feeds which
input of the graph, through nested dicts, tuples and lists, and how the outputs are put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparsecc.errors import InvalidModel, InvalidOption, UnsupportedModel

if TYPE_CHECKING:
    import onnx

Path = tuple[str | int, ...]
Scalar = str | int | float | bool | None

_MISSING = object()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of the graph.

    ``dtype`` is a NumPy-style name; ``shape`` holds sizes, names of dynamic sizes, and None for
    unknown ones, or is None where the rank is unknown; ``path`` is how an input is reached from the
    arguments: the parameter's name, then keys and indices.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    path: Path = ()

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs, outputs, and how arguments and results map to them.

    ``parameters`` are the names that arguments bind to, in order.  ``constants`` are arguments that
    the capture fixed, as (path, value) pairs.  ``result`` is the structure of the result:

        {"kind": "leaf", "output": NAME}      {"kind": "constant", "value": JSON scalar}
        {"kind": "tuple" | "list", "items": [...]}      {"kind": "dict", "keys": [...], "items": [...]}
        {"kind": "record", "name": CLASS, "keys": [...], "items": [...]}

    and None for the plain rule: one output is returned alone, several as a tuple.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[str, ...] = ()
    constants: tuple[tuple[Path, Scalar], ...] = ()
    result: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        inputs = ", ".join(str(spec) for spec in self.inputs)
        return f"({inputs}) -> ({', '.join(str(spec) for spec in self.outputs)})"

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every input by name, from arguments given by position, by name or in one dict.

        Arguments may also be named as the graph's inputs are.  Raises ``InvalidOption``.
        """
        if len(args) == 1 and not kwargs and self._names_everything(args[0]):
            return self.bind((), args[0])
        bound = self._bound(args, kwargs)
        used: set[str | int] = set()
        values: dict[str, Any] = {}
        for spec in self.inputs:
            path = spec.path or (spec.name,)
            used.add(path[0])
            value = _walk(bound, path)
            if value is _MISSING:
                value = bound.get(spec.name, _MISSING)
            if value is _MISSING:
                raise InvalidOption(f"input {_show(path)} is missing; the model takes {self}")
            values[spec.name] = value
        for path, fixed in self.constants:
            used.add(path[0])
            given = _walk(bound, path)
            if given is not _MISSING and not _same(given, fixed):
                raise InvalidOption(
                    f"{_show(path)} was fixed to {fixed!r} when the model was captured; got {given!r}"
                )
        names = used | {spec.name for spec in self.inputs}
        for name, value in bound.items():
            if name not in names and value is not None:
                raise InvalidOption(f"argument {name!r} has no effect in this model, which takes {self}")
        return values

    def assemble(self, outputs: Mapping[str, Any]) -> Any:
        """The result in the structure that the captured model returned."""
        if self.result is not None:
            return _build(self.result, outputs)
        values = tuple(outputs[spec.name] for spec in self.outputs)
        first, *others = values
        return values if others else first

    def to_json(self) -> dict[str, Any]:
        """The signature as JSON data, for the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Read ``to_json`` data back; raises ``InvalidModel`` where it is malformed."""
        try:
            signature = cls(
                inputs=tuple(_tensor_spec(item) for item in _typed(data["inputs"], list, tuple)),
                outputs=tuple(_tensor_spec(item) for item in _typed(data["outputs"], list, tuple)),
                parameters=tuple(_typed(name, str) for name in _typed(data["parameters"], list, tuple)),
                constants=tuple((_path(path), _scalar(value)) for path, value in data["constants"]),
                result=data["result"],
            )
            if signature.result is not None:
                _check_result(signature.result, {spec.name for spec in signature.outputs})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidModel(f"the signature of the model is malformed: {error!r}") from error
        return signature

    def _names_everything(self, value: Any) -> bool:
        """Whether one dict argument names the inputs, rather than being the first parameter's value."""
        if not isinstance(value, Mapping) or not value:
            return False
        names = {*self._parameters(), *(spec.name for spec in self.inputs)}
        if not all(key in names for key in value):
            return False
        first = next(iter(self._parameters()), None)
        nested = {spec.path[1] for spec in self.inputs if len(spec.path) > 1 and spec.path[0] == first}
        return not nested >= set(value)

    def _parameters(self) -> tuple[str, ...]:
        return self.parameters or tuple(spec.name for spec in self.inputs)

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        parameters = self._parameters()
        if len(args) > len(parameters):
            raise InvalidOption(f"the model takes {len(parameters)} arguments, got {len(args)}: {self}")
        bound = dict(zip(parameters, args, strict=False))
        known = {*parameters, *(spec.name for spec in self.inputs)}
        for name, value in kwargs.items():
            if name not in known:
                raise InvalidOption(f"the model has no input {name!r}; it takes {self}")
            if name in bound:
                raise InvalidOption(f"input {name!r} is given twice, by position and by name")
            bound[name] = value
        return bound


class Record(dict[str, Any]):
    """The result of a model that returned an object of its own class: items, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the result has no {name!r}; it has {', '.join(self)}") from None


def describe_result(value: Any, leaf: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The ``result`` data of a structure whose leaves are the numbers that ``leaf`` explains.

    >>> leaf = {0: {"kind": "leaf", "output": "y"}}
    >>> describe_result((0,), leaf)
    {'kind': 'tuple', 'items': [{'kind': 'leaf', 'output': 'y'}]}

    Raises ``TypeError`` for containers that are not sequences, mappings or records.
    """
    if value is None:
        return {"kind": "constant", "value": None}
    if type(value) is int:
        return dict(leaf[value])
    fields = _fields(value)
    if fields is not None:
        kind = {"kind": "dict"} if type(value) is dict else {"kind": "record", "name": type(value).__name__}
        return {
            **kind,
            "keys": list(fields),
            "items": [describe_result(item, leaf) for item in fields.values()],
        }
    if isinstance(value, list | tuple):
        kind = {"kind": "list" if isinstance(value, list) else "tuple"}
        return {**kind, "items": [describe_result(item, leaf) for item in value]}
    raise TypeError(f"a result of type {type(value).__name__} cannot be stored")


def argument_paths(value: Any, path: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Every leaf number in nested arguments, with how it is reached; None leaves too."""
    if value is None or type(value) is int:
        yield path, value
        return
    fields = _fields(value)
    if fields is None and not isinstance(value, list | tuple):
        raise TypeError(f"an argument of type {type(value).__name__} cannot be stored")
    for step, item in fields.items() if fields is not None else enumerate(value):
        yield from argument_paths(item, (*path, step))


def onnx_signature(proto: onnx.ModelProto) -> Signature:
    """The signature of a model that is called by the names of its ONNX inputs.

    Raises ``UnsupportedModel`` for inputs and outputs that are no tensors.
    """
    initializers = {tensor.name for tensor in proto.graph.initializer}
    given = [value for value in proto.graph.input if value.name not in initializers]
    inputs = tuple(_from_value_info(value, (value.name,)) for value in given)
    outputs = tuple(_from_value_info(value) for value in proto.graph.output)
    return Signature(inputs, outputs, parameters=tuple(spec.name for spec in inputs))


def _from_value_info(value: onnx.ValueInfoProto, path: Path = ()) -> TensorSpec:
    import onnx

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        what = (kind or "unknown_type").removesuffix("_type").replace("_", " ")
        raise UnsupportedModel(
            f"{value.name!r} is not a tensor but a {what}: wrap the model so that it is a tensor"
        )
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    dims: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        dims = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
        )
    return TensorSpec(value.name, dtype, dims, path)


def _fields(value: Any) -> dict[str, Any] | None:
    """Named items of a dict, named tuple, dataclass or mapping; None for anything else."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a dict with keys that are not strings cannot be stored")
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if hasattr(type(value), "__dataclass_fields__"):
        return {name: getattr(value, name) for name in type(value).__dataclass_fields__}
    return None


def _build(node: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
    kind = node["kind"]
    if kind == "leaf":
        return outputs[node["output"]]
    if kind == "constant":
        return node["value"]
    items = [_build(item, outputs) for item in node["items"]]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    named = zip(node["keys"], items, strict=True)
    return dict(named) if kind == "dict" else Record(named)


def _walk(bound: Mapping[str, Any], path: Path) -> Any:
    """The value at ``path``; ``_MISSING`` where the arguments do not reach so far."""
    value: Any = bound
    for step in path:
        if isinstance(value, Mapping):
            value = value.get(step, _MISSING)
        elif isinstance(step, int) and isinstance(value, list | tuple):
            value = value[step] if step < len(value) else _MISSING
        else:
            value = getattr(value, step, _MISSING) if isinstance(step, str) else _MISSING
        if value is _MISSING:
            return _MISSING
    return value


def _same(given: Any, fixed: Scalar) -> bool:
    return given is fixed or (type(given) is type(fixed) and bool(given == fixed))


def _show(path: Path) -> str:
    head, *rest = path
    return str(head) + "".join(f"[{step!r}]" for step in rest)


def _tensor_spec(data: Mapping[str, Any]) -> TensorSpec:
    shape = data["shape"]
    dims = None if shape is None else tuple(None if dim is None else _typed(dim, int, str) for dim in shape)
    return TensorSpec(_typed(data["name"], str), _typed(data["dtype"], str), dims, _path(data["path"]))


def _path(data: Any) -> Path:
    return tuple(_typed(step, str, int) for step in _typed(data, list, tuple))


def _scalar(value: Any) -> Scalar:
    checked: Scalar = value if value is None or isinstance(value, bool) else _typed(value, str, int, float)
    return checked


def _typed(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return value


def _check_result(node: Any, outputs: set[str]) -> None:
    kind = _typed(node, dict)["kind"]
    if kind == "leaf":
        if node["output"] not in outputs:
            raise ValueError(f"no output {node['output']!r}")
    elif kind in ("tuple", "list", "dict", "record"):
        items = _typed(node["items"], list)
        if kind in ("dict", "record") and len(_typed(node["keys"], list)) != len(items):
            raise ValueError("keys and items differ in number")
        for item in items:
            _check_result(item, outputs)
    elif kind == "constant":
        _scalar(node["value"])
    else:
        raise ValueError(f"unknown kind {kind!r}")

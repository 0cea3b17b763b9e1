"""What a compiled model is called with, checked against its signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import to_numpy, to_torch
from sparsecc.signature import Signature, TensorSpec

Array = npt.NDArray[Any]


def checked(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Array], torch.device | None]:
    """Arrays by input name, and the device of the first torch tensor among the arguments, if there is one.

    Arguments are given by position, by name, or in one dict.  Raises ``InvalidOption`` where they do not fit.
    """
    values = signature.bind(args, kwargs)
    sizes: dict[str, tuple[int, str]] = {}
    feeds = {spec.name: _checked(spec, values[spec.name], sizes) for spec in signature.inputs}
    tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
    return feeds, tensors[0].device if tensors else None


def _checked(spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]]) -> Array:
    """The array for one input; ``sizes`` remembers named sizes over the inputs of a call."""
    array = _to_numpy(spec, value)
    if array.dtype.name != spec.dtype:
        raise InvalidOption(f"input {spec.name!r} must be {spec.dtype}, got {array.dtype.name}: convert it")
    if spec.shape is None:
        return array
    fits = len(array.shape) == len(spec.shape)
    for size, wanted in zip(array.shape, spec.shape, strict=False):
        fits = fits and (not isinstance(wanted, int) or size == wanted)
    if not fits:
        raise InvalidOption(f"input {spec} does not fit the given shape {list(array.shape)}")
    for size, name in zip(array.shape, spec.shape, strict=True):
        if isinstance(name, str) and name.isidentifier():
            before, where = sizes.setdefault(name, (size, spec.name))
            if before != size:
                raise InvalidOption(
                    f"inputs {where!r} and {spec.name!r} must agree in {name!r}: got {before} and {size}"
                )
    return array


def _to_numpy(spec: TensorSpec, value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, np.ndarray | np.generic):
        native = np.asarray(value, value.dtype.newbyteorder("="))
        return np.ascontiguousarray(native).reshape(native.shape)
    if isinstance(value, bool | int | float | list | tuple):
        try:
            plain = np.asarray(value)
            return plain.astype(spec.dtype, casting="same_kind" if plain.size else "unsafe")
        except (TypeError, ValueError) as error:
            raise InvalidOption(f"input {spec} cannot be made from {value!r}: {error}") from error
    raise InvalidOption(f"input {spec} must be a torch tensor or a NumPy array, got {type(value).__name__}")


def as_torch(name: str, array: Array) -> torch.Tensor:
    tensor = to_torch(array)
    if tensor is None:
        raise InvalidOption(
            f"output {name!r} holds {array.dtype}, which torch cannot: call the model with NumPy arrays"
        )
    return tensor

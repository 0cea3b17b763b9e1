"""Tensors of ONNX: element types, payloads, and their way into numpy and torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import AttributeProto, TensorProto

from sparsecc.errors import InvalidModel, UnsupportedModel

Array: TypeAlias = "npt.NDArray[Any]"

MAX_RANK = 64
"""Axes of a tensor; numpy and torch have no more."""

_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT16: 16,
    TensorProto.INT16: 16, TensorProto.INT32: 32, TensorProto.INT64: 64, TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16, TensorProto.DOUBLE: 64, TensorProto.UINT32: 32, TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128, TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E4M3FNUZ: 8, TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8, TensorProto.UINT4: 4, TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4, TensorProto.FLOAT8E8M0: 8, TensorProto.UINT2: 2, TensorProto.INT2: 2,
}  # fmt: skip

_TYPED_FIELD: dict[int, str] = {
    TensorProto.FLOAT: "float_data", TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data", TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data", TensorProto.UINT32: "uint64_data", TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}  # fmt: skip

TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.UINT8: torch.uint8, TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16, TensorProto.INT16: torch.int16, TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64, TensorProto.BOOL: torch.bool, TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64, TensorProto.UINT32: torch.uint32, TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64, TensorProto.COMPLEX128: torch.complex128,
    TensorProto.BFLOAT16: torch.bfloat16, TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz, TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}  # fmt: skip
"""ONNX element types that torch has; the others (4 and 2 bits, strings) stay numpy arrays."""

_TORCH_FROM_BITS: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip

LACKING = frozenset(_TORCH_FROM_BITS.values())
"""Types of torch that numpy lacks."""


def type_name(elem_type: int) -> str:
    """The name of an ONNX element type, for messages: ``FLOAT16``."""
    names: dict[int, str] = {number: name for name, number in TensorProto.DataType.items()}
    return names.get(elem_type, f"type {elem_type}")


def payload_bytes(elem_type: int, count: int) -> int:
    """Bytes that ``count`` elements of an ONNX type take up in raw or external data."""
    return -(-count * _BITS[elem_type] // 8)


def to_torch(array: Array) -> torch.Tensor | None:
    """A torch tensor that shares the array's memory; None for types that torch does not have."""
    dtype = _TORCH_FROM_BITS.get(array.dtype.name)
    if dtype is not None:
        bits = to_torch(array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8))
        assert bits is not None
        return bits.view(dtype)
    if array.dtype.kind not in "fiubc" or array.dtype.itemsize > 16:
        return None
    if not array.flags.aligned or not array.flags.c_contiguous or array.dtype.byteorder == ">":
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape)
    with warnings.catch_warnings():  # tensors read from a file are only read
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def to_numpy(value: Array | torch.Tensor) -> Array:
    """The array that ONNX stores for a tensor; bf16 and float8 become ml_dtypes arrays."""
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().cpu().contiguous()
    for name, dtype in _TORCH_FROM_BITS.items():
        if value.dtype == dtype:
            import ml_dtypes

            bits = value.view(torch.int16 if value.dtype.itemsize == 2 else torch.uint8).numpy()
            return bits.view(np.dtype(getattr(ml_dtypes, name)))
    return value.numpy()


def numpy_dtype(elem_type: int) -> np.dtype[Any]:
    """The numpy type of an ONNX element type (ml_dtypes for those that numpy lacks)."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, ValueError, TypeError) as error:
        raise UnsupportedModel(f"element type {type_name(elem_type)} is not supported") from error


def external_entries(tensor: TensorProto) -> dict[str, str]:
    """The ``external_data`` entries of a tensor as a dictionary; empty when the tensor is inline."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return {}
    return {entry.key: entry.value for entry in tensor.external_data}


def constant_attribute(attribute: AttributeProto) -> Array:
    """The value of a Constant node that is given as ``value_int(s)``, ``value_float(s)`` or strings."""
    if attribute.name == "value_int":
        return np.array(attribute.i, np.int64)
    if attribute.name == "value_ints":
        return np.array(list(attribute.ints), np.int64)
    if attribute.name == "value_float":
        return np.array(attribute.f, np.float32)
    if attribute.name == "value_floats":
        return np.array(list(attribute.floats), np.float32)
    if attribute.name == "value_string":
        return np.array(attribute.s, dtype=object)
    if attribute.name == "value_strings":
        return np.array(list(attribute.strings), dtype=object)
    raise InvalidModel(f"Constant with an unknown attribute {attribute.name!r}; export the model again")


def declared_size(tensor: TensorProto) -> tuple[int, int]:
    """Elements and bytes that a tensor declares; no memory is allocated for them."""
    name = tensor.name or "of a Constant"
    if len(tensor.dims) > MAX_RANK:
        raise InvalidModel(f"tensor {name!r} has {len(tensor.dims)} axes; the file is damaged")
    count = 1
    for dim in tensor.dims:
        if not 0 <= dim <= 1 << 48:
            raise InvalidModel(f"tensor {name!r} has an impossible shape: {list(tensor.dims)}")
        count *= dim
    if tensor.data_type == TensorProto.STRING:
        return count, 0
    if tensor.data_type not in _BITS:
        raise InvalidModel(f"tensor {name!r} has unknown element type {tensor.data_type}; export it again")
    if count > 1 << 48:
        raise InvalidModel(f"tensor {name!r} declares {count} elements; the file is damaged")
    return count, payload_bytes(tensor.data_type, count)


def entry_number(external: Mapping[str, str], key: str, name: str) -> int:
    text = external.get(key, "0")
    if not text.isdecimal() or len(text) > 18:
        raise InvalidModel(f"tensor {name!r}: external data {key} {text!r} is not a number of bytes")
    return int(text)


def wrong_size(tensor: TensorProto, size: int, found: str) -> InvalidModel:
    return InvalidModel(
        f"tensor {tensor.name or 'of a Constant'!r} of shape {list(tensor.dims)} and type "
        f"{type_name(tensor.data_type)} needs {size} bytes, but has {found}; "
        "the file is damaged, export or copy it again"
    )


def check_typed_length(tensor: TensorProto, count: int) -> None:
    field = _TYPED_FIELD.get(tensor.data_type, "int32_data")
    found = len(getattr(tensor, field))
    expected = count
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        expected = 2 * count
    bits = _BITS.get(tensor.data_type, 8)
    if found not in (expected, -(-count * bits // 8) if bits < 8 else expected):
        raise InvalidModel(
            f"tensor {tensor.name or 'of a Constant'!r} of shape {list(tensor.dims)} needs {expected} "
            f"elements, but has {found}; the file is damaged, export or copy it again"
        )


def decode(raw: Array, elem_type: int, count: int, shape: tuple[int, ...]) -> Array:
    """Raw little-endian bytes as an array; a view wherever the type takes up whole bytes."""
    dtype = numpy_dtype(elem_type)
    bits = _BITS[elem_type]
    if bits < 8:
        per_byte = 8 // bits
        shifts = np.arange(per_byte, dtype=np.uint8) * bits
        unpacked = ((raw[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
        if elem_type in (TensorProto.INT4, TensorProto.INT2):
            sign = 1 << (bits - 1)
            return ((unpacked.astype(np.int8) ^ sign) - sign).astype(dtype).reshape(shape)
        if elem_type == TensorProto.FLOAT4E2M1:
            return np.ascontiguousarray(unpacked).view(dtype).reshape(shape)
        return unpacked.astype(dtype).reshape(shape)
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return raw.view(dtype).reshape(shape)


def encode(array: Array, elem_type: int) -> bytes:
    """What ``raw_data`` holds for an array."""
    bits = _BITS[elem_type]
    if bits >= 8:
        return np.ascontiguousarray(array).tobytes()
    codes = array.reshape(-1)
    codes = (
        codes.view(np.uint8) if elem_type == TensorProto.FLOAT4E2M1 else codes.astype(np.int8).view(np.uint8)
    )
    codes = codes & np.uint8((1 << bits) - 1)
    per_byte = 8 // bits
    rows: Array = np.pad(codes, (0, -codes.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(rows), np.uint8)
    for place in range(per_byte):
        packed |= rows[:, place] << np.uint8(place * bits)
    return packed.tobytes()


def set_typed(tensor: TensorProto, values: Array) -> None:
    kind = tensor.data_type
    flat = np.ascontiguousarray(values).reshape(-1)
    if kind == TensorProto.STRING:
        tensor.string_data.extend(flat.tolist())
    elif kind in (TensorProto.FLOAT, TensorProto.COMPLEX64):
        tensor.float_data.extend(flat.view(np.float32).tolist())
    elif kind in (TensorProto.DOUBLE, TensorProto.COMPLEX128):
        tensor.double_data.extend(flat.view(np.float64).tolist())
    elif kind == TensorProto.INT64:
        tensor.int64_data.extend(flat.tolist())
    elif kind in (TensorProto.UINT32, TensorProto.UINT64):
        tensor.uint64_data.extend(flat.tolist())
    elif kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        tensor.int32_data.extend(flat.view(np.uint16).tolist())
    elif _BITS[kind] < 8 or kind >= TensorProto.FLOAT8E4M3FN:
        tensor.int32_data.extend(np.frombuffer(encode(values, kind), np.uint8).tolist())
    else:
        tensor.int32_data.extend(flat.astype(np.int32).tolist())

"""State as one flat dict of tensors: plain data is JSON in a tensor of bytes.

Such a dict is what ``torch.load(weights_only=True)`` reads and ``safetensors`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from sparsecc.errors import InvalidModel

JSON = "json"
_TENSOR = "tensor:"


def packed(document: Mapping[str, Any]) -> torch.Tensor:
    """Plain data as bytes."""
    return torch.frombuffer(bytearray(json.dumps(document, sort_keys=True).encode()), dtype=torch.uint8)


def unpacked(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The plain data of a state; raises InvalidModel where there is none."""
    try:
        found: dict[str, Any] = json.loads(bytes(state[JSON].cpu().tolist()))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise InvalidModel(
            f"this is no state of a Sparsifier: {error}; give what state_dict() gave"
        ) from error
    return found


def taken_apart(value: Any, tensors: dict[str, torch.Tensor], prefix: str) -> Any:
    """Nested dicts and lists as JSON, with tensors put into ``tensors`` under names of their own."""
    if isinstance(value, torch.Tensor):
        key = f"{prefix}.{len(tensors)}"
        tensors[key] = value
        return _TENSOR + key
    if isinstance(value, Mapping):
        return {"dict": [[k, taken_apart(v, tensors, prefix)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [taken_apart(v, tensors, prefix) for v in value]}
    if isinstance(value, list):
        return [taken_apart(v, tensors, prefix) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidModel(
        f"a snapshot holds a {type(value).__name__}, which cannot be stored without pickle; drop the "
        "snapshot (sparsifier.saved = None), or use a scheduler whose state is plain data"
    )


def put_together(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of ``taken_apart``."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)].clone()
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(put_together(v, tensors) for v in value["tuple"])
        return {k: put_together(v, tensors) for k, v in value["dict"]}
    return [put_together(v, tensors) for v in value] if isinstance(value, list) else value

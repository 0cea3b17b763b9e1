"""Weights whose numbers are not where operators look for them, refused by name before a model is captured."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparsecc.errors import InvalidOption, UnsupportedModel


def check_stored(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise UnsupportedModel for a tensor that is not plain and dense, InvalidOption for one without a shape.

    Tensor types with a dispatch of their own (quantised weights of torchao, semi-structured sparsity, shards)
    hold numbers that only their own operators know, and torch.export takes them apart.
    """
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise InvalidOption(
                f"{name!r} has no shape yet (a lazy module): run the model once on the example inputs first"
            )
        if why := _unusual(tensor):
            raise UnsupportedModel(
                f"{name!r} {why}; give the model with plain dense tensors, and do this to the result"
            )


def _unusual(tensor: torch.Tensor) -> str:
    kind = type(tensor)
    if kind.__torch_dispatch__ not in _PLAIN:
        return f"is a {kind.__module__}.{kind.__name__}, a tensor type with operators of its own"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.is_quantized:
        return f"holds packed numbers ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.layout is not torch.strided:
        return f"is stored as {str(tensor.layout).removeprefix('torch.').lstrip('_')}"
    return ""


_PLAIN = (torch.Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)

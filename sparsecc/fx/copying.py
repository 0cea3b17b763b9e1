"""Copies modules as ``copy.deepcopy`` does, and faster where nothing about them is out of the ordinary."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import nn

#: types whose values are shared by copies
_SHARED = frozenset(
    {int, float, complex, bool, str, bytes, type, NoneType, FunctionType, BuiltinFunctionType}
    | {torch.dtype, torch.device, torch.Size}
)
_MAPPINGS = frozenset({dict, OrderedDict})


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; ``memo`` maps the ``id`` of what is to be something else to what it is to be.

    Raises what the model's own code raises where it takes part in the copying.
    """
    kind: Any = type(value)
    if kind in _SHARED or (kind in (tuple, frozenset) and all(type(v) in _SHARED for v in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is set and all(type(v) in _SHARED for v in value):
        memo[id(value)] = alike = set(value)
        return alike
    if kind in _MAPPINGS:
        return _filled(kind(), value, memo)
    if kind is list:
        out: list[Any] = []
        memo[id(value)] = out
        out.extend(copied(v, memo) for v in value)
        return out
    if isinstance(value, nn.Module) and _ordinary(kind):
        module = kind.__new__(kind)
        memo[id(value)] = module
        state: dict[str, Any] = value.__getstate__()
        own = vars(module)
        for name, entry in state.items():
            if type(entry) in _SHARED:
                own[name] = entry
            elif type(entry) in _MAPPINGS and not entry and id(entry) not in memo:  # hooks, nearly always
                own[name] = memo[id(entry)] = type(entry)()
            else:
                own[name] = copied(entry, memo)
        return module
    return copy.deepcopy(value, memo)


def _filled(out: dict[Any, Any], value: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    memo[id(value)] = out
    for key, entry in value.items():
        out[key if type(key) is str else copied(key, memo)] = (
            entry if type(entry) in _SHARED else copied(entry, memo)
        )
    return out


@cache
def _ordinary(kind: type[nn.Module]) -> bool:
    """Whether ``deepcopy`` would copy the attributes of such a module and do nothing else."""
    return (
        not hasattr(kind, "__deepcopy__")
        and not any(base.__dict__.get("__slots__") for base in kind.__mro__)
        and kind.__new__ is object.__new__
        and kind.__reduce__ is object.__reduce__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind.__setstate__.__module__.startswith("torch.nn.")  # these add what older versions lacked
    )

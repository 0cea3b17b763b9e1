"""Modules are copied as ``copy.deepcopy`` copies them, whatever their attributes are."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.fx.copying import copied


class NoTruth:
    """A value that has neither a truth value, nor a length, nor an equality."""

    def __init__(self) -> None:
        self.inside = [1, 2]

    def __bool__(self) -> bool:
        raise TypeError("no truth value")

    __len__ = __eq__ = __hash__ = __bool__  # type: ignore[assignment]


class Net(nn.Module):
    """Two layers and an attribute."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.extra, self.again = extra, extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).relu())
        return out


VALUES = {
    "tensor": torch.arange(6.0),
    "empty tensor": torch.zeros(0),
    "one number": torch.tensor(0.0),
    "array": np.arange(4),
    "empty array": np.zeros(0),
    "no truth": NoTruth(),
    "list of tensors": [torch.ones(2), torch.zeros(3)],
    "dict of tensors": {"a": torch.ones(2), 3: [torch.zeros(2)]},
    "empty dict": {},
    "empty ordered dict": OrderedDict(),
    "tuple of tensors": (torch.ones(2), (torch.ones(3), "x")),
    "set": {1, 2},
    "deque": deque([1, 2], maxlen=3),
    "generator": torch.Generator().manual_seed(3),
    "size": torch.Size([2, 3]),
    "module": nn.ReLU(),
}


def leaves(value: Any) -> list[Any]:
    """Nested values as a flat list in which everything has an equality."""
    if isinstance(value, dict):
        return [x for k, v in value.items() for x in (k, *leaves(v))]
    if isinstance(value, (list, tuple, set, deque)):
        return [x for v in value for x in leaves(v)]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [tuple(value.shape), *value.tolist()] if value.ndim else [value.item()]
    if isinstance(value, torch.Generator):
        return leaves(value.get_state())
    return leaves(vars(value)["inside"]) if isinstance(value, NoTruth) else [str(value)]


@pytest.mark.parametrize("name", VALUES)
def test_a_copy_is_a_deep_copy(name: str) -> None:
    net = Net(VALUES[name])
    ours, theirs = copied(net, {}), copy.deepcopy(net)
    assert type(ours) is Net
    assert list(vars(ours)) == list(vars(theirs))
    assert type(ours.extra) is type(net.extra)
    assert ours.extra is not net.extra or theirs.extra is net.extra or name == "size"
    assert ours.extra is ours.again
    assert leaves(ours.extra) == leaves(theirs.extra) == leaves(net.extra)


@pytest.mark.parametrize("name", VALUES)
def test_attributes_cost_no_class(name: str) -> None:
    """A module that could not be copied would come back as a graph module."""
    result = sparsecc.prune(Net(VALUES[name]), torch.randn(2, 4), sparsity=0.5)
    assert type(result.model) is Net, result.report.notes
    assert result.model.first.out_features == 4

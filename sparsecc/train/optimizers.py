"""What optimizers remember of single elements."""

from __future__ import annotations

from typing import Any

import torch

from sparsecc.errors import InvalidOption
from sparsecc.train.shards import local


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside wrappers that have it as ``optimizer`` (accelerate, Lightning)."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidOption(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidOption(
            "LBFGS keeps its history of all parameters in one vector, which masks cannot reach; use an "
            "optimizer with state by element, such as SGD or AdamW"
        )
    return optimizer


def clear(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, mask: torch.Tensor) -> None:
    """Zero masked elements of the state: momentum, exp_avg, exp_avg_sq, all of the parameter's shape."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and parameter.dim():
            local(value).masked_fill_(~mask, 0)


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Learning rate by id of the parameter."""
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}

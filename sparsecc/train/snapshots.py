"""Rewinding: weights, optimizer and learning rates as they were at an earlier step.

Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), section 4 (rewinding
to an early step); Renda, Frankle and Carbin, "Comparing Rewinding and Fine-tuning in Neural Network
Pruning" (2020), section 2 (weight rewinding, learning-rate rewinding).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsecc.train.shards import local


@dataclass(eq=False)
class Snapshot:
    """This process's parts of parameters and buffers by name, and the states of optimizer and scheduler."""

    step: int
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)


def taken_of(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> Snapshot:
    """A copy of everything as it is now."""
    tensors = {n: local(t).clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    state = copy.deepcopy(optimizer.state_dict())
    return Snapshot(step, tensors, state, copy.deepcopy(scheduler.state_dict()) if scheduler else {})


@torch.no_grad()
def restore_weights(snapshot: Snapshot, model: nn.Module) -> None:
    """Parameters and buffers as they were."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            local(tensor).copy_(snapshot.tensors[name])


def restore_optimizer(snapshot: Snapshot, optimizer: torch.optim.Optimizer) -> None:
    """State and hyper-parameters as they were."""
    optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))


def restore_rates(snapshot: Snapshot, optimizer: torch.optim.Optimizer) -> None:
    """Learning rates as they were; what the optimizer remembers stays."""
    for group, saved in zip(optimizer.param_groups, snapshot.optimizer["param_groups"], strict=True):
        for name in ("lr", "initial_lr"):
            if name in saved:
                group[name] = copy.deepcopy(saved[name])

"""Torch-Pruning at its documented use: a group-wise L2 pruner, the output layer left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers.nets import Net


def pruner(model: nn.Module, net: Net) -> Any:
    """A pruner that removes half of the channels of every group at its next step."""
    import torch_pruning as tp

    kept = [
        m
        for m in model.modules()
        if getattr(m, "out_features", getattr(m, "out_channels", None)) == net.classes
        and isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    return tp.pruner.BasePruner(
        model,
        torch.randn(net.shape),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=kept[-1:],
    )

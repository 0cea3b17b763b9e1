"""ResNet-20 pruned by Torch-Pruning to a share of its FLOPs, to train beside our results."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.resnet20 import BasicBlock, ResNet20

EXAMPLE = (1, 1, 28, 28)


def flops(model: nn.Module) -> int:
    """FLOPs of one image."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros(EXAMPLE))
    return int(counter.get_total_flops())


def torch_pruned(model: ResNet20, share: float, *, inner: bool) -> nn.Module:
    """Group-wise L2 (Fang et al., "DepGraph", 2023), the ratio with the FLOPs nearest to ``share``.

    ``inner``: only the channels between the convolutions of a block, else all of the network.
    """
    wanted = share * flops(model)
    tried = [_pruned(model, percent / 100, inner=inner) for percent in range(5, 76)]
    return min(tried, key=lambda m: abs(flops(m) - wanted))


def _pruned(model: ResNet20, ratio: float, *, inner: bool) -> nn.Module:
    import torch_pruning as tp

    out = copy.deepcopy(model)
    tp.pruner.BasePruner(
        out,
        torch.zeros(EXAMPLE),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=list(_kept(out, inner)),
    ).step()
    return out


def _kept(model: ResNet20, inner: bool) -> Iterator[nn.Module]:
    """Layers whose outputs stay whole."""
    yield model.fc
    if inner:
        yield model.conv
        for block in model.blocks:
            assert isinstance(block, BasicBlock)
            yield block.conv2
            yield from (m for m in block.shortcut.modules() if isinstance(m, nn.Conv2d))

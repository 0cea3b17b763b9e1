"""Planning time beside Torch-Pruning, and how it grows with the size of the graph."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.nets import Transformer
from benchmarks.peers.nets import Net, torchvision_net
from sparsecc.axes import Analysis
from sparsecc.fx.capture import Program, capture
from sparsecc.fx.module import module_actions, narrowed
from sparsecc.fx.reader import read
from sparsecc.lowering import kept_of
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import decide

#: net, and how many times faster than Torch-Pruning's step planning has to be (None: reported only)
COMPARED: tuple[tuple[Net, float | None], ...] = (
    (torchvision_net("resnet152"), 5),
    (torchvision_net("densenet121"), None),
    (torchvision_net("densenet201"), 50),
    (Net("transformer, 48 layers, d=256", Transformer, (2, 8, 64), 64), 20),
)
#: net, and the CPU-seconds that planning may take; the peer does not end on these
ALONE: tuple[tuple[Net, float], ...] = (
    (torchvision_net("swin_t"), 1),
    (Net("transformer, 1,000 layers, d=64", lambda: Transformer(1000, 64, 2), (2, 8, 64), 64), 5),
)
#: layers of the transformers that growth is fitted on
GROWTH = (25, 50, 100, 200, 400)


def captured(net: Net) -> Program:
    """The exported net; export takes no part in what is measured."""
    torch.manual_seed(0)
    program = capture(net.make().eval(), (torch.randn(net.shape),))
    gc.collect()
    gc.freeze()  # the collector need not walk the exporter's heap at every step that is timed
    return program


def planned(program: Program) -> tuple[int, nn.Module]:
    """Read, analyse, plan and edit; the number of operators and the narrowed module."""
    assert program.module is not None
    view = read(program)
    analysis = Analysis(view)
    plan = decide(analysis, [ChannelPruning(), HeadPruning(head_dims=True)])
    keeps = analysis.keeps(kept_of(plan))
    full = plan.with_actions(module_actions(program, view, plan, keeps))
    return len(view.calls), narrowed(program.module, full, program.tied)


def seconds(work: Callable[[], Any]) -> float:
    """CPU-seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


@dataclass(frozen=True)
class Compared:
    """Medians in CPU-seconds.

    ``floor``: of ours, reading every weight for its norm and copying what stays.  ``setup`` is what the peer
    does before its step: its dependency graph, for which it runs the model once.
    """

    net: str
    nodes: int
    ours: float
    floor: float
    setup: float
    step: float
    wanted: float | None

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes for the same: analysis, plan and edit."""
        return (self.setup + self.step) / self.ours

    @property
    def step_ratio(self) -> float:
        """How many times longer the peer's step alone takes, its analysis left out and ours not."""
        return self.step / self.ours


def touched(program: Program) -> None:
    """Read every weight once for its norm, and copy a quarter of it: less work no planner has."""
    for weight in filter(torch.is_floating_point, program.weights.values()):
        torch.linalg.vector_norm(weight.detach())
        weight.detach().flatten()[: weight.numel() // 4].clone()


def compare(net: Net, wanted: float | None, rounds: int) -> Compared:
    """Both on the same net, in turn."""
    from benchmarks.peers.torch_pruning import pruner

    program = captured(net)
    nodes, _ = planned(program)
    ours, floors, setups, steps = [], [], [], []
    for _ in range(rounds):
        ours.append(statistics.median(seconds(lambda: planned(program)) for _ in range(3)))
        floors.append(statistics.median(seconds(lambda: touched(program)) for _ in range(3)))
        torch.manual_seed(0)
        model = net.make().eval()
        start = time.process_time()
        peer = pruner(model, net)
        setups.append(time.process_time() - start)
        steps.append(seconds(peer.step))
    gc.unfreeze()
    our, floor, setup, step = (statistics.median(s) for s in (ours, floors, setups, steps))
    return Compared(net.name, nodes, our, floor, setup, step, wanted)


@dataclass(frozen=True)
class Alone:
    """A net that only sparsecc plans."""

    net: str
    nodes: int
    ours: float
    limit: float | None


def alone(net: Net, limit: float | None, rounds: int) -> Alone:
    """Median CPU-seconds of planning."""
    program = captured(net)
    nodes, _ = planned(program)
    found = statistics.median(seconds(lambda: planned(program)) for _ in range(rounds))
    gc.unfreeze()
    return Alone(net.name, nodes, found, limit)


@dataclass(frozen=True)
class Growth:
    """Planning time of transformers of growing depth, and the exponent of a power law through it."""

    lines: tuple[Alone, ...]
    exponent: float


def growth(rounds: int) -> Growth:
    """Fit ``log seconds = exponent * log nodes + c`` by least squares."""
    nets = [Net(f"{n} layers", partial(Transformer, n, 64, 2), (2, 8, 64), 64) for n in GROWTH]
    lines = tuple(alone(net, None, rounds) for net in nets)
    x, y = [math.log(line.nodes) for line in lines], [math.log(line.ours) for line in lines]
    return Growth(lines, float(np.polyfit(x, y, 1)[0]))

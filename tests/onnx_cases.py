"""What test cases of single operators share: an operator between layers whose channels may go."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, helper

from tests.onnx_graphs import Graph, check_trial, trial

MICROSOFT = {"opsets": [helper.make_opsetid("com.microsoft", 1)]}


class Case:
    """A model, the weights that must lose positions (and along which axis), and where it can run."""

    def __init__(self, model: ModelProto, *free: tuple[str, int], runtime: bool = True) -> None:
        self.model = model
        self.free = free
        self.runtime = runtime


def check_case(built: Case, seed: int) -> None:
    """What must be free is free, and a random plan gives what masked semantics say."""
    found = trial(built.model, seed)
    groups = {(m.weight, m.axis) for g in found.subject.analysis.groups for m in g.members}
    assert set(built.free) <= groups, [str(f) for f in found.subject.analysis.frozen]
    check_trial(found, seed, runtime=built.runtime)


def image(opset: int = 20, size: int = 6) -> tuple[Graph, str]:
    """A graph with a convolution of 8 channels over an image."""
    g = Graph(opset)
    return g, g.conv(g.input("x", ["batch", 3, size, size]), "a", 3, 8)


def sequence(opset: int = 20, width: int = 8, **fields: Any) -> tuple[Graph, str]:
    """A graph with a linear layer over a sequence."""
    g = Graph(opset, **fields)
    return g, g.linear(g.input("x", ["batch", 5, 6]), "a", 6, width)


def built(
    g: Graph, y: str, channels: int, *free: tuple[str, int], linear: bool = False, **fields: Any
) -> Case:
    """The model with a last layer."""
    runtime = fields.pop("runtime", True)
    z = g.linear(y, "z", channels, 3) if linear else g.conv(y, "z", channels, 3)
    return Case(
        g.build(z, **fields),
        ("a.weight", 1 if linear else 0),
        ("z.weight", 0 if linear else 1),
        *free,
        runtime=runtime,
    )

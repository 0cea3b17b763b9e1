"""Where the operands of a graph's nodes have to be: numbers that say how on the CPU, data on the GPU.

Computations on sizes alone stay on the CPU, and so do operands that an operator reads as numbers (shapes,
axes, counts).  Nothing of them waits for the GPU then, and a CUDA graph can be captured of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from onnx import NodeProto

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.reference.onnx_run import Default, Hook, Program, Runner

_REDUCTIONS = (
    "ReduceSum", "ReduceProd", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip

#: operands of operators of the default domain that are read as numbers
NUMBERS: Mapping[str, frozenset[int]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *_REDUCTIONS, "Reshape", "Expand", "Tile", "Split", "Squeeze", "Unsqueeze", "TopK", "Trilu",
                "OneHot", "CumSum", "Upsample", "CenterCropPad", "AffineGrid", "SequenceAt", "SequenceErase",
            ),
            frozenset({1}),
        ),
        "ConstantOfShape": frozenset({0}),
        "Range": frozenset({0, 1, 2}),
        "Slice": frozenset({1, 2, 3, 4}),
        "Pad": frozenset({1, 2, 3}),
        "Resize": frozenset({1, 2, 3}),
        "Dropout": frozenset({1, 2}),
        "Col2Im": frozenset({1, 2}),
        "SequenceInsert": frozenset({2}),
    }
)  # fmt: skip

#: operators that read no numbers of their operand, wherever it is
_ASKING = ("Shape", "Size")

_CPU = torch.device("cpu")


class Placed:
    """A model on a GPU, node by node.  Raises ``ValueError`` for one with control flow."""

    def __init__(self, file: OnnxFile, device: torch.device) -> None:
        found = Runner(file, cache=False)
        if found.program.bodies:
            raise ValueError("bodies of control flow read values of the graph wherever they are")
        self.device = device
        here = set(_numbers_of(found.program))
        constants = ((n, found.constant(n)) for n in found.program.constants if n not in here)
        self.runner = Runner(
            file,
            weights={name: value.to(device) for name, value in constants if isinstance(value, torch.Tensor)},
        )
        self._sizes = self.runner.sizes
        self._there: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._captured: list[torch.Tensor] = []  # what CUDA graphs read must not be freed

    def run(self, feeds: Mapping[str, torch.Tensor], hook: Hook | None = None) -> dict[str, Any]:
        """The graph's outputs on the GPU; ``hook`` sees every node with its operands in place."""
        there = {name: value.to(self.device) for name, value in feeds.items()}
        found = self.runner.run(there, hook=partial(self._placed, hook))
        return {name: moved(value, self.device) for name, value in found.items()}

    def _placed(
        self, hook: Hook | None, node: NodeProto, index: int, values: list[Any], default: Default
    ) -> tuple[Any, ...]:
        """The hook of the runner."""
        if hook is not None:
            default = partial(_hooked, hook, node, index, default)
        if self._sizes.get(node.output[0], False):
            with _CPU:
                return default(values if node.op_type in _ASKING else [moved(v, _CPU) for v in values])
        numbers = _numbers(node)
        with self.device:
            return default(
                [
                    moved(value, _CPU) if place in numbers else self._data(name, value)
                    for place, (name, value) in enumerate(zip(node.input, values, strict=True))
                ]
            )

    def _data(self, name: str, value: Any) -> Any:
        """A value on the GPU; constants, and what sizes make as they did before, are moved once."""
        if isinstance(value, list):
            return [self._data(f"{name}[{place}]", item) for place, item in enumerate(value)]
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return value
        here, there = self._there.get(name, (None, None))
        if here is None or there is None or not (here is value or _same(here, value)):
            here, there = self._there[name] = value, value.to(self.device)
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(there)
        return there


def _numbers(node: NodeProto) -> frozenset[int]:
    """The operands that a node reads as numbers."""
    return NUMBERS.get(node.op_type, frozenset()) if node.domain in ("", "ai.onnx") else frozenset()


def _numbers_of(program: Program) -> Iterator[str]:
    """What is read on the CPU: operands of computations on sizes, and numbers of the others."""
    for step in program.steps:
        numbers = _numbers(step.node)
        for place, name in enumerate(step.node.input):
            if step.native or place in numbers:
                yield name


def _hooked(hook: Hook, node: NodeProto, index: int, default: Default, values: list[Any]) -> tuple[Any, ...]:
    return hook(node, index, values, default)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.allclose(a, b, 0, 0, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or those in a list, on a device; anything else as it is."""
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value

"""What integer weights of PyTorch programs stand for, so that their magnitudes can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparsecc.fx.capture import Program
from sparsecc.fx.ops import aten_name, bind
from sparsecc.fx.spec import Bound

_DECODERS = (
    "quantized_decomposed.dequantize_per_tensor",
    "quantized_decomposed.dequantize_per_channel",
    "quantized_decomposed.dequantize_per_channel_group",
)


def coded(program: Program) -> dict[str, Node]:
    """Buffers that a dequantisation reads, and no parameters: the node by name.  Several uses: the first."""
    found: dict[str, Node] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or aten_name(node.target) not in _DECODERS:
            continue
        source = node.args[0]
        name = program.weight_of.get(source.name) if isinstance(source, Node) else None
        if name is not None and name not in program.parameters:
            found.setdefault(name, node)
    return found


def decoded(program: Program, decoder: Node, numbers: torch.Tensor) -> torch.Tensor:
    """(integers - zero points) * scales; integers whose scales are computed count as they are."""
    bound = bind(decoder)
    scale = _stored(program, bound.get("scales", bound.get("scale")))
    zero = _stored(program, bound.get("zero_points", bound.get("zero_point")))
    real = numbers.float()
    if scale is None:
        return real
    if zero is not None:
        real = real - _along(zero.float(), real, bound)
    return real * _along(scale.float(), real, bound)


def _stored(program: Program, value: Any) -> torch.Tensor | None:
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    name = program.weight_of.get(value.name) if isinstance(value, Node) else None
    return None if name is None else program.weights[program.tied.get(name, name)].detach()


def _along(entries: torch.Tensor, real: torch.Tensor, bound: Bound) -> torch.Tensor:
    """Entries of an axis, or of groups along the last one, in a shape that goes with the whole tensor."""
    if "group_size" in bound:
        return entries.reshape(len(real), -1).repeat_interleave(bound["group_size"], dim=1)
    axis: int | None = bound.get("axis")
    if axis is None or entries.numel() == 1:
        return entries.reshape(())
    return entries.reshape([-1 if d == axis % real.dim() else 1 for d in range(real.dim())])

"""What integer weights of PyTorch programs stand for, so that their magnitudes can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparsecc.fx.capture import Program
from sparsecc.fx.ops import aten_name, bind

_DECODERS = ("quantized_decomposed.dequantize_per_tensor", "quantized_decomposed.dequantize_per_channel")


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
        real = real - _along(zero.float(), real, bound.get("axis"))
    return real * _along(scale.float(), real, bound.get("axis"))


def _stored(program: Program, value: Any) -> torch.Tensor | None:
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    name = program.weight_of.get(value.name) if isinstance(value, Node) else None
    return None if name is None else program.weights[program.tied.get(name, name)].detach()


def _along(entries: torch.Tensor, real: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Entries of an axis in a shape that goes with the whole tensor."""
    if axis is None or entries.numel() == 1:
        return entries.reshape(())
    return entries.reshape([-1 if d == axis % real.dim() else 1 for d in range(real.dim())])

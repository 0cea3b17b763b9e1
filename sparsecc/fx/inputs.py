"""Inputs to check a captured PyTorch model with, made from its example inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from sparsecc.fx.capture import Program, _reorder_kwargs
from sparsecc.graph import View


def synthesised(
    program: Program, view: View, seed: int, variant: int, *, held: bool = False
) -> tuple[list[Any], str]:
    """Flat inputs and their description.

    Seed 0 of variant 0 is the example.  Otherwise floats are normal with the example's mean and
    deviation, integers that index an axis of size n are uniform below n, and other integers and
    booleans are drawn from the example's values (from three axes on, whole vectors of the last).
    Variant 1 adds one to every dynamic size that allows it.  ``held``: integers and booleans are always the
    example's, and so are the sizes.
    """
    variant = 0 if held else variant
    examples = _examples(program)
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    sizes = _sizes(program, variant)
    limits = dict(_index_limits(view))
    generator = torch.Generator().manual_seed(seed)
    leaves: list[Any] = []
    words: list[str] = []
    for name, example in zip(program.inputs, examples, strict=True):
        if not isinstance(example, torch.Tensor):
            leaves.append(example)
            continue
        shape = _shape(nodes[name], sizes)
        given = held and not example.is_floating_point()
        if (given or (seed == 0 and variant == 0)) and tuple(example.shape) == shape:
            leaves.append(example.detach().clone())
            words.append(f"{name}: the example {list(shape)}")
        else:
            leaves.append(_drawn(example, shape, limits.get(name), generator))
            words.append(f"{name}: {str(example.dtype)[6:]} {list(shape)}, seed {seed}")
    return leaves, "; ".join(words)


def has_integers(program: Program) -> bool:
    """Whether the model takes tensors of integers or booleans."""
    return any(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in _examples(program))


def _examples(program: Program) -> list[Any]:
    if program.args or program.kwargs:
        tree: Any = (program.args, _reorder_kwargs(program.kwargs, program.in_spec))
    else:
        tree = program.exported.example_inputs
    if tree is None:
        nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.inputs]
        return [torch.zeros(_shape(n, _sizes(program, 0)), dtype=n.meta["val"].dtype) for n in nodes]
    return list(pytree.tree_leaves(tree))


def _sizes(program: Program, variant: int) -> dict[Any, int]:
    """A value for every symbol of a dynamic size: the example's, or one more."""
    ranges = program.exported.range_constraints
    found: dict[Any, int] = {}
    for node in program.graph.nodes:
        fake = node.meta.get("val") if node.op == "placeholder" else None
        for size in getattr(fake, "shape", ()):
            if isinstance(size, int):
                continue
            for symbol in size.node.expr.free_symbols:
                hint = (
                    size.node.shape_env.backed_var_to_val.get(symbol)
                    if hasattr(size.node.shape_env, "backed_var_to_val")
                    else size.node.shape_env.var_to_val.get(symbol)
                )
                value = max(int(hint), 2) if hint is not None else 2
                allowed = ranges.get(symbol)
                upper = int(allowed.upper) if allowed is not None and allowed.upper.is_Integer else 2**31
                if variant:
                    value = value + 1 if value + 1 <= upper else max(value - 1, 1)
                found[symbol] = value
    return found


def _shape(node: Node, sizes: dict[Any, int]) -> tuple[int, ...]:
    shape = node.meta["val"].shape
    return tuple(n if isinstance(n, int) else int(n.node.expr.xreplace(sizes)) for n in shape)


def _index_limits(view: View) -> Iterator[tuple[str, int]]:
    """Input name -> size of the axis that it looks up directly."""
    for call in view.calls:
        if call.op == "index" and call.inputs[1] is not None and call.inputs[1].kind == "input":
            source = call.inputs[0]
            if source is not None:
                yield call.inputs[1].name, source.shape[call.attrs["dim"]]


def _drawn(
    example: torch.Tensor, shape: tuple[int, ...], limit: int | None, generator: torch.Generator
) -> torch.Tensor:
    if example.is_floating_point():
        sample = example.detach().double()
        usable = sample.numel() > 1 and sample.device.type != "meta"
        mean, deviation = (sample.mean(), sample.std()) if usable else (torch.zeros(()), torch.ones(()))
        if not deviation > 0:
            mean, deviation = mean * 0, torch.ones(())
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (normal * deviation + mean).to(example.dtype)
    if limit is not None:
        return torch.randint(0, limit, shape, generator=generator, dtype=example.dtype)
    flat = example.detach().reshape(-1, _whole(example, shape))
    chosen = torch.randint(0, max(len(flat), 1), (math.prod(shape) // flat.shape[1],), generator=generator)
    return flat[chosen].reshape(shape)


def _whole(example: torch.Tensor, shape: tuple[int, ...]) -> int:
    """How many integers are drawn together: boxes of [N,L,4] mean nothing in parts."""
    return shape[-1] if example.dim() > 2 and example.shape[-1] == shape[-1] and example.numel() else 1

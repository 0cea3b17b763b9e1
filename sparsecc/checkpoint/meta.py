"""Modules without values, and how one is captured and run with values from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from sparsecc.checkpoint.shards import Shards
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.fx.subject import TorchSubject


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have parameters without values; their buffers have values.

    Under ``torch.device("meta")`` tables that no checkpoint holds, such as RoPE's frequencies, would have
    none either.
    """
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(
                param.detach().to("meta"), requires_grad=param.requires_grad
            )

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Weights(Mapping[str, torch.Tensor]):
    """Values of a program's weights: from the checkpoint, and those that a module's buffers have."""

    def __init__(
        self, names: Mapping[str, torch.Tensor], shards: Shards, own: Mapping[str, torch.Tensor]
    ) -> None:
        self.like = dict(names)
        self.shards = shards
        self.own = dict(own)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.own:
            return self.own[name]
        found, like = self.shards[name], self.like[name]
        return found if found.dtype == like.dtype else found.to(like.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def meta_subject(model: nn.Module, example_inputs: Any, shards: Shards) -> TorchSubject:
    """The model captured without values, which come from the checkpoint when something runs.

    Raises InvalidOption for parameters that have values, InvalidModel where the checkpoint lacks some or has
    other shapes.
    """
    valued = [n for n, p in model.named_parameters() if not p.is_meta]
    if valued:
        raise InvalidOption(
            f"{valued[0]!r} has a value: make the model inside `with parameters_on_meta():`, so that its "
            "weights are those of the checkpoint"
        )
    empty = copy.deepcopy(model).to("meta")
    on_meta = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, example_inputs)
    subject = TorchSubject(empty, on_meta)
    program = subject.program
    for node in program.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _on_cpu)
    own = {n: b for n, b in model.named_buffers(remove_duplicate=False) if not b.is_meta}
    own |= {n: t for n, t in program.weights.items() if not t.is_meta}
    _check(program.weights, shards, own)
    program.weights = Weights(program.weights, shards, own)  # type: ignore[assignment]
    return subject


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value


def _check(names: Mapping[str, torch.Tensor], shards: Shards, own: Mapping[str, torch.Tensor]) -> None:
    wanted = {n: tuple(t.shape) for n, t in names.items() if n not in own}
    lacking = sorted(n for n in wanted if n not in shards)
    if lacking:
        raise InvalidModel(
            f"{shards.path}: holds no {', '.join(lacking[:5])}; give the checkpoint of this model, and make "
            "the model inside `with parameters_on_meta():` so that its buffers have values"
        )
    wrong = [n for n, shape in wanted.items() if shards.entries[n].shape != shape]
    if wrong:
        raise InvalidModel(
            f"{shards.path}: {wrong[0]} has shape {list(shards.entries[wrong[0]].shape)}, the model's "
            f"{list(wanted[wrong[0]])}"
        )

"""Modules without values, and how one is captured, run and cut with values from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from sparsecc.axes.analysis import Keeps
from sparsecc.axes.terms import Kept
from sparsecc.checkpoint.configuration import configured, document
from sparsecc.checkpoint.shards import Shards
from sparsecc.errors import InvalidModel, InvalidOption, UnsupportedModel
from sparsecc.fx.capture import Program, split_inputs
from sparsecc.fx.inputs import synthesised
from sparsecc.fx.module import Diverged, accepted
from sparsecc.fx.subject import AppliedTorch, TorchSubject
from sparsecc.fx.weights import renamed
from sparsecc.plan import Plan


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


class EmptySubject(TorchSubject):
    """A model captured without values; ``stored`` names weights and buffers that have theirs on disk.

    Applying a plan gives a module without values.  Raises InvalidOption for parameters that have values.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, stored: Container[str]) -> None:
        valued = [n for n, p in model.named_parameters() if not p.is_meta]
        if valued:
            raise InvalidOption(
                f"{valued[0]!r} has a value: make the model inside `with parameters_on_meta():`, so that its "
                "weights are those of the checkpoint"
            )
        super().__init__(copy.deepcopy(model).to("meta"), pytree.tree_map(_to_meta, example_inputs))
        program = self.program
        for node in program.graph.nodes:
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _on_cpu)
        state = model.state_dict()
        buffers = model.named_buffers(remove_duplicate=False)
        own = {n: b for n, b in buffers if not b.is_meta and not (n in state and n in stored)}
        self.own = own | {n: t for n, t in program.weights.items() if not t.is_meta}
        self.blank = {n: self.own.get(n, t) for n, t in program.weights.items()}

    def apply(self, plan: Plan, kept: Mapping[str, Kept]) -> AppliedTorch:
        """The plan applied to shapes alone: no weight is read."""
        shapes = copy.copy(self)
        shapes.program = replace(self.program, weights=self.blank)
        return super(EmptySubject, shapes).apply(plan, kept)


class MetaSubject(EmptySubject):
    """A model captured without values, which come from the checkpoint when something runs.

    The class and the configuration of what a plan makes are found as for a model in memory; what
    ``from_pretrained`` makes of a configuration is told from the graph and the buffers.  Raises InvalidModel
    where the checkpoint lacks weights or has other shapes.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, shards: Shards) -> None:
        super().__init__(model, example_inputs, shards)
        self.examples = split_inputs(example_inputs)
        self.shards = shards
        _check(self.program.weights, shards, self.own)
        weights = Weights(self.program.weights, shards, self.own)
        self.program.weights = weights  # type: ignore[assignment]

    def inputs(self, seed: int, variant: int) -> tuple[list[Any], str]:
        """Flat inputs like the example's."""
        args, kwargs = self.examples
        return synthesised(replace(self.program, args=args, kwargs=kwargs), self.view, seed, variant)

    @property
    def has_values(self) -> bool:
        """What a configuration gives can be compared without values."""
        return True

    def check_loaded(self, edited: nn.Module, slim: Program, keeps: Keeps, plan: Plan) -> None:
        """Raise Diverged unless the class, made from the configuration as it will be on disk, has the edited
        graph and, beside the weights that are on disk, the edited buffers.
        """
        assert self.program.module is not None
        with parameters_on_meta():
            made = configured(edited, document(self.shards.path, self.program.module, edited))
        buffers = dict(made.named_buffers())
        accepted(made.to("meta"), self.program, slim, self.view, keeps, plan)
        for old, new in renamed(plan, slim.weights).items():
            buffer, wanted = buffers.get(new), slim.weights[old]
            if buffer is not None and not wanted.is_meta and not torch.equal(buffer, wanted):
                raise Diverged(new, "has other values when the model is built from its config")


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value


def _check(names: Mapping[str, torch.Tensor], shards: Shards, own: Mapping[str, torch.Tensor]) -> None:
    wanted = {n: tuple(t.shape) for n, t in names.items() if n not in own}
    lacking = sorted(n for n in wanted if n not in shards)
    if made := [n for n in lacking if "lifted_tensor" in n]:
        raise UnsupportedModel(
            f"{made[0].partition('lifted_tensor')[0]}forward makes constants while it runs, whose values are "
            "not known without a device; prune the model in memory"
        )
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

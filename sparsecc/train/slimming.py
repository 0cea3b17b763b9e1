"""A smaller model in the middle of training, with the same optimizer: its state is cut by the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsecc.errors import InvalidOption, PlanConflict
from sparsecc.fx.capture import unwrap
from sparsecc.fx.weights import WeightActions, renamed, substituted, taken
from sparsecc.plan import Plan, Take
from sparsecc.train.optimizers import unwrapped
from sparsecc.train.shards import is_sharded
from sparsecc.train.sites import parameters


def slim(
    model: nn.Module, optimizer: Any, plan: Plan, example_inputs: Any = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model that a plan makes, and the optimizer that was given, which now moves that model.

    The model given is left as it was, but nothing moves it any more.  The optimizer keeps its class,
    hyper-parameters, parameter groups and hooks, so that learning-rate schedulers go on; everything that
    it remembers by element, and gradients, are cut like the parameters.  ``example_inputs`` are needed
    only where the class cannot express the plan.

    Raises PlanConflict where the plan is for another model, InvalidOption for state that cannot be cut;
    then nothing was changed.
    """
    inner, _ = unwrap(model)
    require_plain(inner)
    narrow = plan.apply(inner, example_inputs)
    return narrow, rebind(optimizer, inner, narrow, plan)


def require_plain(model: nn.Module) -> None:
    """Raise InvalidOption where parameters are sharded over processes."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise InvalidOption(
                f"{name} is sharded over processes, and shards of another width are another layout; gather "
                "the state (torch.distributed.checkpoint.state_dict with full_state_dict=True), slim the "
                "plain model, and shard the result"
            )


def rebind(optimizer: Any, old: nn.Module, new: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """Let an optimizer move the parameters of a narrowed model instead of those of the original."""
    held: torch.optim.Optimizer = unwrapped(optimizer)
    heirs = _heirs(old, new, plan)
    actions = WeightActions(plan)
    groups: list[list[Any]] = []
    states: dict[Any, dict[str, Any]] = {}
    gradients: dict[nn.Parameter, torch.Tensor] = {}
    for group in held.param_groups:
        left = []
        for parameter in group["params"]:
            names, heir = heirs.get(id(parameter), ((), parameter))
            if heir is None:
                continue
            left.append(heir)
            cut = _Cut(names, parameter, heir, actions)
            if parameter in held.state:
                states[heir] = {k: cut.state(k, v) for k, v in held.state[parameter].items()}
            if parameter.grad is not None and heir is not parameter:
                gradients[heir] = cut.tensor("gradient", parameter.grad)
        groups.append(left)
    for group, left in zip(held.param_groups, groups, strict=True):
        group["params"] = left
    held.state.clear()
    held.state.update(states)
    for heir, gradient in gradients.items():
        heir.grad = gradient
    return held


def _heirs(
    old: nn.Module, new: nn.Module, plan: Plan
) -> dict[int, tuple[tuple[str, ...], nn.Parameter | None]]:
    """By id of an old parameter: its names, and the new parameter (None where it is gone)."""
    before, after = parameters(old), parameters(new)
    names = renamed(plan, before)
    out: dict[int, tuple[tuple[str, ...], nn.Parameter | None]] = {}
    for name, parameter in before.items():
        missing = name in names and names[name] not in after
        if missing and plan.form == "graph":  # nothing reads it, so it is not part of the graph
            del names[name]
        elif missing:
            raise PlanConflict(
                f"the narrowed model has no parameter {names[name]!r}, so its optimizer state has no place; "
                "apply the plan to the model that it was planned for"
            )
        known = out.get(id(parameter))
        heir = after[names[name]] if name in names else None if known is None else known[1]
        out[id(parameter)] = ((*(known[0] if known else ()), name), heir)
    return out


class _Cut:
    """Cuts what belongs to one parameter as the parameter was cut."""

    def __init__(
        self, names: Sequence[str], old: torch.Tensor, new: torch.Tensor, actions: WeightActions
    ) -> None:
        self.old, self.new, self.actions = old, new, actions
        self.name = next((n for n in names if actions.touches(n)), names[0] if names else "")
        self.takes: list[Take] = actions.takes.get(self.name, [])

    def state(self, key: str, value: Any) -> Any:
        """A part of the optimizer's state: tensors by element are cut, numbers stay."""
        if not isinstance(value, torch.Tensor):
            if isinstance(value, (list, tuple, dict)) and len(value):
                raise InvalidOption(
                    f"optimizer state {key!r} of {self.name!r} is a {type(value).__name__}; only tensors and "
                    "numbers can be cut.  Make a new optimizer for the slimmed model"
                )
            return value
        return value if value.numel() == 1 or self.old is self.new else self.tensor(key, value)

    def tensor(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape; an axis of size 1 stands for all positions of the axis."""
        shape = self.old.shape
        fits = len(value.shape) == len(shape) and all(
            n in (1, m) for n, m in zip(value.shape, shape, strict=True)
        )
        if not fits:
            raise InvalidOption(
                f"optimizer state {key!r} of {self.name!r} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(shape)}: it is not known how to cut it.  Make a new optimizer for the slimmed model"
            )
        value = value.detach()
        if self.name in self.actions.valued and value.shape == shape:
            value = substituted(
                Plan(dialect="torch", actions=_masks(self.actions, self.name)), self.name, value
            )
        out = taken(value, [t for t in self.takes if value.shape[t.axis] == t.size])
        return out.clone() if out.data_ptr() == value.data_ptr() else out


def _masks(actions: WeightActions, name: str) -> tuple[Any, ...]:
    from sparsecc.plan import Mask

    return tuple(m for m in actions.plan.of(Mask) if m.weight == name)

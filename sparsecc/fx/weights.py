"""Applies the weight actions of a plan to tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sparsecc.errors import PlanConflict
from sparsecc.fx.capture import find_ties
from sparsecc.plan import Bypass, Fold, Mask, Plan, Renumber, Replace, Take, Write


class Scratch:
    """Memory for what is thrown away again: new pages cost as much as what is written into them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._tensors: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory in the CPU's, with any contents, until the next call."""
        found = self._tensors.get((shape, dtype))
        if found is None:
            count = math.prod(shape) * dtype.itemsize
            if self._buffer.numel() < count:
                self._tensors.clear()
                self._buffer = torch.empty(count, dtype=torch.uint8)
            found = self._tensors[shape, dtype] = self._buffer[:count].view(dtype).view(shape)
        return found


def taken(tensor: torch.Tensor, takes: Iterable[Take], scratch: Scratch | None = None) -> torch.Tensor:
    """A new tensor with the kept positions; what is dropped first is what shrinks most."""
    order = sorted(takes, key=lambda t: (len(t.indices) / t.size, t.axis))
    out = tensor
    for count, take in enumerate(order, 1):
        indices = torch.from_numpy(take.indices)
        if scratch is not None and count == 1 < len(order) and tensor.device.type == "cpu":
            shape = (*out.shape[: take.axis], len(indices), *out.shape[take.axis + 1 :])
            out = torch.index_select(out, take.axis, indices, out=scratch.tensor(shape, out.dtype))
        else:
            out = out.index_select(take.axis, indices.to(tensor.device))
    return out


def _in_form_of(tensor: torch.Tensor, values: Any) -> torch.Tensor:
    """New values in the form of the weight that they replace."""
    return torch.from_numpy(values.copy()).to(tensor).reshape(tensor.shape)


def substituted(plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight with the plan's values and masks put in, at its original size."""
    for write in plan.of(Write):
        if write.weight == name:
            tensor = _in_form_of(tensor, write.values)
    for mask in plan.of(Mask):
        if mask.weight == name:
            if mask.keep.shape != tuple(tensor.shape):
                raise PlanConflict(
                    f"the plan masks {name!r} of shape {mask.keep.shape}, which here has shape "
                    f"{tuple(tensor.shape)}; apply it to the model that it was planned for"
                )
            keep = torch.from_numpy(mask.keep).to(tensor.device)
            tensor = torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    return tensor


class WeightActions:
    """The weight actions of a plan, indexed by weight."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.scratch = Scratch()
        self.valued = {a.weight for a in (*plan.of(Write), *plan.of(Mask))}
        self.takes: dict[str, list[Take]] = {}
        self.uses: dict[tuple[str, str, int], list[Take]] = {}
        self.numbers: dict[str, Renumber] = {}
        self.own_numbers: dict[tuple[str, str, int], Renumber] = {}
        for action in plan.of(Renumber):
            if action.use is None:
                self.numbers[action.weight] = action
            else:
                self.own_numbers[action.weight, *action.use] = action
                self.uses[action.weight, *action.use] = []
        for take in plan.of(Take):
            if take.use is None:
                self.takes.setdefault(take.weight, []).append(take)
            else:
                self.uses.setdefault((take.weight, *take.use), []).append(take)

    def touches(self, name: str) -> bool:
        """Whether the weight changes."""
        return name in self.valued or name in self.takes or name in self.numbers

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The edited weight; the same tensor where nothing changes."""
        tensor = tensor.detach()
        if name in self.valued:
            tensor = substituted(self.plan, name, tensor)
        if name in self.numbers:
            tensor = _in_form_of(tensor, self.numbers[name].values)
        return taken(tensor, self.takes.get(name, ()), self.scratch)

    def edit_use(self, use: tuple[str, str, int], tensor: torch.Tensor) -> torch.Tensor:
        """The version of a constant that one of its uses, a key of ``uses``, gets."""
        numbers = self.own_numbers.get(use)
        tensor = tensor.detach() if numbers is None else _in_form_of(tensor.detach(), numbers.values)
        return taken(tensor, self.uses[use])


def exact_weights(plan: Plan, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Written and stored weights of a lossless plan in float64, as they were before they were rounded.

    Slimming is exact where numbers are; its float64 check is about the plan and not about rounding,
    which the check in the model's own dtype covers.  ``weights`` are those of the result: only those
    that are the rounded ones are told.
    """
    if plan.mode != "slim":
        return {}
    actions = WeightActions(plan)
    wide = {
        w.weight: actions.edit(w.weight, torch.from_numpy(w.values.copy()).double()) for w in plan.of(Write)
    }
    rounded = dict(wide)
    for fold in plan.of(Fold):
        wide[fold.parameter] = torch.from_numpy(fold.exact.copy())
        rounded[fold.parameter] = torch.from_numpy(fold.values.copy())
    return {
        name: exact
        for name, exact in wide.items()
        if (stored := weights.get(name)) is not None
        and torch.equal(rounded[name].to(stored.dtype), stored.detach().cpu())
    }


def edited_weights(plan: Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A new state dict: planned weights edited, ties kept, the rest shared with the input.

    Raises PlanConflict where the plan cuts one constant differently for several nodes, which a
    state dict cannot express, and where shapes differ from those that were planned for.
    """
    actions = WeightActions(plan)
    if folded := [f.parameter for f in plan.of(Fold)]:
        raise PlanConflict(
            f"{', '.join(folded)}: computed by the model from other weights, which a state dict cannot say; "
            "use the model"
        )
    if actions.uses:
        names = ", ".join(sorted({name for name, _, _ in actions.uses}))
        raise PlanConflict(
            f"{names}: cut differently for several nodes, which a state dict cannot hold; use the model"
        )
    ties = find_ties(state)
    plan.check_shapes({n: tuple(state[n].shape) for n in plan.shapes if n in state})
    after = renamed(plan, state)
    done: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name not in after:
            continue
        first = ties.get(name, name)
        if first not in done:
            planned = next((n for n in (first, name) if actions.touches(n)), None)
            done[first] = tensor if planned is None else actions.edit(planned, tensor)
        done[name] = done[first]
    return {new: done[old] for old, new in after.items()}


def under(name: str, module: str) -> bool:
    """Whether a dotted name is that of a module, or of something in it."""
    return name == module or name.startswith(f"{module}.")


def renamed(plan: Plan, names: Iterable[str]) -> dict[str, str]:
    """What weights are called once the plan is applied; those that go with bypassed blocks are left out."""
    replaced = list(plan.of(Replace))
    if not replaced:
        lost = {w for b in plan.of(Bypass) for w in b.weights}
        names = list(names)
        owners = {w.rpartition(".")[0] for w in lost}
        owners -= {
            n.rpartition(".")[0] for n in names if n not in lost and not n.endswith("num_batches_tracked")
        }
        return {n: n for n in names if n not in lost and n.rpartition(".")[0] not in owners}
    holes: dict[str, list[int]] = {}
    for action in replaced:
        if action.by == "nothing":
            parent, _, place = action.module.rpartition(".")
            holes.setdefault(parent, []).append(int(place))
    return {n: _moved(n, holes) for n in names if not any(under(n, a.module) for a in replaced)}


def _moved(name: str, holes: Mapping[str, list[int]]) -> str:
    for parent, places in holes.items():
        if name.startswith(f"{parent}."):
            head, _, rest = name[len(parent) + 1 :].partition(".")
            if head.isdigit():
                return f"{parent}.{int(head) - sum(p < int(head) for p in places)}.{rest}"
    return name

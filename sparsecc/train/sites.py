"""Which parameters get masks, and why others do not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.patterns.layers import layers
from sparsecc.plan import Skip
from sparsecc.selection import selected

#: standard layers, and the axis of their weight that sums run along
_AXES: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Linear, 1),
    (nn.Conv1d, 1),
    (nn.Conv2d, 1),
    (nn.Conv3d, 1),
)


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter with a mask; sums run along ``axis``, None where that is not known."""

    name: str
    parameter: nn.Parameter
    axis: int | None

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter, also where it is sharded."""
        return self.parameter.shape

    @property
    def size(self) -> int:
        """Number of elements of the whole parameter."""
        return self.parameter.numel()


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False))


def from_analysis(
    model: nn.Module, analysis: Analysis, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Site], list[Skip]]:
    """The weights that sums of products read (``patterns.layers``), and the others with the reason."""
    named, why_not = parameters(model), selected(analysis, include, exclude)
    sites: list[Site] = []
    skips: list[Skip] = []
    for layer in layers(analysis):
        reason = layer.why or why_not(layer.weight)
        if not reason and layer.weight not in named:
            reason = "the model that is trained has no parameter of that name"
        if reason:
            skips.append(Skip(layer.weight, reason))
        else:
            sites.append(Site(layer.weight, named[layer.weight], layer.axis))
    return sites, skips


def from_names(model: nn.Module, names: Iterable[str], analysis: Analysis | None = None) -> list[Site]:
    """Exactly these parameters; raises InvalidOption for a name that is none.

    The axis of sums is what the graph says, or without one what standard layers have.
    """
    if isinstance(names, str):
        raise InvalidOption(f"weights={names!r}: give a list of names of parameters")
    named = parameters(model)
    found = layers(analysis) if analysis is not None else ()
    axes = {layer.weight: layer.axis for layer in found if not layer.why}
    out: dict[int, Site] = {}
    for name in names:
        if name not in named:
            near = difflib.get_close_matches(name, named, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(list(named)[:5])}, ..."
            raise InvalidOption(f"weights: the model has no parameter {name!r}; {hint}")
        parameter = named[name]
        if not parameter.is_floating_point():
            raise InvalidOption(f"weights: {name!r} holds {parameter.dtype}; only floats can be masked")
        out.setdefault(id(parameter), Site(name, parameter, axes.get(name, _summed(model, name))))
    return list(out.values())


def _summed(model: nn.Module, name: str) -> int | None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf != "weight" or getattr(module, "groups", 1) != 1:
        return None
    return next((axis for kind, axis in _AXES if type(module) is kind), None)


def require_held(sites: Sequence[Site], optimizer: torch.optim.Optimizer) -> None:
    """Raise InvalidOption for trainable weights that another optimizer moves, or none."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [s.name for s in sites if s.parameter.requires_grad and id(s.parameter) not in held]
    if missing:
        raise InvalidOption(
            f"the optimizer does not hold {', '.join(missing[:5])}{' and others' if missing[5:] else ''}; "
            "make it of the model's present parameters (after wrapping and sharding), or exclude these"
        )


def shapes(sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
    """Shapes by name."""
    return {s.name: tuple(s.shape) for s in sites}

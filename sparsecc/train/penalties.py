"""Regularisers at work: their gradients before the optimizer's step, their proximal steps after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from sparsecc.axes.analysis import Analysis
from sparsecc.errors import InvalidOption
from sparsecc.train.optimizers import rates
from sparsecc.train.regularisers import Regulariser, Scope
from sparsecc.train.shards import is_sharded, local
from sparsecc.train.sites import Site, parameters
from sparsecc.train.structured import GroupMap, group_maps

Place = Literal["gradient", "loss"]


class Penalties:
    """The regularisers of a Sparsifier; ``place`` says whether gradients are added here or by the loss."""

    def __init__(
        self,
        regularisers: Iterable[Regulariser],
        place: Place,
        model: nn.Module,
        sites: Sequence[Site],
        analysis: Analysis | None,
    ) -> None:
        if place not in ("gradient", "loss"):
            raise InvalidOption(f"penalties={place!r}: give 'gradient' or 'loss'")
        self.regularisers = tuple(regularisers)
        self.place, self.model, self.sites, self.analysis = place, model, sites, analysis
        for regulariser in self.regularisers:
            if not isinstance(regulariser, Regulariser):
                raise InvalidOption(f"regularisers: {regulariser!r} is none; give L1, GroupLasso or Growing")
        grouped = next((r for r in self.regularisers if r.grouped), None)
        if grouped is not None and analysis is None:
            raise InvalidOption(f"{type(grouped).__name__} needs coupled groups; give example_inputs")
        if grouped is not None and any(is_sharded(s.parameter) for s in sites):
            raise InvalidOption(
                f"{type(grouped).__name__} needs norms over whole parameters, and these are sharded; use "
                "DistributedDataParallel, or L1"
            )

    def begins(self, step: int) -> bool:
        """Whether some regulariser has to know what will go in the end."""
        return any(r.begins(step) for r in self.regularisers)

    @property
    def adds(self) -> bool:
        """Whether gradients are added to those of the loss."""
        return self.place == "gradient" and any(r.by_gradient for r in self.regularisers)

    @cached_property
    def maps(self) -> list[GroupMap]:
        """Coupled groups, where some regulariser looks at them."""
        if self.analysis is None or not any(r.grouped for r in self.regularisers):
            return []
        return group_maps(self.analysis)

    @property
    def seen(self) -> dict[str, nn.Parameter]:
        """The parameters that regularisers look at."""
        known = parameters(self.model)
        named = [weight for m in self.maps for weight, _, _ in m.members]
        return {**{n: known[n] for n in named}, **{s.name: s.parameter for s in self.sites}}

    def total(self, step: int, candidates: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of all penalties, differentiable with respect to the parameters."""
        return self._sum(self.regularisers, self._scope(dict(self.seen), step, candidates))

    def add(self, step: int, candidates: Mapping[str, torch.Tensor]) -> None:
        """Add gradients of penalties to those of the loss."""
        chosen = [r for r in self.regularisers if r.by_gradient]
        if not self.adds:
            return
        owners = {n: p for n, p in self.seen.items() if p.requires_grad}
        with torch.enable_grad():
            leaves = {n: local(p) for n, p in self.seen.items()}
            wanted = [leaves[n].requires_grad_() for n in owners]
            total = self._sum(chosen, self._scope(leaves, step, candidates))
            if not total.requires_grad:
                return
            found = torch.autograd.grad(total, wanted, allow_unused=True)
        for parameter, gradient in zip(owners.values(), found, strict=True):
            if gradient is not None and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if gradient is not None and parameter.grad is not None:
                local(parameter.grad).add_(gradient)

    def shrink(
        self,
        step: int,
        candidates: Mapping[str, torch.Tensor],
        latents: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Take the proximal steps, on latent weights where there are some."""
        chosen = [r for r in self.regularisers if not r.by_gradient]
        if not chosen:
            return
        seen, every = self.seen, rates(optimizer)
        tensors = {n: latents.get(n, local(p)) for n, p in seen.items()}
        known = {n: every[id(p)] for n, p in seen.items() if id(p) in every}
        scope = self._scope(tensors, step, candidates, known)
        for regulariser in chosen:
            regulariser.shrink(scope)

    def _scope(
        self,
        tensors: Mapping[str, torch.Tensor],
        step: int,
        candidates: Mapping[str, torch.Tensor],
        known: Mapping[str, float] | None = None,
    ) -> Scope:
        masked = {s.name: tensors[s.name] for s in self.sites}
        return Scope(masked, tensors, step, self.maps, candidates, known or {})

    def _sum(self, chosen: Iterable[Regulariser], scope: Scope) -> torch.Tensor:
        found = [term for r in chosen if (term := r.penalty(scope)) is not None]
        return torch.stack(found).sum() if found else torch.zeros(())

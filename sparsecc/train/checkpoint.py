"""A Sparsifier's state as tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sparsecc.errors import InvalidOption
from sparsecc.train import storage
from sparsecc.train.shards import is_sharded, joined, part
from sparsecc.train.sites import Site
from sparsecc.train.snapshots import Snapshot
from sparsecc.train.state import State, Tensors


def dumped(state: State, sites: Sequence[Site], description: Mapping[str, Any]) -> Tensors:
    """One flat dict: ``mask.<parameter>`` and so on, ``group.<group>``, ``generator``, ``json``."""
    out: Tensors = {}
    for kind, tensors in state.kinds().items():
        for site in sites:
            if site.name in tensors:
                whole = joined(tensors[site.name], site.parameter)
                out[f"{kind}.{site.name}"] = whole.detach().clone().contiguous()
    out |= {f"group.{n}": torch.from_numpy(m.copy()) for n, m in state.groups.items()}
    out["generator"] = state.generator.get_state()
    document: dict[str, Any] = {"format": 1, "count": state.count, **description}
    if state.saved is not None:
        if any(is_sharded(s.parameter) for s in sites):
            raise InvalidOption(
                "a snapshot of sharded parameters cannot be stored; set sparsifier.saved = None first"
            )
        saved = state.saved
        inside: Tensors = {}
        tree = [saved.step, saved.tensors, saved.optimizer, saved.scheduler]
        document["snapshot"] = storage.taken_apart(tree, inside, "snapshot")
        out |= {n: t.detach().clone().contiguous() for n, t in inside.items()}
    out[storage.JSON] = storage.packed(document)
    return out


def load(
    state: State, sites: Sequence[Site], description: Mapping[str, Any], given: Mapping[str, torch.Tensor]
) -> None:
    """Take over what ``dumped`` gave; raises InvalidOption, with nothing changed, where it does not fit."""
    document = storage.unpacked(given)
    for name, value in description.items():
        if document.get(name) != value:
            raise InvalidOption(
                f"the state was saved with {name}={document.get(name)}, and here it is {value}"
            )
    found = {kind: _of_kind(kind, sites, given) for kind in state.kinds()}
    for kind, tensors in state.kinds().items():
        if kind != "candidate" and found[kind].keys() != tensors.keys():
            differ = ", ".join(sorted(found[kind].keys() ^ tensors.keys())[:5])
            raise InvalidOption(f"the state is for other weights: {kind} of {differ} stands on one side only")
    prefix = "group."
    groups = {n.removeprefix(prefix): t.cpu().numpy() for n, t in given.items() if n.startswith(prefix)}
    if {n: len(m) for n, m in groups.items()} != {n: len(m) for n, m in state.groups.items()}:
        raise InvalidOption(
            "the state is for other coupled groups; make the Sparsifier as it was made before"
        )
    state.masks, state.latents = found["mask"], found["latent"]
    state.moved, state.candidates = found["moved"], found["candidate"]
    state.groups = {n: m.astype(bool) for n, m in groups.items()}
    state.stays = {s.name: int(given[f"mask.{s.name}"].sum()) for s in sites}
    state.generator.set_state(given["generator"].cpu())
    state.count = int(document["count"])
    snapshot = document.get("snapshot")
    state.saved = None if snapshot is None else Snapshot(*storage.put_together(snapshot, given))


def _of_kind(kind: str, sites: Sequence[Site], given: Mapping[str, torch.Tensor]) -> Tensors:
    known = {s.name: s for s in sites}
    out = {}
    for key, tensor in given.items():
        if not key.startswith(f"{kind}."):
            continue
        name = key.removeprefix(f"{kind}.")
        site = known.get(name)
        if site is None or tensor.shape != site.shape:
            raise InvalidOption(
                f"the state has a {kind} of {name!r} of shape {tuple(tensor.shape)}, which the weights here "
                "do not have; give it to a Sparsifier of the same model"
            )
        out[name] = part(tensor.to(site.parameter.device).clone(), site.parameter)
    return out

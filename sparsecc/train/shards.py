"""Parameters that are spread over processes (``fully_shard``): whole tensors, and this process's part."""

from __future__ import annotations

from typing import Any

import torch


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this process holds, detached and sharing memory; a plain tensor itself."""
    given: Any = tensor
    found: torch.Tensor = given.to_local() if is_sharded(tensor) else given
    return found.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered where it is sharded; every process has to ask at the same time."""
    given: Any = tensor.detach()
    found: torch.Tensor = given.full_tensor() if is_sharded(tensor) else given
    return found


def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut as ``like`` is; the first process's numbers count."""
    if not is_sharded(like):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    wide = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    sharded: Any = distribute_tensor(wide.contiguous(), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    found: torch.Tensor = sharded.to_local().to(tensor.dtype)
    return found


def joined(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of what ``part`` gave: a process's part of a tensor that is cut as ``like`` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    wide = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    sharded = DTensor.from_local(
        wide,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        shape=like.shape,
        stride=like.stride(),
    )
    found: torch.Tensor = sharded.full_tensor().to(tensor.dtype)
    return found


def agreed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The first process's tensor, in every process of a group; the tensor itself without a group."""
    if group is None:
        return tensor
    import torch.distributed as dist

    wide = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
    dist.broadcast(wide, dist.get_global_rank(group, 0), group=group)
    return wide.to(tensor.dtype)

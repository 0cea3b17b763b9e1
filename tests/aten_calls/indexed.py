"""Calls that read and write by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.aten_calls.site import ALL, LAST, Row, Site, aten, each, numbers, square


def _axis(s: Site) -> int:
    """The channels or any other axis but that of the samples."""
    return int(s.pick((s.channel, *range(1, s.x.dim()))))


def _unique(s: Site, count: int) -> Tensor:
    """Some places along an axis, each at most once: a buffer."""
    many = s.pick(range(1, count + 1))
    return s.net.buffer((torch.arange(many) + s.pick(range(count))) % count)


def _spread(s: Site, places: Tensor, dim: int) -> Tensor:
    """Places along ``dim``, the same for every other position, in the operand's form."""
    shape = [1] * s.x.dim()
    shape[dim] = -1
    sizes = list(s.x.shape)
    sizes[dim] = places.shape[0]
    return places.reshape(shape).expand(sizes)


def _gather(s: Site) -> Any:
    dim = _axis(s)
    return aten.gather(s.x, dim, _spread(s, numbers(s, int(s.x.shape[dim])), dim))


def _take_along(s: Site) -> Any:
    dim = _axis(s)
    return aten.take_along_dim(s.x, _spread(s, numbers(s, int(s.x.shape[dim])), dim), dim)


def _scatter(s: Site, name: str) -> Any:
    dim = _axis(s)
    places = _spread(s, _unique(s, int(s.x.shape[dim])), dim)
    source = torch.cos(aten.gather(s.x, dim, places))
    if name == "scatter_reduce":
        return aten.scatter_reduce.two(s.x, dim, places, source, s.pick(("sum", "amax", "mean", "prod")))
    if name == "scatter" and s.pick((False, True)):
        return aten.scatter.value(s.x, dim, places, 0.3)
    return getattr(aten, name)(s.x, dim, places, source)


def _index_write(s: Site, name: str) -> Any:
    dim = _axis(s)
    places = _unique(s, int(s.x.shape[dim]))
    source = torch.cos(aten.index_select(s.x, dim, places))
    if name == "index_fill":
        return aten.index_fill.int_Scalar(s.x, dim, places, 0.3)
    if name == "index_reduce":
        return aten.index_reduce(s.x, dim, places, source, s.pick(("amax", "mean", "prod")))
    return getattr(aten, name)(s.x, dim, places, source)


def _index_put(s: Site, name: str) -> Any:
    dim = _axis(s)
    places = _unique(s, int(s.x.shape[dim]))
    values = s.pick(
        (lambda: s.net.weight(1)[0], lambda: torch.cos(aten.index_select(s.x, dim, places)).movedim(dim, 0))
    )()
    moved = s.x.movedim(dim, 0)
    made = getattr(aten, name)(moved, [places], values, s.pick((False, True)))
    return made.movedim(0, dim)


def _select_scatter(s: Site) -> Any:
    dim = _axis(s)
    return aten.select_scatter(s.x, torch.cos(s.x.select(dim, 0)), dim, s.pick((0, -1)))


def _slice_scatter(s: Site) -> Any:
    dim = _axis(s)
    start, step = (s.pick((0, 1)) if s.x.shape[dim] > 1 else 0), s.pick((1, 2))
    part = torch.cos(aten.slice.Tensor(s.x, dim, start, None, step))
    return aten.slice_scatter(s.x, part, dim, start, None, step)


def _outer(s: Site) -> Tensor:
    """Every channel by every channel: [N,*,C,C]."""
    return s.x.unsqueeze(-1) * torch.sin(s.x).unsqueeze(-2)


def _diagonal(s: Site, name: str) -> Any:
    offset = s.pick((0, 1, -1)) if s.width > 1 else 0
    if name == "linalg_diagonal":
        return aten.linalg_diagonal(_outer(s), offset=offset)
    return getattr(aten, name)(_outer(s), offset, -2, -1)


def _diag(s: Site) -> Any:
    n = s.width
    return s.pick((lambda: s.x * aten.diag(s.net.weight(n, n)), lambda: s.x @ aten.diag(s.net.weight(n))))()


def _block_diag(s: Site) -> Any:
    first = s.pick(range(s.width))
    parts = [s.net.weight(n, s.pick((1, 2))) for n in (first, s.width - first) if n]
    return s.x @ aten.block_diag(parts)


def _meshgrid(s: Site) -> Any:
    vectors = [s.net.weight(s.width), s.net.weight(2)]
    rows, columns = aten.meshgrid.indexing(vectors, indexing=s.pick(("ij", "xy")))
    matrix = rows * torch.cos(columns)
    return s.x @ (matrix if matrix.shape[0] == s.width else matrix.t())


def _embedding_bag(s: Site, name: str) -> Any:
    places = numbers(s, 5)
    offsets = s.net.buffer(torch.tensor([0, s.pick((1, 2))]))
    made = getattr(aten, name)(s.net.weight(5, s.width), places, offsets, False, s.pick((0, 1, 2)))
    return s.x + made[0].sum(0)


RECIPES: dict[str, Row] = {
    "gather": (ALL, _gather),
    "take_along_dim": (ALL, _take_along),
    **each(ALL, _scatter, "scatter scatter_add scatter_reduce"),
    **each(ALL, _index_write, "index_add index_reduce index_copy index_fill"),
    **each(ALL, _index_put, "index_put _unsafe_index_put _index_put_impl"),
    "select_scatter": (ALL, _select_scatter),
    "slice_scatter": (ALL, _slice_scatter),
    **each(LAST, _diagonal, "diagonal diagonal_copy linalg_diagonal"),
    "diag_embed": (LAST, lambda s: aten.diag_embed(s.x).sum(-1)),
    "diag": (LAST, _diag),
    "block_diag": (LAST, _block_diag),
    "meshgrid": (LAST, _meshgrid),
    **each(LAST, _embedding_bag, "embedding_bag _embedding_bag _embedding_bag_forward_only"),
    "unbind_copy": (ALL, lambda s: aten.unbind_copy.int(s.x, s.pick((s.channel, 1)))[0]),
    "slice_copy": (ALL, lambda s: aten.slice_copy.Tensor(s.x, s.channel, 0, None, s.pick((1, 2)))),
    "permute_copy": (ALL, lambda s: aten.permute_copy(torch.relu(s.x), [0, *range(1, s.x.dim())])),
    "t_copy": (["table"], lambda s: torch.relu(aten.t_copy(s.x)).t()),
    "rot90": (ALL, lambda s: aten.rot90(_at_least(s), s.pick((1, 2, 3)), [1, s.pick((2, -1))])),
    "column_stack": (ALL, lambda s: aten.column_stack([s.x, torch.sin(s.x)])),
    "hstack": (ALL, lambda s: aten.hstack([s.x, torch.sin(s.x)])),
    "vstack": (ALL, lambda s: aten.vstack([s.x, torch.sin(s.x)])),
    "row_stack": (ALL, lambda s: aten.row_stack([s.x, torch.sin(s.x)])),
    "dstack": (ALL, lambda s: aten.dstack([s.x, torch.sin(s.x)])),
    "broadcast_tensors": (ALL, lambda s: torch.mul(*aten.broadcast_tensors([s.x, s.vector()]))),
}  # fmt: skip


def _at_least(s: Site) -> Tensor:
    return square(s) if s.x.dim() == 2 else s.x

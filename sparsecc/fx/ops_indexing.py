"""Entries of ATen operators that read and write by index."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparsecc.fx.spec import Bound, Entry, Shapes, Spec, operand, tensors, whole

_MASKS = (torch.bool, torch.uint8)


def index_shape(indices: list[Node], s: Shapes) -> tuple[int, ...]:
    """Broadcast shape of several indices."""
    return tuple(torch.broadcast_shapes(*(s.of(i) for i in indices)))


def looked_up(b: Bound, s: Shapes) -> tuple[list[Node], dict[str, Any]]:
    """Indices of ``x[i, :, mask]`` with the axes that each of them looks up."""
    given = [i for i in b["indices"] if i is not None]
    masks = [i.meta["val"].dtype in _MASKS for i in given]
    widths = [s.rank(i) if mask else 1 for i, mask in zip(given, masks, strict=True)]
    places, at = [], 0
    for i in b["indices"]:
        if i is not None:
            places.append(at)
        at += s.rank(i) if i is not None and i.meta["val"].dtype in _MASKS else 1
    plain = [i for i, mask in zip(given, masks, strict=True) if not mask]
    shape = index_shape(plain, s) if not any(masks) else None
    return given, {"places": places, "widths": widths, "masks": masks, "shape": shape}


def index_many(b: Bound, s: Shapes) -> Spec:
    """x[i, j], x[mask], and every mixture of them."""
    given, attrs = looked_up(b, s)
    return Spec("index_many", (b["self"], *given), attrs)


def _index_put(b: Bound, s: Shapes) -> Spec:
    given, attrs = looked_up(b, s)
    if attrs["shape"] is None:  # a mask: as many values as it selects, or one for all
        rank = s.rank(b["self"]) - sum(attrs["widths"])
        values = s.of(b["values"])
        attrs["shape"] = (values[0],) if len(values) > rank else (1,)
    return Spec("index_put", (b["self"], b["values"], *given), attrs)


def _gather(b: Bound, s: Shapes) -> Spec:
    return _rank_or_unknown("gather_elements", b, s, (b["self"], b["index"]))


def _rank_or_unknown(op: str, b: Bound, s: Shapes, operands: tuple[Node | None, ...]) -> Spec:
    if not s.rank(operand(b)):
        return Spec("elementwise", tensors(b))
    return Spec(op, operands, {"dim": b["dim"]})


def _scatter(b: Bound, s: Shapes) -> Spec:
    source = b.get("src")
    return _rank_or_unknown("scatter_elements", b, s, (b["self"], b["index"], source))


def _take_along(b: Bound, s: Shapes) -> Spec:
    if b["dim"] is None:
        return whole("aten.take_along_dim", "takes positions of everything in a row", b)
    ours, theirs = s.of(b["self"]), s.of(b["indices"])
    if any(a != c for d, (a, c) in enumerate(zip(ours, theirs, strict=True)) if d != b["dim"] % len(ours)):
        return whole("aten.take_along_dim", "repeats its indices along an axis", b)
    return Spec("gather_elements", (b["self"], b["indices"]), {"dim": b["dim"]})


def _index_write(name: str | None) -> Entry:
    def entry(b: Bound, s: Shapes) -> Spec:
        source = b.get(name) if name is not None else None
        return Spec("index_write", (b["self"], b["index"], source), {"dim": b["dim"]})

    return entry


def _select_scatter(b: Bound, s: Shapes) -> Spec:
    return Spec("select_write", (b["self"], b["src"]), {"dim": b["dim"]})


def _slice_scatter(b: Bound, s: Shapes) -> Spec:
    shape = s.of(b["self"])
    dim = b["dim"] % len(shape)
    start = s.argument(b["start"]) or 0
    start = max(start + shape[dim], 0) if start < 0 else min(start, shape[dim])
    stop = start + s.of(b["src"])[dim]
    return Spec("slice_write", (b["self"], b["src"]), {"slices": {dim: (start, stop, s.argument(b["step"]))}})


def _diagonal(b: Bound, s: Shapes) -> Spec:
    return Spec("diagonal", (operand(b),), {"dims": (b["dim1"], b["dim2"]), "offset": b["offset"]})


def _diagonal_embed(b: Bound, s: Shapes) -> Spec:
    return Spec("diagonal_embed", (b["self"],), {"dims": (b["dim1"], b["dim2"]), "offset": b["offset"]})


def _diag(b: Bound, s: Shapes) -> Spec:
    op = "diagonal_embed" if s.rank(b["self"]) == 1 else "diagonal"
    return Spec(op, (b["self"],), {"dims": (0, 1), "offset": b["diagonal"]})


def _block_diagonal(b: Bound, s: Shapes) -> Spec:
    return Spec("block_diagonal", list(b["tensors"]))


def _meshgrid(b: Bound, s: Shapes) -> Spec:
    return Spec("grid", list(b["tensors"]), {"swapped": b.get("indexing", "ij") == "xy"})


def _embedding_bag(b: Bound, s: Shapes) -> Spec:
    return Spec("embedding_bag", (b["weight"], b["indices"], b["offsets"], b["per_sample_weights"]))


TABLE: dict[str, Entry] = {
    "gather": _gather,
    "take_along_dim": _take_along,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scatter),
    **dict.fromkeys(("index_add", "index_reduce", "index_copy"), _index_write("source")),
    "index_fill": _index_write(None),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), _index_put),
    "select_scatter": _select_scatter,
    "slice_scatter": _slice_scatter,
    **dict.fromkeys(("diagonal", "diagonal_copy", "linalg_diagonal"), _diagonal),
    "diag_embed": _diagonal_embed,
    "diag": _diag,
    "block_diag": _block_diagonal,
    "meshgrid": _meshgrid,
    **dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _embedding_bag),
}

"""Entries of ATen operators that multiply or compare vectors."""

from __future__ import annotations

import torch

from sparsecc.fx.spec import Bound, Entry, Shapes, Spec, elementwise, ints, same, tensors, whole

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _grouped_mm(b: Bound, s: Shapes) -> Spec:
    """Matrices by group; rows of operands begin at multiples of 16 bytes."""
    multiple = max(1, 16 // b["self"].meta["val"].element_size())
    return Spec("grouped_matmul", [b[n] for n in ("self", "mat2", "offs", "bias")], {"multiple": multiple})


def _outer(b: Bound, s: Shapes) -> Spec:
    return Spec("einsum", (b["self"], b["vec2"]), {"equation": "i,j->ij"})


def _inner(b: Bound, s: Shapes) -> Spec:
    x, y = b["self"], b["other"]
    if not s.rank(x) or not s.rank(y):
        return elementwise(b, s)
    ours, theirs = _LETTERS[: s.rank(x) - 1], _LETTERS[10 : 10 + s.rank(y) - 1]
    return Spec("einsum", (x, y), {"equation": f"{ours}z,{theirs}z->{ours}{theirs}"})


def _vecdot(b: Bound, s: Shapes) -> Spec:
    x, y = b["x"], b["y"]
    if b["dim"] != -1:
        return whole("aten.linalg_vecdot", "multiplies along an axis that is not the last", b)
    return Spec("einsum", (x, y), {"equation": "...z,...z->..."})


def _tensordot(b: Bound, s: Shapes) -> Spec:
    x, y = b["self"], b["other"]
    ours = list(_LETTERS[: s.rank(x)])
    theirs = list(_LETTERS[13 : 13 + s.rank(y)])
    summed = []
    for i, j in zip(b["dims_self"], b["dims_other"], strict=True):
        theirs[j] = ours[i]
        summed.append(ours[i])
    kept = [letter for letter in (*ours, *theirs) if letter not in summed]
    return Spec("einsum", (x, y), {"equation": f"{''.join(ours)},{''.join(theirs)}->{''.join(kept)}"})


def _multi_dot(b: Bound, s: Shapes) -> Spec:
    matrices = list(b["tensors" if "tensors" in b else "matrices"])
    if any(s.rank(m) != 2 for m in matrices):
        return whole("aten.linalg_multi_dot", "multiplies vectors with matrices", b)
    terms = ",".join(_LETTERS[i : i + 2] for i in range(len(matrices)))
    return Spec("einsum", matrices, {"equation": f"{terms}->a{_LETTERS[len(matrices)]}"})


def _distance(b: Bound, s: Shapes) -> Spec:
    """cdist: differences by a matrix product above 25 rows, unless told otherwise."""
    mode = b.get("compute_mode", 1)
    rows = [b[n].meta["val"].shape[-2] for n in ("x1", "x2")]
    few = all(isinstance(n, int) and n <= 25 for n in rows)
    exact = mode == 2 or (mode in (None, 0) and few) or b.get("p", 2.0) != 2.0
    return Spec("cdist", (b["x1"], b["x2"]), {"by_product": not exact})


def _paired(b: Bound, s: Shapes, names: tuple[str, str], dims: list[int], keepdim: bool) -> Spec:
    x, y = (b[n] for n in names)
    shape = tuple(torch.broadcast_shapes(s.of(x), s.of(y)))
    dims = [d % max(len(shape), 1) for d in dims] if dims else list(range(len(shape)))
    return Spec("paired_reduce", (x, y), {"dims": dims, "keepdim": keepdim, "shape": shape})


def _pairwise(b: Bound, s: Shapes) -> Spec:
    return _paired(b, s, ("x1", "x2"), [-1], b["keepdim"])


def _dist(b: Bound, s: Shapes) -> Spec:
    return _paired(b, s, ("self", "other"), [], False)


def _loss(b: Bound, s: Shapes) -> Spec:
    if b["reduction"] == 0:
        return elementwise(b, s)
    return _paired(b, s, ("self", "target"), [], False)


def _weighted_loss(b: Bound, s: Shapes) -> Spec:
    if b["reduction"] == 0:
        return elementwise(b, s)
    return whole("aten.binary_cross_entropy", "averages with weights", b)


def _along(b: Bound, s: Shapes) -> Spec:
    x, y = tensors(b)
    shape = tuple(torch.broadcast_shapes(s.of(x), s.of(y)))
    dim = b["dim"]
    found = [d for d, n in enumerate(shape) if n == 3][:1] if dim is None else ints(dim)
    return Spec("along", (x, y), {"dims": [d % len(shape) for d in found]})


def _addmv(b: Bound, s: Shapes) -> Spec:
    return Spec("affine_vector", (b["self"], b["mat"], b["vec"]))


def _cosine(b: Bound, s: Shapes) -> Spec:
    return Spec("cosine_similarity", (b["x1"], b["x2"]), {"dim": b["dim"]})


TABLE: dict[str, Entry] = {
    **dict.fromkeys(("outer", "ger"), _outer),
    "_grouped_mm": _grouped_mm,
    "inner": _inner,
    "linalg_vecdot": _vecdot,
    "tensordot": _tensordot,
    **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), _multi_dot),
    "linalg_matmul": same("matmul", "self", "other"),
    "addmv": _addmv,
    "kron": same("kron", "self", "other"),
    "bilinear": same("bilinear", "input1", "input2", "weight", "bias"),
    **dict.fromkeys(("cdist", "_cdist_forward", "_euclidean_dist"), _distance),
    **dict.fromkeys(("pdist", "_pdist_forward"), same("pdist", "self")),
    "cosine_similarity": _cosine,
    "pairwise_distance": _pairwise,
    "dist": _dist,
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"), _loss),
    "soft_margin_loss": _loss,
    "binary_cross_entropy": _weighted_loss,
    "binary_cross_entropy_with_logits": _weighted_loss,
    **dict.fromkeys(("cross", "linalg_cross"), _along),
}

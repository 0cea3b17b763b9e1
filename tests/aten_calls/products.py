"""Calls that multiply or compare vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.aten_calls.site import ALL, LAST, SPACE, Row, Site, aten, each, square


def _other(s: Site) -> Tensor:
    return s.pick((lambda: torch.sin(s.x) * 0.7, lambda: s.vector().expand_as(s.x)))()  # type: ignore[no-any-return]


def _matrix(s: Site, columns: int = 3) -> Tensor:
    return s.net.weight(s.width, columns)


def _outer(s: Site, name: str) -> Any:
    return s.x @ getattr(aten, name)(s.net.weight(s.width), s.net.weight(3))


def _tensordot(s: Site) -> Any:
    return aten.tensordot(s.x, _matrix(s), [s.channel], [0])


def _bilinear(s: Site) -> Any:
    inner = s.pick((2, 3))
    y = torch.sin(s.x @ _matrix(s, inner))
    return aten.bilinear(s.x, y, s.net.weight(3, s.width, inner), s.net.weight(3))


def _cdist(s: Site, name: str) -> Any:
    x, y = square(s), s.net.weight(1, 4, s.width)
    p, mode = s.pick((2.0, 1.0)), s.pick((None, 1, 2))
    if name == "_euclidean_dist":
        return aten._euclidean_dist(x, y.expand(x.shape[0], -1, -1))
    if name == "_cdist_forward":
        return aten._cdist_forward(x, y.expand(x.shape[0], -1, -1), p, mode)
    return aten.cdist(x, y, p, mode)


def _cosine(s: Site) -> Any:
    dim = s.pick((s.channel, 1, -1))
    return s.x * aten.cosine_similarity(s.x, _other(s), dim, 1e-6).unsqueeze(dim)


def _pairwise(s: Site) -> Any:
    return s.x * aten.pairwise_distance(s.x, _other(s), s.pick((2.0, 1.0)), 1e-6, True)


def _loss(s: Site, name: str) -> Any:
    x, y = torch.sigmoid(s.x) * 0.8 + 0.1, torch.sigmoid(_other(s)) * 0.8 + 0.1
    if name == "soft_margin_loss":
        y = torch.sign(y - 0.45)
    given = {"binary_cross_entropy": (None,), "binary_cross_entropy_with_logits": (None, None)}.get(name, ())
    return getattr(aten, name)(x, y, *given, s.pick((0, 1, 2)))


def _cross(s: Site, name: str) -> Any:
    x = s.x @ _matrix(s)
    return getattr(aten, name)(x, s.net.weight(*[1] * (x.dim() - 1), 3), dim=-1)


def _convolution(s: Site) -> Any:
    n, groups = s.spatial, s.divisor()
    weight = s.net.weight(groups * 2, s.width // groups, *[1] * n)
    flags = (False, False, True, True)
    return aten._convolution(s.x, weight, None, [1] * n, [0] * n, [1] * n, False, [0] * n, groups, *flags)


RECIPES: dict[str, Row] = {
    **each(LAST, _outer, "outer ger"),
    "inner": (LAST, lambda s: aten.inner(s.x, s.net.weight(3, s.width))),
    "linalg_vecdot": (ALL, lambda s: s.x * aten.linalg_vecdot(s.x, _other(s), dim=-1).unsqueeze(-1)),
    "tensordot": (ALL, _tensordot),
    **each(
        ["table"],
        lambda s, n: getattr(aten, n)([s.x, _matrix(s, 4), s.net.weight(4, 3)]),
        "linalg_multi_dot chain_matmul",
    ),
    "linalg_matmul": (LAST, lambda s: aten.linalg_matmul(s.x, _matrix(s))),
    "addmv": (["table"], lambda s: s.x * aten.addmv(s.net.weight(1), s.x, s.net.weight(s.width))[:, None]),
    "kron": (["table"], lambda s: aten.kron(s.x, s.net.weight(1, 2))),
    "bilinear": (LAST, _bilinear),
    **each(LAST, _cdist, "cdist _cdist_forward _euclidean_dist"),
    **each(["table"], lambda s, n: getattr(aten, n)(s.x), "pdist _pdist_forward"),
    "cosine_similarity": (ALL, _cosine),
    "pairwise_distance": (ALL, _pairwise),
    "dist": (ALL, lambda s: aten.dist(s.x, _other(s), s.pick((2, 1)))),
    **each(ALL, _loss, "mse_loss l1_loss smooth_l1_loss huber_loss kl_div"),
    **each(ALL, _loss, "soft_margin_loss"),
    **each(ALL, _loss, "binary_cross_entropy binary_cross_entropy_with_logits"),
    **each(LAST, _cross, "cross linalg_cross"),
    "_convolution": (SPACE, _convolution),
    "linalg_norm": (LAST, lambda s: s.x * aten.linalg_norm(s.x, s.pick((None, 2, 1)), [-1], True)),
}  # fmt: skip

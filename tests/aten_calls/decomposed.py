"""Calls of the forms that ``run_decompositions`` and export on other devices leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.aten_calls.site import ALL, LAST, SPACE, Row, Site, apart, aten, each


def _affine(s: Site, *shape: int) -> tuple[Tensor | None, Tensor | None]:
    return (s.net.weight(*shape), s.net.weight(*shape)) if s.pick((True, False)) else (None, None)


def _layer_norm(s: Site) -> Any:
    over = s.sizes() if s.pick((False, True)) else s.sizes()[-1:]
    return aten.native_layer_norm(s.x, over, *_affine(s, *over), 1e-2)[0]


def _rms_norm(s: Site) -> Any:
    over = s.sizes()[-1:]
    return aten._fused_rms_norm(s.x, over, _affine(s, *over)[0], 1e-2)[0]


def _group_norm(s: Site) -> Any:
    space = int(s.x[0, 0].numel())
    given = (s.x.shape[0], s.width, space, s.divisor(), 1e-2)
    return aten.native_group_norm(s.x.contiguous(), *_affine(s, s.width), *given)[0]


def _batch_norm(s: Site, name: str) -> Any:
    mean, var = s.net.weight(s.width), s.net.weight(s.width).abs() + 0.5
    training = (False,) if name == "native_batch_norm" else ()
    affine = _affine(s, s.width) if name != "_batch_norm_no_update" else s.net.weight(2, s.width).unbind(0)
    return getattr(aten, name)(s.x, *affine, mean, var, *training, 0.1, 1e-3)[0]


def _batch_statistics(s: Site) -> Any:
    affine = _affine(s, s.width)
    return aten._native_batch_norm_legit.no_stats(s.x, *affine, True, 0.1, 1e-2)[0]


def _attention(s: Site, name: str) -> Any:
    width = s.pick((2, 4))
    q, k, v = ((s.x @ s.net.weight(s.width, width))[:, None] for _ in range(3))
    return getattr(aten, name)(q, k, v, scale=s.pick((None, 0.4)))[0].squeeze(1)


def _softmax(s: Site, name: str) -> Any:
    dim = s.pick((s.channel, 1, -1))
    rest = {"_log_softmax": (False,), "special_softmax": (None,)}.get(name, ())
    return getattr(aten, name)(s.x, dim, *rest)


def _pool(s: Site, name: str) -> Any:
    return getattr(aten, name)(s.x, [s.pick((1, 2))] * s.spatial)


def _smooth(s: Site, name: str) -> Any:
    size = [int(n) * 2 for n in s.x.shape[2:]]
    return getattr(aten, name).default(s.x, size, s.pick((False, True)))


def _split(s: Site, name: str) -> Any:
    first = s.pick(range(1, s.width)) if s.width > 1 else 1
    if "sizes" in name:
        made = getattr(aten, name)(s.x, [first, s.width - first] if s.width > 1 else [1], s.channel)
    elif "chunk" in name:
        made = getattr(aten, name)(s.x, s.pick((2, 3)), s.channel)
    else:
        made = getattr(aten, name).Tensor(s.x, first, s.channel)
    return torch.cat([made[-1], *(torch.relu(part) for part in made[:-1])], s.channel)


def _whole(s: Site) -> Tensor:
    return torch.floor(apart(s)).to(torch.int64)


RECIPES: dict[str, Row] = {
    "native_layer_norm": (ALL, _layer_norm),
    "_fused_rms_norm": (ALL, _rms_norm),
    "native_group_norm": (SPACE, _group_norm),
    **each(
        (*SPACE, "table"),
        _batch_norm,
        "_native_batch_norm_legit_no_training _batch_norm_no_update native_batch_norm",
    ),
    "_native_batch_norm_legit": (SPACE, _batch_statistics),
    **each(
        ["sequence"],
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math",
    ),
    **each(ALL, _softmax, "_log_softmax _safe_softmax special_softmax special_log_softmax"),
    "_adaptive_avg_pool2d": (["image"], lambda s: _pool(s, "_adaptive_avg_pool2d")),
    "_adaptive_avg_pool3d": (["volume"], lambda s: _pool(s, "_adaptive_avg_pool3d")),
    "_upsample_nearest_exact3d": (
        ["volume"],
        lambda s: aten._upsample_nearest_exact3d.default(s.x, [int(n) * 2 for n in s.x.shape[2:]]),
    ),
    **each(["image"], _smooth, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa"),
    "_prelu_kernel": (ALL, lambda s: aten._prelu_kernel(s.x, s.vector())),
    "log_sigmoid_forward": (ALL, lambda s: aten.log_sigmoid_forward(s.x)[0]),
    "native_channel_shuffle": (["image"], lambda s: aten.native_channel_shuffle(s.x, s.divisor())),
    **each(ALL, _split, "unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy unsafe_chunk"),
    "__lshift__": (LAST, lambda s: s.x * aten.__lshift__.Scalar(_whole(s) & 3, 1)),
    "__rshift__": (LAST, lambda s: s.x * aten.__rshift__.Scalar(_whole(s) & 7, 1)),
    "special_zeta": (ALL, lambda s: aten.special_zeta(torch.sigmoid(s.x) + 2, s.vector().abs() + 1)),
}  # fmt: skip

"""Calls whose arguments a schema does not tell: layers, movement, creation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    pass
from tests.aten_calls.site import (
    ALL,
    LAST,
    SPACE,
    SPATIAL,
    Recipe,
    Site,
    apart,
    aten,
    compared,
    numbers,
    operand,
    roomy,
    square,
)


def _conv(s: Site, transposed: bool = False) -> Tensor:
    n = s.spatial
    groups = s.divisor()
    per = s.pick((1, 2, 3))
    kernel = s.pick((1, 2, 3))
    inner = s.width // groups
    shape = (s.width, per) if transposed else (groups * per, inner)
    weight = s.net.weight(*shape, *[kernel] * n)
    bias = s.net.weight(groups * per) if s.pick((True, False)) else None
    if transposed:
        return getattr(aten, f"conv_transpose{n}d")(s.x, weight, bias, [1], [0], [0], groups)  # type: ignore[no-any-return]
    return getattr(aten, f"conv{n}d")(s.x, weight, bias, [1], [kernel - 1] * n, [1], groups)  # type: ignore[no-any-return]


def _convolution(s: Site) -> Tensor:
    transposed, groups, n = s.pick((False, True)), s.divisor(), s.spatial
    shape = (s.width, 2) if transposed else (groups * 2, s.width // groups)
    weight = s.net.weight(*shape, *[1] * n)
    return aten.convolution(
        s.x, weight, s.net.weight(groups * 2), [1] * n, [0] * n, [1] * n, transposed, [0] * n, groups
    )  # type: ignore[no-any-return]


def _addmm(s: Site) -> Tensor:
    out = s.pick((2, 3, 5))
    bias = s.pick((lambda: s.net.weight(out), lambda: s.net.weight(1), lambda: s.net.weight(1, out)))()
    scales = s.pick(({}, {"alpha": 0.5, "beta": 2.0}))
    return aten.addmm(bias, s.x, s.net.weight(s.width, out), **scales)  # type: ignore[no-any-return]


def _baddbmm(s: Site) -> Tensor:
    x = square(s)
    w = s.net.weight(1, s.width, 3).expand(x.shape[0], -1, -1)
    return aten.baddbmm(s.net.weight(1, 1, 3), x, w)  # type: ignore[no-any-return]


def _batch_norm(s: Site) -> Tensor:
    affine = (s.vector().reshape(-1), s.net.weight(s.width)) if s.pick((True, False)) else (None, None)
    mean, var = s.net.weight(s.width), s.net.weight(s.width).abs() + 0.5
    return aten.batch_norm(s.x, *affine, mean, var, False, 0.1, 1e-3, False)  # type: ignore[no-any-return]


def _instance_norm(s: Site) -> Tensor:
    affine = (s.net.weight(s.width), s.net.weight(s.width)) if s.pick((True, False)) else (None, None)
    if s.x[0, 0].numel() < 2:
        return s.x
    return aten.instance_norm(s.x, *affine, None, None, True, 0.1, 1e-2, False)  # type: ignore[no-any-return]


def _group_norm(s: Site) -> Tensor:
    affine = (s.net.weight(s.width), s.net.weight(s.width)) if s.pick((True, False)) else (None, None)
    return aten.group_norm(s.x, s.divisor(), *affine, 1e-2)  # type: ignore[no-any-return]


def _layer_norm(s: Site, rms: bool = False) -> Tensor:
    over = s.sizes() if s.pick((False, True)) else s.sizes()[-1:]
    weight = s.net.weight(*over) if s.pick((True, False)) else None
    if rms:
        return aten.rms_norm(s.x, over, weight, 1e-2)  # type: ignore[no-any-return]
    return aten.layer_norm(s.x, over, weight, s.net.weight(*over) if weight is not None else None, 1e-2)  # type: ignore[no-any-return]


def _attention(s: Site) -> Tensor:
    width = s.pick((2, 4))
    q, k, v = (s.x @ s.net.weight(s.width, width) for _ in range(3))
    scale = s.pick((None, 0.4))
    made = aten.scaled_dot_product_attention(
        q[:, None], k[:, None], v[:, None], None, 0.0, s.pick((False, True)), scale=scale
    )
    return made.squeeze(1)  # type: ignore[no-any-return]


def _recurrent(s: Site, kind: str, gates: int) -> Tensor:
    x, hidden = square(s), s.pick((2, 3))
    both, layers = s.pick((False, True)), s.pick((1, 2))
    params: list[Tensor] = []
    width = s.width
    for _ in range(layers):
        for _ in range(2 if both else 1):
            params += [s.net.weight(gates * hidden, width), s.net.weight(gates * hidden, hidden)]
            params += [s.net.weight(gates * hidden), s.net.weight(gates * hidden)]
        width = hidden * (2 if both else 1)
    zeros = x.new_zeros(layers * (2 if both else 1), x.shape[0], hidden)
    state = [zeros, zeros] if kind == "lstm" else zeros
    return getattr(aten, kind).input(x, state, params, True, layers, 0.0, False, both, True)[0]  # type: ignore[no-any-return]


def _cell(s: Site, kind: str, gates: int) -> Tensor:
    hidden = s.pick((2, 3))
    state = torch.tanh(s.x @ s.net.weight(s.width, hidden))
    params = [s.net.weight(gates * hidden, s.width), s.net.weight(gates * hidden, hidden)]
    params += [s.net.weight(gates * hidden), s.net.weight(gates * hidden)]
    made = getattr(aten, kind)(s.x, [state, state] if kind == "lstm_cell" else state, *params)
    return made[0] if isinstance(made, tuple) else made


def _index(s: Site) -> Tensor:
    where = [None] * s.channel + [numbers(s, s.width)]
    return aten.index.Tensor(s.x, where)  # type: ignore[no-any-return]


def _pads(s: Site, pairs: int) -> list[int]:
    return [s.pick((0, 1)) for _ in range(2 * pairs)]


def _channel_pads(s: Site) -> list[int]:
    behind = s.x.dim() - 1 - s.channel
    return [0, 0] * behind + [s.pick((0, 1, 2)), s.pick((0, 1))]


def _pooled(s: Site, name: str) -> Any:
    n = s.spatial
    x = roomy(apart(s) if "max_pool" in name else s.x)
    if name.startswith("adaptive"):
        return getattr(aten, name)(x, [s.pick((1, 2))] * n)
    return getattr(aten, name)(x, [2] * n, s.pick(([1] * n, [2] * n)))


def _upsampled(s: Site, name: str) -> Any:
    size = [int(n) * 2 for n in s.x.shape[2:]]
    if "nearest" in name:
        return getattr(aten, name).default(s.x, size)
    return getattr(aten, name).default(s.x, size, s.pick((False, True)))


def _weight_norm(s: Site, name: str) -> Tensor:
    v = s.net.weight(3, s.width)
    g = s.net.weight(3, 1).abs() + 0.5
    w = getattr(aten, name)(v, g, 0)
    return s.x @ (w[0] if isinstance(w, tuple) else w).t()


def _reshaped(s: Site) -> list[int]:
    factor, shape = s.divisor(), [int(n) for n in s.x.shape[1:]]
    at = s.channel - 1
    return [-1, *shape[:at], factor, s.width // factor, *shape[at + 1 :]]


def _view_back(s: Site, name: str) -> Tensor:
    """Split the channels, swap the parts, join them."""
    wide = getattr(aten, name)(s.x.contiguous(), _reshaped(s))
    turned = wide.transpose(s.channel, s.channel + 1)
    return turned.flatten(s.channel, s.channel + 1)  # type: ignore[no-any-return]


def _turned(s: Site, move: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return back(torch.relu(move(s.x)))


def _named(*names: str, **others: Any) -> list[tuple[str, Any]]:
    return [*((name, getattr(aten, name)) for name in names), *others.items()]


def _aliased(s: Site) -> Any:
    return aten._reshape_alias(s.x.contiguous(), [s.x.shape[0], 1, s.width], [s.width, s.width, 1])


def _unshuffled(s: Site) -> Any:
    return aten.pixel_unshuffle(F.pad(s.x, (0, s.x.shape[3] % 2, 0, s.x.shape[2] % 2)), 2)


def _permuted(x: Tensor) -> Tensor:
    return aten.permute(x, [0, *reversed(range(1, x.dim()))])  # type: ignore[no-any-return]


def _moved(s: Site, name: str) -> Tensor:
    move = getattr(aten, name)
    return _turned(s, lambda x: move.int(x, 1, -1), lambda y: move.intlist(y, [-1], [1]))


def _sliced(s: Site) -> Any:
    start = s.pick((0, 1, -2)) if s.width > 2 else 0
    return aten.slice.Tensor(s.x, s.channel, start, None, s.pick((1, 2)))


def _padded(s: Site, pad: Any) -> Any:
    return pad(roomy(s.x), _pads(s, s.spatial))


def _creation(s: Site, make: Callable[[list[Any]], Tensor]) -> Tensor:
    """A tensor of the operand's form that holds no data of it."""
    return s.x + make([s.x.shape[0], *s.sizes()])


def _along(s: Site, make: Callable[[int], Tensor]) -> Tensor:
    """A vector along the last axis."""
    return s.x + make(int(s.x.shape[-1]))


def _squeezed(s: Site) -> Tensor:
    at = s.pick(range(1, s.x.dim() + 1))
    wide = aten.unsqueeze(s.x, at)
    return s.pick((lambda: aten.squeeze.dim(wide, at), lambda: aten.squeeze.dims(wide, [at])))()  # type: ignore[no-any-return]


def _parted(s: Site, made: Sequence[Tensor]) -> Tensor:
    return torch.cat([made[-1], *(torch.relu(p) for p in made[:-1])], s.channel)


def _sizes(s: Site) -> list[int]:
    first = s.pick(range(1, s.width)) if s.width > 1 else 1
    return [first, s.width - first] if s.width > 1 else [1]


RECIPES: dict[str, tuple[Sequence[str], Recipe]] = {
    **{f"conv{n}d": ([k], _conv) for k, n in SPATIAL.items()},
    **{f"conv_transpose{n}d": ([k], lambda s: _conv(s, transposed=True)) for k, n in SPATIAL.items()},
    "convolution": (SPACE, _convolution),
    "linear": (LAST, lambda s: aten.linear(s.x, s.net.weight(s.pick((2, 3, 5)), s.width))),
    "matmul": (LAST, lambda s: aten.matmul(s.x, s.net.weight(s.width, s.pick((2, 3, 5))))),
    "mm": (["table"], lambda s: aten.mm(s.x, s.net.weight(s.width, s.pick((2, 3, 5))))),
    "bmm": (LAST, lambda s: aten.bmm(square(s), s.net.weight(1, s.width, 3).expand(s.x.shape[0], -1, -1))),
    "mv": (["table"], lambda s: aten.mv(s.x, s.net.weight(s.width))),
    "dot": (["table"], lambda s: s.x * aten.dot(s.net.weight(s.width), s.net.weight(s.width))),
    "vdot": (["table"], lambda s: s.x * aten.vdot(s.net.weight(s.width), s.net.weight(s.width))),
    "addmm": (["table"], _addmm),
    "baddbmm": (LAST, _baddbmm),
    "einsum": (LAST, lambda s: aten.einsum("...c,dc->...d", [s.x, s.net.weight(3, s.width)])),
    "batch_norm": ((*SPACE, "table"), _batch_norm),
    "instance_norm": (SPACE, _instance_norm),
    "group_norm": ((*SPACE, "table"), _group_norm),
    "layer_norm": (ALL, _layer_norm),
    "rms_norm": (ALL, lambda s: _layer_norm(s, rms=True)),
    "prelu": ((*SPACE, "table"), lambda s: aten.prelu(s.x, s.net.weight(s.pick((s.width, 1))))),
    "scaled_dot_product_attention": (["sequence"], _attention),
    "embedding": (["table"], lambda s: s.x + aten.embedding(s.net.weight(5, s.width), numbers(s, 5)).sum(0)),
    "index_select": (ALL, lambda s: aten.index_select(s.x, s.channel, numbers(s, s.width))),
    "index": (ALL, _index),
    **{
        name: (ALL, lambda s, name=name: _view_back(s, name))  # type: ignore[misc]
        for name in ("view", "reshape", "_unsafe_view")
    },
    "_reshape_alias": (["table"], _aliased),
    "flatten": (ALL, lambda s: aten.flatten(s.x, 1)),
    "unflatten": (ALL, lambda s: aten.unflatten.int(s.x, s.channel, _reshaped(s)[s.channel : s.channel + 2])),
    "view_as": (ALL, lambda s: aten.view_as(s.x.flatten(1), s.x)),
    "reshape_as": (ALL, lambda s: aten.reshape_as(s.x.flatten(1), s.x)),
    "expand_as": (ALL, lambda s: s.x + aten.expand_as(s.vector(), s.x)),
    "expand": (ALL, lambda s: s.x + aten.expand(s.vector(), [s.x.shape[0], *s.sizes()])),
    "broadcast_to": (ALL, lambda s: s.x + aten.broadcast_to(s.vector(), [s.x.shape[0], *s.sizes()])),
    "pixel_shuffle": (["image"], lambda s: aten.pixel_shuffle(torch.cat([s.x] * 4, 1), 2)),
    "pixel_unshuffle": (["image"], _unshuffled),
    "channel_shuffle": (["image"], lambda s: aten.channel_shuffle(s.x, s.divisor())),
    "glu": (ALL, lambda s: aten.glu(torch.cat([s.x, torch.sin(s.x)], s.channel), s.channel)),
    "_weight_norm": (LAST, lambda s: _weight_norm(s, "_weight_norm")),
    "_weight_norm_interface": (LAST, lambda s: _weight_norm(s, "_weight_norm_interface")),
    "permute": (ALL, lambda s: _turned(s, _permuted, _permuted)),
    **{
        name: (ALL, lambda s, f=f: _turned(s, lambda x: f(x, 1, -1), lambda y: f(y, -1, 1)))  # type: ignore[misc]
        for name, f in _named("swapaxes", "swapdims", transpose=aten.transpose.int)
    },
    "t": (["table"], lambda s: _turned(s, aten.t, aten.t)),
    "numpy_T": (ALL, lambda s: _turned(s, aten.numpy_T, aten.numpy_T)),
    "mT": (ALL, lambda s: _turned(s, aten.mT, aten.mT)),
    "adjoint": (ALL, lambda s: _turned(s, aten.adjoint, aten.adjoint)),
    "movedim": (ALL, lambda s: _moved(s, "movedim")),
    "moveaxis": (ALL, lambda s: _moved(s, "moveaxis")),
    "mvlgamma": (ALL, lambda s: aten.mvlgamma(torch.sigmoid(s.x) + 1.1, s.pick((1, 2)))),
    "unsqueeze": (ALL, _squeezed),
    "squeeze": (ALL, _squeezed),
    "repeat": (ALL, lambda s: aten.repeat(s.x, [2 if d == s.channel else 1 for d in range(s.x.dim())])),
    "tile": (ALL, lambda s: aten.tile(s.x, [2, *[1] * (s.x.dim() - 1 - s.channel)])),
    "repeat_interleave": (ALL, lambda s: aten.repeat_interleave.self_int(s.x, 2, s.channel)),
    **{
        name: (ALL, lambda s, f=f: f([s.x, torch.sin(s.x)], s.pick((s.channel, s.channel - s.x.dim()))))  # type: ignore[misc]
        for name, f in _named("cat", "concat", "concatenate")
    },
    "stack": (ALL, lambda s: aten.stack([s.x, torch.sin(s.x)], s.pick((1, -1))).amax(s._number % 1 + 1)),
    "split": (ALL, lambda s: _parted(s, aten.split.Tensor(s.x, max(1, s.width // 2), s.channel))),
    "split_with_sizes": (ALL, lambda s: _parted(s, aten.split_with_sizes(s.x, _sizes(s), s.channel))),
    "chunk": (ALL, lambda s: _parted(s, aten.chunk(s.x, s.pick((2, 3)), s.channel))),
    "tensor_split": (ALL, lambda s: _parted(s, aten.tensor_split.sections(s.x, s.pick((1, 2)), s.channel))),
    "unbind": (ALL, lambda s: aten.unbind.int(s.x, s.pick((s.channel, 1)))[0]),
    "select": (ALL, lambda s: aten.select.int(s.x, s.pick((s.channel, 1)), s.pick((0, -1)))),
    "slice": (ALL, _sliced),
    **{
        name: (ALL, lambda s, f=f: f(s.x, s.channel, s.pick(range(s.width)), 1))  # type: ignore[misc]
        for name, f in _named("narrow", "narrow_copy")
    },
    "pad": (ALL, lambda s: aten.pad(s.x, _channel_pads(s), "constant", 0.5)),
    "constant_pad_nd": (ALL, lambda s: aten.constant_pad_nd(s.x, _channel_pads(s), 0.5)),
    **{
        name: ([k], lambda s, f=f: _padded(s, f))  # type: ignore[misc]
        for k, n in SPATIAL.items()
        for name, f in _named(f"reflection_pad{n}d", f"replication_pad{n}d")
    },
    **{
        name: ([k], lambda s, name=name: _pooled(s, name))  # type: ignore[misc]
        for k, n in SPATIAL.items()
        for name in (
            *(f"{p}_pool{n}d" for p in ("max", "avg", "adaptive_avg", "adaptive_max")),
            f"max_pool{n}d_with_indices",
        )
    },
    **{
        name: ([kind], lambda s, name=name: _upsampled(s, name))  # type: ignore[misc]
        for kind, modes in (
            ("series", ("upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d")),
            ("image", ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")),
            ("image", ("_upsample_nearest_exact2d",)),
            ("volume", ("upsample_nearest3d", "upsample_trilinear3d")),
        )
        for name in modes
    },
    "roll": (ALL, lambda s: aten.roll(s.x, [1], [s.pick((s.channel, 1))])),
    "flip": (ALL, lambda s: aten.flip(s.x, [s.pick((s.channel, 1))])),
    "lstm": (LAST, lambda s: _recurrent(s, "lstm", 4)),
    "gru": (LAST, lambda s: _recurrent(s, "gru", 3)),
    "rnn_tanh": (LAST, lambda s: _recurrent(s, "rnn_tanh", 1)),
    "rnn_relu": (LAST, lambda s: _recurrent(s, "rnn_relu", 1)),
    "lstm_cell": (["table"], lambda s: _cell(s, "lstm_cell", 4)),
    "gru_cell": (["table"], lambda s: _cell(s, "gru_cell", 3)),
    "rnn_tanh_cell": (["table"], lambda s: _cell(s, "rnn_tanh_cell", 1)),
    "rnn_relu_cell": (["table"], lambda s: _cell(s, "rnn_relu_cell", 1)),
    "zeros": (ALL, lambda s: _creation(s, aten.zeros)),
    "ones": (ALL, lambda s: _creation(s, aten.ones)),
    "full": (ALL, lambda s: _creation(s, lambda n: aten.full(n, 0.5))),
    "empty": (ALL, lambda s: _creation(s, lambda n: aten.fill.Scalar(aten.empty.memory_format(n), 0.5))),
    "new_zeros": (ALL, lambda s: _creation(s, lambda n: aten.new_zeros(s.x, n))),
    "new_ones": (ALL, lambda s: _creation(s, lambda n: aten.new_ones(s.x, n))),
    "new_full": (ALL, lambda s: _creation(s, lambda n: aten.new_full(s.x, n, 0.5))),
    "new_empty": (ALL, lambda s: _creation(s, lambda n: aten.fill.Scalar(aten.new_empty(s.x, n), 0.5))),
    "scalar_tensor": (ALL, lambda s: s.x * aten.scalar_tensor(1.5)),
    "arange": (ALL, lambda s: _along(s, lambda n: aten.arange(n))),
    "linspace": (ALL, lambda s: _along(s, lambda n: aten.linspace(0, 1, n))),
    "eye": (["table"], lambda s: _along(s, lambda n: aten.eye(n)[0])),
    "tril_indices": (["table"], lambda s: _along(s, lambda n: aten.tril_indices(n, n)[0, :n])),
    "triu_indices": (["table"], lambda s: _along(s, lambda n: aten.triu_indices(n, n)[0, :n])),
    "rand": (ALL, lambda s: _along(s, lambda n: aten.rand([n]) * 0)),
    "randn": (ALL, lambda s: _along(s, lambda n: aten.randn([n]) * 0)),
    "randint": (ALL, lambda s: _along(s, lambda n: aten.randint(3, [n]) * 0)),
    "randperm": (ALL, lambda s: _along(s, lambda n: aten.randperm(n) * 0)),
    "rand_like": (ALL, lambda s: s.x + aten.rand_like(s.x) * 0),
    "randn_like": (ALL, lambda s: s.x + aten.randn_like(s.x) * 0),
    "empty_like": (ALL, lambda s: s.x + aten.fill.Scalar(aten.empty_like(s.x), 0.5)),
    "one_hot": (ALL, lambda s: _along(s, lambda n: aten.one_hot(numbers(s, n), n).sum(0))),
    "_assert_tensor_metadata": (ALL, lambda s: (aten._assert_tensor_metadata(s.x, dtype=s.x.dtype), s.x)[1]),
    "where": (ALL, lambda s: aten.where.self(compared(s), s.x, operand(s))),
    "native_dropout": (ALL, lambda s: aten.native_dropout(s.x, 0.5, False)[0]),
}  # fmt: skip

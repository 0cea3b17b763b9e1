"""Random networks described by plain data: a list of ``(operator, a, b, c)``, any of which is a valid net.

Numbers are read modulo what there is to choose from, so that every list of tuples of integers is a
network, and hypothesis can shrink it.  A network maps one or two images, volumes, series, sequences of
tokens or rows of a table to logits and more.  Operators are layers and idioms written down here, and
every entry of sparsecc's table of ATen operators (``tests.aten_calls``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.aten_calls import SPATIAL, landed
from tests.aten_calls import steps as calls

Step = tuple[str, int, int, int]
Make = Callable[["Net", Tensor, int, int, int], Tensor]

_WIDTHS = (2, 3, 4, 6, 8, 12)
_LIMIT = 600  # elements of a value per sample
_LARGE = 50.0
EXAMPLES = {
    "image": (2, 3, 4, 4), "sequence": (2, 4, 6), "series": (2, 3, 6), "volume": (2, 2, 3, 3, 2),
    "table": (2, 6),
}  # fmt: skip
FORMS = 4


class Net(nn.Module):
    """Interprets a description; layers are made at the first run (``lay``), then only looked up.

    ``form`` says how many inputs there are, and in what structure the outputs come.
    """

    def __init__(self, steps: list[Step], kind: str, seed: int, form: int = 0) -> None:
        super().__init__()
        self.steps = steps
        self.kind = kind
        self.form = form % (2 * FORMS)
        self.layers = nn.ModuleDict()
        self.weights = nn.ParameterDict()
        self.choices: dict[Any, Any] = {}
        self.place = 0
        self._made = 0
        torch.manual_seed(seed)
        self.example = torch.randn(EXAMPLES[kind])
        self.examples = (self.example, torch.randn(EXAMPLES[kind]))[: self.form // FORMS + 1]
        self.eval()
        with torch.no_grad():
            self.forward(*self.examples)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def channel(self, x: Tensor) -> int:
        """The axis of channels: the last one of sequences, else the second."""
        return x.dim() - 1 if self.kind == "sequence" else 1

    def layer(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The layer of the current step."""
        name = f"l{self.place}_{self._made}"
        self._made += 1
        if name not in self.layers:
            module = make()
            with torch.no_grad():
                for key, tensor in module.state_dict().items():
                    if "running_var" in key:
                        tensor.uniform_(0.5, 2)
                    elif tensor.is_floating_point() and tensor.dim() == 1:
                        tensor.normal_(1 if "weight" in key else 0, 0.4)
            self.layers[name] = module.eval()
        return self.layers[name]

    def weight(self, *shape: int) -> Tensor:
        """A raw parameter of the current step."""
        name = f"w{self.place}_{self._made}"
        self._made += 1
        if name not in self.weights:
            self.weights[name] = nn.Parameter(torch.randn(shape) * 0.5)
        return self.weights[name]  # type: ignore[return-value]

    def buffer(self, values: Tensor) -> Tensor:
        """A buffer of the current step."""
        name = f"b{self.place}_{self._made}"
        self._made += 1
        if not hasattr(self, name):
            self.register_buffer(name, values)
        return getattr(self, name)  # type: ignore[no-any-return]

    def rewind(self) -> None:
        """Forget what the current step has made so far, while the network is laid out."""
        self._made = 0
        if self.place not in self.choices:
            for name in [n for n in self.weights if n.startswith(f"w{self.place}_")]:
                del self.weights[name]

    def tame(self, y: Tensor) -> Tensor:
        """``y``, or its hyperbolic tangent where it is large for the example."""
        key = (self.place, "tame")
        if key not in self.choices:
            self.choices[key] = bool(y.abs().max() > _LARGE)
        return torch.tanh(y / _LARGE) if self.choices[key] else y

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        values = [x] if other is None else [x, other]
        for at, (name, a, b, c) in enumerate(self.steps):
            self.place, self._made = at, 0
            candidates = [v for v in values if v.dim() == x.dim()]
            value = candidates[-1 - a % min(len(candidates), 3)]
            made = OPERATORS[self.kind][name](self, value, b, c, a)
            if made.numel() // made.shape[0] <= _LIMIT:
                values.append(made)
        self.place, self._made = len(self.steps), 0
        return self._outputs(x, values)

    def _outputs(self, x: Tensor, values: list[Tensor]) -> Any:
        last = values[-1]
        flat = last.flatten(1) if last[0].numel() <= 96 or last.dim() < 3 else last.flatten(2).mean(2)
        logits = self.layer(lambda: nn.Linear(flat.shape[1], 3))(flat)
        unread = values[1] if len(values) > 2 and values[1].dim() == x.dim() else last
        mean = unread.flatten(1).mean(1)
        if self.form % FORMS == 1:
            return {"logits": logits, "inner": {"mean": mean, "maps": [last, (unread,)]}}
        if self.form % FORMS == 2:
            return logits
        return (logits, mean) if self.form % FORMS == 0 else [values[-1], logits, values[len(values) // 2]]


def _pick(options: Any, index: int) -> Any:
    return options[index % len(options)]


def _divisor(n: int, index: int) -> int:
    return _pick([d for d in range(1, n + 1) if n % d == 0], index)  # type: ignore[no-any-return]


def _same(net: Net, x: Tensor, like: Tensor) -> Tensor:
    """``x`` projected to the channels of another value where it must be."""
    if x.shape == like.shape:
        return x
    if net.kind in SPATIAL:
        n = SPATIAL[net.kind]
        y = net.layer(lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](x.shape[1], like.shape[1], 1))(x)
        pools = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        return y if y.shape == like.shape else pools[n - 1](y, like.shape[2:])
    y = net.layer(lambda: nn.Linear(x.shape[-1], like.shape[-1]))(x)
    return y if y.shape == like.shape else y.mean(1, keepdim=True).expand(like.shape)


# -- images --------------------------------------------------------------------------------------------


def _conv(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    return net.layer(
        lambda: nn.Conv2d(x.shape[1], _pick(_WIDTHS, b), 1 + 2 * (c % 2), padding=c % 2, bias=a % 2 == 0)
    )(x)


def _grouped(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    groups = _divisor(x.shape[1], b)
    return net.layer(lambda: nn.Conv2d(x.shape[1], groups * (1 + c % 3), 3, padding=1, groups=groups))(x)


def _transposed(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    groups = _divisor(x.shape[1], b)
    return net.layer(lambda: nn.ConvTranspose2d(x.shape[1], groups * (1 + c % 3), 2, groups=groups))(x)


def _batch_norm(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    y = net.layer(lambda: nn.BatchNorm2d(x.shape[1]))(x)
    return F.relu(y) if c % 2 else y


def _group_norm(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    return net.layer(lambda: nn.GroupNorm(_divisor(x.shape[1], b), x.shape[1], affine=c % 3 > 0))(x)


def _instance_norm(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if x.shape[2] * x.shape[3] == 1:
        return x
    return net.layer(lambda: nn.InstanceNorm2d(x.shape[1], affine=c % 2 == 0))(x)


def _image_norm(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if c % 2:
        return net.layer(lambda: nn.LayerNorm(x.shape[1:]))(x)
    return net.layer(lambda: nn.LayerNorm(x.shape[1]))(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _concat(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    other = _branch(net, x, b)
    return torch.cat([x, other] if c % 2 else [other, x, other], 1)


def _branch(net: Net, x: Tensor, b: int) -> Tensor:
    return _project(net, x, b, 0, 0)


def _residual(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    inner = torch.tanh(_branch(net, x, b))
    return x + _same(net, inner, x)


def _chunk(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    parts = x.chunk(2 + b % 2, net.channel(x))
    return torch.cat([parts[-1], *(F.relu(p) for p in parts[:-1])], net.channel(x))


def _glu(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    dim = net.channel(x)
    if x.shape[dim] % 2:
        return x
    if c % 2:
        return F.glu(x, dim)
    left, right = x.split(x.shape[dim] // 2, dim)
    return left * torch.sigmoid(right)


def _slice(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    dim, n = net.channel(x), x.shape[net.channel(x)]
    start = b % n
    return x.narrow(dim, start, 1 + c % (n - start)) if a % 2 else x.narrow(dim, 0, n - start)


def _pad(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    behind = x.dim() - 1 - net.channel(x)
    return F.pad(x, (*[0, 0] * behind, b % 3, c % 3), value=0.5 * (a % 2))


def _shuffle(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    n, (*_, h, w) = x.shape[1], x.shape
    groups = _divisor(n, b)
    return x.view(-1, groups, n // groups, h, w).transpose(1, 2).reshape(-1, n, h, w)


def _pixel_shuffle(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if c % 2:
        return F.pixel_shuffle(x, 2) if x.shape[1] % 4 == 0 else x
    return F.pixel_unshuffle(x, 2) if x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 else x


def _gate(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    s = x.mean((2, 3), keepdim=True)
    s = net.layer(lambda: nn.Conv2d(x.shape[1], _pick(_WIDTHS, b), 1))(s).relu()
    return x * net.layer(lambda: nn.Conv2d(s.shape[1], x.shape[1], 1))(s).sigmoid()


def _statistics(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    dim = net.channel(x)
    kinds: list[Callable[[], Tensor]] = [
        lambda: x.mean(dim, keepdim=True),
        lambda: x.sum(dim, keepdim=True),
        lambda: x.amax(dim, keepdim=True),
        lambda: x.var(dim, keepdim=True, unbiased=False),
        lambda: x.logsumexp(dim, keepdim=True),
        lambda: torch.linalg.vector_norm(x, dim=dim, keepdim=True),
    ]
    return x * _pick(kinds, b)() if c % 2 else x - _pick(kinds, b)()


def _softmax(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    return (
        x.softmax(net.channel(x))
        if c % 2
        else F.normalize(x, dim=net.channel(x)) + x.log_softmax(net.channel(x))
    )


def _pool(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if min(x.shape[2:]) < 2:
        return F.interpolate(x, scale_factor=2)
    return F.max_pool2d(x, 2) if c % 2 else F.avg_pool2d(x, 2, 1)


def _scale(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    n = x.shape[net.channel(x)]
    shape = (n, *[1] * (x.dim() - 1 - net.channel(x)))
    y = x * net.weight(*shape)
    return y + net.weight(*shape) if c % 2 else y


def _activation(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    functions = [
        F.relu,
        F.gelu,
        F.silu,
        torch.tanh,
        lambda y: y.clamp(-1, 1),
        lambda y: y.abs() ** 1.5,
        F.elu,
    ]
    return _pick(functions, b)(x)  # type: ignore[no-any-return]


def _prelu(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if x.dim() != 4:
        return F.leaky_relu(x)
    return net.layer(lambda: nn.PReLU(x.shape[1] if c % 2 else 1))(x)


def _non_local(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    width = _pick(_WIDTHS, b)
    q, k, v = (net.layer(lambda: nn.Conv2d(x.shape[1], width, 1))(x).flatten(2) for _ in range(3))
    y = v @ (q.transpose(1, 2) @ k * 0.3).softmax(-1).transpose(1, 2)
    return _same(net, y.unflatten(-1, x.shape[2:]), x) + x


def _unfolded(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if min(x.shape[2:]) < 2:
        return x
    windows = F.unfold(x, 2)
    if c % 2:
        return F.fold(windows, x.shape[2:], 2)
    width = _pick(_WIDTHS, b)
    return net.layer(lambda: nn.Conv1d(windows.shape[1], width, 1))(windows)[..., None]


def _sampled(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    places = net.layer(lambda: nn.Conv2d(x.shape[1], 2, 1))(x).tanh().permute(0, 2, 3, 1)
    return F.grid_sample(x, places, align_corners=c % 2 == 0, padding_mode="border")


def _write(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    y = x * 1.5
    n = y.shape[net.channel(y)]
    part = y.narrow(net.channel(y), b % n, 1 + c % (n - b % n))
    part.mul_(2) if a % 2 else part.fill_(0.25)
    return y


def _roll(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    dims = (net.channel(x), x.dim() - 1 - c % 2)
    return torch.roll(x, (b - 2, c), dims) if a % 2 else torch.roll(x, b - 2, dims[0])


def _flip(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    return x.flip(net.channel(x)) + (x if c % 2 else 0)


def _gathered(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """Channels in another order, some of them several times, some not at all."""
    dim = net.channel(x)
    places = [(a + i * (b + 1)) % x.shape[dim] - (c % 2) * x.shape[dim] for i in range(1 + (a + b + c) % 7)]
    chosen = net.buffer(torch.tensor(places))
    if a % 3 == 0:
        return x.index_select(dim, chosen.remainder(x.shape[dim]) if c % 2 else chosen)
    return x[:, chosen] if dim == 1 else x[..., chosen]


def _looked_up(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """Positions along a spatial or time axis, picked by values, alike for all channels or each for itself."""
    y = x.movedim(net.channel(x), -1).flatten(1, -2)
    own = torch.tanh(_branch(net, x, b)).movedim(net.channel(x), -1).flatten(1, -2)
    order = (own[..., :1] + net.weight(own.shape[1], 1) * 0.1).argsort(1)  # no order of equal ones
    kinds: list[Callable[[], Tensor]] = [
        lambda: y.gather(1, order.expand(-1, -1, y.shape[-1])),
        lambda: y.scatter(1, order.expand(-1, -1, y.shape[-1]), y * 2),
        lambda: y.scatter_add(1, order.expand(-1, -1, y.shape[-1]), y),
        lambda: y[torch.arange(y.shape[0])[:, None], order[..., 0]],
        lambda: y.index_add(1, torch.zeros(1, dtype=torch.int64), y[:, -1:]),
        lambda: y.index_put((torch.arange(y.shape[0]), order[:, 0, 0]), y[:, 0]),
        lambda: y.slice_scatter(y[:, :1] * 3, 1, y.shape[1] - 1, y.shape[1]),
        lambda: y.select_scatter(y[:, 0] * 3, 1, y.shape[1] - 1),
    ]
    z = _pick(kinds, c + 6 * (a % 2))()
    return z.reshape(x.movedim(net.channel(x), -1).shape).movedim(-1, net.channel(x))


def _compared(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """A gate from how alike two projections are."""
    left = x.movedim(net.channel(x), -1)
    right = torch.tanh(_same(net, _branch(net, x, b), x)).movedim(net.channel(x), -1)
    kinds: list[Callable[[], Tensor]] = [
        lambda: F.cosine_similarity(left, right, dim=-1)[..., None],
        lambda: F.pairwise_distance(left, right, keepdim=True),
        lambda: (left - right).abs().max(-1, keepdim=True)[0],
        lambda: torch.linalg.vecdot(left, right)[..., None],
        lambda: F.l1_loss(left, right),
        lambda: torch.linalg.norm(left * right, dim=-1, keepdim=True),
    ]
    return (left * _pick(kinds, c)()).movedim(-1, net.channel(x))


def _transformed(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """Fourier transforms, differences and sums along an axis that is no channel."""
    dim = 2 if x.dim() == 4 else 1
    kinds: list[Callable[[], Tensor]] = [
        lambda: torch.fft.rfft(x, dim=dim).abs(),
        lambda: torch.fft.irfft(torch.fft.rfft(x, dim=dim), n=x.shape[dim], dim=dim),
        lambda: torch.fft.fft(x, dim=dim).real,
        lambda: x.cumsum(dim),
        lambda: torch.fft.fftshift(x, dim=dim),
        lambda: torch.polar(x.abs(), x).imag,
    ]
    return _pick(kinds, b)()


# -- sequences -----------------------------------------------------------------------------------------


def _linear(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    if c % 3 == 0:
        return torch.einsum("btd,df->btf", x, net.weight(x.shape[-1], _pick(_WIDTHS, b)))
    return net.layer(lambda: nn.Linear(x.shape[-1], _pick(_WIDTHS, b), bias=c % 3 == 1))(x)


def _layer_norm(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    return net.layer(lambda: (nn.LayerNorm if c % 2 else nn.RMSNorm)(x.shape[-1], eps=1e-5))(x)


def _attention(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    kv, times, dim = 1 + b % 2, 1 + a % 3, 2 + c % 2
    heads, (n, t, d) = kv * times, x.shape
    q = net.layer(lambda: nn.Linear(d, heads * dim))(x).view(n, t, heads, dim).transpose(1, 2)
    k, v = (
        net.layer(lambda: nn.Linear(d, kv * dim))(x).view(n, t, kv, dim).transpose(1, 2) for _ in range(2)
    )
    if b % 3 == 0:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    elif b % 3 == 1:
        k, v = (y[:, :, None].expand(n, kv, times, t, dim).reshape(n, heads, t, dim) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=c % 2 == 0, enable_gqa=b % 3 == 2)
    y = y.transpose(1, 2).reshape(n, t, heads * dim)
    return net.layer(lambda: nn.Linear(heads * dim, d))(y) + x


def _fused(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    heads, dim, (n, t, d) = 1 + b % 3, 2 + c % 2, x.shape
    y = net.layer(lambda: nn.Linear(d, 3 * heads * dim))(x)
    if a % 3 == 0:
        q, k, v = y.reshape(n, t, 3, heads, dim).permute(2, 0, 3, 1, 4)
    elif a % 3 == 1:
        q, k, v = (p.unflatten(-1, (heads, dim)).transpose(1, 2) for p in y.chunk(3, -1))
    else:
        q, k, v = (
            p.squeeze(2).transpose(1, 2)
            for p in y.view(n, t, heads, 3, dim).permute(0, 1, 3, 2, 4).split(1, 2)
        )
    weights = (q @ k.transpose(-2, -1) / dim**0.5).softmax(-1)
    return net.layer(lambda: nn.Linear(heads * dim, d))((weights @ v).transpose(1, 2).flatten(2))


def _recurrent(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    kind = _pick((nn.LSTM, nn.GRU, nn.RNN), b)
    width = 2 + a % 3
    cell = net.layer(lambda: kind(x.shape[-1], width, 1 + c % 2, batch_first=True, bidirectional=a % 2 == 1))
    return cell(x)[0]  # type: ignore[no-any-return]


def _embedding(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    return x + net.layer(lambda: nn.Embedding(8, x.shape[-1]))(places)


def _token(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    token = net.weight(1, 1, x.shape[-1]).expand(x.shape[0], -1, -1)
    return torch.cat([token, x], 1)[:, : x.shape[1]]


def _experts(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    width = _pick(_WIDTHS, b)
    up, down = net.weight(2, x.shape[-1], width), net.weight(2, width, x.shape[-1])
    router = net.layer(lambda: nn.Linear(x.shape[-1], 2))(x).softmax(-1)
    y = torch.einsum("btd,edf->betf", x, up).relu()
    return torch.einsum("betf,efd,bte->btd", y, down, router)


def _joined(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    n = x.shape[-1]
    factor = _divisor(n, b)
    y = (
        x.unflatten(-1, (factor, n // factor)).transpose(2, 3)
        if c % 2
        else x.unflatten(-1, (-1, factor)).flip(3)
    )
    return y.flatten(2)


def _doubled(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    return (
        torch.cat([x.repeat(1, 1, 2), x.repeat_interleave(2, -1)], -1)
        if c % 2
        else x.repeat_interleave(3, -1)
    )


def _convolved(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    n = x.shape[-1]
    groups = n if c % 2 else 1
    return net.layer(lambda: nn.Conv1d(n, n, 3, padding=1, groups=groups))(x.transpose(1, 2)).transpose(1, 2)


# -- any kind ------------------------------------------------------------------------------------------


def _project(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """A layer that makes channels of channels."""
    width, n = _pick(_WIDTHS, b), SPATIAL.get(net.kind, 0)
    if n == 0:
        return net.layer(lambda: nn.Linear(x.shape[-1], width, bias=a % 2 == 0))(x)
    convs, kernel = (nn.Conv1d, nn.Conv2d, nn.Conv3d), 1 + 2 * (c % 2)
    return net.layer(lambda: convs[n - 1](x.shape[1], width, kernel, padding=kernel // 2, bias=a % 2 == 0))(x)


def _raised(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """A transposed convolution of one or three axes."""
    convs, groups = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _divisor(x.shape[1], b)
    kind = convs[SPATIAL[net.kind] - 1]
    return net.layer(lambda: kind(x.shape[1], groups * (1 + c % 3), 1 + a % 2, groups=groups))(x)


def _normal(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """Batch normalisation of any form, also of rows."""
    norms = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return net.layer(lambda: norms[SPATIAL.get(net.kind, 0)](x.shape[1], affine=c % 3 > 0))(x)


def _shared(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """A layer of an earlier step once more, where one takes this operand."""
    if net.place not in net.choices:
        fits = [n for n, m in net.layers.items() if _takes(m, net, x)]
        net.choices[net.place] = _pick(fits, b) if fits else None
    name = net.choices[net.place]
    return x if name is None else landed(net, x, net.layers[name](x))


def _takes(module: nn.Module, net: Net, x: Tensor) -> bool:
    if isinstance(module, nn.Linear):
        return net.kind in ("sequence", "table") and module.in_features == x.shape[-1]
    if isinstance(module, nn.modules.conv._ConvNd):
        return x.dim() == module.weight.dim() and module.in_channels == x.shape[1]
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_features == x.shape[1]


def _tied(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """There and back by one matrix."""
    w = net.weight(_pick(_WIDTHS, b), x.shape[-1])
    return F.linear(torch.relu(F.linear(x, w)), w.t())


def _buffered(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
    """Times a buffer along the channels, or plus one of a single number."""
    shape = [1] * (x.dim() - net.channel(x))
    shape[0] = x.shape[net.channel(x)]
    return x * net.buffer(torch.rand(shape) + 0.5) + net.buffer(torch.rand(1))


_ANY = (
    _residual,
    _chunk,
    _glu,
    _slice,
    _pad,
    _statistics,
    _softmax,
    _scale,
    _activation,
    _write,
    _shared,
    _buffered,
    _roll,
    _flip,
    _gathered,
)
_IMAGE = (
    *(_conv, _grouped, _transposed, _batch_norm, _group_norm, _instance_norm, _image_norm, _concat),
    *(_shuffle, _pixel_shuffle, _gate, _pool, _prelu, _non_local, _unfolded, _sampled),
    *(_looked_up, _compared, _transformed),
)
_SEQUENCE = (
    *(_linear, _layer_norm, _attention, _fused, _recurrent, _embedding, _token, _experts),
    *(_joined, _doubled, _convolved, _tied, _looked_up, _compared, _transformed),
)
_OWN: dict[str, tuple[Make, ...]] = {
    "image": _IMAGE, "sequence": _SEQUENCE, "series": (_raised, _normal, _concat),
    "volume": (_raised, _normal, _concat), "table": (_normal, _tied, _concat),
}  # fmt: skip
LAYERS: dict[str, dict[str, Make]] = {
    kind: {f.__name__[1:]: f for f in (_project, *own, *_ANY)} for kind, own in _OWN.items()
}
CALLS: dict[str, dict[str, Make]] = {kind: calls(kind) for kind in EXAMPLES}
OPERATORS: dict[str, dict[str, Make]] = {kind: {**LAYERS[kind], **CALLS[kind]} for kind in EXAMPLES}

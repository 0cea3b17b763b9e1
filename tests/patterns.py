"""Tiny models of the graph patterns that pruners meet, each with example inputs.

A builder gives ``(module, example_inputs)``; ``CASES`` lists them with what is expected of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Case:
    """A pattern.

    ``kept_class``: the pruned model is of the class that was given.  ``zeroing``: zeroing what the
    consumers of removed channels read is an exact mask (no reduction runs over pruned positions).
    """

    name: str
    build: Callable[[], Built]
    kept_class: bool = True
    zeroing: bool = False

    def make(self) -> Built:
        """The model with random weights, statistics and affine parameters; the same ones every time."""
        torch.manual_seed(0)
        model, inputs = self.build()
        _randomise(model)
        return model.eval(), inputs


CASES: dict[str, Case] = {}


def case(
    *, kept_class: bool = True, zeroing: bool = False
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder under its function's name."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        CASES[build.__name__] = Case(build.__name__, build, kept_class, zeroing)
        return build

    return register


def _randomise(model: nn.Module) -> None:
    """Statistics of one and zero would hide errors."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, norms):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + (name == "weight"))
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 2)


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    """A random batch of images."""
    return torch.randn(batch, channels, size, size)


def tokens(width: int = 12, length: int = 5, batch: int = 2) -> Tensor:
    """A random batch of sequences."""
    return torch.randn(batch, length, width)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Add(nn.Module):
    """The sum of branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum((b(x) for b in self.branches[1:]), self.branches[0](x))  # type: ignore[no-any-return]


class Cat(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, **options), nn.BatchNorm2d(o), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# -- convolutions ------------------------------------------------------------------------------------


@case(zeroing=True)
def conv_bn_relu() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 12), head(12)), (image(),)


@case(zeroing=True)
def residual_identity() -> Built:
    return nn.Sequential(conv(3, 8), Add(nn.Identity(), conv(8, 8)), nn.ReLU(), head(8)), (image(),)


@case(zeroing=True)
def residual_projection() -> Built:
    block = Add(nn.Conv2d(8, 12, 1, stride=2), nn.Sequential(conv(8, 6), nn.Conv2d(6, 12, 3, 2, 1)))
    return nn.Sequential(conv(3, 8), block, head(12)), (image(),)


@case(zeroing=True)
def dense_concat() -> Built:
    layers: list[nn.Module] = [conv(3, 8)]
    for i in range(3):
        layers.append(Cat(nn.Identity(), conv(8 + 4 * i, 4)))
    return nn.Sequential(*layers, head(20)), (image(),)


@case(zeroing=True)
def concat_of_different_widths() -> Built:
    return nn.Sequential(Cat(conv(3, 4), conv(3, 7, 1), conv(3, 2, 5)), conv(13, 6), head(6)), (image(),)


class Chunked(nn.Module):
    """Parts of the channels take different paths; the last of them skips."""

    def __init__(
        self, sizes: tuple[int, ...], order: tuple[int, ...], split: Callable[[Tensor], Any]
    ) -> None:
        super().__init__()
        self.stem = conv(3, sum(sizes))
        self.paths = nn.ModuleList(conv(n, n) for n in sizes[:-1])
        self.tail = nn.Conv2d(sum(sizes), 6, 1)
        self.order = order
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(self.stem(x)))
        parts = [*(p(y) for p, y in zip(self.paths, parts, strict=False)), parts[-1]]
        return self.tail(torch.cat([parts[i] for i in self.order], 1))  # type: ignore[no-any-return]


@case(zeroing=True)
def chunk_equal() -> Built:
    return Chunked((4, 4), (0, 1), lambda y: y.chunk(2, 1)), (image(),)


@case(zeroing=True)
def chunk_uneven() -> Built:
    return Chunked((4, 4, 3), (0, 1, 2), lambda y: y.chunk(3, 1)), (image(),)


@case(kept_class=False, zeroing=True)
def split_uneven() -> Built:
    return Chunked((4, 6, 2), (0, 1, 2), lambda y: y.split((4, 6, 2), 1)), (image(),)


@case(kept_class=False, zeroing=True)
def split_then_concat_in_another_order() -> Built:
    return Chunked((4, 4, 4), (2, 0, 1), lambda y: y.split(4, 1)), (image(),)


@case(zeroing=True)
def tensor_split_sections() -> Built:
    return Chunked((4, 3, 3), (0, 2, 1), lambda y: y.tensor_split(3, 1)), (image(),)


class Sliced(nn.Module):
    """Slices, one of which overlaps the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.tail = nn.Conv2d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(torch.cat([y[:, 8:], y[:, :4] * 2, y[:, 5:-1]], 1))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def slices() -> Built:
    return Sliced(), (image(),)


class Indexed(nn.Module):
    """Channels picked by a buffer."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.register_buffer("order", torch.tensor([6, 1, 3, 3, 0, 5, 4]))
        self.tail = nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.stem(x)[:, self.order])  # type: ignore[no-any-return]


@case()
def index_with_buffer() -> Built:
    return Indexed(), (image(),)


@case(zeroing=True)
def flatten_spatial() -> Built:
    return nn.Sequential(
        conv(3, 6), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3)
    ), (image(),)


class LiteralView(nn.Module):
    """Sizes spelled out in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.tail = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(y.view(y.shape[0], 6 * 8 * 8))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def literal_view() -> Built:
    return LiteralView(), (image(),)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.up = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(s))))


@case(zeroing=True)
def squeeze_excitation() -> Built:
    return nn.Sequential(conv(3, 8), Gate(8, 4), conv(8, 6), head(6)), (image(),)


class SpatialGate(nn.Module):
    """A map of one channel from the mean and the maximum over channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.mix(pooled))


@case()
def spatial_gate() -> Built:
    return nn.Sequential(conv(3, 8), SpatialGate(), conv(8, 6), head(6)), (image(),)


class SpatialGateMax(nn.Module):
    """The same gate with the maximum as a pair of values and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = torch.max(x, 1, keepdim=True)
        return x * torch.sigmoid(self.mix(torch.cat([x.mean(1, keepdim=True), values], 1)))


@case()
def spatial_gate_max() -> Built:
    return nn.Sequential(conv(3, 8), SpatialGateMax(), conv(8, 6), head(6)), (image(),)


@case(zeroing=True)
def grouped_conv() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 12, groups=2), conv(12, 12, groups=4), head(12)), (image(),)


@case(zeroing=True)
def depthwise() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 6, 1), head(6)), (image(),)


@case(zeroing=True)
def depthwise_multiplier() -> Built:
    return nn.Sequential(conv(3, 4), conv(4, 12, groups=4), conv(12, 6, 1), head(6)), (image(),)


@case(zeroing=True)
def conv_transpose() -> Built:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)), (
        image(),
    )


@case(zeroing=True)
def grouped_conv_transpose() -> Built:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.Conv2d(12, 2, 1)), (
        image(),
    )


@case(zeroing=True)
def conv1d_and_conv3d() -> Built:
    line = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1))
    lift = nn.Sequential(
        nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6), nn.Conv3d(6, 2, 2)
    )
    return nn.Sequential(line, lift), (torch.randn(2, 3, 10),)


class Shuffle(nn.Module):
    """Channel shuffle with its number of groups as an attribute."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@case(zeroing=True)
def channel_shuffle() -> Built:
    return nn.Sequential(conv(3, 12), conv(12, 12, groups=2), Shuffle(2), conv(12, 12, groups=2), head(12)), (
        image(),
    )


@case()
def channel_shuffle_indivisible() -> Built:
    """Three groups of four do not shuffle into three groups again: frozen, with the reason."""
    return nn.Sequential(conv(3, 12), conv(12, 12, groups=3), Shuffle(3), conv(12, 12, groups=3), head(12)), (
        image(),
    )


@case(zeroing=True)
def shuffle_operator() -> Built:
    return nn.Sequential(conv(3, 12), nn.ChannelShuffle(3), conv(12, 6, 1), head(6)), (image(),)


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels pass, the other half is worked on, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.work = nn.Sequential(
            conv(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = x.chunk(2, dim=1)
        y = torch.cat((passed, self.work(worked)), 1)
        b, c, h, w = y.shape
        return y.reshape(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


@case(zeroing=True)
def shufflenet_units() -> Built:
    return nn.Sequential(conv(3, 8), ShuffleUnit(8), ShuffleUnit(8), head(8)), (image(),)


@case(zeroing=True)
def pixel_shuffle() -> Built:
    return nn.Sequential(conv(3, 8), nn.Conv2d(8, 12, 3, 1, 1), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1)), (
        image(),
    )


@case(zeroing=True)
def pixel_unshuffle() -> Built:
    return nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 6, 1), head(6)), (image(),)


class Focus(nn.Module):
    """Space to depth by strided slices."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return torch.cat(parts, 1)


@case(zeroing=True)
def focus() -> Built:
    return nn.Sequential(conv(3, 4), Focus(), conv(16, 6, 1), head(6)), (image(),)


# -- larger convolutional structures -----------------------------------------------------------------


class UNet(nn.Module):
    """Two levels with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 6), conv(6, 8)
        self.middle = conv(8, 10)
        self.up1, self.mix1 = nn.ConvTranspose2d(10, 8, 2, 2), conv(16, 8)
        self.up2, self.mix2 = nn.Upsample(scale_factor=2), conv(14, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = self.mix1(torch.cat([self.up1(c), b], 1))
        return self.last(self.mix2(torch.cat([self.up2(c), a], 1)))  # type: ignore[no-any-return]


@case(zeroing=True)
def unet() -> Built:
    return UNet(), (image(),)


class Exchange(nn.Module):
    """HRNet: two resolutions that feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = conv(3, 6), conv(3, 8, stride=2)
        self.down, self.up = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 6, 1)
        self.out_high, self.out_low = head(6), head(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high, low = self.high(x), self.low(x)
        lifted = F.interpolate(self.up(low), size=high.shape[-2:], mode="bilinear")
        return self.out_high(F.relu(high + lifted)), self.out_low(F.relu(low + self.down(high)))


@case(zeroing=True)
def hrnet_exchange() -> Built:
    return Exchange(), (image(),)


@case(zeroing=True)
def inception() -> Built:
    pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(6, 4, 1))
    block = Cat(conv(6, 4, 1), nn.Sequential(conv(6, 3, 1), conv(3, 5)), pooled)
    return nn.Sequential(conv(3, 6), block, head(13)), (image(),)


class Twice(nn.Module):
    """One module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.tail = conv(3, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(self.shared(F.max_pool2d(self.shared(y), 2)))  # type: ignore[no-any-return]


@case(zeroing=True)
def shared_module() -> Built:
    return Twice(), (image(),)


class TiedConvs(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.b.weight = self.a.weight
        self.tail = head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(F.relu(self.a(y)) + self.b(y))  # type: ignore[no-any-return]


@case(zeroing=True)
def tied_convs() -> Built:
    return TiedConvs(), (image(),)


class LayerScale(nn.Module):
    """A residual branch scaled by a raw parameter, and a raw bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.tail = conv(3, 8), conv(8, 8), head(8)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))
        self.beta = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(y + self.gamma * self.branch(y) + self.beta)  # type: ignore[no-any-return]


@case(zeroing=True)
def layer_scale() -> Built:
    return LayerScale(), (image(),)


class Raw(nn.Module):
    """Functional operators on raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.shift = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(6, 8) * 0.3)
        self.last = nn.Parameter(torch.randn(6, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.kernel, self.shift, padding=1)).mean((2, 3))
        return F.relu(F.linear(y, self.matrix)) @ self.last


@case()
def raw_parameters() -> Built:
    return Raw(), (image(),)


@case()
def weight_normalised() -> Built:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
    second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3, padding=1))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head(6)), (image(),)


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


@case(zeroing=True)
def weight_standardised() -> Built:
    return nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), head(6)), (
        image(),
    )


# -- normalisations and activations ------------------------------------------------------------------


@case()
def layer_norm_over_images() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm([8, 8, 8]), nn.ReLU(), conv(8, 6), head(6)), (
        image(),
    )


@case()
def layer_norm_channels_last() -> Built:
    last, first = Apply(lambda x: x.permute(0, 2, 3, 1)), Apply(lambda x: x.permute(0, 3, 1, 2))
    mlp = nn.Sequential(last, nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), first)
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), Add(nn.Identity(), mlp), head(8)), (image(),)


@case()
def group_norm() -> Built:
    block = Add(nn.Identity(), nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)))
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.GroupNorm(2, 8), head(8)), (image(),)


@case(zeroing=True)
def instance_norm() -> Built:
    norm = nn.InstanceNorm2d(8, affine=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.InstanceNorm2d(8), conv(8, 6), head(6)), (
        image(),
    )


@case()
def rms_norm() -> Built:
    return nn.Sequential(nn.Linear(12, 16), nn.RMSNorm(16), nn.SiLU(), nn.Linear(16, 4)), (tokens(),)


class HandMadeRMSNorm(nn.Module):
    """Root mean square in float32, as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


@case()
def hand_made_rms_norm() -> Built:
    return nn.Sequential(nn.Linear(12, 16), HandMadeRMSNorm(16), nn.SiLU(), nn.Linear(16, 4)), (tokens(),)


@case(zeroing=True)
def prelu() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 1), nn.PReLU(), head(6)), (image(),)


@case()
def softmax_over_channels() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 6, 1), nn.LogSoftmax(1), head(6)), (
        image(),
    )


@case()
def l2_normalised() -> Built:
    return nn.Sequential(nn.Linear(12, 16), Apply(lambda x: F.normalize(x, dim=-1)), nn.Linear(16, 4)), (
        tokens(),
    )


@case(zeroing=True)
def padding_modes() -> Built:
    layers = (nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.ReplicationPad2d(1), nn.ZeroPad2d((1, 0, 2, 1)))
    circular = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv(3, 8), *layers, circular, head(6)), (image(),)


@case(zeroing=True)
def channel_padding() -> Built:
    """The parameter-free shortcut of CIFAR ResNets."""
    short = Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    block = Add(short, nn.Sequential(conv(8, 6), nn.Conv2d(6, 12, 3, 2, 1)))
    return nn.Sequential(conv(3, 8), block, head(12)), (image(),)


# -- recurrent ---------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.cell = kind(8, 6, batch_first=True, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.tail = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(self.inner(x))
        return self.tail(y)  # type: ignore[no-any-return]


@case(zeroing=True)
def lstm() -> Built:
    return Recurrent(nn.LSTM), (tokens(6),)


@case(zeroing=True)
def lstm_two_layers_bidirectional() -> Built:
    return Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (tokens(6),)


@case(zeroing=True)
def lstm_projection() -> Built:
    return Recurrent(nn.LSTM, num_layers=2, proj_size=4), (tokens(6),)


@case(zeroing=True)
def gru_two_layers() -> Built:
    return Recurrent(nn.GRU, num_layers=2, bias=False), (tokens(6),)


@case(zeroing=True)
def rnn_bidirectional() -> Built:
    return Recurrent(nn.RNN, bidirectional=True), (tokens(6),)


class LearnedState(nn.Module):
    """Initial states are parameters, final states are read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.h = nn.Parameter(torch.randn(2, 1, 8))
        self.c = nn.Parameter(torch.randn(2, 1, 8))
        self.tail = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [s.expand(-1, x.shape[0], -1).contiguous() for s in (self.h, self.c)]
        _, (h, c) = self.cell(x, tuple(states))
        return self.tail(torch.cat([h[-1], c[-1]], -1))  # type: ignore[no-any-return]


@case(zeroing=True)
def lstm_learned_state() -> Built:
    return LearnedState(), (tokens(6),)


class Cells(nn.Module):
    """An unrolled LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 8)
        self.tail = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 8)
        for t in range(3):
            h, c = self.cell(x[:, t], (h, c))
        return self.tail(h)  # type: ignore[no-any-return]


@case(kept_class=False)
def lstm_cell() -> Built:
    return Cells(), (tokens(6, 3),)


# -- attention ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Separate projections, heads by attributes."""

    def __init__(self, width: int = 12, heads: int = 4, dim: int = 6, kv: int | None = None) -> None:
        super().__init__()
        self.heads, self.dim, self.kv = heads, dim, kv or heads
        self.q = nn.Linear(width, heads * dim)
        self.k, self.v = nn.Linear(width, self.kv * dim), nn.Linear(width, self.kv * dim)
        self.out = nn.Linear(heads * dim, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(*self.split(x)).transpose(1, 2)
        return self.out(y.reshape(x.shape[0], x.shape[1], -1))  # type: ignore[no-any-return]


def block(attention: nn.Module, width: int = 12) -> nn.Sequential:
    """A transformer layer between an embedding and a classifier."""
    mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
    attend = nn.Sequential(nn.LayerNorm(width), attention)
    return nn.Sequential(
        nn.Linear(6, width), Add(nn.Identity(), attend), Add(nn.Identity(), mlp), nn.Linear(width, 3)
    )


@case()
def attention() -> Built:
    return block(Attention()), (tokens(6),)


class DefaultScale(Attention):
    """The scale is read from the head size at run time."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@case(kept_class=False)
def attention_default_scale() -> Built:
    return block(DefaultScale()), (tokens(6),)


class WrittenOut(Attention):
    """Softmax attention by hand, causal, with a scale computed from the head size."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


@case(kept_class=False)
def attention_written_out() -> Built:
    return block(WrittenOut()), (tokens(6),)


class Einsum(Attention):
    """Attention by einsum, without reshaping to heads first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.dim)) for y in (self.q(x), self.k(x), self.v(x)))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))  # type: ignore[no-any-return]


@case()
def attention_einsum() -> Built:
    return block(Einsum()), (tokens(6),)


class Grouped(Attention):
    """Grouped queries by repeating keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = self.heads // self.kv
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


@case()
def grouped_queries_repeated() -> Built:
    return block(Grouped(heads=4, kv=2)), (tokens(6),)


class GroupedExpanded(Attention):
    """Grouped queries by expanding keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, kv, t, d = k.shape
        times = self.heads // self.kv
        k, v = (y[:, :, None].expand(b, kv, times, t, d).reshape(b, kv * times, t, d) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)


@case()
def grouped_queries_expanded() -> Built:
    return block(GroupedExpanded(heads=4, kv=2)), (tokens(6),)


class GroupedBuiltIn(Attention):
    """Grouped queries by the operator itself."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5)


@case()
def grouped_queries_built_in() -> Built:
    return block(GroupedBuiltIn(heads=4, kv=2)), (tokens(6),)


@case()
def multi_query() -> Built:
    return block(GroupedBuiltIn(heads=4, kv=1)), (tokens(6),)


class Fused(nn.Module):
    """One projection for queries, keys and values, taken apart in one of several ways."""

    def __init__(self, how: str, width: int = 12, heads: int = 4, dim: int = 6) -> None:
        super().__init__()
        self.how, self.heads, self.dim = how, heads, dim
        self.qkv = nn.Linear(width, 3 * heads * dim)
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x)
        if self.how == "static":
            q, k, v = y.reshape(b, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        elif self.how == "minus one":
            q, k, v = y.reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = y.chunk(3, -1) if self.how == "chunk" else y.split(self.heads * self.dim, -1)
            q, k, v = (p.reshape(b, t, self.heads, -1).transpose(1, 2) for p in parts)
        z = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(z.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@case()
def fused_qkv_static() -> Built:
    return block(Fused("static")), (tokens(6),)


@case()
def fused_qkv_minus_one() -> Built:
    return block(Fused("minus one")), (tokens(6),)


@case()
def fused_qkv_chunk() -> Built:
    return block(Fused("chunk")), (tokens(6),)


@case()
def fused_qkv_split() -> Built:
    return block(Fused("split")), (tokens(6),)


class SelfAttention(nn.Module):
    """PyTorch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@case(kept_class=False)
def multihead_attention() -> Built:
    return block(SelfAttention()), (tokens(6),)


@case(kept_class=False)
def transformer_encoder_layer() -> Built:
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True)
    return nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 3)), (tokens(6),)


class Rotary(Attention):
    """Rotary positions: halves of a head are turned together."""

    frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", 1 / 100 ** (torch.arange(0, 6, 2) / 6), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * self.frequency
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, scale=0.5)


@case(kept_class=False)
def rotary() -> Built:
    return block(Rotary()), (tokens(6),)


class CrossAttention(nn.Module):
    """Learned queries look at a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 12))
        self.k, self.v, self.out = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(x.shape[0], -1, -1)
        return self.out(F.scaled_dot_product_attention(q, self.k(x), self.v(x))).mean(1)  # type: ignore[no-any-return]


@case(kept_class=False)
def learned_queries() -> Built:
    return CrossAttention(), (tokens(6),)


class Positions(nn.Module):
    """A class token and position embeddings in front of a layer (ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.position = nn.Parameter(torch.randn(1, 5, 12))
        self.attention = Fused("chunk")
        self.norm, self.tail = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.position
        y = y + self.attention(y)
        return self.tail(self.norm(y)[:, 0])  # type: ignore[no-any-return]


@case()
def vision_transformer() -> Built:
    return Positions(), (image(),)


class NonLocal(nn.Module):
    """Attention between the pixels of an image."""

    def __init__(self, channels: int = 8, inner: int = 4) -> None:
        super().__init__()
        self.theta, self.phi = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.g, self.out = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        y = (weights @ v.transpose(1, 2)).transpose(1, 2)
        return x + self.out(y.unflatten(-1, x.shape[-2:]))  # type: ignore[no-any-return]


@case()
def non_local() -> Built:
    return nn.Sequential(conv(3, 8), NonLocal(), head(8)), (image(size=4),)


class WindowAttention(nn.Module):
    """Swin: windows are cut out, attended in with a bias table, shifted and put back."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (4, 4)))
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = torch.roll(x, (-1, -1), (1, 2))
        y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        weights = (q * 0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(y.shape[0], 4, -1))
        y = y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        return torch.roll(y, (1, 1), (1, 2))


@case(kept_class=False)
def swin_window() -> Built:
    last, first = Apply(lambda x: x.permute(0, 2, 3, 1)), Apply(lambda x: x.permute(0, 3, 1, 2))
    inner = Add(nn.Identity(), nn.Sequential(nn.LayerNorm(12), WindowAttention()))
    return nn.Sequential(nn.Conv2d(3, 12, 2, 2), last, inner, first, head(12)), (image(),)


# -- feed-forward ------------------------------------------------------------------------------------


class GLU(nn.Module):
    """A gated layer, fused or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(12, 8) if how == "separate" else nn.Identity()
        self.out = nn.Linear(16 if how == "separate" else 8, 12)
        if how == "separate":
            self.second = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "operator":
            return self.out(F.glu(self.first(x), -1))  # type: ignore[no-any-return]
        if self.how == "separate":
            return self.out(F.silu(self.first(x)) * self.second(x))  # type: ignore[no-any-return]
        gate, value = self.first(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)  # type: ignore[no-any-return]


@case(zeroing=True)
def glu_separate() -> Built:
    return nn.Sequential(nn.Linear(6, 12), GLU("separate"), nn.Linear(12, 3)), (tokens(6),)


@case(zeroing=True)
def glu_fused_chunk() -> Built:
    return nn.Sequential(nn.Linear(6, 12), GLU("chunk"), nn.Linear(12, 3)), (tokens(6),)


@case(zeroing=True)
def glu_operator() -> Built:
    return nn.Sequential(nn.Linear(6, 12), GLU("operator"), nn.Linear(12, 3)), (tokens(6),)


class Language(nn.Module):
    """Token and position embeddings; the head is tied to the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 12), nn.Embedding(6, 12)
        self.layer = block(Grouped(heads=4, kv=2, width=12), 12)[1]
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 11, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        return self.lm_head(self.norm(self.layer(y)))  # type: ignore[no-any-return]


@case()
def tied_embedding() -> Built:
    return Language(), (torch.randint(0, 11, (2, 5)),)


class Experts(nn.Module):
    """A dense mixture: every expert runs, and the router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 12)
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(GLU("separate") for _ in range(3))
        self.tail = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        weights = self.router(y).softmax(-1)
        mixed = torch.stack([e(y) for e in self.experts], -1)
        return self.tail((mixed * weights.unsqueeze(-2)).sum(-1))  # type: ignore[no-any-return]


@case(zeroing=True)
def mixture_of_experts() -> Built:
    return Experts(), (tokens(6),)


class StackedExperts(nn.Module):
    """Experts in one parameter; the best two are picked by their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.router = nn.Linear(6, 8), nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 10) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 10, 8) * 0.3)
        self.tail = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        scores, chosen = self.router(y).softmax(-1).topk(2, -1)
        weights = torch.zeros_like(self.router(y)).scatter(-1, chosen, scores)
        z = torch.einsum("btd,edf->betf", y, self.up).relu()
        z = torch.einsum("betf,efd->betd", z, self.down)
        return self.tail(torch.einsum("betd,bte->btd", z, weights))  # type: ignore[no-any-return]


@case()
def stacked_experts() -> Built:
    return StackedExperts(), (tokens(6),)


class Scan(nn.Module):
    """A selective state-space layer with its recurrence unrolled (Mamba)."""

    def __init__(self, width: int = 6, inner: int = 8, state: int = 4) -> None:
        super().__init__()
        self.state, self.rank = state, 2
        self.project = nn.Linear(width, 2 * inner)
        self.mix = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select = nn.Linear(inner, self.rank + 2 * state)
        self.step = nn.Linear(self.rank, inner)
        self.decay = nn.Parameter(torch.rand(inner, state))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.project(x).chunk(2, -1)
        y = F.silu(self.mix(y.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        low, b, c = self.select(y).split([self.rank, self.state, self.state], -1)
        delta = F.softplus(self.step(low))
        a = torch.exp(-delta.unsqueeze(-1) * self.decay.exp())
        u = delta.unsqueeze(-1) * b.unsqueeze(2) * y.unsqueeze(-1)
        h, outputs = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + u[:, t]
            outputs.append(torch.einsum("bds,bs->bd", h, c[:, t]))
        z = torch.stack(outputs, 1) + self.skip * y
        return self.out(z * F.silu(gate))  # type: ignore[no-any-return]


@case()
def mamba_scan() -> Built:
    return Scan(), (tokens(6, 4),)


# -- detectors ---------------------------------------------------------------------------------------


class C2f(nn.Module):
    """YOLOv8's block: split in two, and every step is kept for the end."""

    def __init__(self, i: int, o: int, n: int = 2) -> None:
        super().__init__()
        self.c = o // 2
        self.first = conv(i, 2 * self.c, 1)
        self.steps = nn.ModuleList(Add(nn.Identity(), conv(self.c, self.c)) for _ in range(n))
        self.last = conv((2 + n) * self.c, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(step(parts[-1]) for step in self.steps)
        return self.last(torch.cat(parts, 1))  # type: ignore[no-any-return]


@case(zeroing=True)
def c2f() -> Built:
    return nn.Sequential(conv(3, 8), C2f(8, 8), head(8)), (image(),)


class C3(nn.Module):
    """YOLOv5's block."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        half = o // 2
        self.a, self.b, self.last = conv(i, half, 1), conv(i, half, 1), conv(2 * half, o, 1)
        self.inner = Add(nn.Identity(), nn.Sequential(conv(half, half, 1), conv(half, half)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat((self.inner(self.a(x)), self.b(x)), 1))  # type: ignore[no-any-return]


class SPPF(nn.Module):
    """Pools of pools, side by side."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first, self.last = conv(i, i // 2, 1), conv(i * 2, o, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))  # type: ignore[no-any-return]


@case(zeroing=True)
def c3_and_sppf() -> Built:
    return nn.Sequential(conv(3, 8), C3(8, 8), SPPF(8, 8), head(8)), (image(),)


class Detect(nn.Module):
    """A head over two scales: box distributions and class scores, boxes by an expectation."""

    bins: Tensor

    def __init__(self, channels: tuple[int, int] = (8, 6), classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.bins_count, self.classes = bins, classes
        self.stem, self.down = conv(3, channels[0]), conv(channels[0], channels[1], stride=2)
        self.boxes = nn.ModuleList(nn.Sequential(conv(c, 6), nn.Conv2d(6, 4 * bins, 1)) for c in channels)
        self.scores = nn.ModuleList(nn.Sequential(conv(c, 5), nn.Conv2d(5, classes, 1)) for c in channels)
        self.register_buffer("bins", torch.arange(bins).float())

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        outputs = []
        for y, box, score in zip((high, self.down(high)), self.boxes, self.scores, strict=True):
            outputs.append(torch.cat([box(y), score(y)], 1).flatten(2))
        joined = torch.cat(outputs, 2)
        box, score = joined.split((4 * self.bins_count, self.classes), 1)
        b, _, n = box.shape
        spread = box.view(b, 4, self.bins_count, n).softmax(2)
        return torch.cat([(spread * self.bins[:, None]).sum(2), score.sigmoid()], 1)


@case(kept_class=False)
def detect_head() -> Built:
    return Detect(), (image(),)


# -- inputs, outputs and the rest --------------------------------------------------------------------


class TwoInputs(nn.Module):
    """An image and a vector; a dictionary with a nested list comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = conv(3, 8), nn.Linear(4, 8)
        self.a, self.b = nn.Linear(8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, *, v: Tensor) -> dict[str, Any]:
        y = self.image(x) * self.vector(v)[:, :, None, None]
        return {"class": self.a(y.mean((2, 3))), "maps": [self.b(y), {"input": v}]}


@case(zeroing=True)
def keywords_and_nested_outputs() -> Built:
    return TwoInputs(), {"v": torch.randn(2, 4), "x": image()}


class Untaken(nn.Module):
    """Some of the parameters are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spare, self.tail = conv(3, 8), conv(8, 8), head(8)
        self.deep = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(self.spare(y) if self.deep else y)  # type: ignore[no-any-return]


@case(zeroing=True)
def branch_not_taken() -> Built:
    return Untaken(), (image(),)


@case(zeroing=True)
def frozen_parameters() -> Built:
    model = nn.Sequential(conv(3, 8), conv(8, 6), head(6))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model, (image(),)


@case(zeroing=True)
def conv_classifier() -> Built:
    return nn.Sequential(conv(3, 8), conv(8, 6), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (
        image(),
    )


class Bilinear(nn.Module):
    """Products of features with features: an outer product and a sum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.tail = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        both = torch.einsum("bcn,bdn->bcd", a, b) / a.shape[-1]
        return self.tail(both.flatten(1)) + a.sum((1, 2), keepdim=False)[:, None]  # type: ignore[no-any-return]


@case()
def bilinear_pooling() -> Built:
    return Bilinear(), (image(size=4),)


class InPlace(nn.Module):
    """Writes through a view of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 8, 3), head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y[:, 2:5] *= 2
        y[:, 6:] = 1
        y.add_(0.5).mul_(2)
        return self.tail(y)  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def writes_through_views() -> Built:
    return InPlace(), (image(),)


class Ordered(nn.Module):
    """Operators that read positions: sorting, a running sum, positions of maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tail = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).cumsum(-1)
        z = self.b(y).sort(-1).values
        return self.tail(F.relu(self.c(z))), y.argmax(-1)


@case(zeroing=True)
def order_matters() -> Built:
    return Ordered(), (tokens(6),)


class UnalignedShuffle(nn.Module):
    """A group convolution after a shuffle whose blocks do not align with its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=4)
        self.tail = head(24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = y.unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2)
        return self.tail(self.grouped(y).relu())  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def shuffle_across_groups() -> Built:
    return UnalignedShuffle(), (image(),)


class UnalignedCut(nn.Module):
    """Cuts the channels of a shuffle where no block ends, as ShuffleNet does with odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.left, self.right = nn.Conv2d(5, 8, 1), nn.Conv2d(7, 8, 1)
        self.tail = head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
        left, right = y.split((5, 7), 1)
        return self.tail(self.left(left).relu() + self.right(right))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def cut_through_a_shuffle() -> Built:
    return UnalignedCut(), (image(),)


class Reordered(nn.Module):
    """Channels taken by a buffer of positions, some twice; rolled and reversed channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 10, 1), nn.Conv2d(9, 6, 1)
        self.register_buffer("order", torch.tensor([3, 9, 0, 3, -1, 5, 8, 1, 2]))
        self.tail = head(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.stem(x).relu()[:, self.order]).relu()
        return self.tail(torch.cat([torch.roll(y, 4, 1), y.flip(1)], 1))  # type: ignore[no-any-return]


@case(kept_class=False, zeroing=True)
def reordered_channels() -> Built:
    return Reordered(), (image(),)


class OneOrder(nn.Module):
    """A learned order of channels, used once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 10, 1), nn.Conv2d(8, 6, 1)
        self.register_buffer("order", torch.tensor([7, 2, 9, 0, 5, 4, 8, 1]))
        self.tail = head(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu().index_select(1, self.order)
        return self.tail(self.inner(y).relu())  # type: ignore[no-any-return]


@case(zeroing=True)
def channels_by_index() -> Built:
    return OneOrder(), (image(),)


class CoordinateAttention(nn.Module):
    """Gates a row and a column, from means along either side that share a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.shared = conv(8, 4, 1)
        self.rows = nn.Conv2d(4, 8, 1)
        self.columns = nn.Conv2d(4, 8, 1)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        height, width = x.shape[2:]
        means = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = self.shared(means).split([height, width], 2)
        gate = self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()
        return self.head(x * gate)  # type: ignore[no-any-return]


@case()
def coordinate_attention() -> Built:
    return CoordinateAttention(), (image(),)


class GatedDilated(nn.Module):
    """WaveNet: causal dilated convolutions with gates, residuals, and skips that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 1)
        self.gated = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=d) for d in (1, 2))
        self.residual = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(8, 10, 1) for _ in range(2))
        self.last = nn.Conv1d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0
        for i, (gated, residual, skip) in enumerate(zip(self.gated, self.residual, self.skip, strict=True)):
            value, gate = gated(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(y)
            x = x + residual(y)
        return self.last(F.relu(total)) + x.mean(1, keepdim=True)  # type: ignore[no-any-return]


@case()
def gated_dilated_convolutions() -> Built:
    return GatedDilated(), (torch.randn(2, 4, 12),)


class MessagePassing(nn.Module):
    """A graph network: messages along edges are summed a node, means by degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.message = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
        self.update = nn.Linear(16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.embed(x)
        source, target = edges[0], edges[1]
        messages = self.message(torch.cat([h[source], h[target]], -1))
        degrees = x.new_ones(x.shape[0], 1).index_add(0, target, x.new_ones(edges.shape[1], 1))
        total = torch.zeros_like(h).index_add(0, target, messages) / degrees
        return self.head(F.relu(self.update(torch.cat([h, total], -1))))  # type: ignore[no-any-return]


@case()
def message_passing() -> Built:
    return MessagePassing(), (torch.randn(5, 6), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]))


class SpatialGating(nn.Module):
    """gMLP: a convolution over positions of half of the channels, each of which it carries."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(12)
        self.positions = nn.Conv1d(6, 6, 1)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.gelu(self.up(x)).chunk(2, -1)
        return self.head(x + self.down(left * self.positions(self.norm(right))))  # type: ignore[no-any-return]


@case()
def convolution_over_positions() -> Built:
    return SpatialGating(), (tokens(8, 6),)


class Convolved(SpatialGating):
    """A convolution that slides along the features, which therefore stay."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Conv1d(6, 6, 3, padding=1)


@case()
def convolution_along_features() -> Built:
    return nn.Sequential(Convolved(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (tokens(8, 6),)


class LinearAttention(nn.Module):
    """Attention without softmax: keys and values are multiplied first."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(8, 36)
        self.out = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.fused(x).view(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums = torch.einsum("bhtd,bhte->bhde", k, v)
        scale = 1 / torch.einsum("bhtd,bhd->bht", q, k.sum(2))
        y = torch.einsum("bhtd,bhde,bht->bhte", q, sums, scale)
        return self.head(self.out(y.transpose(1, 2).reshape(n, t, 12)))  # type: ignore[no-any-return]


@case(kept_class=False)
def linear_attention() -> Built:
    return LinearAttention(), (tokens(8, 6),)


class RelativeBias(Attention):
    """Scores get a learned bias a head and distance (T5), and a fixed slope a head (ALiBi)."""

    def __init__(self, width: int = 12, heads: int = 4, dim: int = 4) -> None:
        super().__init__(width, heads, dim)
        self.table = nn.Embedding(11, heads)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        distance = (places[None] - places[:, None]).clamp(-5, 5)
        bias = self.table(distance + 5).permute(2, 0, 1) - distance.abs() * self.slopes[:, None, None]
        return (q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v


@case()
def relative_positions() -> Built:
    return block(RelativeBias()), (tokens(6),)


class ComplexRotary(nn.Module):
    """Rotary positions as products of complex numbers (Llama)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 12)
        angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles).to(torch.complex128))

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 4, 4) for layer in (self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in (self._turned(q), self._turned(k), v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + self.out(y.transpose(1, 2).reshape(n, t, 16))  # type: ignore[no-any-return]


@case(kept_class=False)
def rotary_complex() -> Built:
    return block(ComplexRotary()), (tokens(6),)


class Spectral(nn.Module):
    """A layer in the Fourier domain (FNO): low frequencies are mixed by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(8, 10, 3, 3, 2) * 0.2)
        self.beside = nn.Conv2d(8, 10, 1)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        low = torch.fft.rfft2(x)[:, :, :3, :3]
        mixed = torch.einsum("bixy,ioxy->boxy", low, torch.view_as_complex(self.weight))
        y = torch.fft.irfft2(mixed, s=x.shape[-2:])
        return self.head(F.gelu(y + self.beside(x)))  # type: ignore[no-any-return]


@case()
def spectral_convolution() -> Built:
    return Spectral(), (image(),)


class Sampled(nn.Module):
    """Features are sampled at learned places (deformable convolutions, spatial transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.offsets = nn.Conv2d(8, 2, 3, padding=1)
        self.body = conv(8, 6)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        places = torch.tanh(self.offsets(x)).permute(0, 2, 3, 1)
        return self.head(self.body(F.grid_sample(x, places, align_corners=False)))  # type: ignore[no-any-return]


@case()
def sampled_features() -> Built:
    return Sampled(), (image(),)


class Windows(nn.Module):
    """Windows are unfolded, mixed and folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.mix = nn.Conv1d(8 * 4, 6 * 4, 1)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(F.unfold(self.stem(x), 2, stride=2))
        return self.head(F.fold(y, x.shape[2:], 2, stride=2))  # type: ignore[no-any-return]


@case()
def unfolded_windows() -> Built:
    return Windows(), (image(),)


class DynamicConv(nn.Module):
    """Every sample has a kernel of its own, a mixture of learned ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.router = nn.Linear(8, 3)
        self.kernels = nn.Parameter(torch.randn(3, 6, 8, 3, 3) * 0.2)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        kernels = self.router(x.mean((2, 3))).softmax(-1) @ self.kernels.flatten(1)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels.view(n * 6, 8, 3, 3), padding=1, groups=n)
        return self.head(y.view(n, 6, h, w))  # type: ignore[no-any-return]


@case(kept_class=False)
def dynamic_convolution() -> Built:
    return DynamicConv(), (image(),)


class Coupling(nn.Module):
    """A normalising flow: halves shift and scale each other."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros_like(x[:, 0])
        for net in self.nets:
            left, right = x.chunk(2, -1)
            scale, shift = net(left).chunk(2, -1)
            x = torch.cat([right * torch.tanh(scale).exp() + shift, left], -1)
            volume = volume + torch.tanh(scale).sum(-1)
        return x, volume


@case()
def coupling_layers() -> Built:
    return Coupling(), (torch.randn(3, 8),)


class TopKExperts(nn.Module):
    """Sparse experts: each works on the tokens that chose it, and adds to their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = torch.zeros_like(self.router(x)).scatter(-1, chosen, scores)
        y = sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.experts))
        return self.head(x + y)  # type: ignore[no-any-return]


@case()
def experts_by_top_k() -> Built:
    return TopKExperts(), (tokens(8, 6),)


class Cached(nn.Module):
    """Keys and values of earlier tokens come in and go out; layers beside them are narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> dict[str, Any]:
        n = x.shape[0]
        q, k, v = (y(x).view(n, -1, 3, 4).transpose(1, 2) for y in (self.q, self.k, self.v))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, 12)
        x = x + self.out(y)
        return {"y": x + self.down(F.silu(self.up(x))), "cache": (k, v)}


@case()
def key_value_cache() -> Built:
    return Cached(), (tokens(8, 5), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))


class Regions(nn.Module):
    """Parts run without gradients, checkpointed, and with autocast switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 10), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            length = x.norm(dim=-1, keepdim=True)
        y = checkpoint(lambda t: self.b(F.relu(self.a(t))), x / length, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            y = F.relu(y)
        return self.c(y)  # type: ignore[no-any-return]


@case()
def regions() -> Built:
    return Regions(), (tokens(8, 6),)

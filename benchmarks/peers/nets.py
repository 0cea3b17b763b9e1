"""Small networks of the removal comparison, one for every pattern that pruners treat differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import DenseNet, Transformer

IMAGE = (2, 3, 32, 32)


@dataclass(frozen=True)
class Net:
    """A network to prune at one half: how it is made, its example input and its output layer's width."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    classes: int = 10


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class UNet(nn.Module):
    """Two levels down and up with concatenated skips (Ronneberger et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _conv(3, 32), _conv(32, 64), _conv(64, 128)
        self.up2, self.up1 = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.merge2, self.merge1 = _conv(128, 64), _conv(64, 32)
        self.out = nn.Conv2d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> y[N,10,H,W]"""
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        d = self.merge2(torch.cat([self.up2(c), b], 1))
        y: Tensor = self.out(self.merge1(torch.cat([self.up1(d), a], 1)))
        return y


class Gated(nn.Module):
    """Residual blocks with squeeze-and-excitation (Hu et al., 2018)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = _conv(3, width)
        self.bodies = nn.ModuleList(nn.Sequential(_conv(width, width), _conv(width, width)) for _ in range(3))
        self.gates = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(width, 16, 1),
                nn.ReLU(),
                nn.Conv2d(16, width, 1),
                nn.Sigmoid(),
            )
            for _ in range(3)
        )
        self.head = _head(width)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> logits[N,10]"""
        y = self.stem(x)
        for body, gate in zip(self.bodies, self.gates, strict=True):
            z = body(y)
            y = y + z * gate(z)
        logits: Tensor = self.head(y)
        return logits


class SpatialGate(nn.Module):
    """A gate of one channel over all positions (Woo et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv(3, 64), _conv(64, 64)
        self.gate = nn.Conv2d(2, 1, 7, padding=3)
        self.head = _head(64)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> logits[N,10]"""
        y = self.body(self.stem(x))
        statistics = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        logits: Tensor = self.head(y * torch.sigmoid(self.gate(statistics)))
        return logits


class DenseConcat(nn.Module):
    """Every layer reads all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(3 + 32 * i, 32) for i in range(4))
        self.head = _head(3 + 32 * 4)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> logits[N,10]"""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        logits: Tensor = self.head(x)
        return logits


class GroupNormNet(nn.Module):
    """Convolutions with group normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.ReLU()),
            nn.Conv2d(128, 128, 3, padding=1),
        )
        self.head = _head(128)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,H,W] -> logits[N,10]"""
        logits: Tensor = self.head(self.body(x))
        return logits


class GatedLinear(nn.Module):
    """Feed-forward blocks with fused gated linear units (Shazeer, 2020)."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(32, width)
        self.ups = nn.ModuleList(nn.Linear(width, 8 * width) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,L,32] -> y[N,L,10]"""
        y = self.embed(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            value, gate = up(y).chunk(2, -1)
            y = y + down(value * F.silu(gate))
        logits: Tensor = self.head(y)
        return logits


class Waves(nn.Module):
    """1-d convolutions with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 64, 9, padding=4)
        self.bodies = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(64, 64, 5, padding=2),
                nn.BatchNorm1d(64),
                nn.ReLU(),
                nn.Conv1d(64, 64, 5, padding=2),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,1,T] -> logits[N,10]"""
        y = self.stem(x)
        for body in self.bodies:
            y = F.relu(y + body(y))
        logits: Tensor = self.head(y.mean(2))
        return logits


class VisionTransformer(nn.Module):
    """Patches, a class token, positions and six blocks (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.body = Transformer(6, width, 3)
        self.body.embed = nn.Linear(width, width)
        self.body.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x[N,3,32,32] -> logits[N,10]"""
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.places
        logits: Tensor = self.body(y)[:, 0]
        return logits


def torchvision_net(name: str) -> Net:
    """A classifier of torchvision with random weights."""

    def make() -> nn.Module:
        from benchmarks.zoo.torchvision_models import classifier

        return classifier(name).module

    return Net(name, make, (2, 3, SIZES.get(name, 64), SIZES.get(name, 64)), 1000)


#: sizes of images that are not 64
SIZES = {"inception_v3": 96, "vgg11": 32, "vgg16_bn": 32}

#: what the graph pruner of onnxsim is compared on
GRAPH_NETS: tuple[Net, ...] = (
    *map(torchvision_net, ("resnet18", "resnet50", "densenet121", "mobilenet_v2", "resnext50_32x4d")),
    Net("U-Net", UNet),
    Net("ViT", VisionTransformer),
    Net("squeeze-and-excitation", Gated),
    Net("1-d convolutions", Waves, (2, 1, 64)),
    Net("dense concatenation", DenseConcat),
    Net("group normalisation", GroupNormNet),
    Net("spatial gate", SpatialGate),
    Net("gated linear units", GatedLinear, (2, 8, 32)),
    Net("transformer", lambda: Transformer(4, 128, 4), (2, 8, 64), 64),
    Net("DenseNet, small", lambda: DenseNet((2, 3, 4, 2), 16), IMAGE, 1000),
)

_CLASSIFIERS = """
    alexnet convnext_tiny densenet169 densenet201 efficientnet_b0 efficientnet_v2_s googlenet inception_v3
    mnasnet1_0 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet34 resnet101
    resnet152 shufflenet_v2_x1_0 squeezenet1_1 swin_t vgg11 vgg16_bn vit_b_16 wide_resnet50_2
"""
#: what Torch-Pruning is compared on: these, and classifiers of torchvision
MODULE_NETS: tuple[Net, ...] = (*GRAPH_NETS, *map(torchvision_net, _CLASSIFIERS.split()))

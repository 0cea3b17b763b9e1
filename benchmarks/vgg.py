"""A narrow VGG for 28x28 grey images, trained by ``python -m benchmarks.train_fashion vgg``.

Configuration A (VGG-11) of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
Image Recognition", table 1, made for small images: batch normalisation, four stages instead of five,
fewer channels, one hidden layer in the classifier: 299,898 parameters.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "vgg_fmnist.safetensors"
#: channels of the convolutions of each stage, which ends with pooling
STAGES = ((16,), (32,), (64, 64), (128, 128))


class Vgg(nn.Module):
    """``x[N,1,28,28] -> logits[N,classes]``: six 3x3 convolutions in four stages, two linear layers."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in STAGES:
            for outputs in stage:
                conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def load_vgg(weights: Path = WEIGHTS) -> Vgg:
    """The trained network, in evaluation mode."""
    from safetensors.torch import load_file

    model = Vgg()
    model.load_state_dict(load_file(str(weights)))
    return model.eval()

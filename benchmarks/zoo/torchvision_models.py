"""All models of torchvision, at the smallest sensible resolution."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entry import Built, Entry, image
from benchmarks.zoo.torchvision_ops import ready

CLASSIFICATION = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169
    densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
    efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s
    googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2
    mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf
    regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf
    regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50
    resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0
    shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b
    swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32
    vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
"""
SEGMENTATION = """
    deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101 fcn_resnet50
    lraspp_mobilenet_v3_large
"""
DETECTION = """
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
    fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn
    maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16
    ssdlite320_mobilenet_v3_large
"""
VIDEO = "mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_b swin3d_s swin3d_t"
FLOW = "raft_large raft_small"

#: pattern -> input size; 64 elsewhere
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vgg*": 32, "vit_h_14": 56}
#: frames, height and width
CLIPS = {"s3d": (16, 224, 224), "mvit_*": (8, 64, 64), "swin3d_*": (4, 64, 64), "*": (8, 32, 32)}
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_h_14": {"image_size": 56},
    "vit_*": {"image_size": 64},
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}


def _first(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in table.items() if fnmatch.fnmatchcase(name, pattern)), default)


@contextlib.contextmanager
def _for_small_clips() -> Iterator[None]:
    """MViT has tables of positions for the size that its functions give: inside, for that of ``CLIPS``."""
    from torchvision.models.video import mvit

    original = mvit._mvit
    frames, *space = CLIPS["mvit_*"]

    def small(**given: Any) -> Any:
        return original(**{**given, "spatial_size": tuple(space), "temporal_size": frames})

    mvit._mvit = small
    try:
        yield
    finally:
        mvit._mvit = original


def _made(name: str, **options: Any) -> nn.Module:
    ready()
    from torchvision.models import get_model

    with _for_small_clips():
        made: nn.Module = get_model(name, weights=None, **_first(OPTIONS, name, {}), **options)
    return made


def classifier(name: str) -> Built:
    """A classifier with random weights and two images."""
    return Built(_made(name), (image(_first(SIZES, name, 64)),))


def _segmenter(name: str) -> Built:
    return Built(_made(name, weights_backbone=None), (image(64),))


def _clip(name: str) -> Built:
    return Built(_made(name), (image(*_first(CLIPS, name, None)),))


def _flow(name: str) -> Built:
    return Built(_made(name), (image(128), image(128), 2))


def _detector(name: str) -> Built:
    """The whole detector, which takes a list of images and gives lists of boxes."""
    size = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    return Built(
        _made(name, weights_backbone=None, **size), ([torch.rand(3, 64, 64), torch.rand(3, 64, 64)],)
    )


class Body(nn.Module):
    """A detector without pre- and post-processing: images [N,3,H,W] -> features and raw predictions."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        rpn = getattr(detector, "rpn", None)
        self.head: Any = detector.head if rpn is None else rpn.head
        roi = None if rpn is None else detector.roi_heads
        self.roi: Any = None if roi is None else nn.Sequential(roi.box_head, roi.box_predictor)

    def forward(self, images: torch.Tensor) -> Any:
        """Features by level, what the dense head makes of them, and what the box head makes of one."""
        features = list(self.backbone(images).values())
        if self.roi is None:
            return features, self.head(features)
        regions = nn.functional.interpolate(features[0], size=(7, 7))
        return features, self.head(features), self.roi(regions)


def _body(name: str) -> Built:
    size = 300 if name == "ssd300_vgg16" else 320 if name.startswith("ssdlite") else 64
    return Built(Body(_detector(name).module), (image(size),))


def entries() -> list[Entry]:
    """Every model; detectors as a whole and, because those seldom export, as ``NAME:body``."""
    kinds: list[tuple[str, Callable[[str], Built], str]] = [
        (CLASSIFICATION, classifier, ""),
        (SEGMENTATION, _segmenter, ""),
        (VIDEO, _clip, ""),
        (FLOW, _flow, ""),
        (DETECTION, _detector, ""),
        (DETECTION, _body, ":body"),
    ]
    return [
        Entry("torchvision", name + suffix, partial(build, name))
        for names, build, suffix in kinds
        for name in names.split()
    ]

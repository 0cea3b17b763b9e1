"""Makes torchvision importable where its compiled operators do not load.

The wheel on PyPI is built for CUDA.  Beside a CPU build of PyTorch its library lacks what it links
to, torchvision then fails at import because ``torchvision::nms`` does not exist, and so do timm and
transformers, which import it.  ``ready`` defines what the import asks for; everything else that is
compiled (``deform_conv2d``, ``roi_pool``, image codecs) stays unavailable and says so when called.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from functools import cache
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def define() -> torch.library.Library | None:
    """Define the operators that torchvision's import needs, unless its own library loads or it is absent.

    To be called before anything imports torchvision; does not import it.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("nms", nms, "CPU")
    return library


@cache
def ready() -> None:
    """Import torchvision with a working ``nms``; raises ModuleNotFoundError where it is not installed."""
    defined = define()
    boxes = importlib.import_module("torchvision.ops.boxes")
    if defined is not None:
        boxes._assert_has_ops = lambda: None  # type: ignore[attr-defined]


def _loads(folder: Path) -> bool:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(library)
            except OSError:
                return False
            return True
    return False


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes [N,4] (x1, y1, x2, y2) that no better one overlaps by more than the threshold."""
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = dets.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(int(best))
        wide = (torch.minimum(x2[best], x2[rest]) - torch.maximum(x1[best], x1[rest])).clamp(min=0)
        high = (torch.minimum(y2[best], y2[rest]) - torch.maximum(y1[best], y1[rest])).clamp(min=0)
        shared = wide * high
        order = rest[shared / (area[best] + area[rest] - shared) <= iou_threshold]
    return torch.tensor(kept, dtype=torch.long)

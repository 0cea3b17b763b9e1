"""Imported by the process that the zoo's processes are forked from: what takes long the first time."""

import contextlib
import importlib

import torch

import sparsecc
from benchmarks.zoo.torchvision_ops import ready

torch.set_num_threads(1)

_NAMES = (
    "benchmarks.zoo.measure",
    "benchmarks.zoo.suites",
    "onnxscript",
    "sparsecc.onnxfile.subject",
    "timm",
    "torch.onnx",
    "transformers.modeling_utils",
    "transformers.models.bert.modeling_bert",
)
with contextlib.suppress(ModuleNotFoundError):
    ready()
for _name in _NAMES:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(_name)
# The tracer imports and caches a lot when it first runs.
_small, _x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), (torch.randn(2, 4),)
sparsecc.prune(_small, _x)
with contextlib.suppress(ModuleNotFoundError):  # onnxscript
    sparsecc.compile(_small, _x, target="onnx")

"""The patterns captured and as ONNX, each made once a process.

``tests/conftest.py`` sends all tests of one pattern to one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
from torch import nn

from sparsecc.fx.capture import Program
from sparsecc.fx.subject import TorchSubject
from sparsecc.fx.to_onnx import to_onnx
from tests.oracles import fingerprint
from tests.patterns import CASES

#: patterns that the exporter cannot write, and what the error says
UNWRITABLE = {
    "rotary_complex": "no translation for the operator",
    "spectral_convolution": "no translation for the operator",
    "dynamic_convolution": "cannot be written as ONNX",
    "lstm_projection": "an initial state of shape",  # the exporter writes an LSTM that ONNX does not have
}


@dataclass(frozen=True)
class Example:
    """A pattern's model, the fingerprint that it had before anything was done with it, and its capture.

    Tests that change weights make their own from ``CASES``.
    """

    model: nn.Module
    inputs: Any
    before: str
    subject: TorchSubject


@cache
def example(name: str) -> Example:
    """A pattern, captured."""
    model, inputs = CASES[name].make()
    before = fingerprint(model)
    return Example(model, inputs, before, TorchSubject(model, inputs))


def captured(name: str) -> Program:
    """A pattern's captured program."""
    return example(name).subject.program


@cache
def exported(name: str) -> onnx.ModelProto:
    """A pattern as sparsecc writes it to ONNX, with inferred shapes of every value."""
    return onnx.shape_inference.infer_shapes(to_onnx(captured(name).exported), data_prop=True)

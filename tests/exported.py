"""The patterns as ONNX, exported once a test run."""

from __future__ import annotations

from functools import cache

import onnx

from sparsecc.fx.capture import Program, capture
from sparsecc.fx.to_onnx import to_onnx
from tests.patterns import CASES

#: patterns that the exporter cannot write, and what the error says
UNWRITABLE = {
    "learned_queries": "only 4D query, key, and value are supported",
    "rotary_complex": "no translation for the operator",
    "spectral_convolution": "no translation for the operator",
    "dynamic_convolution": "cannot be written as ONNX",
    "lstm_projection": "an initial state of shape",  # the exporter writes an LSTM that ONNX does not have
}


@cache
def captured(name: str) -> Program:
    """A pattern's captured program."""
    return capture(*CASES[name].make())


@cache
def exported(name: str) -> onnx.ModelProto:
    """A pattern as sparsecc writes it to ONNX, with inferred shapes of every value."""
    return onnx.shape_inference.infer_shapes(to_onnx(captured(name).exported), data_prop=True)

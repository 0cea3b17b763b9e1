"""Models of 8 bits that keep the zeros of pruned ones: onnxruntime's quantisers, checked and measured."""

from sparsecc.quantization.quantise import quantize
from sparsecc.quantization.result import Error, Layer, Quantised, QuantisedReport

__all__ = ["Error", "Layer", "Quantised", "QuantisedReport", "quantize"]

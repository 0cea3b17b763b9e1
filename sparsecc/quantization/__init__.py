"""Models of 8 bits that keep the zeros of pruned ones: others' quantisers, checked and measured."""

from sparsecc.quantization.exported import QuantisedProgram, quantize_program
from sparsecc.quantization.quantise import quantize
from sparsecc.quantization.result import Error, Layer, Quantised, QuantisedReport

__all__ = [
    "Error",
    "Layer",
    "Quantised",
    "QuantisedProgram",
    "QuantisedReport",
    "quantize",
    "quantize_program",
]

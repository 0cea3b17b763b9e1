"""Batch norms folded into the convolutions before them, as quantisers need them.

    Conv(x, w, b) -> BatchNormalization(scale, shift, mean, var)
    Conv(x, w s, (b - mean) s + shift)        s = scale / sqrt(var + epsilon), by output channel

A zero weight stays zero.  Names stay: the weight keeps its own, and the result that of the norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.site import attribute
from sparsecc.onnxfile.structure import uses

Doubles = npt.NDArray[np.float64]


def folded(file: OnnxFile) -> OnnxFile:
    """The model with every batch norm folded that directly follows a convolution and has constants only."""
    if file.proto.ir_version < 4:
        return file  # initializers are inputs there
    model = ModelProto()
    model.CopyFrom(file.to_kind("proto"))
    readers = Counter(name for node in model.graph.node for name in uses(node))
    readers.update(value.name for value in model.graph.output)
    makers = {name: node for node in model.graph.node for name in node.output}
    values: dict[str, npt.NDArray[np.float32]] = {}
    gone: set[str] = set()
    taken = {*readers, *makers}
    for norm in model.graph.node:
        conv = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or not _foldable(file, norm, conv, readers):
            continue
        scale, shift, mean, variance = (_array(file, name) for name in norm.input[1:])
        factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        weight = _array(file, conv.input[1])
        bias = _array(file, conv.input[2]) if _biased(conv) else np.zeros(len(factor))
        name = _unused(f"{norm.output[0]}_folded_bias", taken)
        values[conv.input[1]] = _single(weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
        values[name] = _single((bias - mean) * factor + shift)
        conv.input[:] = [*conv.input[:2], name]
        conv.output[0] = norm.output[0]
        gone.add(norm.output[0])
    return OnnxFile.load(_without_norms(model, gone, values)) if gone else file


def _foldable(file: OnnxFile, norm: NodeProto, conv: NodeProto, readers: Mapping[str, int]) -> bool:
    if conv.op_type != "Conv" or len(norm.output) != 1 or attribute(norm, "training_mode", 0):
        return False
    constants = [*(name for name in conv.input[1:] if name), *norm.input[1:]]
    once = readers[conv.output[0]] == readers[conv.input[1]] == 1
    return once and all(name in file.initializers for name in constants)


def _unused(name: str, taken: set[str]) -> str:
    """A name that no value of the graph has yet."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _biased(conv: NodeProto) -> bool:
    return len(conv.input) > 2 and bool(conv.input[2])


def _array(file: OnnxFile, name: str) -> Doubles:
    return file.array(name).astype(np.float64)


def _single(values: Doubles) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(values.astype(np.float32))


def _without_norms(
    model: ModelProto, gone: set[str], values: Mapping[str, npt.NDArray[np.float32]]
) -> ModelProto:
    nodes = [n for n in model.graph.node if not (n.op_type == "BatchNormalization" and n.output[0] in gone)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    left = {name for node in nodes for name in uses(node)} | {v.name for v in model.graph.output}
    dead = {t.name for t in model.graph.initializer} - left
    stored = [t for t in model.graph.initializer if t.name in left and t.name not in values]
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in values.items())
    inputs = [v for v in model.graph.input if v.name in left or v.name not in dead]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model

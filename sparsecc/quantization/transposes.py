"""Transposes of stored weights applied to them, so that quantisers see weights and not activations.

    MatMul(x, Transpose(w))  ->  MatMul(x, w')        w' is stored under the name of w

where nothing else reads w, and under that name with ``_Transposed`` behind it where something does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.site import attribute
from sparsecc.onnxfile.structure import uses


def untransposed(file: OnnxFile) -> OnnxFile:
    """The model without Transpose nodes that read an initializer."""
    going = list(_transposes(file))
    if not going:
        return file
    model = ModelProto()
    model.CopyFrom(file.to_kind("proto"))
    gone = {node.output[0] for node in going}
    nodes = [node for node in model.graph.node if not gone.intersection(node.output)]
    others = {name for node in nodes for name in uses(node)} | {v.name for v in model.graph.output}
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    renamed: dict[str, str] = {}
    for node in going:
        weight, order = node.input[0], _order(file, node)
        alone = weight not in others and all(known != weight for known, _ in names)
        name = names.get((weight, order))
        if name is None:
            count = sum(known == weight for known, _ in names)
            name = weight if alone else f"{weight}_Transposed" + (f"_{count}" if count else "")
            names[weight, order] = name
        renamed[node.output[0]] = name
    stored = [t for t in model.graph.initializer if t.name in others or t.name not in {w for w, _ in names}]
    made = [
        numpy_helper.from_array(np.ascontiguousarray(file.array(weight).transpose(order)), name)
        for (weight, order), name in names.items()
    ]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    stale = gone | {*names.values()}
    infos = [v for v in model.graph.value_info if v.name not in stale]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend([*stored, *made])
    return OnnxFile.load(model)


def _transposes(file: OnnxFile) -> Iterator[NodeProto]:
    """Those of initializers that only nodes of the main graph read."""
    graph = file.proto.graph
    inner = {name for node in graph.node for name in uses(node) - set(node.input)}
    shown = inner | {value.name for value in graph.output} | {value.name for value in graph.input}
    for node in graph.node:
        constant = node.op_type == "Transpose" and node.input[0] in file.initializers
        if constant and not shown.intersection((node.input[0], node.output[0])):
            yield node


def _order(file: OnnxFile, node: NodeProto) -> tuple[int, ...]:
    rank = len(file.tensor_type(node.input[0])[0])
    return tuple(attribute(node, "perm", tuple(reversed(range(rank)))))

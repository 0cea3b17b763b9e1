"""Ways to damage an ONNX model, as a careless exporter, a broken disk or an attacker would.

A mutation takes a model and a source of random numbers; what it returns (a model, or the bytes of a
file) need not mean anything.  A case is plain data: the name of a seed, and ``(mutation, number)`` pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.onnx_seeds import FLOAT, SEEDS, function

Random = random.Random
Mutation = Callable[[ModelProto, Random], "ModelProto | bytes | None"]

ABSURD = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 65537, 2**24, 2**31 - 1, 2**33, 2**40, 2**62, 2**63 - 1)
TEXTS = (
    *("", "x", "a" * 1_000_000, "two\nlines", "\x1b[31mred\x1b[0m", "../../etc/passwd", "nul\0inside"),
    *("%s%n", "{0}", "ünï", "ai.onnx", "com.microsoft", "local", "If", "Conv", "Constant", "[red]", "-"),
)
LOCATIONS = (
    *("../secret", "/etc/passwd", "link", "way/secret", ".", "", "missing", "model.onnx", "a/../../secret"),
    *("C:\\weights", "~/weights", "nul\0", "./weights.bin", "endless", "x" * 5000, "weights.bin/"),
)
OPERATORS = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""})


# -- what there is to damage -------------------------------------------------------------------------


def graphs(model: ModelProto) -> list[GraphProto]:
    """The main graph and all subgraphs."""
    found, pending = [], [model.graph]
    while pending:
        graph = pending.pop()
        found.append(graph)
        for node in graph.node:
            for attribute in node.attribute:
                pending.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
    return found


def nodes(model: ModelProto) -> list[NodeProto]:
    """Nodes of all graphs and functions."""
    own = [node for graph in graphs(model) for node in graph.node]
    return own + [node for f in model.functions for node in f.node]


def attributes(model: ModelProto) -> list[AttributeProto]:
    """Attributes of all nodes."""
    return [a for node in nodes(model) for a in node.attribute]


def tensors(model: ModelProto) -> list[TensorProto]:
    """Initializers and values of Constant nodes."""
    own = [t for graph in graphs(model) for t in graph.initializer]
    return own + [a.t for a in attributes(model) if a.HasField("t")]


def infos(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs, outputs and value infos."""
    return [v for g in graphs(model) for v in (*g.input, *g.output, *g.value_info)]


def names(model: ModelProto) -> list[str]:
    """Names of values."""
    return sorted({n for node in nodes(model) for n in (*node.input, *node.output) if n})


def _one(r: Random, found: Sequence[object]) -> Any:
    return r.choice(found) if found else None


# -- bytes -------------------------------------------------------------------------------------------


def flip_bits(m: ModelProto, r: Random) -> bytes:
    data = bytearray(m.SerializeToString())
    for _ in range(r.choice((1, 1, 2, 8))):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    return bytes(data)


def flip_structure(m: ModelProto, r: Random) -> bytes:
    """Bits outside the weights, where they hurt."""
    data = bytearray(m.SerializeToString())
    large = [t.raw_data for t in tensors(m) if len(t.raw_data) >= 16]
    taken = [(data.find(raw), len(raw)) for raw in large]
    free = [i for i in range(len(data)) if not any(at <= i < at + size for at, size in taken)]
    for _ in range(r.choice((1, 1, 2))):
        data[r.choice(free)] = r.randrange(256)
    return bytes(data)


def truncate(m: ModelProto, r: Random) -> bytes:
    data = m.SerializeToString()
    return data[: r.randrange(len(data))]


def splice(m: ModelProto, r: Random) -> bytes:
    data = m.SerializeToString()
    at = r.randrange(len(data))
    return data[:at] + r.randbytes(r.choice((1, 4, 100))) + data[at:]


def cut_out(m: ModelProto, r: Random) -> bytes:
    data = m.SerializeToString()
    at = r.randrange(len(data))
    return data[:at] + data[at + r.choice((1, 4, 100)) :]


def double_bytes(m: ModelProto, r: Random) -> bytes:
    data = m.SerializeToString()
    start, stop = sorted((r.randrange(len(data)), r.randrange(len(data))))
    return data[:stop] + data[start:]


def endless_numbers(m: ModelProto, r: Random) -> bytes:
    data = bytearray(m.SerializeToString())
    at = r.randrange(len(data))
    data[at : at + 9] = b"\xff" * 9
    return bytes(data)


def crossed(m: ModelProto, r: Random) -> bytes:
    """The beginning of one model and the end of another."""
    other = SEEDS[r.choice(sorted(SEEDS))]().SerializeToString()
    data = m.SerializeToString()
    return data[: r.randrange(len(data))] + other[r.randrange(len(other)) :]


def merged(m: ModelProto, r: Random) -> bytes:
    """Two models one after the other, which protobuf reads as one."""
    return m.SerializeToString() + SEEDS[r.choice(sorted(SEEDS))]().SerializeToString()


# -- graphs ------------------------------------------------------------------------------------------


def rewire(m: ModelProto, r: Random) -> None:
    """A node reads another value: a cycle, a type that does not fit, a value of another graph."""
    node = _one(r, [n for n in nodes(m) if n.input])
    if node is not None:
        node.input[r.randrange(len(node.input))] = r.choice(names(m))


def cycle(m: ModelProto, r: Random) -> None:
    graph = m.graph
    first, last = r.choice(graph.node), r.choice(graph.node)
    if first.input:
        first.input[0] = last.output[0]


def undefined_input(m: ModelProto, r: Random) -> None:
    node = _one(r, [n for n in nodes(m) if n.input])
    if node is not None:
        node.input[r.randrange(len(node.input))] = r.choice(("nothing", ""))


def rename_output(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    node.output[r.randrange(len(node.output))] = r.choice((*names(m), "", "fresh"))


def more_inputs(m: ModelProto, r: Random) -> None:
    r.choice(nodes(m)).input.extend([r.choice(names(m))] * r.choice((1, 1, 9, 10_000)))


def fewer_inputs(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    del node.input[r.randrange(len(node.input) + 1) :]


def more_outputs(m: ModelProto, r: Random) -> None:
    r.choice(nodes(m)).output.extend(f"more{k}" for k in range(r.choice((1, 2, 50))))


def fewer_outputs(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    del node.output[r.randrange(len(node.output)) :]


def unnamed_outputs(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    for place in range(len(node.output)):
        node.output[place] = ""


def double_node(m: ModelProto, r: Random) -> None:
    graph = _one(r, [g for g in graphs(m) if g.node])
    graph.node.add().CopyFrom(r.choice(graph.node))


def remove_node(m: ModelProto, r: Random) -> None:
    graph = _one(r, [g for g in graphs(m) if g.node])
    del graph.node[r.randrange(len(graph.node))]


def shuffle_nodes(m: ModelProto, r: Random) -> None:
    graph = r.choice(graphs(m))
    mixed = [NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    r.shuffle(mixed)
    graph.ClearField("node")
    graph.node.extend(mixed)


def double_initializer(m: ModelProto, r: Random) -> None:
    graph = _one(r, [g for g in graphs(m) if g.initializer])
    if graph is not None:
        graph.initializer.add().CopyFrom(r.choice(graph.initializer))


def rename_initializer(m: ModelProto, r: Random) -> None:
    tensor = _one(r, [t for g in graphs(m) for t in g.initializer])
    if tensor is not None:
        tensor.name = r.choice((*names(m), "", "fresh"))


def initializer_is_input(m: ModelProto, r: Random) -> None:
    tensor = _one(r, m.graph.initializer)
    if tensor is not None:
        shape = list(tensor.dims) if r.random() < 0.5 else [r.choice(ABSURD) for _ in tensor.dims]
        m.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))


def double_input(m: ModelProto, r: Random) -> None:
    m.graph.input.add().CopyFrom(r.choice(m.graph.input))


def remove_input(m: ModelProto, r: Random) -> None:
    del m.graph.input[r.randrange(len(m.graph.input))]


def rename_graph_output(m: ModelProto, r: Random) -> None:
    graph = r.choice(graphs(m))
    r.choice(graph.output).name = r.choice((*names(m), "", "nothing"))


def double_graph_output(m: ModelProto, r: Random) -> None:
    graph = r.choice(graphs(m))
    graph.output.add().CopyFrom(r.choice(graph.output))


def more_graph_outputs(m: ModelProto, r: Random) -> None:
    """Inner values, weights and inputs shown as outputs."""
    for name in r.sample(names(m), min(3, len(names(m)))):
        m.graph.output.append(helper.make_empty_tensor_value_info(name))


def no_outputs(m: ModelProto, r: Random) -> None:
    r.choice(graphs(m)).ClearField("output")


def no_nodes(m: ModelProto, r: Random) -> None:
    r.choice(graphs(m)).ClearField("node")


def inputs_only(m: ModelProto, r: Random) -> None:
    m.graph.ClearField("node")
    m.graph.ClearField("output")
    if r.random() < 0.5:
        m.graph.output.add().CopyFrom(m.graph.input[0])


def no_initializers(m: ModelProto, r: Random) -> None:
    r.choice(graphs(m)).ClearField("initializer")


def no_graph(m: ModelProto, r: Random) -> None:
    m.ClearField("graph")


def body_inputs(m: ModelProto, r: Random) -> None:
    graph = r.choice(graphs(m))
    if graph.input and r.random() < 0.5:
        del graph.input[r.randrange(len(graph.input))]
    else:
        graph.input.append(helper.make_tensor_value_info(r.choice((*names(m), "extra")), FLOAT, [2]))


def sparse_weights(m: ModelProto, r: Random) -> None:
    sparse = m.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), r.choice(names(m))))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, 1]), "at"))
    sparse.dims.extend([r.choice(ABSURD)])


# -- operators ---------------------------------------------------------------------------------------


def another_operator(m: ModelProto, r: Random) -> None:
    r.choice(nodes(m)).op_type = r.choice((*OPERATORS, "Frobnicate"))


def operator_of_same_form(m: ModelProto, r: Random) -> None:
    """Another operator with as many inputs, and without attributes that the first one had."""
    node = r.choice(nodes(m))
    fits = [
        s.name
        for s in onnx.defs.get_all_schemas()
        if s.domain == "" and s.min_input <= len(node.input) <= s.max_input and not s.deprecated
    ]
    node.op_type = r.choice(sorted(fits) or ["Relu"])
    node.ClearField("attribute")


def another_domain(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    node.domain = r.choice(("com.microsoft", "nothing", "ai.onnx", "ai.onnx.ml", "local", "ünï"))
    if r.random() < 0.7:
        m.opset_import.append(helper.make_opsetid(node.domain, r.choice((1, 20, 2**40, -1))))


def another_opset(m: ModelProto, r: Random) -> None:
    m.opset_import[0].version = r.choice((*range(1, 27), *range(11, 23), *ABSURD))


def no_opsets(m: ModelProto, r: Random) -> None:
    m.ClearField("opset_import")


def double_opset(m: ModelProto, r: Random) -> None:
    m.opset_import.append(helper.make_opsetid(r.choice(("", "ai.onnx")), r.randrange(11, 26)))


def another_ir_version(m: ModelProto, r: Random) -> None:
    m.ir_version = r.choice(ABSURD)


def builtin_function(m: ModelProto, r: Random) -> None:
    """A local function that has the name of a standard operator."""
    name = r.choice([n.op_type for n in nodes(m)])
    own = function(name, helper.make_node("Neg", ["a"], ["b"]))
    own.domain = r.choice(("", "ai.onnx", "local"))
    m.functions.append(own)


def recursive_functions(m: ModelProto, r: Random) -> None:
    first = function("loop1", helper.make_node("loop2", ["a", "w"], ["b"], domain="local"))
    second = function("loop2", helper.make_node("loop1", ["a", "w"], ["b"], domain="local"))
    m.functions.extend((first, second))
    node = r.choice(nodes(m))
    node.op_type, node.domain = r.choice(("loop1", "loop2", "Neg")), r.choice(("local", ""))
    m.opset_import.append(helper.make_opsetid("local", 1))


def function_chain(m: ModelProto, r: Random) -> None:
    """Functions that call the one before: once each, or (billions of nodes) twice."""
    depth, times = r.choice(((20, 2), (40, 2), (150, 1), (5000, 1)))
    for level in range(depth):
        inner = f"f{level - 1}" if level else "Add"
        domain = "local" if level else ""
        calls = [helper.make_node(inner, ["a", "w"], ["b"], domain=domain)]
        if times == 2:
            calls = [
                helper.make_node(inner, ["a", "w"], ["t"], domain=domain),
                helper.make_node(inner, ["t", "w"], ["b"], domain=domain),
            ]
        m.functions.append(function(f"f{level}", *calls))
    x = m.graph.input[0].name
    m.graph.node.append(helper.make_node(f"f{depth - 1}", [x, x], ["deep"], domain="local"))
    m.graph.output.append(helper.make_empty_tensor_value_info("deep"))
    m.opset_import.append(helper.make_opsetid("local", 1))


# -- attributes --------------------------------------------------------------------------------------


def attribute_numbers(m: ModelProto, r: Random) -> None:
    attribute = _one(r, [a for a in attributes(m) if a.type in (AttributeProto.INT, AttributeProto.INTS)])
    if attribute is None:
        return
    if attribute.type == AttributeProto.INT:
        attribute.i = r.choice(ABSURD)
    elif attribute.ints and r.random() < 0.7:
        attribute.ints[r.randrange(len(attribute.ints))] = r.choice(ABSURD)
    else:
        attribute.ints.extend([r.choice(ABSURD)] * r.choice((1, 5, 100_000)))


def attribute_floats(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    name = r.choice(("epsilon", "alpha", "beta", "momentum", "value_float"))
    node.attribute.append(helper.make_attribute(name, r.choice((float("nan"), float("inf"), -1.0, 1e38))))


def attribute_type(m: ModelProto, r: Random) -> None:
    attribute = _one(r, attributes(m))
    if attribute is not None:
        attribute.type = r.choice((*range(15), 99))  # type: ignore[assignment]


def attribute_value(m: ModelProto, r: Random) -> None:
    """A value of another type under the same name."""
    attribute = _one(r, attributes(m))
    if attribute is None:
        return
    values = (1, -1, [1, 2], [], 0.5, [0.5], "text", ["a", "b"], helper.make_graph([], "g", [], []))
    made = r.choice(values)
    kind = AttributeProto.INTS if made == [] else None
    attribute.CopyFrom(helper.make_attribute(attribute.name, made, attr_type=kind))


def attribute_name(m: ModelProto, r: Random) -> None:
    attribute = _one(r, attributes(m))
    if attribute is not None:
        attribute.name = r.choice(("", "axis", "axes", "group", "value", "ünï", "perm"))


def double_attribute(m: ModelProto, r: Random) -> None:
    node = _one(r, [n for n in nodes(m) if n.attribute])
    if node is not None:
        node.attribute.add().CopyFrom(r.choice(node.attribute))


def remove_attribute(m: ModelProto, r: Random) -> None:
    node = _one(r, [n for n in nodes(m) if n.attribute])
    if node is not None:
        del node.attribute[r.randrange(len(node.attribute))]


def referring_attribute(m: ModelProto, r: Random) -> None:
    """A reference to a function's attribute, where there is none."""
    attribute = _one(r, attributes(m))
    if attribute is not None:
        attribute.ref_attr_name = r.choice(("alpha", "nothing"))


def new_attribute(m: ModelProto, r: Random) -> None:
    node = r.choice(nodes(m))
    schemas = [s for s in onnx.defs.get_all_schemas() if s.name == node.op_type and s.attributes]
    options = sorted(schemas[0].attributes) if schemas else ["axis"]
    made = r.choice((r.choice(ABSURD), [r.choice(ABSURD)] * r.choice((1, 2, 4)), "SAME_UPPER", 0.5))
    node.attribute.append(helper.make_attribute(r.choice(options), made))


# -- tensors -----------------------------------------------------------------------------------------


def weight_shape(m: ModelProto, r: Random) -> None:
    tensor = r.choice(tensors(m))
    if tensor.dims and r.random() < 0.8:
        tensor.dims[r.randrange(len(tensor.dims))] = r.choice(ABSURD)
    else:
        tensor.dims.extend([r.choice(ABSURD)] * r.choice((1, 1, 100, 100_000)))


def weight_order(m: ModelProto, r: Random) -> None:
    """As many entries in another shape."""
    tensor = r.choice(tensors(m))
    shape = list(tensor.dims)
    r.shuffle(shape)
    tensor.ClearField("dims")
    tensor.dims.extend(r.choice((shape, [int(np.prod(shape))], [*shape, 1], [1, *shape], shape[::-1])))


def empty_weight(m: ModelProto, r: Random) -> None:
    """A weight with a size of 0, whole in itself."""
    tensor = r.choice(tensors(m))
    for name in ("raw_data", "float_data", "int64_data", "int32_data", "external_data", "data_location"):
        tensor.ClearField(name)
    if tensor.dims:
        tensor.dims[r.randrange(len(tensor.dims))] = 0
    else:
        tensor.dims.append(0)
    tensor.raw_data = b""


def resized_weight(m: ModelProto, r: Random) -> None:
    """A weight of another size, whole in itself."""
    tensor = _one(r, [t for t in tensors(m) if t.data_type == FLOAT and t.HasField("raw_data")])
    if tensor is not None:
        shape = [max(1, n + r.choice((-1, 0, 1))) for n in tensor.dims]
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))


def weight_type(m: ModelProto, r: Random) -> None:
    r.choice(tensors(m)).data_type = r.choice((*range(27), 99, -1, 2**31 - 1))


def retyped_weight(m: ModelProto, r: Random) -> None:
    """A weight of another element type, whole in itself."""
    tensor = _one(r, [t for t in tensors(m) if t.HasField("raw_data") and t.data_type == FLOAT])
    if tensor is not None:
        kind = r.choice((np.float64, np.float16, np.int64, np.int8, np.uint16, np.bool_, np.complex64))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name))


def text_weight(m: ModelProto, r: Random) -> None:
    """A weight of strings."""
    tensor = r.choice(tensors(m))
    texts = np.full(tuple(max(0, min(n, 9)) for n in tensor.dims), "text", dtype=object)
    tensor.CopyFrom(numpy_helper.from_array(texts, tensor.name))


def weight_length(m: ModelProto, r: Random) -> None:
    tensor = r.choice(tensors(m))
    left = r.randrange(len(tensor.raw_data) + 1)
    tensor.raw_data = tensor.raw_data[:left] + r.randbytes(r.choice((0, 1, 8)))


def both_payloads(m: ModelProto, r: Random) -> None:
    r.choice(tensors(m)).float_data.extend([1.0] * r.choice((1, 4, 1000)))


def strange_numbers(m: ModelProto, r: Random) -> None:
    """Weights that are infinite, undefined, huge, tiny or zero."""
    tensor = _one(r, [t for t in tensors(m) if t.data_type == FLOAT and t.HasField("raw_data")])
    if tensor is None:
        return
    values = numpy_helper.to_array(tensor).copy()
    number = r.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0, -0.0))
    values.reshape(-1)[:: r.choice((1, 1, 2, 5))] = number
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def absurd_sizes(m: ModelProto, r: Random) -> None:
    """Numbers that shapes, pads, repeats and limits are made of."""
    found = [t for t in tensors(m) if t.data_type == TensorProto.INT64 and t.HasField("raw_data")]
    tensor = _one(r, found)
    if tensor is not None:
        values = numpy_helper.to_array(tensor).copy().reshape(-1)
        if values.size:
            values[r.randrange(values.size)] = r.choice(ABSURD)
            tensor.CopyFrom(numpy_helper.from_array(values.reshape(tuple(tensor.dims)), tensor.name))


def external_place(m: ModelProto, r: Random) -> None:
    """External data somewhere else: outside, behind links, out of range."""
    tensor = r.choice(tensors(m))
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=r.choice(LOCATIONS))
    numbers = ("0", "4", "-4", "9" * 30, str(2**63), "1e3", "", "0x10", "٣")
    for key in ("offset", "length"):
        if r.random() < 0.5:
            tensor.external_data.add(key=key, value=r.choice(numbers))


def external_entry(m: ModelProto, r: Random) -> None:
    """One entry of external data is wrong."""
    found = [e for t in tensors(m) for e in t.external_data]
    entry = _one(r, found)
    if entry is not None:
        entry.value = r.choice((*LOCATIONS, "0", "1", "16", "-1", "9" * 30, "999999"))


# -- declared shapes and types -----------------------------------------------------------------------


def declared_size(m: ModelProto, r: Random) -> None:
    dims = [d for v in infos(m) for d in v.type.tensor_type.shape.dim]
    dim = _one(r, dims)
    if dim is not None:
        if r.random() < 0.7:
            dim.dim_value = r.choice(ABSURD)
        else:
            dim.dim_param = r.choice(("batch", "", "?", "-1", "n" * 100_000, "2", "batch+1", "time"))


def input_size(m: ModelProto, r: Random) -> None:
    """65537 is left out: such a model is right, and verification takes a minute over it."""
    dims = [d for v in m.graph.input for d in v.type.tensor_type.shape.dim]
    if dims:
        r.choice(dims).dim_value = r.choice([n for n in ABSURD if n != 65537])


def declared_rank(m: ModelProto, r: Random) -> None:
    value = r.choice(infos(m))
    if value.type.HasField("tensor_type"):
        shape = value.type.tensor_type.shape
        for _ in range(r.choice((1, 1, 3, 70, 10_000))):
            shape.dim.add().dim_value = r.choice((1, 2))


def declared_type(m: ModelProto, r: Random) -> None:
    r.choice(infos(m)).type.tensor_type.elem_type = r.choice((*range(27), 99, -1))


def no_declaration(m: ModelProto, r: Random) -> None:
    value = r.choice(infos(m))
    if r.random() < 0.5:
        value.ClearField("type")
    else:
        value.type.tensor_type.ClearField("shape")


def another_kind_of_value(m: ModelProto, r: Random) -> None:
    value = r.choice(infos(m))
    inner = helper.make_tensor_type_proto(FLOAT, [2])
    made = r.choice(
        (
            helper.make_sequence_type_proto(inner),
            helper.make_optional_type_proto(inner),
            helper.make_map_type_proto(TensorProto.INT64, inner),
            helper.make_sparse_tensor_type_proto(FLOAT, [2]),
        )
    )
    value.type.CopyFrom(made)


def false_declaration(m: ModelProto, r: Random) -> None:
    """A declared shape for a value (also a weight) that has another one."""
    shape = [r.choice((1, 2, 3, 2**40, -1, 0)) for _ in range(r.randrange(5))]
    kind = r.choice((FLOAT, TensorProto.INT64, TensorProto.STRING))
    m.graph.value_info.append(helper.make_tensor_value_info(r.choice(names(m)), kind, shape))


# -- operators that make tensors of any size ---------------------------------------------------------


def _absurd(r: Random) -> int:
    return r.choice((2**20, 2**31, 2**40, 2**62, -1, 0, 3))


def _doubling() -> GraphProto:
    """The body of a loop that makes its state twice as long."""
    value = helper.make_tensor_value_info
    return helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Concat", ["v", "v"], ["w"], axis=0)],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("v", FLOAT, None)],
        [value("on", TensorProto.BOOL, None), value("w", FLOAT, None)],
    )


def made_of_nothing(m: ModelProto, r: Random) -> None:
    """A tensor whose size is a number in the file, which the output depends on."""
    number = r.randrange(10**6)

    def ints(values: Any, name: str) -> str:
        tensor = numpy_helper.from_array(np.array(values, np.int64), f"{name}_{number}")
        m.graph.initializer.append(tensor)
        return tensor.name

    def floats(values: Any, name: str) -> str:
        tensor = numpy_helper.from_array(np.array(values, np.float32), f"{name}_{number}")
        m.graph.initializer.append(tensor)
        return tensor.name

    def many(count: int) -> str:
        return ints([_absurd(r) for _ in range(count)], f"many{r.random()}")

    def any_(name: str) -> str:
        return ints(r.choice(ABSURD), name)

    def list_(name: str) -> str:
        return ints([r.choice(ABSURD)], name)

    x, big = m.graph.input[0].name, f"big_{number}"
    rank = max(1, len(m.graph.input[0].type.tensor_type.shape.dim))
    factors = [r.choice((1e9, 0.0, -1.0, float("nan"), 1.0))] * rank
    equation = r.choice(("ij->ji", "...", "->", "i" * 99, "a,b", "é"))
    limit = r.choice((1e30, float("inf"), float("nan")))
    make: dict[str, Callable[[], tuple[str, list[str], dict[str, Any]]]] = {
        "filled": lambda: ("ConstantOfShape", [many(r.randrange(1, 5))], {}),
        "expanded": lambda: ("Expand", [floats(1.0, "one"), many(2)], {}),
        "counted": lambda: ("Range", [ints(0, "a"), any_("b"), ints(r.choice((1, -1, 0)), "c")], {}),
        "counted in floats": lambda: ("Range", [floats(0.0, "a"), floats(limit, "b"), floats(1e-3, "c")], {}),
        "tiled": lambda: ("Tile", [x, many(rank)], {}),
        "padded": lambda: ("Pad", [x, many(2 * rank)], {}),
        "one-hot": lambda: ("OneHot", [ints([0], "i"), any_("d"), ints([0, 1], "v")], {}),
        "random": lambda: ("RandomNormal", [], {"shape": [_absurd(r), _absurd(r)]}),
        "reshaped": lambda: ("Reshape", [x, many(3)], {}),
        "sliced": lambda: ("Slice", [x, list_("a"), list_("b"), ints([0], "c"), list_("d")], {}),
        "split": lambda: ("Split", [x, many(2)], {"axis": 0}),
        "split into many": lambda: ("Split", [x], {"axis": 0, "num_outputs": r.choice(ABSURD)}),
        "window": lambda: ("BlackmanWindow", [any_("n")], {}),
        "gathered": lambda: ("Gather", [x, list_("i")], {"axis": 0}),
        "triangle": lambda: ("Trilu", [x, any_("k")], {}),
        "summed up": lambda: ("CumSum", [x, any_("k")], {}),
        "largest": lambda: ("TopK", [x, list_("k")], {}),
        "squeezed": lambda: ("Squeeze", [x, many(2)], {}),
        "unsqueezed": lambda: ("Unsqueeze", [x, many(2)], {}),
        "averaged": lambda: ("ReduceMean", [x, many(2)], {}),
        "resized by": lambda: ("Resize", [x, "", floats(factors, "f")], {}),
        "resized to": lambda: ("Resize", [x, "", "", many(rank)], {}),
        "cropped": lambda: ("CenterCropPad", [x, many(rank)], {}),
        "unit matrix": lambda: ("EyeLike", [x], {"k": r.choice(ABSURD)}),
        "sampled": lambda: ("GridSample", [x, x], {}),
        "transformed": lambda: ("DFT", [x, any_("n")], {}),
        "einsum": lambda: ("Einsum", [x], {"equation": equation}),
        "modulo zero": lambda: ("Mod", [ints([7], "a"), ints([0], "b")], {}),
        "divided": lambda: ("Div", [ints([-(2**63)], "a"), ints([r.choice((0, -1))], "b")], {}),
        "shifted": lambda: ("BitShift", [ints([7], "a"), ints([2**40], "b")], {"direction": "LEFT"}),
        "power": lambda: ("Pow", [ints([2], "a"), list_("b")], {}),
        "doubled in a loop": lambda: ("Loop", [ints(2**62, "trips"), "", x], {"body": _doubling()}),
    }
    kind = r.choice(sorted(make))
    operator, inputs, attributes = make[kind]()
    m.graph.node.append(helper.make_node(operator, inputs, [big], kind, **attributes))
    m.graph.node.append(helper.make_node("Cast", [big], [f"cast_{number}"], to=FLOAT))
    m.graph.node.append(helper.make_node("ReduceSum", [f"cast_{number}"], [f"total_{number}"], keepdims=0))
    m.graph.output.append(helper.make_empty_tensor_value_info(r.choice((big, f"total_{number}"))))


def sizes_of_sizes(m: ModelProto, r: Random) -> None:
    """A small tensor that doubles again and again."""
    number, x = r.randrange(10**6), m.graph.input[0].name
    kind = r.choice(("Concat", "Tile", "Mul", "Shape"))
    last = x
    if kind == "Shape":
        m.graph.node.append(helper.make_node("Shape", [x], [f"d0_{number}"]))
        last = f"d0_{number}"
    m.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), f"two_{number}"))
    for k in range(1, r.choice((10, 70))):
        out = f"d{k}_{number}"
        inputs = [last, f"two_{number}"] if kind == "Tile" else [last, last]
        operator = {"Shape": "Concat"}.get(kind, kind)
        extra = {"axis": 0} if operator == "Concat" else {}
        m.graph.node.append(helper.make_node(operator, inputs, [out], **extra))
        last = out
    m.graph.output.append(helper.make_empty_tensor_value_info(last))


# -- depth and length --------------------------------------------------------------------------------


def _field(number: int, content: bytes) -> bytes:
    size, rest = [], len(content)
    while rest > 127:
        size.append(rest & 127 | 128)
        rest >>= 7
    return bytes([number << 3 | 2, *size, rest]) + content


def nested(m: ModelProto, r: Random) -> bytes:
    """Ifs within Ifs, by hand: protobuf does not build what is too deep to read."""
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    for _ in range(r.choice((10, 20, 24, 30, 32, 33, 40, 60, 200, 2000))):
        branch = _field(1, b"then_branch") + _field(6, _field(1, node)) + b"\xa0\x01\x05"
        node = _field(1, b"c") + _field(2, b"y") + _field(4, b"If") + _field(5, branch)
    return m.SerializeToString() + _field(7, _field(1, node))


def nested_types(m: ModelProto, r: Random) -> bytes:
    """A sequence of sequences of ..., as a declared type."""
    kind = helper.make_tensor_type_proto(FLOAT, [1]).SerializeToString()
    for _ in range(r.choice((5, 30, 90, 1000))):
        kind = _field(4, _field(1, kind))
    return m.SerializeToString() + _field(7, _field(11, _field(1, b"deep") + _field(2, kind)))


def long_chain(m: ModelProto, r: Random) -> None:
    """Thousands of nodes one after the other, in or out of order."""
    last, made = m.graph.input[0].name, []
    for k in range(r.choice((300, 1200))):
        made.append(helper.make_node(r.choice(("Neg", "Identity")), [last], [f"chain{k}"]))
        last = f"chain{k}"
    if r.random() < 0.5:
        made.reverse()
    m.graph.node.extend(made)
    m.graph.output.append(helper.make_empty_tensor_value_info(last))


def many_reads(m: ModelProto, r: Random) -> None:
    """A value that is added to itself again and again: as many paths as there are stars."""
    last = m.graph.input[0].name
    for k in range(60):
        m.graph.node.append(helper.make_node("Add", [last, last], [f"twice{k}"]))
        last = f"twice{k}"
    m.graph.output.append(helper.make_empty_tensor_value_info(last))


# -- texts -------------------------------------------------------------------------------------------


def texts(m: ModelProto, r: Random) -> None:
    """A strange name somewhere."""
    text = r.choice(TEXTS)
    node = r.choice(nodes(m))
    place = r.randrange(9)
    if place == 0:
        node.op_type = text
    elif place == 1:
        node.domain = text
    elif place == 2:
        node.name = text
    elif place == 3:
        node.doc_string = text
    elif place == 4:
        m.graph.name = text
    elif place == 5 and node.attribute:
        r.choice(node.attribute).s = text.encode()
    elif place == 6:
        r.choice(infos(m)).name = text
    else:
        _rename(m, r.choice(names(m)), text)


def _rename(m: ModelProto, old: str, new: str) -> None:
    """One value by another name, wherever it is used."""
    for node in nodes(m):
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                if name == old:
                    field[place] = new
    for item in (*infos(m), *tensors(m)):
        if item.name == old:
            item.name = new


def unreadable_texts(m: ModelProto, r: Random) -> bytes:
    """Bytes that are no UTF-8 in place of letters."""
    data = bytearray(m.SerializeToString())
    letters = [i for i, b in enumerate(data) if 97 <= b <= 122]
    data[r.choice(letters)] = r.choice((0x80, 0xFF, 0xC0))
    return bytes(data)


def descriptions(m: ModelProto, r: Random) -> None:
    """Everything in a model that says nothing about what it computes."""
    m.producer_name, m.domain, m.model_version = r.choice(TEXTS), r.choice(TEXTS), r.choice(ABSURD)
    helper.set_model_props(m, {r.choice(TEXTS): r.choice(TEXTS)})
    m.graph.quantization_annotation.add().tensor_name = r.choice(names(m))
    m.training_info.add().algorithm.node.add().op_type = "Relu"


BYTES: tuple[Mutation, ...] = (
    flip_bits, flip_structure, truncate, splice, cut_out, double_bytes, endless_numbers, crossed, merged,
    nested, nested_types, unreadable_texts,
)  # fmt: skip
MODELS: tuple[Mutation, ...] = (
    rewire, cycle, undefined_input, rename_output, more_inputs, fewer_inputs, more_outputs, fewer_outputs,
    unnamed_outputs, double_node, remove_node, shuffle_nodes, double_initializer, rename_initializer,
    initializer_is_input, double_input, remove_input, rename_graph_output, double_graph_output,
    more_graph_outputs, no_outputs, no_nodes, inputs_only, no_initializers, no_graph, body_inputs,
    sparse_weights, another_operator, operator_of_same_form, another_domain, another_opset, no_opsets,
    double_opset, another_ir_version, builtin_function, recursive_functions, function_chain,
    attribute_numbers, attribute_floats, attribute_type, attribute_value, attribute_name, double_attribute,
    remove_attribute, referring_attribute, new_attribute, weight_shape, weight_order, empty_weight,
    resized_weight, weight_type, retyped_weight, text_weight, weight_length, both_payloads, strange_numbers,
    absurd_sizes, external_place, external_entry, declared_size, input_size, declared_rank, declared_type,
    no_declaration, another_kind_of_value, false_declaration, made_of_nothing, sizes_of_sizes, long_chain,
    many_reads, texts, descriptions,
)  # fmt: skip
MUTATIONS: dict[str, Mutation] = {f.__name__: f for f in (*MODELS, *BYTES)}

Case = tuple[str, Sequence[tuple[str, int]]]


def mutated(case: Case) -> bytes:
    """The file of a case; bytes can only be damaged further as bytes, so models come first."""
    seed, steps = case
    model = SEEDS[seed]()
    for name, number in sorted(steps, key=lambda step: MUTATIONS[step[0]] in BYTES):
        try:
            found = MUTATIONS[name](model, Random(f"{name}{number}"))
        except (IndexError, ValueError, AttributeError):
            continue  # there is nothing left to damage in that way
        if isinstance(found, bytes):
            return found
    return model.SerializeToString()

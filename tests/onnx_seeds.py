"""Small valid ONNX models of every kind that the reader has to cope with; the fuzz test damages them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from tests.onnx_graphs import Graph

FLOAT = TensorProto.FLOAT


def conv_net() -> ModelProto:
    """Convolutions, norms, a residual sum, pools and a classifier."""
    g = Graph()
    x = g.input("x", ["batch", 3, 6, 6])
    a = g.node("Relu", [g.batch_norm(g.conv(x, "c1", 3, 8), "n1", 8)], "r1")
    b = g.node("Add", [g.conv(a, "c2", 8, 8, groups=2), a], "sum")
    pooled = g.node("MaxPool", [b], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    c = g.node("Concat", [g.conv(pooled, "c3", 8, 4, 1), pooled], "joined", axis=1)
    flat = g.node("Flatten", [g.node("GlobalAveragePool", [c], "mean")], "flat", axis=1)
    return g.build(g.node("Gemm", [flat, g.weight("fc", 5, 12), g.vector("bias", 5)], "y", transB=1))


def transformer() -> ModelProto:
    """One block: fused attention spelled out, layer norms, an MLP."""
    g = Graph()
    x = g.input("x", ["batch", "time", 8])
    n = g.node("LayerNormalization", [x, g.vector("g1", 8), g.vector("b1", 8)], "n1", axis=-1)
    shape = g.node("Shape", [n], "shape")
    lead = g.node("Slice", [shape, g.ints("zero", [0]), g.ints("two", [2])], "lead")
    target = g.node("Concat", [lead, g.ints("heads", [2, 4])], "target", axis=0)
    turned = []
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        full = g.node("MatMul", [n, g.weight(f"w{name}", 8, 8)], f"full_{name}")
        turned.append(
            g.node("Transpose", [g.node("Reshape", [full, target], f"four_{name}")], name, perm=perm)
        )
    scores = g.node("Div", [g.node("MatMul", turned[:2], "qk"), g.tensor("root", 2.0)], "scores")
    mixed = g.node("MatMul", [g.node("Softmax", [scores], "soft", axis=-1), turned[2]], "mixed")
    back = g.node("Transpose", [mixed], "back", perm=[0, 2, 1, 3])
    joined = g.node("Reshape", [back, g.ints("wide", [0, 0, -1])], "joined")
    r = g.node("Add", [g.node("MatMul", [joined, g.weight("wo", 8, 8)], "o"), x], "r")
    up = g.node("Gelu", [g.node("MatMul", [r, g.weight("up", 8, 12)], "h")], "act")
    return g.build(g.node("Add", [g.node("MatMul", [up, g.weight("down", 12, 8)], "d"), r], "y"))


def recurrent() -> ModelProto:
    """An LSTM and a GRU."""
    g = Graph()
    x = g.input("x", [5, "batch", 4])
    y, *_ = g.node(
        "LSTM",
        [x, g.weight("w", 1, 24, 4), g.weight("r", 1, 24, 6), g.weight("b", 1, 48)],
        ["y", "h", "c"],
        hidden_size=6,
    )
    flat = g.node("Squeeze", [y, g.ints("one", [1])], "flat")
    z = g.node("GRU", [flat, g.weight("w2", 1, 9, 6), g.weight("r2", 1, 9, 3)], "z", hidden_size=3)
    return g.build(
        g.node("MatMul", [g.node("Squeeze", [z, g.ints("dir", [1])], "flat2"), g.weight("o", 3, 2)], "out")
    )


def _body(name: str, nodes: list[NodeProto], inputs: list[Any], outputs: list[Any]) -> Any:
    return helper.make_graph(nodes, name, inputs, outputs)


def branches() -> ModelProto:
    """An If whose bodies read weights of the graph around it."""
    g = Graph()
    x = g.input("x", ["batch", 4])
    a = g.node("Relu", [g.linear(x, "fc1", 4, 8)], "a")
    g.weight("inner", 8, 8)
    value = helper.make_tensor_value_info
    then = _body("then", [helper.make_node("MatMul", ["a", "inner"], ["t"])], [], [value("t", FLOAT, None)])
    other = _body("else", [helper.make_node("Neg", ["a"], ["e"])], [], [value("e", FLOAT, None)])
    total = g.node("ReduceSum", [a], "total", keepdims=0)
    test = g.node("Greater", [total, g.tensor("limit", 0.0)], "test")
    b = g.node("If", [test], "b", then_branch=then, else_branch=other)
    return g.build(g.linear(b, "fc2", 8, 3), shapes=False)


def loops() -> ModelProto:
    """A Loop that carries a state, with a fixed number of trips."""
    g = Graph()
    x = g.input("x", ["batch", 4])
    a = g.linear(x, "fc1", 4, 6)
    g.tensor("trips", 3, np.int64)
    g.tensor("go", True, np.bool_)
    g.weight("step", 6, 6)
    value = helper.make_tensor_value_info
    body = _body(
        "body",
        [
            helper.make_node("MatMul", ["state", "step"], ["moved"]),
            helper.make_node("Tanh", ["moved"], ["next"]),
            helper.make_node("Identity", ["going"], ["still"]),
        ],
        [
            value("i", TensorProto.INT64, []),
            value("going", TensorProto.BOOL, []),
            value("state", FLOAT, None),
        ],
        [value("still", TensorProto.BOOL, []), value("next", FLOAT, None)],
    )
    b = g.node("Loop", ["trips", "go", a], "b", body=body)
    return g.build(g.linear(b, "fc2", 6, 3), shapes=False)


def function(name: str, *nodes: NodeProto) -> FunctionProto:
    """A local function ``a, w -> b``."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a", "w"], ["b"], list(nodes), opsets)


def functions() -> ModelProto:
    """Local functions, one of which calls the other."""
    dense = function(
        "dense", helper.make_node("MatMul", ["a", "w"], ["t"]), helper.make_node("Relu", ["t"], ["b"])
    )
    twice = function(
        "twice",
        helper.make_node("dense", ["a", "w"], ["t"], domain="local"),
        helper.make_node("dense", ["t", "w"], ["b"], domain="local"),
    )
    g = Graph()
    x = g.input("x", ["batch", 4])
    a = g.node("dense", [x, g.weight("w1", 4, 6)], "a", domain="local")
    b = g.node("twice", [a, g.weight("w2", 6, 6)], "b", domain="local")
    y = g.node("MatMul", [b, g.weight("w3", 6, 2)], "y")
    return g.build(y, shapes=False, functions=[dense, twice], opsets=[helper.make_opsetid("local", 1)])


def external() -> ModelProto:
    """Weights in ``weights.bin``, which the worker writes beside the model."""
    model = conv_net()
    offset = 0
    for tensor in model.graph.initializer:
        size = len(tensor.raw_data)
        set_external_data(tensor, "weights.bin", offset, size)
        tensor.ClearField("raw_data")
        offset += size
    return model


def half() -> ModelProto:
    """Weights and activations in float16."""
    g = Graph(dtype=np.float16)
    x = g.input("x", ["batch", 3, 4, 4])
    a = g.node("Relu", [g.conv(x, "c1", 3, 6)], "a")
    return g.build(g.conv(a, "c2", 6, 2, 1))


def constant_nodes() -> ModelProto:
    """Weights and shapes as Constant nodes."""
    g = Graph()
    g.constant_nodes = True
    x = g.input("x", ["batch", 3, 4, 4])
    a = g.node("Relu", [g.conv(x, "c1", 3, 6)], "a")
    flat = g.node("Reshape", [a, g.ints("to", [0, 6, 16])], "flat")
    return g.build(
        g.node(
            "MatMul",
            [g.node("ReduceMean", [flat, g.ints("at", [2])], "m", keepdims=0), g.weight("w", 6, 2)],
            "y",
        )
    )


def quantised() -> ModelProto:
    """Quantise and dequantise around a linear layer, weights in int8."""
    g = Graph()
    x = g.input("x", ["batch", 4])
    scale, zero = g.tensor("scale", 0.05), g.tensor("zero", 3, np.int8)
    q = g.node("DequantizeLinear", [g.node("QuantizeLinear", [x, scale, zero], "q"), scale, zero], "dq")
    w = g.tensor("w8", g.random.integers(-90, 90, (4, 8)), np.int8)
    steps = g.tensor("steps", g.random.uniform(0.01, 0.02, 8))
    dense = g.node("DequantizeLinear", [w, steps, g.tensor("zeros", np.zeros(8), np.int8)], "w", axis=1)
    a = g.node("Relu", [g.node("MatMul", [q, dense], "a0")], "a")
    return g.build(g.linear(a, "fc2", 8, 3))


def sizes() -> ModelProto:
    """Every operator that makes tensors of sizes that are numbers in the file."""
    g = Graph()
    x = g.input("x", ["batch", 4, 2, 2])
    a = g.conv(x, "c1", 4, 6, 1)
    none = g.tensor("none", [], np.float32)
    a = g.node("Resize", [a, none, g.tensor("scales", [1, 1, 2, 2])], "bigger", mode="nearest")
    a = g.node("Pad", [a, g.ints("pads", [0, 0, 1, 1, 0, 0, 1, 1])], "padded")
    a = g.node("Slice", [a, g.ints("from", [0]), g.ints("until", [4]), g.ints("along", [2])], "cut")
    a = g.node("Tile", [a, g.ints("times", [1, 1, 2, 1])], "tiled")
    fill = g.node(
        "ConstantOfShape",
        [g.ints("fill_shape", [1, 6, 1, 1])],
        "fill",
        value=numpy_helper.from_array(np.ones(1, np.float32)),
    )
    wide = g.node("Expand", [fill, g.ints("wide_shape", [1, 6, 8, 6])], "wide")
    steps = g.node("Range", [g.ints("low", 0), g.ints("high", 6), g.ints("by", 1)], "steps")
    steps = g.node(
        "Reshape", [g.node("Cast", [steps], "numbers", to=FLOAT), g.ints("line", [1, 1, 1, 6])], "row"
    )
    a = g.node("Add", [g.node("Mul", [a, wide], "product"), steps], "moved")
    hot = g.node(
        "OneHot", [g.ints("hot_at", [1, 2]), g.ints("depth", 6), g.tensor("off_on", [0.0, 1.0])], "hot"
    )
    a = g.node("Add", [a, g.node("ReduceSum", [hot], "sum", keepdims=0)], "shifted")
    flat = g.node("Reshape", [a, g.ints("flat_shape", [-1, 288])], "flat")
    return g.build(g.linear(flat, "fc", 288, 3))


def nested_branches(depth: int = 4) -> ModelProto:
    """Ifs within Ifs."""
    value = helper.make_tensor_value_info
    node = helper.make_node("MatMul", ["a", "inner"], ["y0"])
    for level in range(1, depth + 1):
        last = f"y{level - 1}"
        then = _body(f"then{level}", [node], [], [value(last, FLOAT, None)])
        other = _body(
            f"else{level}",
            [helper.make_node("Neg", ["a"], [f"n{level}"])],
            [],
            [value(f"n{level}", FLOAT, None)],
        )
        node = helper.make_node("If", ["test"], [f"y{level}"], then_branch=then, else_branch=other)
    g = Graph()
    x = g.input("x", ["batch", 4])
    g.inputs.append(value("test", TensorProto.BOOL, []))
    g.linear(x, "a", 4, 6)
    g.weight("inner", 6, 6)
    g.nodes.append(node)
    return g.build(g.linear(f"y{depth}", "fc2", 6, 3), shapes=False)


SEEDS: dict[str, Callable[[], ModelProto]] = {
    "conv": conv_net, "transformer": transformer, "recurrent": recurrent, "branches": branches,
    "loops": loops, "functions": functions, "external": external, "half": half,
    "constant nodes": constant_nodes, "quantised": quantised, "sizes": sizes,
    "nested branches": nested_branches,
}  # fmt: skip


def payload() -> bytes:
    """What ``weights.bin`` holds for the external model."""
    return b"".join(tensor.raw_data for tensor in conv_net().graph.initializer)

"""Nodes of the ONNX operators that sparsecc has in its table, with inputs and attributes from their schemas.

An operator whose schema tells what it takes needs nothing here; what needs more has a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.defs
from onnx import TensorProto, helper

from sparsecc.onnxfile.ops import TABLE
from tests import onnx_recipes
from tests.onnx_recipes import joined

if TYPE_CHECKING:
    from tests.test_onnx_property import Net, Value

#: operators that are defined, or well conditioned, on a part of the numbers alone
DOMAINS: dict[str, str] = dict.fromkeys(
    ["Acos", "Asin", "Atanh", "Log", "Sqrt", "Reciprocal", "Div", "Pow", "Mod", "Tan"], "unit"
) | {"Acosh": "above one"}
#: operators that jump: what they read must not be where two ways of summing differ
JUMPS = frozenset(
    {
        "Ceil", "Floor", "Round", "Sign", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod",
        "ArgMax", "ArgMin", "TopK", "Hardmax", "Shrink", "ThresholdedRelu",
    }
)  # fmt: skip
ATTRIBUTES: dict[str, Callable[[Net], Any]] = {
    "direction": lambda net: net.pick(("LEFT", "RIGHT")),
    "approximate": lambda net: net.pick(("none", "tanh")),
    "fmod": lambda net: 1, "to": lambda net: TensorProto.FLOAT, "alpha": lambda net: net.pick((0.3, 1.5)),
    "lambd": lambda net: 0.3, "bias": lambda net: 0.1,
}  # fmt: skip
_KINDS = (
    ("tensor(float)", TensorProto.FLOAT), ("tensor(bool)", TensorProto.BOOL),
    ("tensor(int64)", TensorProto.INT64), ("tensor(uint8)", TensorProto.UINT8),
)  # fmt: skip


def schema_of(name: str, opset: int) -> Any:
    """The schema of an operator at an opset; None where it has none, or is deprecated."""
    try:
        found = onnx.defs.get_schema(name, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


def newest(name: str, opsets: tuple[int, ...]) -> int | None:
    """The opset to try an operator at: the first of these that has it."""
    return next((opset for opset in opsets if schema_of(name, opset) is not None), None)


def call(net: Net, name: str) -> None:
    """Put a node of the operator in, on one of the last values; nothing where the opset lacks it."""
    schema = schema_of(name, net.graph.opset)
    if schema is None:
        return
    recipe = RECIPES.get(name)
    if recipe is not None:
        recipe(net, name)
        return
    v = net.pick(net.values[-4:])
    if TABLE[name] is TABLE["MaxPool"]:
        _pool(net, name)
        return
    inputs = [_input(net, name, v, place, form) for place, form in enumerate(schema.inputs) if _wanted(form)]
    attributes = {key: ATTRIBUTES[key](net) for key in schema.attributes if key in ATTRIBUTES}
    out = net.graph.node(name, inputs, net.fresh(name.lower()), **attributes)
    _land(net, v, out, schema)


def _wanted(form: Any) -> bool:
    return form.option != onnx.defs.OpSchema.FormalParameterOption.Optional


def _input(net: Net, name: str, v: Value, place: int, form: Any) -> str:
    kind = next(number for text, number in _KINDS if text in form.types)
    if kind != TensorProto.FLOAT:
        test = net.graph.node("Greater", [generic(net, v), net.scalar(0.1 * place)], net.fresh("test"))
        return (
            test if kind == TensorProto.BOOL else net.graph.node("Cast", [test], net.fresh("cast"), to=kind)
        )
    if place:
        first = net.pick(
            (lambda: _channel_vector(net, v), lambda: net.graph.node("Sin", [v.name], net.fresh("sin")))
        )()
    else:
        first = generic(net, v) if name in JUMPS else v.name
    return _within(net, DOMAINS.get(name), first)


def _within(net: Net, domain: str | None, name: str) -> str:
    """A value whose numbers lie where an operator is defined."""
    if domain is None:
        return name
    unit = net.graph.node("Sigmoid", [name], net.fresh("unit"))
    low = 1.1 if domain == "above one" else 0.2
    return (
        net.graph.node("Add", [unit, net.scalar(low)], net.fresh("within"))
        if domain == "above one"
        else net.graph.node(
            "Mul",
            [net.graph.node("Add", [unit, net.scalar(low)], net.fresh("raised")), net.scalar(0.7)],
            net.fresh("within"),
        )
    )


def _channel_vector(net: Net, v: Value) -> str:
    at = net.channel(len(v.shape))
    sizes = [v.shape[d] if d == at else 1 for d in range(at, len(v.shape))]
    return net.graph.tensor(net.fresh("along"), net.graph.random.uniform(0.3, 0.9, sizes))


def generic(net: Net, v: Value) -> str:
    """A value moved by a vector along its channels, so that no two of its numbers are equal by design."""
    return net.graph.node("Add", [v.name, _channel_vector(net, v)], net.fresh("moved"))


def _land(net: Net, v: Value, out: str, schema: Any) -> None:
    """What comes out, in floats, and joined to the value that it was made of."""
    if "tensor(float)" not in schema.outputs[0].types or (
        schema.outputs[0].type_str == "T" and "tensor(float)" not in schema.inputs[0].types
    ):
        out = net.graph.node("Cast", [out], net.fresh("floats"), to=TensorProto.FLOAT)
    net.put("Add", [net.graph.node("Tanh", [out], net.fresh("tame")), v.name], v.shape)


# -- recipes -----------------------------------------------------------------------------------------


def _axis(net: Net, v: Value) -> int:
    axis = net.pick((net.channel(len(v.shape)), len(v.shape) - 1, 1))
    return int(axis - len(v.shape) if net.pick((False, True)) else axis)


def _reduce(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    rank = len(v.shape)
    axes = net.pick(([_axis(net, v)], [net.channel(rank)], list(range(1, rank)), None))
    x = _within(net, "unit", v.name)
    out = net.fresh("stat")
    given: dict[str, Any] = {"keepdims": 1}
    operator_changed = 13 if name == "ReduceSum" else 18
    inputs = [x]
    if axes is not None and net.graph.opset >= operator_changed:
        inputs.append(net.ints(*axes))
    elif axes is not None:
        given["axes"] = axes
    joined(net, v, net.graph.node(name, inputs, out, **given))


def _positions(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    out = net.graph.node(name, [generic(net, v)], net.fresh("where"), axis=_axis(net, v), keepdims=1)
    joined(net, v, net.graph.node("Cast", [out], net.fresh("floats"), to=TensorProto.FLOAT))


def _along(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    axis = net.graph.ints(net.fresh("axis"), _axis(net, v))
    joined(net, v, net.graph.node(name, [v.name, axis], net.fresh("along")))


def _top(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    outputs = [net.fresh("top"), net.fresh("at")]
    net.graph.node(name, [generic(net, v), net.ints(1)], outputs, axis=_axis(net, v))
    joined(net, v, outputs[0])


def _normalised(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    attributes = {"p": 2} if name == "LpNormalization" else {}
    x = generic(net, v) if name in JUMPS else v.name
    joined(net, v, net.graph.node(name, [x], net.fresh("soft"), axis=_axis(net, v), **attributes))


def _rms(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    scale = net.vector(v.shape[-1])
    net.put(name, [v.name, scale], v.shape, axis=-1, epsilon=1e-2)


def _pool(net: Net, name: str) -> None:
    v = net.value()
    if v is None or min(v.shape[2:]) < 2:
        return
    if name.startswith("Global"):
        joined(net, v, net.graph.node(name, [v.name], net.fresh("pooled")))
        return
    shape = (*v.shape[:2], v.shape[2] // 2, v.shape[3] // 2)
    net.put(name, [v.name], shape, kernel_shape=[2, 2], strides=[2, 2])


def _tile(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    at = net.channel(len(v.shape))
    if v.shape[at] <= 8:
        times = [2 if d == at else 1 for d in range(len(v.shape))]
        net.put(name, [v.name, net.ints(*times)], tuple(n * t for n, t in zip(v.shape, times, strict=True)))


def _gather_nd(net: Net, name: str) -> None:
    """The first rows of every sample."""
    v = net.pick(net.values[-4:])
    turned = net.graph.node("Transpose", [v.name], net.fresh("turned"), perm=[1, 0, *range(2, len(v.shape))])
    rows = net.graph.tensor(net.fresh("rows"), [[0], [v.shape[1] - 1]], np.int64)
    found = net.graph.node(name, [turned, rows], net.fresh("found"))
    net.put("Transpose", [found], (v.shape[0], 2, *v.shape[2:]), perm=[1, 0, *range(2, len(v.shape))])


def _space_to_depth(net: Net, name: str) -> None:
    v = net.value()
    if v is not None and v.shape[1] <= 4 and v.shape[2] % 2 == 0 and v.shape[3] % 2 == 0:
        net.put(name, [v.name], (v.shape[0], v.shape[1] * 4, v.shape[2] // 2, v.shape[3] // 2), blocksize=2)


def _depth_to_space(net: Net, name: str) -> None:
    """On as many channels as it takes."""
    v = net.value()
    if v is None or v.shape[1] > 6 or max(v.shape[2:]) > 6:
        return
    four = net.graph.node("Concat", [v.name] * 4, net.fresh("four"), axis=1)
    shape = (*v.shape[:2], v.shape[2] * 2, v.shape[3] * 2)
    net.put(name, [four], shape, blocksize=2, mode=net.pick(("DCR", "CRD")))


def _filled(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    shape = net.graph.node("Shape", [v.name], net.fresh("shape"))
    number = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.5])
    net.put("Add", [v.name, net.graph.node(name, [shape], net.fresh("filled"), value=number)], v.shape)


def _range(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    numbers = [net.graph.tensor(net.fresh("bound"), n, np.float32) for n in (0.0, float(v.shape[-1]), 1.0)]
    joined(net, v, net.graph.node(name, numbers, net.fresh("range")))


def _eye(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    square = net.graph.tensor(net.fresh("square"), np.zeros((v.shape[-1], v.shape[-1])))
    joined(
        net,
        v,
        net.graph.node(
            "ReduceMax", [net.graph.node(name, [square], net.fresh("eye"))], net.fresh("top"), keepdims=0
        ),
    )


def _one_hot(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    depth = net.graph.ints(net.fresh("depth"), v.shape[-1])
    off_on = net.graph.tensor(net.fresh("off_on"), [0.0, 1.0])
    joined(net, v, net.graph.node(name, [net.ints(0), depth, off_on], net.fresh("hot")))


def _non_zero(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    found = net.graph.node(name, [generic(net, v)], net.fresh("found"))
    count = net.graph.node(
        "Cast", [net.graph.node("Size", [found], net.fresh("size"))], net.fresh("count"), to=TensorProto.FLOAT
    )
    joined(net, v, count)


def _triangle(net: Net, name: str) -> None:
    v = net.pick([u for u in net.values[-6:] if len(u.shape) > 2] or net.values[:1])
    net.put(name, [v.name], v.shape, upper=net.pick((0, 1)))


def _clip(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    net.put(name, [v.name, net.scalar(-0.5), net.scalar(0.7)], v.shape)


def _cast_like(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    net.put(name, [v.name, net.scalar(1.0)], v.shape)


def _dropout(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    net.put(name, [v.name], v.shape)


def _quantised(net: Net, name: str) -> None:
    """To integers and back, with one scale or one a channel."""
    v = net.pick(net.values[-4:])
    at = net.channel(len(v.shape))
    each = net.graph.opset >= 13 and net.pick((True, False))
    scale = net.graph.tensor(
        net.fresh("scale"), net.graph.random.uniform(0.3, 0.9, (v.shape[at],) if each else ())
    )
    axis = {"axis": net.pick((at, at - len(v.shape)))} if each else {}
    integers = net.graph.node("QuantizeLinear", [generic(net, v), scale], net.fresh("integers"), **axis)
    joined(net, v, net.graph.node("DequantizeLinear", [integers, scale], net.fresh("real"), **axis))


def _gene(gene: str) -> Callable[[Net, str], None]:
    """Operators that the network has a method for."""
    return lambda net, name: getattr(net, gene)()


RECIPES: dict[str, Callable[[Net, str], None]] = {
    **{
        name: _reduce
        for name in TABLE
        if name.startswith("Reduce")
    },
    **dict.fromkeys(("ArgMax", "ArgMin"), _positions),
    **dict.fromkeys(("CumSum", "CumProd"), _along),
    "TopK": _top,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"), _normalised),
    "RMSNormalization": _rms, "Tile": _tile, "GatherND": _gather_nd, "SpaceToDepth": _space_to_depth,
    "ConstantOfShape": _filled, "Range": _range, "EyeLike": _eye, "OneHot": _one_hot, "NonZero": _non_zero,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantised),
    "Trilu": _triangle, "Clip": _clip, "CastLike": _cast_like, "Dropout": _dropout,
    "Conv": _gene("conv"), "ConvTranspose": _gene("conv_transpose"), "Gemm": _gene("gemm"),
    "MatMul": _gene("linear"), "Einsum": _gene("einsum"), "BatchNormalization": _gene("batch_norm"),
    "LayerNormalization": _gene("layer_norm"), "InstanceNormalization": _gene("instance_norm"),
    "GroupNormalization": _gene("group_norm"), "PRelu": _gene("prelu"), "Where": _gene("where"),
    "Transpose": _gene("transposed_twice"), "Squeeze": _gene("squeezed"), "Unsqueeze": _gene("squeezed"),
    "Reshape": _gene("shuffle"), "Flatten": _gene("flatten"), "Expand": _gene("expanded"),
    "Concat": _gene("concat"), "Split": _gene("split"), "Slice": _gene("cut"), "Gather": _gene("gather"),
    "DepthToSpace": _depth_to_space, "Pad": _gene("pad"), "Resize": _gene("resize"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _gene("recurrent")), **onnx_recipes.RECIPES,
}  # fmt: skip

#: entries for integers, for caches that grow, and what nothing here can run: tests/test_onnx_operators.py and
#: its neighbours hold them
APART = frozenset(
    {
        "CausalConvWithState", "ConvInteger", "DeformConv", "DynamicQuantizeLinear", "MatMulInteger",
        "MaxRoiPool", "QLinearConv", "QLinearMatMul", "TensorScatter",
    }
)  # fmt: skip

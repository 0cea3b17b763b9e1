"""Random ONNX graphs over the whole table of operators, with random choices of what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

from sparsecc.axes.registry import RULES
from sparsecc.lowering import lower
from sparsecc.onnxfile.ops import TABLE
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.reference.onnx_run import Runner
from tests.kept_alone import onnx_errors
from tests.onnx_calls import APART, call, newest
from tests.onnx_graphs import Graph, check_value_info, difference, error, explained, masked64, ort, run64

EXACT = 1e-12
FUSED = "com.microsoft"


@dataclass(frozen=True)
class Value:
    """A value under construction: its name and sizes, with 2 for the dynamic batch."""

    name: str
    shape: tuple[int, ...]


class Net:
    """A graph that grows by one operator for every gene; a gene's number decides everything about it."""

    def __init__(self, opset: int, seed: int, dynamic: bool) -> None:
        self.graph = Graph(opset, seed)
        self.dynamic = dynamic
        batch = "batch" if dynamic else 2
        self.values = [Value(self.graph.input("x", [batch, 3, 4, 4]), (2, 3, 4, 4))]
        self.count = 0
        self.number = 0

    # -- choices ----------------------------------------------------------------------------------

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options, by the next digits of the gene."""
        self.number, rest = divmod(self.number, len(options))
        return options[rest]

    def value(self, rank: int = 4, least: int = 1) -> Value | None:
        """A value with that many axes and channels, late ones first."""
        found = [
            v for v in reversed(self.values[-6:]) if len(v.shape) == rank and v.shape[_channel(rank)] >= least
        ]
        return self.pick(found) if found else None

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def put(self, kind: str, inputs: Sequence[str], shape: tuple[int, ...], **attributes: Any) -> Value:
        """A node with one output that later ones may read."""
        name = self.fresh(kind.lower())
        self.graph.node(kind, inputs, name, **attributes)
        self.values.append(Value(name, shape))
        return self.values[-1]

    def ints(self, *values: int) -> str:
        return self.graph.ints(self.fresh("ints"), list(values))

    def weight(self, *shape: int) -> str:
        return self.graph.weight(self.fresh("weight"), *shape)

    def vector(self, size: int) -> str:
        return self.graph.vector(self.fresh("vector"), size)

    def scalar(self, value: float) -> str:
        return self.graph.tensor(self.fresh("number"), value)

    def channel(self, rank: int) -> int:
        return _channel(rank)

    # -- any shape ----------------------------------------------------------------------------------

    def unary(self) -> None:
        v = self.pick(self.values[-4:])
        kinds = ("Relu", "Sigmoid", "Tanh", "Neg", "LeakyRelu", "Sin", "Softplus", "Identity", "Abs", "Elu")
        self.put(self.pick(kinds), [v.name], v.shape)

    def binary(self) -> None:
        v = self.pick(self.values[-4:])
        other = self.pick([u for u in self.values if u.shape == v.shape])
        self.put(self.pick(("Add", "Mul", "Sub", "Max")), [v.name, other.name], v.shape)

    def where(self) -> None:
        v = self.pick(self.values[-4:])
        other = self.pick([u for u in self.values if u.shape == v.shape])
        zero = self.graph.tensor(self.fresh("zero"), 0.0)
        test = self.graph.node("Greater", [v.name, zero], self.fresh("greater"))
        self.put("Where", [test, v.name, other.name], v.shape)

    def constant(self) -> None:
        """Times a vector along the channels, which is spelled with or without axes of size 1."""
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        shape = [v.shape[d] if d == at else 1 for d in range(at, len(v.shape))]
        w = self.graph.tensor(self.fresh("scale"), self.graph.random.uniform(0.5, 1.5, shape))
        self.put(self.pick(("Mul", "Add")), [v.name, w], v.shape)

    def softmax(self) -> None:
        v = self.pick(self.values[-4:])
        self.put(self.pick(("Softmax", "LogSoftmax")), [v.name], v.shape, axis=_channel(len(v.shape)))

    def reduce(self) -> None:
        """A statistic over channels, which gates the value that it was made of."""
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        kind = self.pick(("ReduceMean", "ReduceMax", "ReduceL2", "ReduceSum"))
        if self.graph.opset < (13 if kind == "ReduceSum" else 18):
            found = self.graph.node(kind, [v.name], self.fresh("stat"), axes=[at], keepdims=1)
        else:
            found = self.graph.node(kind, [v.name, self.ints(at)], self.fresh("stat"), keepdims=1)
        gate = self.graph.node("Sigmoid", [found], self.fresh("gate"))
        self.put("Mul", [v.name, gate], v.shape)

    def concat(self) -> None:
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        fits = [
            u
            for u in self.values
            if len(u.shape) == len(v.shape) and _rest(u.shape, at) == _rest(v.shape, at)
        ]
        others = [self.pick(fits) for _ in range(self.pick((1, 2)))]
        total = v.shape[at] + sum(u.shape[at] for u in others)
        if total <= 24:
            self.put(
                "Concat",
                [v.name, *(u.name for u in others)],
                _with(v.shape, at, total),
                axis=at - len(v.shape),
            )

    def split(self) -> None:
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        size = v.shape[at]
        if size < 2:
            return
        first = size // 2 if self.pick((True, False)) and size % 2 == 0 else self.pick(range(1, size))
        names = [self.fresh("part"), self.fresh("part")]
        even = first * 2 == size
        if even and self.graph.opset >= 18 and self.pick((True, False)):
            self.graph.node("Split", [v.name], names, axis=at, num_outputs=2)
        elif even and self.graph.opset < 18 and self.pick((True, False)):
            self.graph.node("Split", [v.name], names, axis=at)
        elif self.graph.opset < 13:
            self.graph.node("Split", [v.name], names, axis=at, split=[first, size - first])
        else:
            self.graph.node("Split", [v.name, self.ints(first, size - first)], names, axis=at)
        self.values += [
            Value(n, _with(v.shape, at, s)) for n, s in zip(names, (first, size - first), strict=True)
        ]

    def cut(self) -> None:
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        size = v.shape[at]
        start = self.pick(range(size))
        stop = self.pick(range(start + 1, size + 1))
        step = self.pick((1, 1, 2))
        left = start - size if self.pick((True, False)) else start
        right = (2**31 if stop == size else stop - size) if self.pick((True, False)) else stop
        inputs = [v.name, self.ints(left), self.ints(right), self.ints(at), self.ints(step)]
        self.put("Slice", inputs, _with(v.shape, at, len(range(start, stop, step))))

    def turned_around(self) -> None:
        """All of an axis in reverse, with bounds as exporters write them."""
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        size = v.shape[at]
        first, last = self.pick((-1, size - 1, 2**31)), self.pick((-size - 1, -(2**31) + 1))
        inputs = [v.name, self.ints(first), self.ints(last), self.ints(at), self.ints(-1)]
        self.put("Slice", inputs, v.shape)

    def pad(self) -> None:
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        pads = np.zeros((2, len(v.shape)), int)
        pads[0, at], pads[1, at] = self.pick((0, 1, 2)), self.pick((0, 1))
        shape = _with(v.shape, at, v.shape[at] + int(pads.sum()))
        if len(v.shape) == 4 and self.pick((True, False)):
            pads[:, 3] = 1
            shape = _with(shape, 3, shape[3] + 2)
        if shape[at] <= 24 and max(shape) <= 24:
            value = self.graph.tensor(self.fresh("fill"), 0.5)
            self.put("Pad", [v.name, self.ints(*pads.reshape(-1).tolist()), value], shape)

    def transposed_twice(self) -> None:
        """There and back, with something along the way."""
        v = self.pick([u for u in self.values[-6:] if len(u.shape) > 2] or self.values[:1])
        rank = len(v.shape)
        order = [0, *range(2, rank), 1]
        back = [order.index(d) for d in range(rank)]
        there = self.put("Transpose", [v.name], tuple(v.shape[d] for d in order), perm=order)
        self.values.pop()
        act = self.graph.node("Relu", [there.name], self.fresh("act"))
        self.put("Transpose", [act], v.shape, perm=back)

    def squeezed(self) -> None:
        """An axis of size 1 comes and goes."""
        v = self.pick(self.values[-4:])
        at = self.pick(range(len(v.shape)))
        if self.graph.opset < 13:
            up = self.graph.node("Unsqueeze", [v.name], self.fresh("up"), axes=[at])
            self.put("Squeeze", [up], v.shape, axes=[at])
        else:
            up = self.graph.node("Unsqueeze", [v.name, self.ints(at)], self.fresh("up"))
            self.put("Squeeze", [up, self.ints(at)], v.shape)

    def squeezed_by_a_branch(self) -> None:
        """An axis of size 1 goes where it is one, as exporters write it that do not know its size."""
        v = self.pick(self.values[-4:])
        at = self.pick(range(1, len(v.shape) + 1))
        axes = {} if self.graph.opset >= 13 else {"axes": [at]}
        place = [] if axes else [self.ints(at)]
        up = self.graph.node("Unsqueeze", [v.name, *place], self.fresh("up"), **axes)
        shape = self.graph.node("Shape", [up], self.fresh("shape"))
        size = self.graph.node("Gather", [shape, self.ints(at)], self.fresh("size"))
        bodies = {}
        for side, kind in (("then", "Squeeze"), ("else", "Identity")):
            out, inside = self.fresh(side), self.fresh("axes")
            constant = helper.make_node("Constant", [], [inside], value_ints=[at])
            rest = [inside] if place and kind == "Squeeze" else []
            node = helper.make_node(kind, [up, *rest], [out], **(axes if kind == "Squeeze" else {}))
            result = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
            bodies[f"{side}_branch"] = helper.make_graph([constant] * len(rest) + [node], side, [], [result])
        test = self.graph.node("Equal", [size, self.ints(1)], self.fresh("test"))
        self.declared(self.put("If", [test], v.shape, **bodies))

    def divided_by_size(self) -> None:
        """A scale that is computed from a size must stay what it was."""
        v = self.pick(self.values[-4:])
        shape = self.graph.node("Shape", [v.name], self.fresh("shape"))
        places = [_channel(len(v.shape)), self.pick(range(len(v.shape)))]
        sizes = [
            self.graph.node("Gather", [shape, self.graph.ints(self.fresh("at"), p)], self.fresh("size"))
            for p in places
        ]
        area = self.graph.node("Mul", sizes, self.fresh("area"))
        number = self.graph.node("Cast", [area], self.fresh("number"), to=TensorProto.FLOAT)
        self.put("Div", [v.name, self.graph.node("Sqrt", [number], self.fresh("root"))], v.shape)

    def expanded(self) -> None:
        """A learned vector, expanded to the shape of a value."""
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        sizes = [v.shape[d] if d == at else 1 for d in range(len(v.shape))]
        w = self.graph.tensor(self.fresh("token"), self.graph.random.uniform(-1, 1, sizes))
        shape = self.graph.node("Shape", [v.name], self.fresh("shape"))
        self.put("Expand", [w, shape], v.shape)

    # -- images -------------------------------------------------------------------------------------

    def conv(self) -> None:
        v = self.value()
        if v is None:
            return
        channels = v.shape[1]
        groups = self.pick([g for g in (1, 1, 2, 3, 4, channels) if channels % g == 0])
        out = groups * self.pick(range(1, max(2, 12 // groups)))
        kernel = self.pick((1, 3))
        bias = [self.vector(out)] if self.pick((True, True, False)) else []
        inputs = [v.name, self.weight(out, channels // groups, kernel, kernel), *bias]
        self.put("Conv", inputs, _with(v.shape, 1, out), group=groups, pads=[kernel // 2] * 4)

    def conv_transpose(self) -> None:
        v = self.value()
        if v is None or v.shape[2] * v.shape[3] > 100:
            return
        channels = v.shape[1]
        groups = self.pick([g for g in (1, 1, 2, channels) if channels % g == 0])
        out = self.pick(range(1, max(2, 10 // groups)))
        shape = (v.shape[0], out * groups, v.shape[2] * 2, v.shape[3] * 2)
        inputs = [v.name, self.weight(channels, out, 2, 2), self.vector(out * groups)]
        self.put("ConvTranspose", inputs, shape, group=groups, strides=[2, 2])

    def batch_norm(self) -> None:
        v = self.value()
        if v is not None:
            self.put("BatchNormalization", [v.name, *(self.vector(v.shape[1]) for _ in range(4))], v.shape)

    def instance_norm(self) -> None:
        v = self.value()
        if v is not None:
            names = [self.vector(v.shape[1]), self.vector(v.shape[1])]
            self.put("InstanceNormalization", [v.name, *names], v.shape, epsilon=1e-2)

    def group_norm(self) -> None:
        v = self.value()
        if v is None or self.graph.opset < 21:
            return
        groups = self.pick([g for g in (1, 2, 3, 4) if v.shape[1] % g == 0])
        names = [self.vector(v.shape[1]), self.vector(v.shape[1])]
        found = self.put("GroupNormalization", [v.name, *names], v.shape, num_groups=groups, epsilon=1e-2)
        info = helper.make_tensor_value_info(
            found.name, TensorProto.FLOAT, ["batch" if self.dynamic else 2, *v.shape[1:]]
        )
        self.graph.value_info.append(info)

    def prelu(self) -> None:
        v = self.value()
        if v is not None:
            slope = self.graph.tensor(
                self.fresh("slope"), self.graph.random.uniform(0, 1, (v.shape[1], 1, 1))
            )
            self.put("PRelu", [v.name, slope], v.shape)

    def pool(self) -> None:
        v = self.value()
        if v is not None and min(v.shape[2:]) >= 2:
            shape = (*v.shape[:2], v.shape[2] // 2, v.shape[3] // 2)
            self.put(
                self.pick(("MaxPool", "AveragePool")), [v.name], shape, kernel_shape=[2, 2], strides=[2, 2]
            )

    def resize(self) -> None:
        v = self.value()
        if v is None or v.shape[2] * v.shape[3] > 40:
            return
        shape = (*v.shape[:2], v.shape[2] * 2, v.shape[3] * 2)
        none = "" if self.graph.opset >= 13 else self.graph.tensor(self.fresh("none"), [])
        if self.pick((True, False)):
            scales = self.graph.tensor(self.fresh("scales"), [1, 1, 2, 2], np.float32)
            self.put("Resize", [v.name, none, scales], shape, mode="nearest")
        else:
            start = self.ints(0), self.ints(1)
            sizes = self.graph.node(
                "Slice", [self.graph.node("Shape", [v.name], self.fresh("shape")), *start], self.fresh("b")
            )
            full = self.graph.node("Concat", [sizes, self.ints(*shape[1:])], self.fresh("sizes"), axis=0)
            self.put("Resize", [v.name, none, none, full], shape, mode="linear")

    def squeeze_excite(self) -> None:
        v = self.value()
        if v is None:
            return
        pooled = self.graph.node("GlobalAveragePool", [v.name], self.fresh("pooled"))
        gate = self.graph.conv(pooled, self.fresh("gate"), v.shape[1], v.shape[1], 1)
        self.put("Mul", [v.name, self.graph.node("Sigmoid", [gate], self.fresh("sigmoid"))], v.shape)

    def shuffle(self) -> None:
        v = self.value(least=2)
        if v is None:
            return
        groups = self.pick([g for g in (2, 3, v.shape[1]) if v.shape[1] % g == 0])
        shape = self.ints(0, groups, v.shape[1] // groups, *v.shape[2:])
        wide = self.graph.node("Reshape", [v.name, shape], self.fresh("wide"))
        turned = self.graph.node("Transpose", [wide], self.fresh("turned"), perm=[0, 2, 1, 3, 4])
        self.put("Reshape", [turned, self.ints(0, v.shape[1], *v.shape[2:])], v.shape)

    def depth_to_space(self) -> None:
        v = self.value()
        if v is not None and v.shape[1] % 4 == 0 and max(v.shape[2:]) <= 6:
            shape = (v.shape[0], v.shape[1] // 4, v.shape[2] * 2, v.shape[3] * 2)
            self.put("DepthToSpace", [v.name], shape, blocksize=2, mode=self.pick(("DCR", "CRD")))

    def to_sequence(self) -> None:
        v = self.value()
        if v is None or v.shape[2] * v.shape[3] > 40:
            return
        length = v.shape[2] * v.shape[3]
        flat = self.graph.node(
            "Reshape",
            [v.name, self.ints(*self.pick(((0, 0, -1), (0, v.shape[1], length))))],
            self.fresh("flat"),
        )
        if self.pick((True, True, True, False)):
            self.put("Transpose", [flat], (v.shape[0], length, v.shape[1]), perm=[0, 2, 1])
        else:  # the channels are the steps
            self.values.append(Value(flat, (v.shape[0], v.shape[1], length)))

    def flatten(self) -> None:
        v = self.value()
        if v is not None and int(np.prod(v.shape[1:])) <= 80:
            self.put("Flatten", [v.name], (v.shape[0], int(np.prod(v.shape[1:]))), axis=1)

    # -- sequences ----------------------------------------------------------------------------------

    def linear(self) -> None:
        v = self.value(self.pick((3, 3, 2)))
        if v is None:
            return
        out = self.pick(range(2, 10))
        product = self.graph.node("MatMul", [v.name, self.weight(v.shape[-1], out)], self.fresh("product"))
        self.put("Add", [product, self.vector(out)], (*v.shape[:-1], out))

    def gemm(self) -> None:
        v = self.value(2)
        if v is None:
            return
        out, turned = self.pick(range(2, 10)), self.pick((0, 1))
        w = self.weight(out, v.shape[1]) if turned else self.weight(v.shape[1], out)
        self.put("Gemm", [v.name, w, self.vector(out)], (v.shape[0], out), transB=turned, alpha=0.5, beta=2.0)

    def einsum(self) -> None:
        v = self.value(3)
        if v is not None and self.graph.opset >= 12:
            out = self.pick(range(2, 10))
            self.put(
                "Einsum", [v.name, self.weight(v.shape[2], out)], (*v.shape[:2], out), equation="btc,cd->btd"
            )

    def layer_norm(self) -> None:
        v = self.value(self.pick((3, 3, 2)), least=2)
        if v is not None and self.graph.opset >= 17:
            names = [self.vector(v.shape[-1]), self.vector(v.shape[-1])]
            self.put("LayerNormalization", [v.name, *names], v.shape, axis=-1, epsilon=1e-2)

    def attention(self) -> None:
        v = self.value(3)
        if v is None or v.shape[1] > 16:
            return
        heads, width, (batch, length, channels) = self.pick((1, 2, 3)), self.pick((1, 2, 3)), v.shape
        shape = self.graph.node("Shape", [v.name], self.fresh("shape"))
        first = self.graph.node("Slice", [shape, self.ints(0), self.ints(2)], self.fresh("first"))
        rest = self.ints(heads, self.pick((width, -1)))
        split = self.graph.node("Concat", [first, rest], self.fresh("heads"), axis=0)
        turned = []
        for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            full = self.graph.node(
                "MatMul", [v.name, self.weight(channels, heads * width)], self.fresh("product")
            )
            four = self.graph.node("Reshape", [full, split], self.fresh("four"))
            turned.append(self.graph.node("Transpose", [four], self.fresh("turned"), perm=order))
        scores = self.graph.node("MatMul", turned[:2], self.fresh("scores"))
        soft = self.graph.node("Softmax", [scores], self.fresh("soft"), axis=3)
        mixed = self.graph.node("MatMul", [soft, turned[2]], self.fresh("mixed"))
        back = self.graph.node("Transpose", [mixed], self.fresh("back"), perm=[0, 2, 1, 3])
        self.put(
            "Reshape",
            [back, self.ints(0, length, self.pick((heads * width, -1)))],
            (batch, length, heads * width),
        )

    def recurrent(self) -> None:
        v = self.value(3)
        if v is None or v.shape[1] > 16:
            return
        kind, hidden, both = self.pick(("LSTM", "GRU", "RNN")), self.pick(range(2, 6)), self.pick((1, 1, 2))
        rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * hidden
        time_first = self.graph.node("Transpose", [v.name], self.fresh("time"), perm=[1, 0, 2])
        weights = [self.weight(both, rows, v.shape[2]), self.weight(both, rows, hidden)]
        if self.pick((True, False)):
            weights.append(self.weight(both, 2 * rows))
        attributes = {"linear_before_reset": 1} if kind == "GRU" and self.pick((True, False)) else {}
        direction = "bidirectional" if both == 2 else "forward"
        y = self.graph.node(
            kind,
            [time_first, *weights],
            self.fresh("y"),
            hidden_size=hidden,
            direction=direction,
            **attributes,
        )
        turned = self.graph.node("Transpose", [y], self.fresh("turned"), perm=[2, 0, 1, 3])
        self.put("Reshape", [turned, self.ints(0, 0, -1)], (*v.shape[:2], both * hidden))

    def gather(self) -> None:
        """One step of a sequence, or several."""
        v = self.value(3)
        if v is None:
            return
        if self.pick((True, False)):
            at = self.graph.ints(self.fresh("at"), self.pick((0, -1)))
            self.put("Gather", [v.name, at], (v.shape[0], v.shape[2]), axis=1)
        else:
            self.put("Gather", [v.name, self.ints(0, v.shape[1] - 1)], (v.shape[0], 2, v.shape[2]), axis=1)

    def channels(self) -> None:
        """Channels by a list."""
        v = self.pick(self.values[-4:])
        at = _channel(len(v.shape))
        order = self.graph.random.integers(-v.shape[at], v.shape[at], self.pick(range(1, 9)))
        self.put("Gather", [v.name, self.ints(*order.tolist())], _with(v.shape, at, len(order)), axis=at)

    # -- single entries, quantised and fused operators ------------------------------------------------

    def declared(self, found: Value) -> Value:
        """With its shape written down: onnx knows none of a fused operator."""
        shape = ["batch" if self.dynamic else 2, *found.shape[1:]]
        self.graph.value_info.append(helper.make_tensor_value_info(found.name, TensorProto.FLOAT, shape))
        return found

    def fused(self, kind: str, inputs: Sequence[str], shape: tuple[int, ...], **attributes: Any) -> Value:
        return self.declared(self.put(kind, inputs, shape, domain=FUSED, **attributes))

    def places(self) -> None:
        """Entries looked up, or written, along the sequence."""
        v = self.value(3)
        if v is None or self.dynamic or v.shape[1] > 16:
            return
        order = np.argsort(self.graph.random.random(v.shape), axis=1)[:, : self.pick((1, 2, 3))]
        index = self.graph.ints(self.fresh("index"), order)
        found = self.put("GatherElements", [v.name, index], order.shape, axis=1)
        if self.pick((True, False)):
            self.put("ScatterElements", [v.name, index, found.name], v.shape, axis=1)

    def quantised_weights(self) -> None:
        """A product with integers, scaled as a whole, by column or by block."""
        v = self.value(3)
        if v is None or self.graph.opset < 13:
            return
        rows, out, way = v.shape[-1], self.pick(range(2, 10)), self.pick(("whole", "column", "block"))
        random, name = self.graph.random, self.fresh("q")
        shape: tuple[int, ...] = {"whole": (), "column": (out,), "block": (rows // 2, out)}[way]
        attributes = {"axis": 1} if way == "column" else {}
        if way == "block":
            if self.graph.opset < 21 or rows % 2:
                return
            attributes = {"axis": 0, "block_size": 2}
        operands = [
            self.graph.tensor(f"{name}.w", random.integers(-100, 100, (rows, out)), np.int8),
            self.graph.tensor(f"{name}.scale", random.uniform(0.005, 0.02, shape)),
            self.graph.tensor(f"{name}.zero", random.integers(-9, 9, shape), np.int8),
        ]
        w = self.graph.node("DequantizeLinear", operands, f"{name}.real", **attributes)
        self.put("MatMul", [v.name, w], (*v.shape[:-1], out))

    def packed_attention(self) -> None:
        v = self.value(3)
        if v is None or v.shape[1] > 16:
            return
        kv, shared, width = self.pick((1, 2, 3)), self.pick((1, 2)), 2 * self.pick((1, 2))
        heads, (batch, length, channels) = kv * shared, v.shape
        sizes = (heads * width, kv * width, kv * width)
        q, k, w = (
            self.put("MatMul", [v.name, self.weight(channels, n)], (batch, length, n)).name for n in sizes
        )
        shape = (batch, length, heads * width)
        if self.graph.opset >= 23:
            causal = {"is_causal": self.pick((0, 1))}
            self.put("Attention", [q, k, w], shape, q_num_heads=heads, kv_num_heads=kv, **causal)
        elif shared == 1:
            bias = [self.graph.tensor(self.fresh("bias"), self.graph.random.uniform(-1, 1, sum(sizes)))]
            self.fused("MultiHeadAttention", [q, k, w, *bias], shape, num_heads=heads)

    def rotated(self) -> None:
        v = self.value(3)
        if v is None or self.graph.opset < 23 or self.dynamic or v.shape[2] % 2:
            return
        heads = self.pick([n for n in (1, 2, 3) if v.shape[2] % (2 * n) == 0])
        shape = (*v.shape[:2], v.shape[2] // heads // 2)
        tables = [
            self.graph.tensor(self.fresh("table"), self.graph.random.uniform(-1, 1, shape)) for _ in (0, 1)
        ]
        attributes = {"num_heads": heads, "interleaved": self.pick((0, 1))}
        self.put("RotaryEmbedding", [v.name, *tables], v.shape, **attributes)

    def fused_product(self) -> None:
        v = self.value(3)
        if v is not None:
            out = self.pick(range(2, 10))
            inputs = [v.name, self.weight(out, v.shape[2])]
            found = self.fused("FusedMatMul", inputs, (*v.shape[:2], out), transB=1, alpha=0.5)
            self.fused("BiasGelu", [found.name, self.vector(out)], found.shape)

    def fused_sum(self) -> None:
        v = self.value(3, least=2)
        if v is not None:
            other = self.pick([u for u in self.values if u.shape == v.shape])
            norm = [self.vector(v.shape[2]), self.vector(v.shape[2])]
            self.fused("SkipLayerNormalization", [v.name, other.name, *norm], v.shape, epsilon=1e-2)

    def fused_convolution(self) -> None:
        v = self.value()
        if v is not None:
            out = self.pick(range(1, 10))
            inputs = [v.name, self.weight(out, v.shape[1], 3, 3), self.vector(out)]
            shape = _with(v.shape, 1, out)
            self.fused("FusedConv", inputs, shape, pads=[1] * 4, kernel_shape=[3, 3], activation="Relu")

    def neighbours(self) -> None:
        """What mixes channels, or keeps them and mixes the rest."""
        v = self.value()
        if v is None or self.graph.opset < 13:
            return
        if self.pick((True, False)):
            self.put("LRN", [v.name], v.shape, size=3)
        else:
            axes = self.pick(([2, 3], [1, 2, 3]))
            self.put("MeanVarianceNormalization", [v.name], v.shape, axes=axes)

    # -- the end ------------------------------------------------------------------------------------

    def model(self) -> ModelProto:
        """The model: the last values through layers of their own, so that their channels may go."""
        outputs = []
        for v in {v.shape: v for v in self.values[-3:]}.values():
            name = self.fresh("output")
            channels = v.shape[_channel(len(v.shape))]
            if len(v.shape) == 4:
                outputs.append(self.graph.conv(v.name, name, channels, 2, 1))
            else:
                outputs.append(self.graph.linear(v.name, name, channels, 3))
        return self.graph.build(*outputs, opsets=[helper.make_opsetid(FUSED, 1)])


def _channel(rank: int) -> int:
    """Where the channels of a value are."""
    return 1 if rank == 4 else rank - 1


def _with(shape: tuple[int, ...], at: int, size: int) -> tuple[int, ...]:
    return (*shape[:at], size, *shape[at + 1 :])


def _rest(shape: tuple[int, ...], at: int) -> tuple[int, ...]:
    return (*shape[:at], *shape[at + 1 :])


_METHODS: tuple[Callable[[Net], None], ...] = (
    Net.conv, Net.linear, Net.unary, Net.binary, Net.where, Net.constant, Net.softmax, Net.reduce,
    Net.concat, Net.split, Net.cut, Net.pad, Net.transposed_twice, Net.squeezed, Net.squeezed_by_a_branch,
    Net.divided_by_size, Net.expanded, Net.conv_transpose, Net.batch_norm, Net.instance_norm,
    Net.group_norm, Net.prelu, Net.pool, Net.resize, Net.squeeze_excite, Net.shuffle,
    Net.depth_to_space, Net.to_sequence, Net.flatten, Net.gemm, Net.einsum, Net.layer_norm,
    Net.attention, Net.recurrent, Net.gather, Net.channels, Net.turned_around,
    Net.places, Net.quantised_weights, Net.packed_attention,
    Net.rotated, Net.fused_product, Net.fused_sum, Net.fused_convolution, Net.neighbours,
)  # fmt: skip
GENES = {method.__name__: method for method in _METHODS}

GENES |= {f"call {name}": partial(call, name=name) for name in TABLE if name not in APART}

#: what makes channels comes more often
COMMON = ("conv", "conv", "linear", "linear", "gemm", "attention", "recurrent")

gene = st.tuples(st.sampled_from([*GENES, *COMMON]), st.integers(0, 2**20 - 1))


def grown(genes: Sequence[tuple[str, int]], opset: int, seed: int, dynamic: bool) -> ModelProto:
    """The model of some genes; a convolution and a sequence come first, so that every gene finds one."""
    net = Net(opset, seed, dynamic)
    for name, number in (("conv", 5 * 6 + seed % 7), ("to_sequence", 0), ("linear", seed % 97), *genes):
        net.number = number
        GENES[name](net)
    return net.model()


NIGHTLY = settings().max_examples > 500


@settings(max_examples=settings().max_examples if NIGHTLY else 40)
@given(
    st.lists(gene, min_size=1, max_size=27 if NIGHTLY else 12),
    st.sampled_from((11, 13, 17, 20, 21, 23)),
    st.integers(0, 999),
    st.booleans(),
)
@example([("expanded", 0), ("conv", 0)], 11, 0, True)  # one number is left of a table, and is no size
def test_random_graphs_equal_their_masked_semantics(
    genes: list[tuple[str, int]], opset: int, seed: int, dynamic: bool
) -> None:
    model = grown(genes, opset, seed, dynamic)
    checked(model, seed, runtime=_runs(model))


def _runs(model: ModelProto) -> bool:
    """Whether the runtime that is installed has all operators: some are newer, some were never written."""
    try:
        ort(model, OnnxSubject(model).inputs(0, 0)[0])
    except (Missing, Fail, InvalidGraph):
        return False
    return True


def checked(model: ModelProto, seed: int, runtime: bool = True) -> OnnxSubject:
    """A model after a random plan was checked on it."""
    subject = OnnxSubject(model)
    random = np.random.default_rng(seed)
    kept = {}
    for group in subject.analysis.groups:
        mask = random.random(group.size) < random.choice((0.3, 0.6, 0.9))
        mask[random.integers(group.size)] = True
        kept[group.name] = mask
    kept = subject.analysis.feasible(kept)
    gaps = [f for f in subject.analysis.frozen if f.reason.kind in ("unknown operator", "rule failed")]
    assert [f for f in gaps if "not known before it runs" not in str(f)] == []
    plan = lower(subject.analysis, kept)
    applied = subject.apply(plan, kept)
    assert applied.file is not None
    assert subject.file.check(full=True) is None
    assert applied.file.check(full=True) is None
    for variant in (0, 1):
        feeds, _ = subject.inputs(seed, variant)
        reference = masked64(subject, plan, kept, feeds, garbage=True)
        assert error(run64(applied.file, feeds, applied.sizes), reference) <= EXACT
    wrong = {name: e for name, e in onnx_errors(subject, plan, kept, feeds).items() if not e <= EXACT}
    assert wrong == {}
    single = Runner(applied.file, cache=False).run(feeds)
    rounding = error([single[v.name] for v in applied.file.proto.graph.output], reference)
    if runtime:
        assert error(ort(applied.file.proto, feeds), reference) <= 100 * max(rounding, 1e-6)
        check_value_info(applied.file.proto, feeds)
    found = difference(model, applied.file.proto)
    nodes, tensors = explained(plan, subject.file)
    assert found.tensors <= tensors
    unnamed = {n for n in found.nodes - nodes if not _reads_made_numbers(applied.file.proto, n)}
    assert {
        n for n in unnamed if _without_shapes(model, n) != _without_shapes(applied.file.proto, n)
    } == set()
    assert all(c.passed for c in subject.node_checks(applied, kept, feeds))
    return subject


def _without_shapes(model: ModelProto, output: str) -> bytes:
    """A node with branches that say no shapes: those follow what is passed on."""
    node = NodeProto()
    node.CopyFrom(next(n for n in model.graph.node if output in n.output))
    for info in (v for a in node.attribute for v in a.g.output):
        info.type.tensor_type.ClearField("shape")
    return node.SerializeToString(deterministic=True)


def _reads_made_numbers(model: ModelProto, output: str) -> bool:
    """Whether a node reads a number that was put in to pin what depends on sizes."""
    node = next(n for n in model.graph.node if output in n.output)
    return any("_pruned" in name for name in node.input)


def test_every_gene_grows() -> None:
    """A gene that never applies would test nothing (some need a net that has grown a little)."""
    for name in GENES:
        if name.startswith("call "):
            continue
        nets = [(n, genes) for n in range(100) for genes in ([], [("conv", n * 31)], [("flatten", n)])]
        assert any(
            grown([*genes, (name, n * 7919)], 23, n, n % 2 == 0) != grown(genes, 23, n, n % 2 == 0)
            for n, genes in nets
        ), name


# -- every entry of the table ------------------------------------------------------------------------

OPSETS = (21, 20, 17, 13, 11, 22, 23, 24, 25, 26, 27)
CURRENT = {name: opset for name in TABLE if (opset := newest(name, OPSETS)) is not None and name not in APART}


def _holding(name: str, number: int, opset: int) -> ModelProto | None:
    """A small network that holds a node of the operator, if these numbers make one."""
    before: list[tuple[str, int]] = [("conv", number * 31), ("flatten", number)][: number % 3]
    model = grown([*before, (f"call {name}", number * 7919)], opset, number, number % 2 == 0)
    return model if any(node.op_type == name for node in model.graph.node) else None


@pytest.mark.parametrize("name", CURRENT)
def test_every_entry_of_the_table_computes_masked_semantics(name: str) -> None:
    wanted, found = (20 if NIGHTLY else 1), 0
    for number in range(200):
        model = _holding(name, number, CURRENT[name])
        if model is None:
            continue
        checked(model, number, runtime=_runs(model))
        found += 1
        if found == wanted:
            return
    assert found, f"no random graph holds {name}: add a recipe to tests/onnx_calls.py"


def test_every_entry_of_the_table_has_a_schema() -> None:
    """An entry for an operator that no accepted model can hold is dead."""
    assert sorted(set(TABLE) - set(CURRENT) - APART) == [
        "Scatter",
        "SimplifiedLayerNormalization",
        "SwiGLU",
        "Upsample",
    ]


#: rules that no random network holds (APART of both dialects); most have tests of single operators
ALONE = """
    deform_conv depthwise_causal dynamic_quantize dynamic_quantize_matmul embed_layer_norm
    fused_conv fused_gemm fused_matmul group_query_attention grouped_matmul index_many matmul_nbits
    measured multi_head_attention opaque per_channel qconcat qconv qmatmul qmixed qsoftmax
    quantisation_range self_attention skip_layer_norm split_gate tensor_scatter
"""


def test_every_rule_is_fuzzed_in_some_dialect() -> None:
    from tests.test_property_torch import fuzzed_rules

    ours: set[str] = set()
    for name, opset in CURRENT.items():
        models = (_holding(name, number, opset) for number in range(40))
        for model in islice((m for m in models if m is not None), 2 if NIGHTLY else 1):
            ours |= {c.op for c in OnnxSubject(model).view.calls}
    missing = sorted(set(RULES) - ours - fuzzed_rules() - set(ALONE.split()))
    assert missing == [], f"no random network in either dialect holds the rules {', '.join(missing)}"

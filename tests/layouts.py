"""Layers of every layout with small integers as weights, and their weights as the product sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsecc.axes.analysis import Analysis
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.plan import Mask, Plan

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layout:
    """How ``rows`` by ``channels`` (by kernel places) are stored; ``seen`` gives [rows, places, channels]."""

    operator: str
    shape: Callable[[int, int], tuple[int, ...]]
    seen: Callable[[Array], Array]
    attributes: dict[str, Any]


LAYOUTS: dict[str, Layout] = {
    "matmul": Layout("MatMul", lambda r, c: (c, r), lambda w: w.T[:, None, :], {}),
    "gemm": Layout("Gemm", lambda r, c: (c, r), lambda w: w.T[:, None, :], {}),
    "gemm transposed": Layout("Gemm", lambda r, c: (r, c), lambda w: w[:, None, :], {"transB": 1}),
    "conv": Layout(
        "Conv",
        lambda r, c: (r, c, 3, 2),
        lambda w: w.transpose(0, 2, 3, 1).reshape(w.shape[0], -1, w.shape[1]),
        {},
    ),
}


def weight(shape: Sequence[int], seed: int, most: int = 3) -> Array:
    """Integers between -most and most: many ties and zeros."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def model(layout: Layout, *weights: Array) -> onnx.ModelProto:
    """Layers of one layout on inputs of their own."""
    nodes, inputs, outputs = [], [], []
    for k, w in enumerate(weights):
        channels = w.shape[1] if w.ndim == 4 or "transB" in layout.attributes else w.shape[0]
        shape = ["n", channels, 5, 4] if w.ndim == 4 else ["n", channels]
        inputs.append(helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, None))
        nodes.append(helper.make_node(layout.operator, [f"x{k}", f"w{k}"], [f"y{k}"], **layout.attributes))
    tensors = [numpy_helper.from_array(w, f"w{k}") for k, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def analysed(layout: Layout, *weights: Array) -> Analysis:
    """The analysis of ``model``."""
    return OnnxSubject(model(layout, *weights), None).analysis


def after(plan: Plan, *weights: Array) -> list[Array]:
    """The weights with the plan's masks."""
    out = [w.copy() for w in weights]
    for mask in plan.of(Mask):
        out[int(mask.weight[1:])][~mask.keep] = 0
    return out


def number(size: int, sparsity: float) -> int:
    """How many of ``size`` go, in exact arithmetic."""
    return math.floor(Fraction(str(sparsity)) * size)


def kept(scores: Sequence[float], gone: int) -> list[bool]:
    """Which of some scores stay where the ``gone`` lowest go, the last ones among equals."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    stay = set(order[: len(scores) - gone])
    return [i in stay for i in range(len(scores))]

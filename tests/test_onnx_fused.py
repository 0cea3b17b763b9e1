"""Operators that runtimes fuse: the executable reference beside onnxruntime, one node at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from sparsecc.onnxfile.model import OnnxFile, to_numpy
from sparsecc.reference.onnx_ops import find
from sparsecc.reference.onnx_run import Runner
from tests.onnx_graphs import ort

Array = np.ndarray[Any, np.dtype[Any]]
MICROSOFT = "com.microsoft"
_TYPES = {
    "float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8,
    "int32": TensorProto.INT32, "int64": TensorProto.INT64, "bool": TensorProto.BOOL,
}  # fmt: skip

random = np.random.default_rng(3)
# signed weights stay within 7 bits: without VNNI instructions onnxruntime saturates sums of two products


def real(*shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return random.uniform(0.01, 0.05, shape).astype(np.float32)


def bytes_(*shape: int, low: int = 0, high: int = 256, dtype: Any = np.uint8) -> Array:
    return random.integers(low, high, shape).astype(dtype)


def ints(values: Any, dtype: Any = np.int64) -> Array:
    return np.asarray(values, dtype)


SCALE, ZERO = np.float32(0.03), np.uint8(120)
OUT_SCALE, OUT_ZERO = np.float32(0.05), np.uint8(110)
COS, SIN, WIDE = real(16, 4), real(16, 4), real(16, 8)

Case = tuple[str, list[Any], int, dict[str, Any]]
CASES: dict[str, Case] = {
    "FusedConv": ("FusedConv", [real(2, 4, 5, 5), real(6, 4, 3, 3), real(6)], 1, {"activation": "Relu"}),
    "FusedConv, sum": (
        "FusedConv",
        [real(2, 4, 5, 5), real(6, 4, 3, 3), real(6), real(2, 6, 3, 3)],
        1,
        {"activation": "Relu"},
    ),
    "FusedConv, leaky": (
        "FusedConv",
        [real(2, 4, 5, 5), real(6, 2, 3, 3)],
        1,
        {"activation": "LeakyRelu", "activation_params": [0.2], "group": 2, "pads": [1, 1, 1, 1]},
    ),
    "FusedGemm": (
        "FusedGemm",
        [real(3, 4), real(6, 4), real(6)],
        1,
        {"activation": "LeakyRelu", "activation_alpha": 0.1, "transB": 1, "alpha": 0.5},
    ),
    "FusedMatMul": ("FusedMatMul", [real(2, 3, 4, 5), real(2, 3, 6, 5)], 1, {"transB": 1, "alpha": 0.3}),
    "FusedMatMul, left": ("FusedMatMul", [real(2, 5, 4), real(2, 5, 6)], 1, {"transA": 1}),
    "BiasGelu": ("BiasGelu", [real(2, 3, 8), real(8)], 1, {}),
    "FastGelu": ("FastGelu", [real(2, 3, 8), real(8)], 1, {}),
    "QuickGelu": ("QuickGelu", [real(2, 3, 8)], 1, {"alpha": 1.5}),
    "Gelu": ("Gelu", [real(2, 3, 8)], 1, {}),
    "SkipLayerNormalization": (
        "SkipLayerNormalization",
        [real(2, 3, 8), real(2, 3, 8), real(8), real(8), real(8)],
        4,
        {"epsilon": 1e-5},
    ),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization",
        [real(2, 3, 8), real(2, 3, 8), real(8), real(8)],
        4,
        {"epsilon": 1e-5},
    ),
    "EmbedLayerNormalization": (
        "EmbedLayerNormalization",
        [
            ints([[1, 2, 0], [3, 4, 4]], np.int32),
            ints([[0, 1, 1], [0, 0, 1]], np.int32),
            real(5, 8),
            real(7, 8),
            real(2, 8),
            real(8),
            real(8),
            ints([[1, 0, 1], [1, 1, 2]], np.int32),
        ],
        3,
        {"epsilon": 1e-5},
    ),
    "Trilu": ("Trilu", [real(4, 5), ints(1)], 1, {"upper": 0}),
    "Attention": ("Attention", [real(2, 3, 8), real(8, 24), real(24)], 1, {"num_heads": 2}),
    "Attention, masked": (
        "Attention",
        [real(2, 3, 8), real(8, 24), real(24), ints([[1, 1, 0], [1, 0, 1]], np.int32)],
        1,
        {"num_heads": 2, "unidirectional": 1},
    ),
    "Attention, widths": (
        "Attention",
        [real(2, 3, 8), real(8, 20), real(20), ints([2, 3], np.int32)],
        1,
        {"num_heads": 2, "qkv_hidden_sizes": [6, 6, 8], "scale": 0.7},
    ),
    "Attention, past": (
        "Attention",
        [real(2, 3, 8), real(8, 24), real(24), None, real(2, 2, 2, 4, 4)],
        2,
        {"num_heads": 2, "unidirectional": 1},
    ),
    "MultiHeadAttention": (
        "MultiHeadAttention",
        [real(2, 3, 8), real(2, 5, 8), real(2, 5, 12)],
        1,
        {"num_heads": 2},
    ),
    "MultiHeadAttention, bias": (
        "MultiHeadAttention",
        [
            real(2, 3, 8),
            real(2, 3, 8),
            real(2, 3, 8),
            real(24),
            ints([[1, 1, 0], [1, 0, 1]], np.int32),
            real(1, 2, 3, 3),
        ],
        3,
        {"num_heads": 2, "unidirectional": 1},
    ),
    "MultiHeadAttention, past": (
        "MultiHeadAttention",
        [real(2, 3, 8), real(2, 3, 8), real(2, 3, 8), None, None, None, real(2, 2, 4, 4), real(2, 2, 4, 4)],
        3,
        {"num_heads": 2},
    ),
    "MultiHeadAttention, cross": (
        "MultiHeadAttention",
        [real(2, 3, 8), real(2, 2, 5, 4), real(2, 2, 5, 4)],
        1,
        {"num_heads": 2},
    ),
    "GroupQueryAttention": (
        "GroupQueryAttention",
        [
            real(2, 3, 32),
            real(2, 3, 16),
            real(2, 3, 16),
            None,
            None,
            ints([2, 2], np.int32),
            ints(3, np.int32),
        ],
        3,
        {"num_heads": 4, "kv_num_heads": 2},
    ),
    "GroupQueryAttention, rotary": (
        "GroupQueryAttention",
        [real(1, 3, 128), None, None, None, None, ints([2], np.int32), ints(3, np.int32), WIDE, WIDE],
        3,
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": 2},
    ),
    "GroupQueryAttention, past": (
        "GroupQueryAttention",
        [
            real(2, 1, 64),
            real(2, 1, 32),
            real(2, 1, 32),
            real(2, 2, 5, 16),
            real(2, 2, 5, 16),
            ints([5, 5], np.int32),
            ints(6, np.int32),
            WIDE,
            WIDE,
        ],
        3,
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "softcap": 2.0, "rotary_interleaved": 1},
    ),
    "RotaryEmbedding": ("RotaryEmbedding", [real(2, 3, 16), ints([[0, 1, 2], [5, 3, 1]]), COS, SIN], 1, {}),
    "RotaryEmbedding, 4 axes": (
        "RotaryEmbedding",
        [real(2, 2, 3, 8), ints([2]), COS, SIN],
        1,
        {"interleaved": 1},
    ),
    "RotaryEmbedding, partly": (
        "RotaryEmbedding",
        [real(2, 3, 24), ints([1]), COS, SIN],
        1,
        {"num_heads": 2, "rotary_embedding_dim": 8},
    ),
    "QLinearAdd": (
        "QLinearAdd",
        [bytes_(2, 3, 4), SCALE, ZERO, bytes_(3, 4), np.float32(0.02), np.uint8(99), OUT_SCALE, OUT_ZERO],
        1,
        {},
    ),
    "QLinearMul": (
        "QLinearMul",
        [bytes_(2, 3, 4), SCALE, ZERO, bytes_(3, 4), np.float32(0.02), np.uint8(99), OUT_SCALE, OUT_ZERO],
        1,
        {},
    ),
    "QLinearSigmoid": (
        "QLinearSigmoid",
        [bytes_(2, 3, 4), SCALE, ZERO, np.float32(1 / 256), np.uint8(0)],
        1,
        {},
    ),
    "QLinearLeakyRelu": (
        "QLinearLeakyRelu",
        [bytes_(2, 3, 4), SCALE, ZERO, OUT_SCALE, OUT_ZERO],
        1,
        {"alpha": 0.1},
    ),
    "QLinearSoftmax": (
        "QLinearSoftmax",
        [bytes_(2, 3, 4), SCALE, ZERO, np.float32(1 / 256), np.uint8(0)],
        1,
        {"axis": -1, "opset": 13},
    ),
    "QLinearConcat": (
        "QLinearConcat",
        [OUT_SCALE, OUT_ZERO, bytes_(2, 3), SCALE, ZERO, bytes_(2, 4), np.float32(0.02), np.uint8(99)],
        1,
        {"axis": 1},
    ),
    "QLinearWhere": (
        "QLinearWhere",
        [
            random.random((2, 3)) > 0.5,
            bytes_(2, 3),
            SCALE,
            ZERO,
            bytes_(2, 3),
            np.float32(0.02),
            np.uint8(99),
            OUT_SCALE,
            OUT_ZERO,
        ],
        1,
        {},
    ),
    "QLinearAveragePool": (
        "QLinearAveragePool",
        [bytes_(2, 3, 4, 4), SCALE, ZERO, OUT_SCALE, OUT_ZERO],
        1,
        {"kernel_shape": [2, 2], "strides": [2, 2]},
    ),
    "QLinearGlobalAveragePool": (
        "QLinearGlobalAveragePool",
        [bytes_(2, 3, 4, 4), SCALE, ZERO, OUT_SCALE, OUT_ZERO],
        1,
        {"channels_last": 0},
    ),
    "QGemm": (
        "QGemm",
        [
            bytes_(3, 4),
            SCALE,
            ZERO,
            bytes_(5, 4, dtype=np.int8, low=-60, high=60),
            positive(5),
            np.zeros(5, np.int8),
            ints(np.arange(5), np.int32),
            OUT_SCALE,
            OUT_ZERO,
        ],
        1,
        {"transB": 1},
    ),
    "QGemm, real": (
        "QGemm",
        [
            bytes_(3, 4),
            SCALE,
            ZERO,
            bytes_(4, 5, dtype=np.int8, low=-60, high=60),
            np.float32(0.02),
            np.int8(0),
            ints(np.arange(5), np.int32),
        ],
        1,
        {"alpha": 0.5},
    ),
    "MatMulIntegerToFloat": (
        "MatMulIntegerToFloat",
        [bytes_(2, 3, 4), bytes_(4, 5), SCALE, positive(5), ZERO, bytes_(5, low=100, high=140), real(5)],
        1,
        {},
    ),
    "DynamicQuantizeMatMul": (
        "DynamicQuantizeMatMul",
        [real(2, 3, 4), bytes_(4, 5), positive(5), bytes_(5, low=100, high=140), real(5)],
        1,
        {},
    ),
    "MatMulNBits": (
        "MatMulNBits",
        [real(2, 3, 64), bytes_(6, 2, 16), positive(6, 2), bytes_(6, 1), None, real(6)],
        1,
        {"K": 64, "N": 6, "bits": 4, "block_size": 32},
    ),
    "MatMulNBits, flat": (
        "MatMulNBits",
        [real(2, 3, 50), bytes_(6, 2, 16), positive(12)],
        1,
        {"K": 50, "N": 6, "bits": 4, "block_size": 32},
    ),
    "MatMulNBits, 8 bits": (
        "MatMulNBits",
        [real(3, 64), bytes_(6, 2, 32), positive(6, 2), bytes_(6, 2)],
        1,
        {"K": 64, "N": 6, "bits": 8, "block_size": 32},
    ),
    "QAttention": (
        "QAttention",
        [
            bytes_(2, 3, 8),
            bytes_(8, 24, dtype=np.int8, low=-60, high=60),
            real(24),
            SCALE,
            np.float32(0.01),
            None,
            ZERO,
            np.int8(0),
        ],
        1,
        {"num_heads": 2},
    ),
}


def single(
    kind: str, inputs: list[Any], outputs: int, attributes: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A model of one node, all of whose operands are graph inputs."""
    feeds = {f"in{i}": np.asarray(x) for i, x in enumerate(inputs) if x is not None}
    names = [f"in{i}" if x is not None else "" for i, x in enumerate(inputs)]
    node = helper.make_node(kind, names, [f"out{i}" for i in range(outputs)], domain=MICROSOFT, **attributes)
    infos = [helper.make_tensor_value_info(name, _TYPES[str(x.dtype)], x.shape) for name, x in feeds.items()]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "single", infos, results)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), feeds


@pytest.mark.parametrize("name", CASES)
def test_a_fused_operator_gives_what_onnxruntime_gives(name: str) -> None:
    kind, inputs, outputs, attributes = CASES[name]
    model, feeds = single(kind, inputs, outputs, attributes)
    found = Runner(OnnxFile.load(model)).run(feeds)
    wanted = ort(model, feeds)
    for i, want in enumerate(wanted):
        have = found[f"out{i}"]
        if have is None or (kind.startswith("Skip") and i in (1, 2)):
            continue  # statistics that this runtime does not compute
        have = to_numpy(have)
        assert have.shape == want.shape, (i, have.shape, want.shape)
        if want.dtype.kind == "f":
            np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-5, err_msg=str(i))
        else:
            assert have.dtype == want.dtype
            assert np.abs(have.astype(int) - want.astype(int)).max() <= (1 if "Softmax" in kind else 0), i


@pytest.mark.parametrize("name", CASES)
def test_a_fused_operator_tells_its_shapes_and_types_without_data(name: str) -> None:
    kind, inputs, outputs, attributes = CASES[name]
    model, feeds = single(kind, inputs, outputs, attributes)
    runner = Runner(OnnxFile.load(model))
    found = runner.run(feeds)
    step = runner.program.steps[0]
    ctx = step.ctx.copy()
    ctx.abstract = True
    args = [None if x is None else torch.from_numpy(np.array(x)) for x in inputs]
    meta = [None if x is None else torch.empty_like(x, device="meta") for x in args]
    small = zip(meta, args, strict=True)
    ctx.known = {id(m): x for m, x in small if x is not None and not x.is_floating_point() and x.ndim == 0}
    operator = find(MICROSOFT, kind, 1)
    assert operator is not None
    function: Callable[..., Any] = operator.function
    results = function(ctx, *meta)
    results = results if isinstance(results, tuple) else (results,)
    for i in range(outputs):
        if results[i] is not None:
            assert (tuple(results[i].shape), results[i].dtype) == (
                tuple(found[f"out{i}"].shape),
                found[f"out{i}"].dtype,
            )

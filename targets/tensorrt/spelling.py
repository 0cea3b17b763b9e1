"""Products spelled so that TensorRT's rule for sparse weights applies to them.

    MatMul(x, Transpose(w))           MatMul(x, w')                          the transpose is folded
    MatMul(w, x), x of 2 axes         Transpose(Gemm(x, w, transA, transB))
    MatMul(w, x), x of 3 axes         Conv(x, w), 1x1
    MatMul(w, x), more axes           Transpose(MatMul(Transpose(x), w'))
    MatMul(x, w[1,K,N])               MatMul(x, w[K,N])
    Einsum("bik,nk->bin", x, w)       MatMul(x, w')
    Gemm(w, x)                        Transpose(Gemm(x, w, ...))

With ``linear="conv"`` a MatMul on 2 or 3 axes becomes a 1x1 Conv as well.  All sum the same terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from sparsecc.targets.tensorrt.stored import Array, Stored, has_negative_zero, has_pattern, is_standard
from sparsecc.targets.tensorrt.surgeon import Surgeon

LINEAR = ("matmul", "conv")
FLOATS = ("float64", "float32", "float16", "bfloat16")


def respell(surgeon: Surgeon, node: gs.Node, linear: str) -> None:
    """Give one node the spelling that the rule applies to; leave it alone where it has that, or no weight."""
    rewrite = _SPELLINGS.get(node.op) if is_standard(node) else None
    if rewrite is not None:
        rewrite(surgeon, node)
    if linear == "conv" and node.op == "MatMul":
        _as_conv(surgeon, node)


def _matmul(surgeon: Surgeon, node: gs.Node) -> None:
    """x[*,K] w[K,N] -> y[*,N], or w[M,K] x[*,K,N] -> y[*,M,N]"""
    right, left = surgeon.stored(node.inputs[1]), surgeon.stored(node.inputs[0])
    if right is not None:
        _right(surgeon, node, right)
    elif left is not None and left.values.ndim == 2 and _is_plain(left):
        _left(surgeon, node, left)


def _right(surgeon: Surgeon, node: gs.Node, weight: Stored) -> None:
    rank = weight.values.ndim
    if rank > 2 and set(weight.values.shape[:-2]) == {1} and _is_plain(weight):
        given = surgeon.rank(node.inputs[0])
        if given is None or given < rank:
            return
        matrix = weight.values.reshape(weight.values.shape[-2:])
        node.inputs[1] = surgeon.constant(weight.name, "matrix", matrix)
        surgeon.note(node.outputs[0].name, "its weight's leading axes of size 1 are gone")
        return
    _fold(surgeon, node, weight)


def _fold(surgeon: Surgeon, node: gs.Node, weight: Stored) -> None:
    """Store the second operand as the product reads it."""
    if not weight.folded and not (has_negative_zero(weight.values) and has_pattern(node, weight.values)):
        return
    if weight.folded:
        kinds = sorted({n.op for n in weight.between} - {n.op for n in weight.quantizers})
        surgeon.note(node.outputs[0].name, f"{' and '.join(kinds)} folded into its weight")
    else:
        surgeon.note(node.outputs[0].name, "negative zeros of its weight are positive ones")
    node.inputs[1] = surgeon.operand(weight, "folded" if weight.folded else "zeros")


def _is_plain(weight: Stored) -> bool:
    """Whether a weight holds floats, with no scales to move along."""
    return not weight.quantized and weight.values.dtype.name in FLOATS


def _conv_takes(surgeon: Surgeon, values: Array) -> bool:
    """Whether a Conv may have weights of this type, and of the one that they will have."""
    return surgeon.file.opset >= 22 or (values.dtype.name != "bfloat16" and surgeon.dtype != "bf16")


def _left(surgeon: Surgeon, node: gs.Node, weight: Stored) -> None:
    """w[M,K] x -> y, the sums over what x has one axis before its last"""
    x, output = node.inputs[1], node.outputs[0].name
    rank = surgeon.rank(x)
    if rank is None:
        surgeon.note(output, "its weight is the first operand, and the axes of the second are not known")
    elif rank == 1:
        node.inputs = [x, surgeon.constant(weight.name, "flipped", weight.values.T)]
        surgeon.note(output, "MatMul with its weight as first operand: operands exchanged")
    elif rank == 2:
        _flipped_gemm(surgeon, node, x, weight, trans_x=1, trans_w=1)
    elif rank == 3 and _conv_takes(surgeon, weight.values):
        node.op, node.attrs = "Conv", {"kernel_shape": [1]}
        node.inputs = [x, surgeon.constant(weight.name, "conv", weight.values[:, :, None])]
        surgeon.note(output, "MatMul with its weight as first operand: 1x1 Conv")
    else:
        order = [*range(rank - 2), rank - 1, rank - 2]
        flipped = surgeon.node("Transpose", [x], f"{x.name}.flipped", perm=order)
        node.inputs = [flipped, surgeon.constant(weight.name, "flipped", weight.values.T)]
        surgeon.finish("Transpose", node, "flipped", perm=order)
        surgeon.note(output, "MatMul with its weight as first operand: operands exchanged")


def _flipped_gemm(
    surgeon: Surgeon, node: gs.Node, x: gs.Tensor, weight: Stored, *, trans_x: int, trans_w: int
) -> None:
    """w x as the transpose of x' w'"""
    attrs = {key: node.attrs[key] for key in ("alpha",) if key in node.attrs}
    was, output = node.op, node.outputs[0].name
    node.op, node.attrs = "Gemm", {**attrs, "transA": trans_x, "transB": trans_w}
    kept = not weight.folded and not has_negative_zero(weight.values)
    node.inputs = [x, node.inputs[0] if kept else surgeon.operand(weight, "folded")]
    surgeon.finish("Transpose", node, "flipped", perm=[1, 0])
    surgeon.note(output, f"{was} with its weight as first operand: Gemm with operands exchanged")


def _gemm(surgeon: Surgeon, node: gs.Node) -> None:
    """x[M,K] w[K,N] c -> y[M,N], operands transposed as the attributes say"""
    right, left = surgeon.stored(node.inputs[1]), surgeon.stored(node.inputs[0])
    if right is not None:
        _fold(surgeon, node, right)
    elif left is not None and _is_plain(left) and (len(node.inputs) < 3 or not node.inputs[2].name):
        trans_w, trans_x = node.attrs.get("transA", 0), node.attrs.get("transB", 0)
        _flipped_gemm(surgeon, node, node.inputs[1], left, trans_x=1 - trans_x, trans_w=1 - trans_w)


def _conv(surgeon: Surgeon, node: gs.Node) -> None:
    """x[N,C,*S] w[O,C/g,*K] b[O] -> y[N,O,*S']"""
    weight = surgeon.stored(node.inputs[1])
    if weight is not None:
        _fold(surgeon, node, weight)


def _einsum(surgeon: Surgeon, node: gs.Node) -> None:
    """x[*,K] w -> y[*,N] where the equation is a product of a matrix"""
    if len(node.inputs) != 2:
        return
    for place in (1, 0):
        weight = surgeon.stored(node.inputs[place])
        if weight is None or weight.values.ndim != 2 or not _is_plain(weight):
            continue
        flipped = _matrix_product(str(node.attrs.get("equation", "")), place)
        if flipped is None:
            surgeon.note(node.outputs[0].name, "this Einsum is no product with a matrix along the last axis")
            return
        x = node.inputs[1 - place]
        values, what = (weight.values.T, "flipped") if flipped else (weight.values, "matrix")
        node.op, node.attrs = "MatMul", {}
        node.inputs = [x, surgeon.constant(weight.name, what, values)]
        surgeon.note(node.outputs[0].name, "Einsum: MatMul")
        return


def _matrix_product(equation: str, place: int) -> bool | None:
    """Whether operand ``place`` of an equation is w[N,K] (True) or w[K,N] (False) of x[*,K] -> y[*,N]."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if not arrow or len(parts) != 2:
        return None
    weight, x = parts[place], parts[1 - place]
    if len(set(weight)) != 2 or len(set(x)) != len(x) or not x.isalpha() or not weight.isalpha():
        return None
    for summed, kept, flipped in ((weight[1], weight[0], True), (weight[0], weight[1], False)):
        if x.endswith(summed) and result == x[:-1] + kept:
            return flipped
    return None


def _as_conv(surgeon: Surgeon, node: gs.Node) -> None:
    """x[B,L,K] w[K,N] as a convolution of x[B,K,L]; of x[M,K] as one of x[M,K,1]"""
    weight = surgeon.stored(node.inputs[1])
    x, output = node.inputs[0], node.outputs[0].name
    rank = surgeon.rank(x)
    if weight is None or not _is_plain(weight) or weight.values.ndim != 2 or rank not in (2, 3):
        return
    if not _conv_takes(surgeon, weight.values):
        return
    kernel = surgeon.constant(weight.name, "conv", weight.values.T[:, :, None])
    if rank == 3:
        given = surgeon.node("Transpose", [x], f"{x.name}.channels", perm=[0, 2, 1])
        surgeon.finish("Transpose", node, "channels", perm=[0, 2, 1])
    else:
        axis, attrs = _axes(surgeon, output)
        given = surgeon.node("Unsqueeze", [x, *axis], f"{x.name}.channels", **attrs)
        surgeon.finish("Squeeze", node, "channels", axis, **attrs)
    node.op, node.attrs, node.inputs = "Conv", {"kernel_shape": [1]}, [given, kernel]
    surgeon.note(output, "MatMul: 1x1 Conv")


def _axes(surgeon: Surgeon, output: str) -> tuple[list[gs.Tensor], dict[str, list[int]]]:
    """The axis 2 for Squeeze and Unsqueeze: an operand from opset 13 on, an attribute before."""
    if surgeon.file.opset < 13:
        return [], {"axes": [2]}
    return [surgeon.constant("sparsecc", "axes", np.array([2], np.int64))], {}


_SPELLINGS: Mapping[str, Callable[[Surgeon, gs.Node], None]] = MappingProxyType(
    {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Einsum": _einsum}
)

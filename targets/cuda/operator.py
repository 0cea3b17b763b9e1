"""``torch.ops.sparsecc.sparse_matmul``: a product with packed 2:4 weights, as one PyTorch operator.

On a GPU it launches a generated kernel; on the CPU it computes the same numbers from the unpacked weights:
operands rounded to the kernel's element type, sums in float32; of int8 exact sums, rounded once.  It has a
fake kernel, so that it works in torch.compile, torch.export and CUDA graphs, and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparsecc.errors import InvalidOption, TargetUnavailable
from sparsecc.targets.cuda.pack import GROUP, Packed, unpack

NAME = "sparsecc::sparse_matmul"

#: element types by the names that configurations use
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}

#: unpacked weights, as long as the packed ones live
_dense: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False, slots=True)
class Operands:
    """The operator's arguments: activation(scale * (W x) + bias) + residual, in the type of ``x``.

    With ``dtype`` int8, ``x`` is int8, or uint8 of which 128 is taken off, and the result float32.

    Without ``conv`` x[*,K] -> y[*,out]; with it (channels, then kernel, stride, padding and dilation, two
    numbers each) x[N,C,H,W] -> y[N,out,H',W'].  ``values`` and ``metadata`` are those of
    ``sparsecc.targets.cuda.pack``; ``scale`` and ``bias`` are float32 [out].  ``kernels`` are the
    names, joined by commas, of the kernels that a GPU may choose from.
    """

    x: Tensor
    values: Tensor
    metadata: Tensor
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    out: int
    k: int
    dtype: str
    activation: str
    conv: Sequence[int]
    kernels: str


_SCHEMA = (
    "(Tensor x, Tensor values, Tensor metadata, Tensor? scale, Tensor? bias, Tensor? residual, "
    "SymInt out, SymInt k, str dtype, str activation, int[] conv, str kernels) -> Tensor"
)
torch.library.define(NAME, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(*arguments: Any) -> Tensor:
    given = Operands(*arguments)
    shape = output_shape(given.x.shape, given.out, given.conv)
    return given.x.new_empty(shape, dtype=result_type(given.x))


torch.library.register_fake(NAME, _fake)


def _on_cpu(*arguments: Any) -> Tensor:
    given = Operands(*arguments)
    weight = _weight(given)
    return computed(given, weight, rounded=DTYPES[given.dtype], wide=torch.float32)


def _on_gpu(*arguments: Any) -> Tensor:
    given = Operands(*arguments)
    if not given.kernels:
        raise TargetUnavailable("this layer was compiled without kernels, so it runs on the CPU only")
    from sparsecc.targets.cuda import cusparselt
    from sparsecc.targets.cuda.launch import launched

    if cusparselt.chosen(given):
        return cusparselt.product(given)
    return launched(given, output_shape(given.x.shape, given.out, given.conv))


torch.library.impl(NAME, "CPU", _on_cpu)
torch.library.impl(NAME, "CUDA", _on_gpu)


def output_shape(shape: Sequence[int], out: int, conv: Sequence[int]) -> list[int]:
    """The shape of the output for an input of ``shape``."""
    if not conv:
        return [*shape[:-1], out]
    _, *pairs = conv
    kernel, stride, padding, dilation = (pairs[i : i + 2] for i in range(0, 8, 2))
    sizes = [
        (shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    return [shape[0], out, *sizes]


def result_type(x: Tensor) -> torch.dtype:
    """The type of what comes out: that of ``x``, float32 for integers."""
    return x.dtype if x.is_floating_point() else torch.float32


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a kernel reads it; unsigned bytes less 128."""
    return (x ^ 128).view(torch.int8) if x.dtype == torch.uint8 else x.to(dtype)


def computed(given: Operands, weight: Tensor, *, rounded: torch.dtype | None, wide: torch.dtype) -> Tensor:
    """The operator from the dense weight [out, k], with ``x`` rounded to ``rounded``, in ``wide`` numbers.

    Products of int8 are summed in float64, where they are exact, and rounded once, as kernels do.
    """
    integers = weight.dtype == torch.int8
    x = given.x if rounded is None and not integers else rounded_to(given.x, rounded or torch.int8)
    sums = torch.float64 if integers else wide
    x, weight = x.to(sums), weight.to(sums)
    y = (_convolved(x, weight, given.conv) if given.conv else F.linear(x, weight)).to(wide)
    return finished(given, y, wide=wide)


def finished(given: Operands, y: Tensor, *, wide: torch.dtype) -> Tensor:
    """What follows the product ``y`` (in ``wide`` numbers): scale, bias, activation, residual."""
    each = (1, -1, 1, 1) if given.conv else (-1,)
    if given.scale is not None:
        y = y * given.scale.to(wide).reshape(each)
    if given.bias is not None:
        y = y + given.bias.to(wide).reshape(each)
    y = _ACTIVATIONS[given.activation](y)
    if given.residual is not None:
        y = y + given.residual.to(wide).expand(y.shape)
    return y.to(given.x.dtype if given.x.is_floating_point() else wide).contiguous()


def _convolved(x: Tensor, weight: Tensor, conv: Sequence[int]) -> Tensor:
    channels, high, wide, *rest = conv
    stride, padding, dilation = (list(rest[i : i + 2]) for i in range(0, 6, 2))
    padded = -(-channels // GROUP) * GROUP
    kernel = weight.reshape(len(weight), high, wide, padded)[..., :channels].permute(0, 3, 1, 2)
    return F.conv2d(x, kernel, None, stride, padding, dilation)


def _weight(given: Operands) -> Tensor:
    """The unpacked weight [out, k], remembered."""
    found = _dense.get(given.values)
    if found is None:
        if given.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InvalidOption(f"weights of type {given.dtype!r} do not run on the CPU; there are {known}")
        found = unpack(Packed(given.values.numpy(), given.metadata.numpy(), given.out, given.k, given.dtype))
        _dense[given.values] = found
    return found  # type: ignore[no-any-return]

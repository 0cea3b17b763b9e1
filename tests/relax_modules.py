"""Relax modules with 2:4 weights, how to run them, and how exact their results have to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

TORCH = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "x * sigmoid(x)": torch.nn.functional.silu,
}


def two_of_four(*shape: int, axis: int = -1, seed: int = 0) -> torch.Tensor:
    """Normal numbers, two of every four along ``axis`` set to zero at random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).movedim(axis, -1)
    groups = (*weight.shape[:-1], -1, 4)
    rank = torch.rand(*weight.shape, generator=generator).view(groups).argsort(-1).view(weight.shape)
    return torch.where(rank < 2, weight, torch.zeros_like(weight)).movedim(-1, axis).contiguous()


def prune(module: torch.nn.Module) -> torch.nn.Module:
    """The module with 2:4 weights in its linear layers and convolutions."""
    for seed, layer in enumerate(module.modules()):
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            shape = layer.weight.shape
            layer.weight.data = two_of_four(*shape, axis=1, seed=seed) / shape[1:].numel() ** 0.5
    return module.eval()


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor as an array of the same type, bfloat16 included."""
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().numpy()
    import ml_dtypes

    return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


@dataclass
class Layer:
    """x -> activation(product + bias), as a Relax function of the input alone.

    ``x`` is [*, k], with the sizes ``varying`` (by axis) left open; a convolution where ``conv`` is given.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    activation: str = "none"
    varying: Sequence[int] = ()
    conv: dict[str, Any] | None = None
    permuted: bool = True
    out_dtype: str = ""

    @property
    def dtype(self) -> str:
        return str(self.x.dtype).removeprefix("torch.")

    def module(self) -> Any:
        """The IRModule."""
        import tvm
        from tvm import relax

        builder = relax.BlockBuilder()
        sizes = [
            tvm.tirx.Var(f"n{i}", "int64") if i in self.varying else n for i, n in enumerate(self.x.shape)
        ]
        x = relax.Var("x", relax.TensorType(sizes, self.dtype))
        with builder.function("main", [x]):
            with builder.dataflow():
                y = builder.emit(self._product(relax, builder, x))
                if self.bias is not None:
                    y = builder.emit(relax.op.add(y, self._bias(relax)))
                y = self._activated(relax, builder, y)
                out = builder.emit_output(y)
            builder.emit_func_output(out)
        return builder.finalize()

    def _product(self, relax: Any, builder: Any, x: Any) -> Any:
        weight = relax.const(as_array(self.weight), self.dtype)
        if self.conv is not None:
            return relax.op.nn.conv2d(x, weight, **self.conv)
        if self.permuted:
            return relax.op.matmul(x, builder.emit(relax.op.permute_dims(weight)), self.out_dtype or None)
        return relax.op.matmul(x, relax.const(as_array(self.weight.T.contiguous()), self.dtype))

    def _bias(self, relax: Any) -> Any:
        assert self.bias is not None
        bias = as_array(self.bias)
        nchw = self.conv is not None and self.conv.get("data_layout", "NCHW") == "NCHW"
        return relax.const(bias.reshape(1, -1, 1, 1) if nchw else bias, self.out_dtype or self.dtype)

    def _activated(self, relax: Any, builder: Any, y: Any) -> Any:
        if self.activation == "none":
            return y
        if self.activation == "x * sigmoid(x)":
            return relax.op.multiply(y, builder.emit(relax.op.sigmoid(y)))
        return getattr(relax.op.nn, self.activation)(y)

    def check(self, result: Array) -> None:
        """Against float64, with a bound on the rounding of sums, of the activation and of the result."""
        exact, magnitude = (self._in_float64(absolute=absolute) for absolute in (False, True))
        sums = ROUNDING["float64" if "float64" in (self.dtype, self.out_dtype) else "float32"]
        terms = self.weight[0].numel() / 2 + 4
        bound = 1.2 * terms * sums * magnitude + 8 * sums * (1 + magnitude)
        bound = bound + ROUNDING[str(result.dtype)] * exact.abs()
        error = (torch.from_numpy(result.astype(np.float64)) - exact).abs()
        assert error.shape == exact.shape
        assert (error <= bound).all(), f"{float((error / bound).max())} times the bound"

    def _in_float64(self, *, absolute: bool) -> torch.Tensor:
        x, weight = self.x.double(), self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        if absolute:
            x, weight, bias = x.abs(), weight.abs(), None if bias is None else bias.abs()
        y = self._conv_in_float64(x, weight) if self.conv is not None else x @ weight.T
        if bias is not None:
            y = y + (bias[:, None, None] if self.conv is not None else bias)
        y = y if absolute else ACTIVATIONS[self.activation](y)
        channels_last = self.conv is not None and self.conv.get("data_layout") == "NHWC"
        return y.permute(0, 2, 3, 1) if channels_last else y

    def _conv_in_float64(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert self.conv is not None
        x = x.permute(0, 3, 1, 2) if self.conv.get("data_layout") == "NHWC" else x
        weight = weight.permute(["OHWI".index(a) for a in "OIHW"]) if self._kernel == "OHWI" else weight
        top, left, bottom, right = self.conv.get("padding", [0, 0, 0, 0])
        padded = torch.nn.functional.pad(x, (left, right, top, bottom))
        strides, dilation = self.conv.get("strides", [1, 1]), self.conv.get("dilation", [1, 1])
        return torch.nn.functional.conv2d(padded, weight, None, strides, 0, dilation)

    @property
    def _kernel(self) -> str:
        return str((self.conv or {}).get("kernel_layout", "OIHW"))


class Machine:
    """A module's ``main``, built for this processor."""

    def __init__(self, module: Any, pipeline: Any = "default") -> None:
        import tvm
        from tvm import relax

        built = tvm.compile(module, target="llvm", relax_pipeline=pipeline)
        self._main = relax.VirtualMachine(built, tvm.cpu())["main"]
        self._tensor = tvm.runtime.tensor

    def __call__(self, *inputs: torch.Tensor) -> Array:
        """The only output, or the first."""
        result = self._main(*(self._tensor(as_array(x)) for x in inputs))
        return np.asarray((result if hasattr(result, "numpy") else result[0]).numpy())

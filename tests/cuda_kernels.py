"""Running generated kernels on the simulator, and what they should compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from sparsecc.targets.cuda.config import KernelConfig
from sparsecc.targets.cuda.generate import gemm_source, signature
from sparsecc.targets.cuda.grid import grid
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tvm_build import Source
from tests.cuda_sim.simulator import Report, Simulator, aligned

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp32": torch.float32,
    "int32": torch.int32,
}
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@cache
def source_of(config: KernelConfig, problem: Problem) -> Source:
    return gemm_source(config, problem, name="kernel")


@cache
def simulator_of(config: KernelConfig, problem: Problem, text: str | None = None) -> Simulator:
    source = source_of(config, problem)
    tensors = signature(config, problem, "kernel").tensors
    return Simulator(text or source.text, source.entry, source.parameters, list(tensors))


@dataclass
class Case:
    """Inputs of one kernel: small integers, so that every sum is exact in the accumulator."""

    config: KernelConfig
    problem: Problem
    tokens: int = 40  # pixels of an image in layout nchw, where these are not given by ``size``
    batch: int = 1
    size: tuple[int, int] | None = None  # height and width of the input of a convolution
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        out, k = self.problem.out, self.problem.k
        self.weight = two_of_four(self._integers((out, k), 8), self.generator)
        if self.problem.conv is not None:
            conv = self.problem.conv
            shaped = self.weight.view(out, -1, conv.padded_channels)
            shaped[:, :, conv.channels :] = 0
        self.x = self._integers(self._input_shape(), 8)
        self.bias = self._integers((out,), 64).float()
        self.scale = 2.0 ** torch.randint(-3, 3, (out,), generator=self.generator)
        tokens = self.output_shape[0]
        self.token_scale = 2.0 ** torch.randint(-3, 3, (tokens,), generator=self.generator)
        self.residual = self._integers(self.output_shape, 64)

    def _integers(self, shape: tuple[int, ...], limit: int) -> torch.Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=self.generator).double()

    @property
    def nchw(self) -> bool:
        return self.config.layout == "nchw"

    @property
    def pixels(self) -> int:
        return int(np.prod(self.out_size)) if self.problem.conv is not None else self.tokens

    @property
    def out_size(self) -> tuple[int, int]:
        assert self.problem.conv is not None
        assert self.size is not None
        return self.problem.conv.output_size(*self.size)

    def _input_shape(self) -> tuple[int, ...]:
        if self.problem.conv is None:
            return (self.batch, self.problem.k, self.tokens) if self.nchw else (self.tokens, self.problem.k)
        assert self.size is not None
        channels = self.problem.conv.channels
        return (self.batch, channels, *self.size) if self.nchw else (self.batch, *self.size, channels)

    @property
    def output_shape(self) -> tuple[int, ...]:
        if self.nchw:
            return (self.batch, self.problem.out, self.pixels)
        rows = self.batch * self.pixels if self.problem.conv is not None else self.tokens
        return (rows, self.problem.out)

    def expected(self) -> torch.Tensor:
        """The result in float64."""
        epilogue = self.config.epilogue
        y = self._product()
        per_feature = (lambda v: v.double()[:, None]) if self.nchw else (lambda v: v.double())
        if epilogue.scale:
            y = y * per_feature(self.scale)
        if epilogue.token_scale:
            y = y * self.token_scale.double()[:, None]
        if epilogue.bias:
            y = y + per_feature(self.bias)
        y = ACTIVATIONS[epilogue.activation](y)
        return y + self.residual if epilogue.residual else y

    def _product(self) -> torch.Tensor:
        conv = self.problem.conv
        if conv is None:
            return self.weight @ self.x if self.nchw else self.x @ self.weight.T
        x = self.x if self.nchw else self.x.permute(0, 3, 1, 2)
        kernel = self.weight.view(-1, *conv.kernel, conv.padded_channels)[..., : conv.channels]
        y = torch.nn.functional.conv2d(
            x, kernel.permute(0, 3, 1, 2), None, conv.stride, conv.padding, conv.dilation
        )
        return y.flatten(2) if self.nchw else y.permute(0, 2, 3, 1).flatten(0, 2)

    def run(self, text: str | None = None, packed: Any = None) -> tuple[torch.Tensor, Report]:
        """The kernel's result, and what the simulator has to say; ``text`` stands in for its source."""
        config, problem = self.config, self.problem
        packed = packed or pack(self.weight.to(DTYPES[config.dtype]))
        out_dtype = DTYPES[config.out_dtype]
        out = aligned(np.full(int(np.prod(self.output_shape)) * out_dtype.itemsize, 0xA5, np.uint8))
        tensors = {
            "weight": packed.values,
            "metadata": packed.metadata,
            "x": as_bytes(self.x.to(DTYPES[config.dtype])),
            "bias": self.bias.numpy(),
            "scale": self.scale.numpy(),
            "token_scale": self.token_scale.numpy(),
            "residual": as_bytes(self.residual.to(out_dtype)),
        }
        arrays = {name: aligned(array) for name, array in tensors.items()} | {"d": out}
        simulator = simulator_of(config, problem, text)
        report = simulator.run(arrays, self.scalars(), self.grid(), config.threads, config.shared_bytes)
        return torch.from_numpy(out).view(out_dtype).view(self.output_shape), report

    def scalars(self) -> Mapping[str, int]:
        height, width = self.size or (0, 0)
        out_height, out_width = self.out_size if self.problem.conv is not None else (0, 0)
        return {
            "tokens": int(np.prod(self.output_shape[:-1])),
            "pixels": self.pixels,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
        }

    def grid(self) -> tuple[int, int, int]:
        rows = self.pixels if self.nchw else int(np.prod(self.output_shape[:-1]))
        return grid(self.config, self.problem, rows, self.batch if self.nchw else 1)


def two_of_four(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``weight`` with two of every four columns set to zero, at random."""
    out, k = weight.shape
    rank = torch.rand(out, -(-k // 4), 4, generator=generator).argsort(-1).flatten(1)[:, :k]
    return torch.where(rank < 2, weight, torch.zeros_like(weight))


def as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.contiguous().view(torch.uint8).numpy()


__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "Case",
    "Conv",
    "Problem",
    "replace",
    "simulator_of",
    "source_of",
    "two_of_four",
]

"""2:4 products on sparse tensor cores: the kernels of ``sparsecc.targets.cuda`` as functions of a module.

The kernel's own TIR is called, with its grid computed from the sizes of its arguments, and compiled with the
rest of the module by whatever TVM compiles CUDA with.  Nothing here has run on hardware: tests execute the
source that the whole module compiles to, instruction by instruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsecc.errors import InvalidOption, TargetRefused
from sparsecc.targets.cuda.build import kernel_name
from sparsecc.targets.cuda.choice import CHOICES, CURVES
from sparsecc.targets.cuda.config import ARCHES, Epilogue, KernelConfig
from sparsecc.targets.cuda.generate import body_of, signature
from sparsecc.targets.cuda.grid import grid
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.tiles import default_config, tile_for
from sparsecc.targets.cuda.tvm_build import Number, Tensor, emit_function
from sparsecc.targets.relax.graph import fixed, sizes
from sparsecc.targets.relax.llvm import output_size
from sparsecc.targets.relax.product import Array, Product, Window
from sparsecc.targets.relax.scope import Scope

PRODUCTS: Mapping[str, tuple[str, torch.dtype]] = {
    "fp16": ("float16", torch.float16),
    "bf16": ("bfloat16", torch.bfloat16),
}
"""Element types that are multiplied, by the name of the kernel's."""
_OUTPUTS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_FEWEST_PIXELS = 17  # kernels for images have no tiles for fewer pixels than this
_OPAQUE = 8  # TVM's OpPatternKind: nothing is fused with the function


@dataclass(frozen=True, slots=True)
class Options:
    """What may be asked for on CUDA.

    ``product``: fp16 or bf16, the type that products of float32 models are rounded to; without it they stay
    dense, since there is no 2:4 instruction for float32.  ``choose``: ``modelled`` (2:4 where it is expected
    to pay) or ``always``.  ``tokens``: rows that a varying size stands for, when a tile is picked.
    """

    product: str | None = None
    choose: str = "modelled"
    tokens: int = 512

    def __post_init__(self) -> None:
        if self.product is not None and self.product not in PRODUCTS:
            raise InvalidOption(f"product must be one of {', '.join(PRODUCTS)}; got {self.product!r}")
        if self.choose not in CHOICES:
            raise InvalidOption(f"choose must be one of {', '.join(CHOICES)}; got {self.choose!r}")
        if self.tokens < 1:
            raise InvalidOption(f"tokens must be at least 1; got {self.tokens}")


class OnCuda:
    """Kernels around ``mma.sp`` for the architecture of a target."""

    def __init__(self, target: Any, options: Options) -> None:
        self.target, self.options = target, options
        self.arch = str(target.attrs["arch"])
        if self.arch not in ARCHES:
            raise TargetRefused(
                f"there are no 2:4 kernels for {self.arch}; there are for {', '.join(ARCHES)}"
            )

    def choose(self, product: Product) -> tuple[bool, str]:
        """As ``sparsecc.targets.cuda.choice`` does."""
        refusal = self._refusal(product)
        if refusal:
            return False, refusal
        what = f"mma.sp in {self._element(product)}"
        if self.options.choose == "always":
            return True, what
        curve = CURVES[self.arch.replace("_", "").removesuffix("a")]
        expected = curve.at(2.0 * product.out * product.k * self._rows(product))
        why = f"{what}, {expected:.2f}x expected (cuSPARSELt on {curve.gpu})"
        return expected > 1.0, why

    def _element(self, product: Product) -> str | None:
        own = next((name for name, (dtype, _) in PRODUCTS.items() if dtype == product.dtype), None)
        return self.options.product if product.dtype == "float32" else own

    def _refusal(self, product: Product) -> str:
        element = self._element(product)
        if element is None:
            hint = ": product='fp16' or 'bf16' rounds to it" if product.dtype == "float32" else ""
            return f"there is no 2:4 instruction for {product.dtype}{hint}"
        out_dtype = _OUTPUTS.get(str(product.output.ty.dtype))
        if out_dtype not in ({element, "fp32"}):
            return f"its output is {product.output.ty.dtype}"
        with np.errstate(over="ignore"):
            finite = np.isfinite(product.matrix.astype(PRODUCTS[element][0]).astype(np.float64)).all()
        if not finite:
            return f"its weight has values that are not finite in {element}"
        window = product.window
        if window is not None and window.padding[:2] != window.padding[2:]:
            return "its padding differs between sides"
        return ""

    def _rows(self, product: Product) -> int:
        """Rows that the kernel is chosen for: tokens, or pixels of all images."""
        known = sizes(product.output)
        channel = 1 if product.window is not None and product.window.layout == "NCHW" else -1
        rows = [] if known is None else [n for at, n in enumerate(known) if at != channel % len(known)]
        return self.options.tokens if None in rows or not rows else int(np.prod([n or 0 for n in rows]))

    def call(self, product: Product, x: Any, scope: Scope) -> Any:
        """The call of a kernel with values, metadata and bias as constants."""
        element = self._element(product)
        assert element is not None
        dtype, rounded = PRODUCTS[element]
        if str(x.ty.dtype) != dtype:
            x = scope.emit(scope.relax.op.astype(x, dtype))
        x, layout = self._layout(product, x, scope)
        config = self._config(product, element)
        problem = Problem(product.out, product.k, conv=layout.conv)
        key = (config, problem, layout.x, layout.y)
        name = kernel_name(config, problem)
        function = scope.function(key, name, lambda: self._function(config, problem, layout, name))

        def packed(matrix: Array) -> tuple[Array, ...]:
            made = pack(torch.from_numpy(matrix.astype(np.float32)).to(rounded))
            return made.values, made.metadata

        inputs = [x, *scope.packed(product.matrix, element, packed)]
        if product.bias is not None:
            inputs.append(scope.bias(product.bias, "float32"))
        return scope.called(function, inputs, layout.shape, str(product.output.ty.dtype), product)

    def _config(self, product: Product, element: str) -> KernelConfig:
        """The tile for the number of rows, with as many stages as the architecture has memory for."""
        images = product.window is not None and product.window.layout == "NCHW"
        rows = self._rows(product)
        config = default_config(
            tile_for(max(rows, _FEWEST_PIXELS) if images else rows, product.out),
            element,
            epilogue=Epilogue(bias=product.bias is not None, activation=product.activation),
            out_dtype=_OUTPUTS[str(product.output.ty.dtype)],
            layout="nchw" if images else "rows",
        )
        while config.stages > 2 and config.refusal(self.arch):
            config = replace(config, stages=config.stages - 1)
        return config

    def _layout(self, product: Product, x: Any, scope: Scope) -> tuple[Any, _Layout]:
        if product.window is None:
            x, tokens = scope.rows(x, product.k)
            known = fixed(tokens)
            count = "tokens" if known is None else known
            return x, _Layout(None, (count, product.k), (count, product.out), [tokens, product.out])
        return x, _images(product.window, product.out, list(x.ty.shape.values))

    def _function(self, config: KernelConfig, problem: Problem, layout: _Layout, name: str) -> Any:
        dtype = PRODUCTS[config.dtype][0]
        out_dtype = next(own for own, short in _OUTPUTS.items() if short == config.out_dtype)
        steps = config.element.steps
        tensors = {
            "x": Tensor(layout.x, dtype),
            "weight": Tensor((problem.row_tiles, problem.units, steps, 32, 16), "uint8"),
            "metadata": Tensor((problem.row_tiles, problem.units, 32), "uint32"),
            **({"bias": Tensor((problem.out,), "float32")} if config.epilogue.bias else {}),
            "d": Tensor(layout.y, out_dtype),
        }

        def run_time(varying: Mapping[str, Number]) -> tuple[Mapping[str, Number], Sequence[Number]]:
            scalars = layout.scalars(varying)
            nchw = config.layout == "nchw"
            rows = scalars["pixels" if nchw else "tokens"]
            return scalars, grid(config, problem, rows, scalars["batch"] if nchw else 1)

        made = emit_function(
            signature(config, problem, name), tensors, run_time, body_of(config, problem), self.target
        )
        return made.with_attrs({"tirx.is_scheduled": True, "op_pattern": _OPAQUE})


@dataclass(frozen=True, slots=True)
class _Layout:
    """Shapes of a kernel's input and output, by number or by name, and the output's as an expression."""

    conv: Conv | None
    x: tuple[int | str, ...]
    y: tuple[int | str, ...]
    shape: list[Any]
    axes: str = ""

    def scalars(self, varying: Mapping[str, Number]) -> Mapping[str, Number]:
        """The kernel's integers, from the sizes that vary."""

        def value(size: int | str) -> Number:
            return varying[size] if isinstance(size, str) else size

        if self.conv is None:
            return {"tokens": value(self.x[0])}
        given = {axis: value(size) for axis, size in zip(self.axes, self.x, strict=True)}
        made = {axis: value(size) for axis, size in zip(self.axes, self.y, strict=True)}
        pixels = made["H"] * made["W"]
        return {
            "batch": given["N"],
            "height": given["H"],
            "width": given["W"],
            "out_height": made["H"],
            "out_width": made["W"],
            "pixels": pixels,
            "tokens": given["N"] * pixels,
        }


def _images(window: Window, out: int, shape: list[Any]) -> _Layout:
    top, left, _, _ = window.padding
    conv = Conv(window.channels, window.kernel, window.stride, (top, left), window.dilation)
    given = dict(zip(window.layout, shape, strict=True))
    high, wide = output_size(window, given["H"], given["W"])
    made = {"N": given["N"], "C": out, "H": high, "W": wide}
    x_names = {"N": "batch", "C": "channels", "H": "height", "W": "width"}
    y_names = {"N": "batch", "C": "out", "H": "out_height", "W": "out_width"}

    def named(expressions: Mapping[str, Any], names: Mapping[str, str]) -> tuple[int | str, ...]:
        known = {
            axis: value if isinstance(value, int) else fixed(value) for axis, value in expressions.items()
        }
        return tuple(names[axis] if (size := known[axis]) is None else size for axis in window.layout)

    return _Layout(
        conv,
        named(given, x_names),
        named(made, y_names),
        [made[axis] for axis in window.layout],
        window.layout,
    )

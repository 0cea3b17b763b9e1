"""2:4 products on processors: the functions of ``llvm``, in the model's own element type."""

from __future__ import annotations

from typing import Any

from sparsecc.targets.relax.graph import fixed
from sparsecc.targets.relax.llvm import Spec, function_of, output_size
from sparsecc.targets.relax.packing import pack_rows
from sparsecc.targets.relax.product import Product
from sparsecc.targets.relax.scope import Scope


class OnLlvm:
    """Every 2:4 product becomes a function of packed weights."""

    def choose(self, product: Product) -> tuple[bool, str]:
        """Always yes."""
        return True, f"from packed weights, in {product.dtype}"

    def call(self, product: Product, x: Any, scope: Scope) -> Any:
        """The call of a function with values, index and bias as constants."""
        x, given, shape = _arguments(product, x, scope)
        out_dtype = str(product.output.ty.dtype)
        spec = Spec(
            product.out,
            product.k,
            product.dtype,
            out_dtype,
            product.bias is not None,
            product.activation,
            tuple(fixed(size) for size in given),
            product.window,
        )
        name = f"sparse24_{product.out}x{product.k}_{product.activation}"
        function = scope.function(spec, name, lambda: function_of(spec))
        inputs = [x, *scope.packed(product.matrix, "rows", pack_rows)]
        if product.bias is not None:
            inputs.append(scope.bias(product.bias, spec.sums))
        return scope.called(function, inputs, shape, out_dtype, product)


def _arguments(product: Product, x: Any, scope: Scope) -> tuple[Any, list[Any], list[Any]]:
    """The function's x, the sizes of it that may vary, and the shape of its output."""
    if product.window is None:
        x, tokens = scope.rows(x, product.k)
        return x, [tokens], [tokens, product.out]
    named = dict(zip(product.window.layout, x.ty.shape.values, strict=True))
    high, wide = output_size(product.window, named["H"], named["W"])
    made = {"N": named["N"], "C": product.out, "H": high, "W": wide}
    return x, [named[axis] for axis in "NHW"], [made[axis] for axis in product.window.layout]

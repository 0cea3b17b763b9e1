"""What a back end writes a call with: the rewritten function, and the functions and constants it shares."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsecc.targets.relax.graph import fixed
from sparsecc.targets.relax.product import Array, Product


@dataclass(eq=False, slots=True)
class Scope:
    """Where calls are written.  Equal functions and equal weights are stored once in a module."""

    relax: Any
    builder: Any
    functions: dict[Hashable, Any] = field(default_factory=dict)
    constants: dict[Hashable, tuple[Any, ...]] = field(default_factory=dict)

    def function(self, key: Hashable, name: str, make: Callable[[], Any]) -> Any:
        """The module's function for ``key``, added under a name like ``name`` when it is first asked for."""
        if key not in self.functions:
            self.functions[key] = self.builder.add_func(make(), name)
        return self.functions[key]

    def packed(self, matrix: Array, kind: str, pack: Callable[[Array], tuple[Array, ...]]) -> tuple[Any, ...]:
        """A matrix as the constants that ``pack`` makes of it."""
        plain = np.ascontiguousarray(matrix)
        digest = hashlib.sha256(plain.tobytes()).hexdigest()
        key = (kind, matrix.shape, matrix.dtype.name, digest)
        if key not in self.constants:
            self.constants[key] = tuple(self.constant(part) for part in pack(plain))
        return self.constants[key]

    def bias(self, values: Array, dtype: str) -> Any:
        """One number for each output feature, as a constant of type ``dtype``."""
        return self.packed(values.astype(dtype), "bias", lambda plain: (plain,))[0]

    def constant(self, values: Array) -> Any:
        """An array as a constant of its own type."""
        return self.relax.const(np.ascontiguousarray(values), str(values.dtype.name))

    def emit(self, expression: Any) -> Any:
        """The variable that an expression is bound to."""
        return self.builder.emit(expression)

    def rows(self, x: Any, k: int) -> tuple[Any, Any]:
        """x [*, k] as a matrix [tokens, k], and the number of tokens: a number or an expression."""
        sizes = list(x.ty.shape.values)
        tokens = math.prod(known if (known := fixed(size)) is not None else size for size in sizes[:-1])
        return (x if len(sizes) == 2 else self.emit(self.relax.op.reshape(x, (tokens, k)))), tokens

    def called(self, function: Any, inputs: list[Any], shape: list[Any], dtype: str, product: Product) -> Any:
        """The call of a function, in the shape that the product's readers expect."""
        made = self.relax.call_tir(function, inputs, self.relax.TensorType(shape, dtype))
        wanted = product.output.ty.shape.values
        if len(wanted) == len(shape):
            return made
        return self.relax.op.reshape(self.emit(made), list(wanted))

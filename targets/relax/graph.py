"""A Relax function as bindings with who reads what, and the constants in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsecc.targets.cuda.tvm_build import load_tvm
from sparsecc.targets.relax.product import Array


@dataclass(frozen=True, eq=False, slots=True)
class Graph:
    """The bindings of a function's outermost blocks, in order.

    ``values`` are the bound expressions by variable; ``readers`` the variables whose bindings read a
    variable, where None stands for the function's result, for another block, and for anything that is not a
    plain binding.
    """

    values: Mapping[Any, Any]
    readers: Mapping[Any, tuple[Any, ...]]

    @classmethod
    def of(cls, function: Any) -> Graph:
        """Index a function (``relax.Function``); bodies of branches count as readers only."""
        relax = load_tvm().relax
        values: dict[Any, Any] = {}
        readers: dict[Any, list[Any]] = {}
        here: set[Any] = set()  # what the current block has bound

        def read(expression: Any, by: Any) -> None:
            seen: list[Any] = []
            relax.analysis.post_order_visit(expression, seen.append)
            for found in dict.fromkeys(e for e in seen if isinstance(e, relax.Var)):
                readers.setdefault(found, []).append(by if found in here else None)

        for block in function.body.blocks:
            here.clear()
            for binding in block.bindings:
                plain = isinstance(binding, relax.VarBinding)
                if plain:
                    values[binding.var] = binding.value
                read(binding.value, binding.var if plain else None)
                here.add(binding.var)
        here.clear()
        read(function.body.body, None)
        return cls(values, {var: tuple(found) for var, found in readers.items()})

    def call(self, expression: Any, *names: str) -> Any | None:
        """The call of one of the operators ``names`` that an expression is or stands for, else None."""
        value = self.values.get(expression, expression)
        op = getattr(value, "op", None)
        return value if getattr(op, "name", None) in names else None

    def constant(self, expression: Any) -> Array | None:
        """The numbers of an expression, where it is a constant, also transposed or reshaped, else None."""
        value = self.values.get(expression, expression)
        if isinstance(value, load_tvm().ir.GenericConst):
            return np.asarray(value.value.numpy())
        call = self.call(value, *_FOLDED)
        inner = None if call is None else self.constant(call.args[0])
        return None if call is None or inner is None else _FOLDED[call.op.name](inner, call)


def _permuted(values: Array, call: Any) -> Array:
    axes = call.attrs.axes
    return values.transpose(None if axes is None else [int(axis) for axis in axes])


def _reshaped(values: Array, call: Any) -> Array | None:
    shape = sizes(call)
    return None if shape is None or None in shape else values.reshape([size or 0 for size in shape])


_FOLDED: Mapping[str, Callable[[Array, Any], Array | None]] = {
    "relax.permute_dims": _permuted,
    "relax.reshape": _reshaped,
    "relax.astype": lambda values, call: values.astype(str(call.attrs.dtype)),
}


def sizes(expression: Any) -> list[int | None] | None:
    """The sizes of a tensor, None for those that vary; None where not even their number is known."""
    shape = getattr(expression.ty, "shape", None)
    values = getattr(shape, "values", None)
    return None if values is None else [fixed(size) for size in values]


def fixed(size: Any) -> int | None:
    """A size as a number, None where it varies."""
    value = getattr(size, "value", None)
    return value if isinstance(value, int) else None

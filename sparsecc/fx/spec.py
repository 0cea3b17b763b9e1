"""What table entries are made of: canonical calls, arguments by name, sizes as numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node


class Spec(NamedTuple):
    """A canonical call without its names: operands are FX nodes or None."""

    op: str
    operands: Sequence[Node | None]
    attrs: dict[str, Any] = {}  # noqa: RUF012


Bound = dict[str, Any]
Entry = Callable[[Bound, "Shapes"], Spec]


class Size(NamedTuple):
    """A size of an FX value.

    ``number`` stands for it: every symbol is a prime of its own.  ``example``: for the example input.
    ``varies``: it depends on the inputs; torch.export writes some that do not as expressions.
    """

    number: int
    example: int
    varies: bool


class Shapes:
    """Sizes of FX values; ``halved``: of an example whose batch of one is twice in what was captured."""

    def __init__(self, *, halved: bool = False) -> None:
        self.halved = halved
        self._cache: dict[Any, Size] = {}
        self._symbols: dict[Any, int] = {}

    def size(self, value: Any) -> Size:
        """A size, given as a number or as torch's symbolic one."""
        if isinstance(value, int):
            return Size(value, value, False)
        expression = value.node.expr
        found = self._cache.get(expression)
        if found is None:
            for symbol in sorted(expression.free_symbols, key=str):
                self._symbols.setdefault(symbol, _PRIMES[len(self._symbols) % len(_PRIMES)])
            number = int(expression.xreplace(self._symbols))
            varies = value.node.maybe_as_int() is None
            example = int(value.node.hint or number)
            if self.halved and value.node.hint:
                example = int(expression.xreplace(dict.fromkeys(expression.free_symbols, 1))) or example
            found = self._cache[expression] = Size(number, example, varies)
        return found

    def shape(self, value: Any) -> tuple[int, ...]:
        """Representative shape of a fake tensor."""
        return tuple(n if type(n) is int else self.size(n).number for n in value.shape)

    def of(self, node: Node) -> tuple[int, ...]:
        """Representative shape of a node's single result."""
        return self.shape(node.meta["val"])

    def rank(self, node: Node) -> int:
        """Number of axes of a node's result."""
        return int(node.meta["val"].dim())

    def contiguous(self, value: Any) -> bool:
        """Whether the strides of a fake tensor are those of its sizes, the last axis fastest."""
        expected = 1
        for size, stride in zip(reversed(self.shape(value)), reversed(value.stride()), strict=True):
            if size != 1 and self.size(stride).number != expected:
                return False
            expected *= size
        return True

    def argument(self, value: Any) -> Any:
        """An int, a symbolic int or a node that computes one, as a number."""
        if isinstance(value, Node):
            value = value.meta["val"]
        return value if isinstance(value, (int, float)) or value is None else self.size(value).number


_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)


#: what ``Bound`` calls the node itself, which is no argument
NODE = "node"


def results_read(b: Bound) -> set[int]:
    """Places of the results, of an operator with several, that some other node reads."""
    users = [u for u in b[NODE].users if u.users or u.target is not operator.getitem]
    return {u.args[1] for u in users} if all(u.target is operator.getitem for u in users) else set(range(9))


def tensors(bound: Bound) -> list[Node]:
    """Every tensor argument, in order."""
    found: list[Node] = []
    for name, value in bound.items():
        if name == NODE:
            continue
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor):
                found.append(leaf)
    return found


def operand(b: Bound) -> Node:
    """The tensor that an operator works on, whatever its schema calls it."""
    found: Node = next(b[name] for name in ("self", "input", "A", "x") if isinstance(b.get(name), Node))
    return found


def ints(value: Any) -> list[int]:
    """One integer or several, as a list."""
    return [value] if isinstance(value, int) else list(value)


def words(text: str) -> list[str]:
    """Names separated by white space."""
    return text.split()


def elementwise(b: Bound, _: Shapes) -> Spec:
    """Every tensor argument, broadcast."""
    return Spec("elementwise", tensors(b))


def whole(op: str, why: str, b: Bound) -> Spec:
    """A use of an operator that no rule covers: every axis that it touches stays, and ``why`` is reported."""
    return Spec(op, tensors(b), {"why": why})


def same(op: str, *names: str, **attrs: str) -> Entry:
    """Operands and attributes straight from the schema."""

    def entry(b: Bound, s: Shapes) -> Spec:
        values = {
            k: s.argument(b[v]) if not isinstance(b[v], (list, tuple)) else b[v] for k, v in attrs.items()
        }
        return Spec(op, [b.get(n) for n in names], values)

    return entry

"""Where a call stands in a random network, and what it may take from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tests.random_nets import Net

aten: Any = torch.ops.aten

KINDS = ("image", "sequence", "series", "volume", "table")
SPATIAL = {"image": 2, "series": 1, "volume": 3}
ALL, SPACE = KINDS, ("image", "series", "volume")
LAST = ("sequence", "table")


class Site:
    """Where a call stands: its network, its operand, and a number that makes its choices."""

    def __init__(self, net: Net, x: Tensor, number: int) -> None:
        self.net = net
        self.x = x
        self._number = number
        self.variant = "plain"
        self.dropout = False

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options, by the next digits of the number."""
        self._number, rest = divmod(self._number, len(options))
        return options[rest]

    @property
    def channel(self) -> int:
        """The axis of channels."""
        return self.net.channel(self.x)

    @property
    def width(self) -> int:
        """How many channels there are."""
        return int(self.x.shape[self.channel])

    @property
    def spatial(self) -> int:
        """How many axes lie behind the channels."""
        return SPATIAL.get(self.net.kind, 0)

    def sizes(self) -> list[int]:
        """Width and what comes after it, as plain numbers."""
        return [int(n) for n in self.x.shape[1:]]

    def vector(self) -> Tensor:
        """A parameter along the channels that broadcasts to the operand."""
        shape = [1] * (self.x.dim() - self.channel)
        shape[0] = self.width
        return self.net.weight(*shape)

    def divisor(self) -> int:
        """A divisor of the width."""
        return int(self.pick([d for d in range(1, self.width + 1) if self.width % d == 0]))


Recipe = Callable[[Site], Any]
#: kinds of networks that can hold a call, and the call
Row = tuple[Sequence[str], Recipe]


def numbers(s: Site, count: int) -> Tensor:
    """Places along an axis: a buffer."""
    return s.net.buffer(torch.tensor([s.pick(range(count)) for _ in range(3)]))


def square(s: Site) -> Tensor:
    """The operand as [N,T,C]."""
    return s.x if s.x.dim() == 3 else s.x.unsqueeze(1)


def roomy(x: Tensor) -> Tensor:
    """An operand, enlarged where an axis of space has one position only."""
    return x if min(x.shape[2:]) > 1 else F.interpolate(x, scale_factor=2)


def apart(s: Site) -> Tensor:
    """The operand, moved so that along no axis two numbers are alike but for rounding.

    What sorts, rounds or compares may not read others: two ways of summing would tell them apart.
    """
    samples = torch.arange(s.x.shape[0]).reshape(-1, *[1] * (s.x.dim() - 1))
    return s.x + s.net.weight(*s.sizes()) * 0.1 + samples * s.net.weight(1) * 0.1


def parts(made: Any) -> list[Tensor]:
    return [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, Tensor)]


def operand(s: Site) -> Tensor:
    """Another tensor of the same form: computed, or a parameter."""
    return s.pick([lambda: torch.sin(s.x) * 0.7, s.vector, lambda: s.net.weight(1)])()  # type: ignore[no-any-return]


def compared(s: Site) -> Tensor:
    return s.x > s.vector()


def each(kinds: Sequence[str], make: Callable[[Site, str], Any], names: str) -> dict[str, Row]:
    """Entries of a table for operators whose calls differ by name alone."""
    return {name: (kinds, lambda s, name=name: make(s, name)) for name in names.split()}  # type: ignore[misc]

"""Which values hold positions of an axis (the experts that tokens are sent to), and who may read them.

Where an axis shrinks, an operator that finds positions of it while the model runs finds them in the new
numbering by itself.  That is right as long as they are only moved, looked up along the same axis, or counted
along it; whoever computes anything else with them pins the axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.axes.terms import Reason, Term, resolve
from sparsecc.axes.unify import freeze
from sparsecc.graph import Call, Value, View

#: operators that move what they read, and change none of it
_MOVES = frozenset(
    {"layout", "reshape", "expand", "repeat_interleave", "tile", "split", "unbind", "select", "slice"}
)
_COPIES = frozenset({"to", "_to_copy", "type_as", "contiguous", "detach", "alias", "clone", "lift_fresh"})
#: dtypes that hold every position of an axis that fits in memory
_WIDE = frozenset({"int64", "int32", "float32", "float64"})


@dataclass(frozen=True)
class Route:
    """An axis of which an operator picks ``count`` positions; ``reason`` freezes it where that is all."""

    term: Term
    count: int
    reason: Reason


class Positions:
    """What is known of values that hold positions.

    ``holds`` maps a value to the axis, ``counted`` are values that say along an axis how often its positions
    occurred (so that removed ones occur never), ``routes`` are the axes that positions are picked from, and
    ``shares`` axes along which something is normalised (by which experts are weighed).
    """

    def __init__(self) -> None:
        self.holds: dict[Value, Term] = {}
        self.counted: set[Value] = set()
        self.routes: list[Route] = []
        self.shares: list[Term] = []
        self._followed: set[tuple[Call, int]] = set()

    def followed(self, call: Call, index: int) -> Term | None:
        """The axis whose positions an operand holds, for a rule that lets them be renumbered."""
        value = call.inputs[index]
        term = None if value is None else self.holds.get(value)
        if term is not None:
            self._followed.add((call, index))
        return term

    def after(self, call: Call, view: View, failed: bool) -> None:
        """Carry positions through a call that moves them; pin the axes of those that it computes with."""
        if not self.holds:
            return
        copies = view.semantics is not None and view.semantics.function(call) in _COPIES
        moves = call.op in _MOVES or (call.op == "elementwise" and len(call.inputs) == 1 and copies)
        whole = all(v.dtype in _WIDE for v in call.outputs)
        for index, value in enumerate((*call.inputs, *call.attrs.get("unlisted", ()))):
            term = None if value is None else self.holds.get(value)
            if term is None or ((call, index) in self._followed and not failed):
                continue
            if moves and whole and index == 0 and not failed:
                self.holds.update(dict.fromkeys(call.outputs, term))
            else:
                freeze(term, Reason("position", f"{call.describe()} computes with positions of this axis"))
        if moves and whole and call.inputs[0] in self.counted:
            self.counted.update(call.outputs)

    def settle(self, view: View, axes: dict[Value, tuple[Term, ...]]) -> None:
        """Pin axes whose positions the graph puts out, and those that are picked from for anything else than
        matrices stacked along them; the others keep their order.
        """
        for value in view.outputs:
            if value in self.holds:
                freeze(self.holds[value], Reason("graph output", f"{value.name!r} holds positions"))
        stacks = stacked(view, axes) if self.routes else set()
        for route in self.routes:
            if resolve(route.term) in stacks:
                resolve(route.term).picked = True
            else:
                freeze(route.term, route.reason)

    def least(self, term: Term) -> int:
        """How many positions of an axis have to stay, so that as many can be picked."""
        return max([1, *(r.count for r in self.routes if resolve(r.term) is resolve(term))])

    def experts(self, view: View, axes: dict[Value, tuple[Term, ...]]) -> set[Term]:
        """Atoms along which matrices are stacked, and among which a router chooses or weighs."""
        chosen = {resolve(t) for t in (*(r.term for r in self.routes), *self.shares)}
        return stacked(view, axes) & chosen if chosen else chosen


def stacked(view: View, axes: dict[Value, tuple[Term, ...]]) -> set[Term]:
    """Atoms that are one whole axis of a parameter of matrices, [E,K,N]; kernels of convolutions are none."""
    kernels = {v for c in view.calls if c.op.startswith("conv") for v in c.inputs[1:2]}
    weights = [v for n, v in view.weights.items() if n in view.parameters and v not in kernels]
    found = {resolve(t) for v in weights if len(v.shape) > 2 for t in axes[v]}
    return {t for t in found if t.kind == "atom" and t.size > 1}

"""Which positions can go without changing what a model computes, and what has to be written for it.

Backwards over the graph: all positions of all groups are supposed to go, and come back where a
contraction or reduction needs them, until nothing changes (the greatest set that is consistent).
A contraction can do without a position if its weights there are zero for every output that stays,
if the position always holds zero, or if it holds a constant whose share can be added once and for
all to a bias, to the running mean of the BatchNorm that follows, or to a constant that is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.solver import Facts
from sparsecc.axes.terms import Keep, Term, as_mask, fold, keep_mask, resolve
from sparsecc.constants import Constants, Product
from sparsecc.graph import Call, Value
from sparsecc.plan import Skip, Write


@dataclass(frozen=True, slots=True, eq=False)
class Slimming:
    """Kept positions by group name, the weights that absorb constants, and what could not go."""

    kept: Mapping[str, Keep]
    writes: tuple[Write, ...]
    skips: tuple[Skip, ...]


def slimming(analysis: Analysis) -> Slimming:
    """Everything that can be removed from a model without changing its outputs.

    Raises UnsupportedModel where the model has no values (meta device).
    """
    return _Search(analysis).result()


@dataclass(slots=True, eq=False)
class _Need:
    """Positions of an axis that a call needs, and why some constants cannot be folded."""

    needed: Keep
    blocked: Keep
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Sink:
    """A weight that can take a constant: ``weight += factor * shares`` along ``axis``."""

    value: Value
    axis: int
    factor: float


@dataclass(eq=False)
class _Search:
    analysis: Analysis
    gone: dict[Term, Keep] = field(default_factory=dict)
    _memo: dict[int, Keep | None] = field(default_factory=dict)
    _hidden: dict[tuple[Value, int], Keep] = field(default_factory=dict)
    _shares: dict[Call, tuple[bytes, Keep]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants = Constants(self.analysis)
        self.solver = self.analysis.solver
        self.view = self.analysis.view
        self.uses: Counter[Value] = Counter(v for c in self.view.calls for v in c.inputs if v is not None)
        self.uses.update(self.view.outputs)
        self.readers: dict[Value, list[tuple[Call, int]]] = {}
        for call in self.view.calls:
            for index, value in enumerate(call.inputs):
                if value is not None:
                    self.readers.setdefault(value, []).append((call, index))
        self.gone = {resolve(g.term): np.ones(g.size, bool) for g in self.analysis.groups}
        self.calls = [(c, self.solver.facts[c]) for c in self.view.calls if c in self.solver.facts]

    def result(self) -> Slimming:
        for call, _ in reversed(self.calls):  # from the end, so that no chain of readers is followed far
            product = self.constants.product(call)
            if product is not None:
                self._outputs(call, product)
        self._settle()
        self.emptied = [g for g in self.analysis.groups if self.gone[resolve(g.term)].all()]
        for group in self.emptied:
            self.gone[resolve(group.term)][0] = False  # an axis needs at least one position
        self._settle()
        before = -1
        while before != (before := sum(int(gone.sum()) for gone in self.gone.values())):
            for name, kept in self.analysis.feasible(self._kept()).items():
                gone = self.gone[resolve(self.analysis.group(name).term)]
                gone &= ~as_mask(kept, len(gone))
            self._settle()
        return Slimming(self._kept(), tuple(self._writes()), tuple(self._skips()))

    def _kept(self) -> dict[str, Keep]:
        """What stays of every group that loses something."""
        return {g.name: ~gone for g in self.analysis.groups if (gone := self.gone[resolve(g.term)]).any()}

    # -- the search ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        self._memo = {}
        changed = True
        while changed:
            changed = False
            for call, facts in reversed(self.calls):
                for term, need in self._needs(call, facts):
                    changed |= self._restore(term, need.needed)

    def _restore(self, term: Term, needed: Keep) -> bool:
        kept = self.mask(term)
        if kept is None or not (back := needed & ~kept).any():
            return False
        for part, hit in self._spread(term, back):
            self.gone[part] &= ~hit
        self._memo = {}
        return True

    def _spread(self, term: Term, positions: Keep) -> Iterator[tuple[Term, Keep]]:
        """The positions of every removable atom that make up positions of an axis."""
        found: dict[Term, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
        fold(term, positions.astype(np.float64), found)
        for part, counts in found.items():
            if part in self.gone:
                yield part, counts > 0

    def mask(self, term: Term) -> Keep | None:
        """Positions of an axis that stay at this point of the search; None means all."""
        if not self._memo:
            self._keeps = {t: ~gone for t, gone in self.gone.items() if gone.any()}
        return keep_mask(term, self._keeps, self._memo)

    # -- what calls need ----------------------------------------------------------------------------

    def _needs(self, call: Call, facts: Facts) -> Iterator[tuple[Term, _Need]]:
        for index, dim in facts.contractions:
            term = self._axis(call, index, dim)
            if self.mask(term) is not None or self._final:
                yield term, self._contraction(call, index, dim)
        for index, dim in facts.reductions:
            term = self._axis(call, index, dim)
            if self.mask(term) is not None or self._final:
                yield term, self._reduction(call, index, dim, term)

    _final: bool = False

    def _axis(self, call: Call, index: int, dim: int) -> Term:
        axes = self.solver.of(call, index)
        return axes[dim % len(axes)]

    def _contraction(self, call: Call, index: int, dim: int) -> _Need:
        product = self.constants.product(call)
        if product is not None:
            return self._product(call, product)
        size = resolve(self._axis(call, index, dim)).size
        free = np.zeros(size, bool)
        if "zeros" in call.attrs:  # quantised: 0 is not what stands for 0
            return _Need(~free, np.zeros(size, bool))
        for operand, axis in _contracted(call, self.solver.facts[call], index, dim):
            free |= self._ignored(call, operand, axis, size)
        return _Need(~free, np.zeros(size, bool))

    def _ignored(self, call: Call, operand: int, axis: int, size: int) -> Keep:
        """Positions where an operand is zero at everything that stays of its other axes."""
        value = call.inputs[operand]
        if value is None or value.shape[axis] != size:
            return np.zeros(size, bool)
        found = self.constants.full(value)
        if found is None:
            known, numbers = self.constants.vector(value, axis)
            return np.asarray((known & (numbers == 0)).numpy())
        found = found != 0
        for other, term in enumerate(self.solver.of(call, operand)):
            kept = self.mask(term) if other != axis % found.dim() else None
            if kept is not None:
                found = found.index_select(other, torch.from_numpy(np.flatnonzero(kept)))
        return np.asarray(~found.movedim(axis, 0).reshape(size, -1).any(1).numpy())

    def _product(self, call: Call, product: Product) -> _Need:
        kept = self._outputs(call, product)
        touched = self._touched(call, product, kept)
        known, numbers = self._held(call, product)
        constant = touched & known & (numbers != 0)
        needed = touched & ~known
        nothing = np.zeros(len(touched), bool)
        if not constant.any():
            return _Need(needed, nothing)
        if not product.even:
            reason = f"{call.describe()} sees zeros beside it (padding), so no bias can stand for it"
        elif self._sink(call, product) is None:
            reason = f"{call.describe()} has no bias of its own, and nothing after it, that could take it"
        else:
            return _Need(needed, nothing)
        return _Need(needed | constant, constant, reason)

    def _outputs(self, call: Call, product: Product) -> Keep | None:
        """Outputs that stay and matter; None means all."""
        if product.out is None:
            return None
        out = call.outputs[0]
        kept, silent = (
            self.mask(self.solver.axes[out][product.out]),
            self._silent(out, product.out % len(out.shape)),
        )
        if not silent.any():
            return kept
        return ~silent if kept is None else kept & ~silent

    def _silent(self, value: Value, dim: int) -> Keep:
        """Positions whose content cannot matter to any reader, whatever it is: a zero scale hides it."""
        if (value, dim) not in self._hidden:
            readers = self.readers.get(value, [])
            size = value.shape[dim]
            hidden = np.full(size, bool(readers) and value not in self.view.outputs)
            for call, index in readers:
                if not hidden.any():
                    break
                hidden &= self._hides(call, index, dim, size)
            self._hidden[value, dim] = hidden
        return self._hidden[value, dim]

    def _hides(self, call: Call, index: int, dim: int, size: int) -> Keep:
        """Positions along an axis of an operand that a call makes nothing of, or nothing that matters."""
        nothing = np.zeros(size, bool)
        semantics, product = self.view.semantics, self.constants.product(call)
        if semantics is None or any(v in semantics.overwritten() for v in call.inputs if v is not None):
            return nothing
        if product is not None:
            value = call.inputs[product.x]
            if index != product.x or value is None or dim != product.dim % len(value.shape):
                return nothing
            return ~np.asarray(product.touches().numpy())
        if call.op not in ("batch_norm", "elementwise") or (
            call.op == "batch_norm" and (index, dim) != (0, 1)
        ):
            return nothing
        source, out = call.inputs[index], call.outputs[0]
        if source is None or len(call.outputs) != 1 or out.shape != source.shape:
            return nothing
        hidden = self._silent(out, dim).copy()
        if call.op == "batch_norm" and call.inputs[1] is not None:
            known, numbers = self.constants.vector(call.inputs[1], 0)
            hidden |= np.asarray((known & (numbers == 0)).numpy())
        elif semantics.function(call) == "mul" and len(call.inputs) == 2:
            other = call.inputs[1 - index]
            axis = dim - len(out.shape) + (0 if other is None else len(other.shape))
            if other is not None and other is not source and axis >= 0 and other.shape[axis] == size:
                known, numbers = self.constants.vector(other, axis)
                hidden |= np.asarray((known & (numbers == 0)).numpy())
        return hidden

    def _touched(self, call: Call, product: Product, kept: Keep | None) -> Keep:
        key = b"" if kept is None else kept.tobytes()
        cached = self._shares.get(call)
        if cached is None or cached[0] != key:
            rows = None if kept is None else torch.from_numpy(kept)
            cached = key, np.asarray(product.touches(rows).numpy())
            self._shares[call] = cached
        return cached[1]

    def _held(
        self, call: Call, product: Product
    ) -> tuple[Keep, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        known, numbers = self.constants.vector(call.inputs[product.x], product.dim)
        return np.asarray(known.numpy()), np.asarray(numbers.numpy())

    def _reduction(self, call: Call, index: int, dim: int, term: Term) -> _Need:
        """Reductions read every position; a sum can do without zeros, group norm without whole groups."""
        size = resolve(term).size
        needed, kept = np.ones(size, bool), self.mask(term)
        if call.op == "group_norm" and dim == 1 and index == 0:
            whole = np.ones(size, bool) if kept is None else kept
            needed = np.repeat(whole.reshape(call.attrs["groups"], -1).any(1), size // call.attrs["groups"])
        elif call.op == "reduce" and call.attrs["kind"] == "sum":
            needed = ~self._ignored(call, index, dim, size)
        known, _ = self.constants.vector(call.inputs[index], dim)
        reason = f"{call.describe()} reads every position of it"
        return _Need(needed, needed & np.asarray(known.numpy()), reason)

    # -- folding ------------------------------------------------------------------------------------

    def _sink(self, call: Call, product: Product) -> _Sink | None:
        """The weight that can take constant shares of the outputs of a call."""
        if product.bias is not None:
            bias = call.inputs[product.bias]
            if product.beta and bias is not None and self._own(bias) and self._along(bias, call, product.out):
                return _Sink(bias, len(bias.shape) - 1, 1 / product.beta)
            return None
        out = call.outputs[0]
        if product.out is None or self.uses[out] != 1 or out not in self.readers:
            return None
        reader, index = self.readers[out][0]
        if reader.op == "batch_norm" and index == 0 and product.out % len(out.shape) == 1:
            mean = reader.inputs[3]
            return _Sink(mean, 0, -1.0) if mean is not None and self._own(mean) else None
        return self._added(reader, index, out, product.out % len(out.shape))

    def _own(self, value: Value) -> bool:
        """A stored weight that nothing else reads."""
        semantics = self.view.semantics
        stored = value.weight is not None and semantics is not None and semantics.constant(value) is not None
        return stored and self.uses[value] == 1 and value.dtype.startswith(("float", "bfloat"))

    def _along(self, bias: Value, call: Call, out: int | None) -> bool:
        shape = call.outputs[0].shape
        return (
            out is not None
            and bias.shape[-1:] == (shape[out],)
            and (len(bias.shape) == 1 or out % len(shape) == len(shape) - 1)
        )

    def _added(self, reader: Call, index: int, out: Value, dim: int) -> _Sink | None:
        """``out + w``, for a stored ``w`` with the same channels."""
        semantics = self.view.semantics
        if semantics is None or reader.op != "elementwise" or len(reader.inputs) != 2:
            return None
        factors, other = semantics.factors(reader), reader.inputs[1 - index]
        if semantics.function(reader) != "add" or factors is None or not factors[0] or other is None:
            return None
        axis = dim - len(reader.outputs[0].shape) + len(other.shape)
        if reader.outputs[0].shape != out.shape or axis < 0 or other.shape[axis] != out.shape[dim]:
            return None
        return _Sink(other, axis, factors[0] if index == 1 else 1 / factors[0]) if self._own(other) else None

    def _writes(self) -> Iterator[Write]:
        semantics = self.view.semantics
        for call, facts in self.calls:
            product = self.constants.product(call)
            if product is None or not facts.contractions or semantics is None:
                continue
            kept = self.mask(self._axis(call, *facts.contractions[0]))
            known, numbers = self._held(call, product)
            if kept is None or not product.even:
                continue
            shares = product.sums(torch.from_numpy(np.where(known & ~kept, numbers, 0.0)))
            sink = self._sink(call, product) if bool((shares != 0).any()) else None
            if sink is None:
                continue
            old = semantics.constant(sink.value)
            if old is None or sink.value.weight is None:
                continue
            shape = [1] * old.dim()
            shape[sink.axis] = -1
            new = old.double() + sink.factor * shares.reshape(shape)
            yield Write(sink.value.weight, np.asarray(new.cpu().numpy()))

    # -- what stays, and why ------------------------------------------------------------------------

    def _skips(self) -> Iterator[Skip]:
        """Constant positions that had to stay although nobody needs more of them than a number."""
        self._final = True
        live = {t: np.zeros(t.size, bool) for t in self.gone}
        blocked: dict[Term, dict[str, Keep]] = {t: {} for t in self.gone}
        for call, facts in self.calls:
            for term, need in self._needs(call, facts):
                for part, hit in self._spread(term, need.needed & ~need.blocked):
                    live[part] |= hit
                if need.blocked.any():
                    for part, hit in self._spread(term, need.blocked):
                        found = blocked[part].setdefault(need.reason, np.zeros(part.size, bool))
                        found |= hit
        for group in self.analysis.groups:
            yield from self._told(group, live[resolve(group.term)], blocked[resolve(group.term)])

    def _told(self, group: Group, live: Keep, blocked: Mapping[str, Keep]) -> Iterator[Skip]:
        if group in self.emptied:
            yield Skip(
                f"{group.name} position 0", "nothing of this group is needed, but an axis keeps one position"
            )
        for reason, hit in blocked.items():
            stuck = np.flatnonzero(hit & ~live & ~self.gone[resolve(group.term)])
            if len(stuck):
                listed = ", ".join(map(str, stuck[:8])) + (", ..." if len(stuck) > 8 else "")
                yield Skip(f"{group.name} positions {listed}", f"constant, but {reason}")


def _contracted(call: Call, facts: Facts, index: int, dim: int) -> Iterator[tuple[int, int]]:
    """Every (operand, axis) that a contraction multiplies along; zeros in any of them are enough."""
    yield index, dim
    for pair in facts.matched:
        if (index, dim) in pair:
            yield pair[pair[0] == (index, dim)]
    if call.op == "attention" and index == 0:
        yield 1, dim

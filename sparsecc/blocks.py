"""Residual blocks: found by dominance on the graph, ranked, and what disappears with them.

A block is a sum ``y = x + f(x)``: every value of the branch f is read only inside of it or by the
sum (the sum post-dominates the branch), the branch starts at x, and y has the axes of x.  Values of other
kinds (masks, rotations, a memory) may enter the branch, but none leaves it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsecc.axes.analysis import Analysis, Group
from sparsecc.axes.terms import atoms, resolve
from sparsecc.errors import InvalidOption
from sparsecc.graph import Call, Value, View
from sparsecc.plan import Action, Bypass, Fold, Skip
from sparsecc.saliency import Saliency


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """``output = source + branch``; ``calls`` compute the branch, ``weights`` are what they read."""

    name: str
    add: Call
    source: Value
    branch: Value
    calls: tuple[Call, ...]
    weights: tuple[str, ...]

    @property
    def output(self) -> Value:
        """The sum."""
        return self.add.outputs[0]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Calls (by name) and weights that nothing reads once blocks are bypassed."""

    calls: frozenset[str]
    weights: frozenset[str]


# -- finding blocks ---------------------------------------------------------------------------------


def residual_blocks(analysis: Analysis) -> tuple[list[Block], list[Skip]]:
    """All residual blocks in graph order, nested ones included, and sums that had to be left alone."""
    view = analysis.view
    place = {c: i for i, c in enumerate(view.calls)}
    producer = {v: c for c in view.calls for v in c.outputs}
    readers: dict[Value, list[Call]] = {}
    for call in view.calls:
        for value in call.inputs:
            if value is not None:
                readers.setdefault(value, []).append(call)
    overwritten = view.semantics.overwritten() if view.semantics is not None else frozenset()
    changed = view.semantics.overwritten(read_later=False) if view.semantics is not None else frozenset()
    outputs = set(view.outputs)
    found: list[tuple[Call, Value, Value, list[Call]]] = []
    skips: list[Skip] = []
    for call in view.calls:
        for operand, branch in _sums(view, call):
            chain = copies(view, operand, producer)
            source = chain[-1]
            region = _region(call, source, branch, producer, readers, outputs, place)
            if not _branches(view, region, chain, producer) or _enters(chain, region):
                continue
            if not _same_axes(analysis, source, call.outputs[0]):
                continue
            touched = {*chain, branch, *call.outputs, *(v for c in region for v in c.outputs)}
            inside = {call, *region}
            shared = (
                source.kind == "input" or source in outputs or any(r not in inside for r in readers[source])
            )
            if touched & overwritten or (shared and changed & set(call.outputs)):
                reason = "a value of the block is changed in place while others read it"
                skips.append(Skip(call.describe(), reason))
                continue
            found.append((call, source, branch, region))
            break
    return list(_named(found)), skips


def _sums(view: View, call: Call) -> Iterator[tuple[Value, Value]]:
    """(x, f) for every way to read a call as x + f."""
    if call.op != "elementwise" or len(call.inputs) != 2 or view.semantics is None:
        return
    factors = view.semantics.factors(call) if view.semantics.function(call) == "add" else None
    left, right = call.inputs
    if factors is None or left is None or right is None or left is right:
        return
    yield left, right
    if factors[0] == 1:
        yield right, left


def _region(
    add: Call,
    source: Value,
    branch: Value,
    producer: dict[Value, Call],
    readers: dict[Value, list[Call]],
    outputs: set[Value],
    place: dict[Call, int],
) -> list[Call]:
    """Calls whose results reach nothing but ``branch``, later ones decided before earlier ones."""
    inside: set[Call] = {add}
    queue: list[tuple[int, Call]] = []
    seen: set[Call] = set()

    def push(value: Value | None) -> None:
        call = producer.get(value) if value is not None and value is not source else None
        if call is not None and call not in seen and source not in call.outputs:
            seen.add(call)
            heapq.heappush(queue, (-place[call], call))

    push(branch)
    while queue:
        _, call = heapq.heappop(queue)
        if any(v in outputs or any(r not in inside for r in readers.get(v, ())) for v in call.outputs):
            continue
        inside.add(call)
        for value in call.inputs:
            push(value)
    return sorted(inside - {add}, key=place.__getitem__)


def _same_axes(analysis: Analysis, source: Value, output: Value) -> bool:
    if source.kind not in ("node", "input") or source.dtype != output.dtype or source.shape != output.shape:
        return False
    ours, theirs = analysis.axes(source), analysis.axes(output)
    return all(resolve(a) is resolve(b) or a.size == b.size == 1 for a, b in zip(ours, theirs, strict=True))


_COPIES = frozenset(
    {"to", "_to_copy", "type_as", "contiguous", "detach", "alias", "clone", "lift_fresh", "identity", "cast"}
)
_DROPS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "native_dropout"})


def copies(view: View, value: Value, producer: Mapping[Value, Call]) -> list[Value]:
    """The value, what it is a copy of, what that is a copy of, ... (casts to the same type, idle dropout)."""
    chain = [value]
    while view.semantics is not None:
        call = producer.get(chain[-1])
        source = call.inputs[0] if call is not None and len(call.inputs) == 1 else None
        if call is None or source is None or call.op != "elementwise":
            break
        if (source.shape, source.dtype) != (chain[-1].shape, chain[-1].dtype) or source.kind not in (
            "node",
            "input",
        ):
            break
        name = view.semantics.function(call)
        if name not in _COPIES and not (name in _DROPS and view.semantics.deterministic(call)):
            break
        chain.append(source)
    return chain


def _branches(
    view: View, region: Sequence[Call], chain: Sequence[Value], producer: Mapping[Value, Call]
) -> bool:
    """Whether a region starts at the source and has matrices of its own."""
    copying = {producer[v] for v in chain[:-1]}
    starts = any(v in chain for c in region if c not in copying for v in c.inputs)
    return starts and any(n in view.parameters for n in _matrix_names(region))


def _enters(chain: Sequence[Value], region: Sequence[Call]) -> bool:
    """Whether a branch also starts at another value of its source's shape: then nothing dominates it."""
    made = {v for c in region for v in c.outputs} | set(chain)
    entering = {v for c in region for v in c.inputs if v is not None and v.kind in ("node", "input")} - made
    return any((v.shape, v.dtype) == (chain[0].shape, chain[0].dtype) for v in entering)


def _named(found: Sequence[tuple[Call, Value, Value, list[Call]]]) -> Iterator[Block]:
    """Blocks are called after what their matrices have in common, or after their sum.

    Where that is one name for several, the first part that differs follows: ``layers.0[attn]``.
    """
    paths = [list(_matrix_names(region)) for _, _, _, region in found]
    common = [common_path(names) for names in paths]
    names = [
        f"{name}[{first_part(own[0], name)}]" if name and common.count(name) > 1 else name or found[i][0].name
        for i, (name, own) in enumerate(zip(common, paths, strict=True))
    ]
    for (add, source, branch, region), name in zip(found, names, strict=True):
        weights = dict.fromkeys(
            v.weight for c in region for v in c.inputs if v is not None and v.weight is not None
        )
        unique = name if names.count(name) == 1 else f"{name}[{add.name}]"
        yield Block(unique, add, source, branch, tuple(region), tuple(weights))


def _matrix_names(region: Iterable[Call]) -> Iterator[str]:
    for call in region:
        for value in call.inputs:
            if value is not None and value.weight is not None and len(value.shape) > 1:
                yield value.weight


def first_part(name: str, path: str) -> str:
    """The part of a dotted name that follows a path."""
    return name.replace("/", ".").strip(".").removeprefix(f"{path}.").partition(".")[0]


def common_path(names: Sequence[str]) -> str:
    """The longest dotted (or slashed) path that all names lie under."""
    split = [n.replace("/", ".").strip(".").split(".")[:-1] for n in names]
    out = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return ".".join(out)


# -- ranking them -----------------------------------------------------------------------------------

#: scores of blocks; higher ones are kept
BlockSaliency = Callable[[Analysis, Sequence[Block], Saliency], list[float]]

_ROWS = {"linear": (1, 0), "conv": (1, 0), "conv_transpose": (1, 1), "matmul": (1, -1), "addmm": (2, -1)}


def magnitude(analysis: Analysis, block: Block, saliency: Saliency) -> float:
    """How large the branch's last matrices make its outputs: root mean square of their rows' magnitudes.

    Scales between the last matrix and the sum count: a BatchNorm's gamma over its deviation, and
    weights that are multiplied (layer scale).
    """
    rows = [r for r in _last_rows(analysis, block, saliency) if r.size]
    return float(np.sqrt(np.mean(np.concatenate([r.reshape(-1) for r in rows]) ** 2))) if rows else 0.0


Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def _last_rows(analysis: Analysis, block: Block, saliency: Saliency) -> Iterator[Floats]:
    producer = {v: c for c in block.calls for v in c.outputs}
    queue: list[tuple[Value, Floats]] = [(block.branch, np.ones(1))]
    seen: set[Call] = set()
    while queue:
        value, scale = queue.pop()
        call = producer.get(value)
        if call is None or call in seen:
            continue
        seen.add(call)
        row = _row_magnitudes(analysis, call, saliency)
        if row is not None:
            yield row * scale if scale.size in (1, row.size) else row
            continue
        scale = _scaled(analysis, call, scale)
        queue.extend((v, scale) for v in call.inputs if v is not None and v.kind == "node")


def _row_magnitudes(analysis: Analysis, call: Call, saliency: Saliency) -> Floats | None:
    """Saliency of every output position of a call with a weight matrix."""
    view = analysis.view
    for index, value in enumerate(call.inputs):
        if value is None or value.weight not in view.parameters or len(value.shape) < 2:
            continue
        assert value.weight is not None
        at, axis = _ROWS.get(call.op, (index, 0))
        if call.op == "gemm":
            at, axis = 1, 0 if call.attrs["trans_b"] else 1
        if at != index or call.op == "elementwise":
            continue
        weight = view.weight(value.weight)
        criterion = saliency.criterion
        (scores,) = criterion.scores(value.weight, weight, [axis % weight.dim()], saliency.statistics)
        if scores is None:
            raise InvalidOption(
                f"{type(criterion).__name__} scores no outputs of layers, by which blocks are ranked; give "
                'DepthPruning(rank="influence"), or another saliency'
            )
        return np.asarray(criterion.finish(scores), np.float64)
    return None


def _scaled(analysis: Analysis, call: Call, scale: Floats) -> Floats:
    """``scale`` times what a call multiplies its channels with."""
    semantics = analysis.view.semantics
    if semantics is None:
        return scale
    factor: Floats | None = None
    if call.op == "batch_norm" and call.inputs[1] is not None and call.inputs[4] is not None:
        gamma, variance = semantics.constant(call.inputs[1]), semantics.constant(call.inputs[4])
        if gamma is not None and variance is not None:
            deviation = np.sqrt(variance.double().numpy() + 1e-5)
            factor = np.abs(gamma.double().numpy()) / deviation
    elif call.op == "elementwise" and semantics.function(call) == "mul":
        found = [semantics.constant(v) for v in call.inputs if v is not None and v.weight is not None]
        if len(found) == 1 and found[0] is not None:
            factor = np.abs(found[0].double().numpy().reshape(-1))
    if factor is None or (scale.size > 1 and factor.size > 1 and scale.size != factor.size):
        return scale
    return scale * factor


def magnitudes(analysis: Analysis, blocks: Sequence[Block], saliency: Saliency) -> list[float]:
    """The magnitude of every block."""
    return [magnitude(analysis, block, saliency) for block in blocks]


def influence(analysis: Analysis, blocks: Sequence[Block], saliency: Saliency) -> list[float]:
    """By how much blocks turn what passes through them, on calibration data."""
    from sparsecc.calibration import influences
    from sparsecc.recovery.needs import needed

    found = needed(saliency, 'DepthPruning(rank="influence")')
    return influences(found, [(b.source, b.output, _features(analysis, b.output)) for b in blocks])


def _features(analysis: Analysis, value: Value) -> int | None:
    """The axis that holds positions of a group: channels, or the width of a residual stream."""
    axes = enumerate(analysis.solver.axes[value])
    return next((d for d, t in axes if any(a.frozen is None and a.size > 1 for a in atoms(t))), None)


#: how blocks are ranked
BLOCK_SALIENCIES: dict[str, BlockSaliency] = {"magnitude": magnitudes, "influence": influence}


# -- bypassing them ---------------------------------------------------------------------------------


def bypasses(analysis: Analysis, blocks: Sequence[Block]) -> list[Bypass]:
    """Actions that bypass blocks, each with the weights that go with it; a nested block goes by itself."""
    inner = {c for b in blocks for c in b.calls}
    outer = [b for b in blocks if b.add not in inner]
    bare = [Bypass(b.name, b.output.name, b.source.name) for b in outer]
    left = set(dropped(analysis.view, bare).weights)
    out = []
    for action, block in zip(bare, outer, strict=True):
        own = tuple(w for w in block.weights if w in left)
        left -= set(own)
        out.append(Bypass(action.block, action.output, action.source, own))
    return out


def dropped(view: View, actions: Iterable[Action]) -> Dropped:
    """Calls and weights that are needed no more once blocks are bypassed and values stored."""
    cuts = [a for a in actions if isinstance(a, (Bypass, Fold))]
    around = {a.output: a.source for a in cuts if isinstance(a, Bypass)}
    stored = frozenset(a.output for a in cuts if isinstance(a, Fold))
    if not cuts:
        return Dropped(frozenset(), frozenset())
    before, after = _needed(view, {}), _needed(view, around, stored)
    gone = before - after
    results = {v for c in gone for v in c.outputs}
    for call in view.calls:  # results that nobody reads, of operators that change a value in place
        if call not in before and any(v in results for v in call.inputs):
            gone.add(call)
            results.update(call.outputs)
    read = {v.weight for c in view.calls if c not in gone for v in c.inputs if v is not None and v.weight}
    read |= {v.weight for v in view.outputs if v.weight}
    lost = {v.weight for c in gone for v in c.inputs if v is not None and v.weight} - read
    return Dropped(frozenset(c.name for c in gone), frozenset(w for w in lost if w is not None))


def lost(group: Group, gone: Dropped) -> bool:
    """Whether all weights that hold positions of a group go."""
    return bool(gone.weights) and all(m.weight in gone.weights for m in group.members)


def _needed(view: View, around: dict[str, str], stored: frozenset[str] = frozenset()) -> set[Call]:
    """Calls that the outputs depend on."""
    known = {v.name: v for c in view.calls for v in c.outputs} | {v.name: v for v in view.inputs}

    def followed(value: Value) -> Value:
        while value.name in around and value.kind == "node":
            value = known[around[value.name]]
        return value

    wanted = {followed(v) for v in view.outputs}
    needed: set[Call] = set()
    for call in reversed(view.calls):
        if any(v in wanted and v.name not in stored for v in call.outputs):
            needed.add(call)
            wanted.update(followed(v) for v in call.inputs if v is not None)
    return needed

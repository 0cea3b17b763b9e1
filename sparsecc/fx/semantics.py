"""What single ATen calls compute: the numbers behind a view of a PyTorch program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch.fx import Node, map_arg

from sparsecc.fx.capture import Program
from sparsecc.fx.ops import aten_name, bind
from sparsecc.fx.sharing import sharing, written
from sparsecc.graph import Call, Value

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_SAME = {"multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div"}
_DROPS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"})
_UNINITIALISED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
_FILLS = {
    "zeros": 0.0,
    "new_zeros": 0.0,
    "zeros_like": 0.0,
    "zero": 0.0,
    "ones": 1.0,
    "new_ones": 1.0,
    "ones_like": 1.0,
}
_FILL_ARGUMENTS = ("fill_value", "value", "s")
_PRESERVE_ALL = ("max_pool", "adaptive_", "upsample_", "_upsample_", "roll", "flip")


class ProgramSemantics:
    """Answers of a captured program; see ``sparsecc.graph.Semantics``."""

    def __init__(
        self, program: Program, values: Mapping[Node, Value], weight: Callable[[str], torch.Tensor]
    ) -> None:
        self.program = program
        self.values = values
        self.weight = weight

    def function(self, call: Call) -> str:
        """``mul`` for ``aten.mul_.Tensor``."""
        name = aten_name(call.raw.target) or ""
        return _SAME.get(name, name)

    def constant(self, value: Value) -> torch.Tensor | None:
        """Parameters, and buffers that the graph does not change, unless they are complex."""
        if value.weight is None or value in self._changed or value.dtype.startswith("complex"):
            return None
        return self.weight(value.weight).cpu()

    def deterministic(self, call: Call) -> bool:
        """Dropout counts where it is switched off."""
        name = self.function(call)
        if name in _UNINITIALISED:
            return False
        if not isinstance(call.raw.target, torch._ops.OpOverload):
            return False  # a conditional or a loop, whose bodies may do anything
        if torch.Tag.nondeterministic_seeded not in call.raw.target.tags:
            return True
        bound = bind(call.raw)
        if name in _DROPS:
            return bound["train"] is False
        if name == "rrelu":
            return bound["training"] is False
        return name == "scaled_dot_product_attention" and bound["dropout_p"] == 0

    def evaluate(
        self, call: Call, operands: Sequence[torch.Tensor | None], *, promoted: bool = True
    ) -> tuple[torch.Tensor, ...] | None:
        """The node on copies of the operands, every float and float type promoted unless told not to."""
        if not self.deterministic(call):
            return None
        given = {
            ref: t for ref, t in zip(call.refs, operands, strict=True) if ref is not None and t is not None
        }
        if any(n not in given for n in call.raw.all_input_nodes):
            return None
        args, kwargs = map_arg((call.raw.args, dict(call.raw.kwargs)), lambda n: given[n])
        args, kwargs = _copied(args), _copied(kwargs)
        if promoted:
            args, kwargs = _promoted(args), _promoted(kwargs)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if promoted else before)
        try:
            with torch.no_grad():
                result = call.raw.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            return None  # an operator that does not run on operands with axes of size 1, or of another dtype
        finally:
            torch.set_default_dtype(before)
        found = result if isinstance(result, (tuple, list)) else (result,)
        tensors = tuple(t for t in found if isinstance(t, torch.Tensor))
        return None if any(t.is_complex() for t in tensors) else tensors

    def settled(self, call: Call) -> bool:
        """No size is computed for it while the model runs."""
        return set(call.raw.all_input_nodes) <= set(call.refs)

    def fill(self, call: Call) -> float | None:
        """Numbers that are spelled out in the graph."""
        name = self.function(call)
        if name in _FILLS:
            return _FILLS[name]
        if name in _UNINITIALISED:
            return None
        bound = bind(call.raw)
        value = next((bound[n] for n in _FILL_ARGUMENTS if n in bound), None)
        if value is None and call.op == "pad":
            return 0.0
        return float(value) if isinstance(value, (int, float)) else None

    def offset(self, call: Call) -> torch.Tensor | None:
        """Numbers that are spelled out, or a buffer of them; None given for zero points means 0."""
        bound = bind(call.raw)
        if bound.get("zero_points", 0) is None:
            return torch.tensor(0)
        found = bound.get("zero_points", bound.get("zero_point"))
        if isinstance(found, (int, float)):
            return torch.tensor(found)
        value = self.values.get(found) if isinstance(found, Node) else None
        return None if value is None else self.constant(value)

    def zero_padded(self, call: Call) -> bool:
        """``valid`` and zero padding see no zeros, ``same`` does unless the kernel has one position."""
        padding = bind(call.raw).get("padding")
        if isinstance(padding, str):
            weight = call.inputs[1]
            return padding != "valid" and (weight is None or any(n > 1 for n in weight.shape[2:]))
        sizes = [padding] if isinstance(padding, int) else padding
        return not isinstance(sizes, (list, tuple)) or any(n != 0 for n in sizes)

    def factors(self, call: Call) -> tuple[float, float] | None:
        """Numbers that are spelled out in the graph."""
        bound = bind(call.raw)
        alpha, beta = bound.get("alpha", 1), bound.get("beta", 1)
        if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
            return None
        return float(alpha), float(beta)

    def preserves(self, call: Call) -> Literal["constants", "zero", "none"]:
        """All pools and resizes keep zero; averages that count padding keep nothing else."""
        name = self.function(call)
        if name.startswith(_PRESERVE_ALL):
            return "constants"
        if not name.startswith("avg_pool"):
            return "zero"
        bound = bind(call.raw)
        padding = bound["padding"]
        padded = any(padding) if isinstance(padding, (list, tuple)) else padding != 0
        plain = bound.get("divisor_override") is None and not (padded and bound["count_include_pad"])
        return "constants" if plain else "zero"

    # -- values that are changed in place ---------------------------------------------------------

    def overwritten(self, *, read_later: bool = True) -> frozenset[Value]:
        """Values that share memory with an operand that is changed (before they are last read)."""
        return self._overwritten if read_later else self._changed

    @cached_property
    def _changed(self) -> frozenset[Value]:
        """Everything that shares memory with what some operator changes, if it was there before."""
        return frozenset(self._clobbered(later_reads=False))

    @cached_property
    def _overwritten(self) -> frozenset[Value]:
        return frozenset(self._clobbered(later_reads=True))

    def _clobbered(self, *, later_reads: bool) -> Iterator[Value]:
        place = {n: i for i, n in enumerate(self.program.graph.nodes)}
        changes = [(n, a) for n in place for a in written(n)]
        if not changes:
            return
        members = sharing(place)
        for node, target in changes:
            for other in members[target]:
                read_later = any(place[u] > place[node] for u in other.users)
                if place[other] < place[node] and (read_later or not later_reads) and other in self.values:
                    yield self.values[other]


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value)
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _promoted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FLOATS else value
    if isinstance(value, (list, tuple)):
        return type(value)(_promoted(v) for v in value)
    return {k: _promoted(v) for k, v in value.items()} if isinstance(value, dict) else value

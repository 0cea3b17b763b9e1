"""Runs a captured PyTorch program node by node, optionally with every float promoted to float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Node, map_arg

from sparsecc.blocks import copies
from sparsecc.fx.capture import Program, written
from sparsecc.fx.ops import aten_name
from sparsecc.graph import Call, Value, View
from sparsecc.reference.masked import Masked

#: runs an operator, some operands replaced
Default = Callable[[Mapping[Node, Any]], Any]
Hook = Callable[[Node, Default, Mapping[Node, Any]], Any]

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class ProgramRunner:
    """Executes ``program.graph``.

    With ``dtype`` every float weight, input, cast and created tensor has that dtype, whatever the
    graph says.  ``overrides`` replaces weights by name.
    """

    def __init__(
        self,
        program: Program,
        *,
        dtype: torch.dtype | None = None,
        overrides: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.program = program
        self.dtype = dtype
        self.overrides = overrides or {}
        self._last_use = _last_uses(program)
        self.written = {n.name for n in written(program.graph)}

    def run(
        self, inputs: list[Any], *, hook: Hook | None = None, keep_values: bool = False
    ) -> tuple[list[Any], dict[Node, Any]]:
        """Flat user outputs (in graph order), and values by node where ``keep_values``.

        ``hook(node, default, env)`` is called for every operator; ``default(substitutes)`` runs it with
        some operands replaced.
        """
        env: dict[Node, Any] = {}
        with torch.no_grad(), default_dtype(self.dtype):
            steps = self.steps(inputs, env, keep_values=keep_values)
            try:
                node, default = next(steps)
                while True:
                    found = default({}) if hook is None else hook(node, default, env)
                    node, default = steps.send(found)
            except StopIteration as end:
                return end.value, env

    def steps(
        self, inputs: list[Any], env: dict[Node, Any], *, keep_values: bool = False
    ) -> Generator[tuple[Node, Default], Any, list[Any]]:
        """Every operator before it runs; what is sent is its result.  Ends with the flat user outputs.

        Values stand in ``env`` as long as they are needed; a weight is read when its first reader comes.
        """
        given = dict(zip(self.program.inputs, inputs, strict=True))
        outputs: list[Any] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in given:
                    env[node] = self._cast(given[node.name], copy=True)
                continue
            for used in node.all_input_nodes:
                if used not in env:
                    env[used] = self._weight_of(used)
            if node.op == "get_attr":
                env[node] = getattr(self.program.owner, str(node.target))
            elif node.op == "output":
                flat = list(map_arg(node.args[0], lambda n: env[n]))
                kinds = [kind for kind, _ in self.program.outputs]
                outputs = [v for v, k in zip(flat, kinds, strict=True) if k == "USER_OUTPUT"]
            elif self.dtype is not None and aten_name(node.target) == "_assert_tensor_metadata":
                env[node] = None
            else:
                read = {used: env[used] for used in node.all_input_nodes}
                env[node] = yield node, partial(self._default, node, read)
            if not keep_values:
                for dead in self._last_use.get(node, ()):
                    env.pop(dead, None)
        return outputs

    def weight(self, name: str) -> torch.Tensor:
        """A weight as it is used in the run."""
        tensor = self.overrides.get(name)
        tensor = self.program.weights[name].detach() if tensor is None else tensor
        return self._cast(tensor)  # type: ignore[no-any-return]

    def _weight_of(self, node: Node) -> torch.Tensor:
        return self._cast(  # type: ignore[no-any-return]
            self.weight(self.program.weight_of[node.name]), copy=node.name in self.written
        )

    def _cast(self, value: Any, copy: bool = False) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        wanted = self._promote(value.dtype)
        if wanted is not value.dtype:
            value = value.to(wanted)
        return value.clone() if copy else value

    def _default(self, node: Node, env: Mapping[Node, Any], substitutes: Mapping[Node, Any]) -> Any:
        def value(n: Node) -> Any:
            return substitutes[n] if n in substitutes else env[n]

        args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
        if self.dtype is not None and _reads_bits(node):
            return self._cast(node.target(*_as_stored(node, args), **kwargs))  # type: ignore[operator]
        if self.dtype is not None:
            args, kwargs = self._promote(args), self._promote(kwargs)
            if (wide := _WIDE.get(node.target)) is not None:
                return wide(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _promote(self, value: Any) -> Any:
        if self.dtype is None:
            return value
        if isinstance(value, torch.dtype):
            return self.dtype if value in _FLOATS else self.dtype.to_complex() if value.is_complex else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._promote(v) for v in value)
        if isinstance(value, dict):
            return {k: self._promote(v) for k, v in value.items()}
        return value


def _grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x[S,K] w[E,K,N] -> y[S,N], row by row with the matrix before whose end it lies."""
    if x.dim() != 2 or w.dim() != 3 or offs is None or bias is not None:
        return torch.ops.aten._grouped_mm.default(x, w, offs, bias, out_dtype)  # type: ignore[no-any-return]
    ends = [int(end) for end in offs]
    out = x.new_zeros(len(x), w.shape[2])
    for matrix, start, end in zip(w, [0, *ends[:-1]], ends, strict=True):
        out[start:end] = x[start:end] @ matrix
    return out


#: operators that take no float64, and what computes them in it
_WIDE: Mapping[Any, Callable[..., torch.Tensor]] = {torch.ops.aten._grouped_mm.default: _grouped}


def _reads_bits(node: Node) -> bool:
    """Whether an operator needs numbers as the model stores them.

    A view as another dtype shows how they are stored; quantisers take float32 and give integers, which are
    the same whatever was promoted before, and what these stand for.
    """
    if node.target is torch.ops.aten.view.dtype:
        return True
    return (aten_name(node.target) or "").startswith("quantized_decomposed.")


def _as_stored(node: Node, args: Any) -> tuple[Any, ...]:
    """The arguments in the dtypes that the graph gives them."""
    return tuple(
        given.to(source.meta["val"].dtype)
        if isinstance(source, Node) and isinstance(given, torch.Tensor)
        else given
        for source, given in zip(node.args, args, strict=True)
    )


def _last_uses(program: Program) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    out: dict[Node, list[Node]] = {}
    for used, node in last.items():
        out.setdefault(node, []).append(used)
    return out


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Floats that are made inside have that type."""
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_copy(view: View, value: Value | None, source: str, producer: Mapping[Value, Call]) -> bool:
    return value is None or source in {v.name for v in copies(view, value, producer)}


class MaskedCalls:
    """Runs every call of ``view`` under masked semantics.

    ``bypassed`` maps sums to the operand that is left of them: the other one, a branch, is zero.
    """

    def __init__(self, view: View, masked: Masked, bypassed: Mapping[str, str] | None = None) -> None:
        self.view = view
        self.masked = masked
        self.around = bypassed or {}
        self._producer = {v: c for c in view.calls for v in c.outputs} if self.around else {}

    def operands(self, call: Call, env: Mapping[Node, Any]) -> list[Any]:
        """What a call reads, bypassed branches as zeros."""
        found = [None if ref is None else env[ref] for ref in call.refs]
        if call.name not in self.around:
            return found
        source = self.around[call.name]
        return [
            t if t is None or _is_copy(self.view, v, source, self._producer) else torch.zeros_like(t)
            for v, t in zip(call.inputs, found, strict=True)
        ]


def runs(call: Call, default: Default) -> Callable[[list[Any]], tuple[Any, ...]]:
    """A call as a function of its operands in canonical order."""

    def run(operands: list[Any]) -> tuple[Any, ...]:
        result = default({r: t for r, t in zip(call.refs, operands, strict=True) if r is not None})
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    return run


def result_of(node: Node, outputs: tuple[Any, ...]) -> Any:
    """Outputs of a call as the node gives them."""
    return outputs if isinstance(node.meta["val"], (tuple, list)) else outputs[0]


def masked_hook(view: View, masked: Masked, bypassed: Mapping[str, str] | None = None) -> Hook:
    """A hook that runs every call of ``view`` under masked semantics."""
    masking = MaskedCalls(view, masked, bypassed)
    calls = {call.raw: call for call in view.calls}

    def hook(node: Node, default: Default, env: Mapping[Node, Any]) -> Any:
        call = calls.get(node)
        if call is None:
            return default({})
        return result_of(node, masked(call, masking.operands(call, env), runs(call, default)))

    return hook

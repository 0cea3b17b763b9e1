"""Whether a capture of two does for a batch of one what the model does.

torch.export takes a size of one for a constant, so an example with a batch of one is captured twice over.  A
model that asks for that size (``if len(x) == 1``, ``squeeze(0)``) takes another path then, which only a run
shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from sparsecc.fx.capture import Program, evaluating
from sparsecc.memory import out_of_memory
from sparsecc.reference.torch_run import Default, ProgramRunner

#: of the largest output, what a graph may differ by from the module that it was captured from
_ALIKE = 0.02


def holds_for_one(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run both on the example as it was given, a batch of one.

    True as well where nothing can be told: on the meta device, of models that give something else every time.
    """
    assert program.module is not None
    tensors = [
        x for x in (*program.weights.values(), *_leaves((args, kwargs))) if isinstance(x, torch.Tensor)
    ]
    if any(tensor.is_meta for tensor in tensors):
        return True
    try:
        with torch.random.fork_rng(()):
            return _holds(program, program.module, args, kwargs)
    except Exception as error:  # whatever the model's own code raises
        if out_of_memory(error):
            raise
        return False


def _holds(program: Program, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    found = ProgramRunner(program).run(program.flat_inputs(args, kwargs), hook=_same_rank)[0]
    with evaluating(module), torch.no_grad(), _buffers_kept(module):
        wanted = _leaves(module(*args, **kwargs))
        if _alike(found, wanted):
            return True
        return not _alike(wanted, _leaves(module(*args, **kwargs)))


def _same_rank(node: Node, default: Default, env: Mapping[Node, Any]) -> Any:
    """A hook that fails where a value has another number of axes than it had in the capture."""
    found, captured = default({}), node.meta.get("val")
    ranks = [value.dim() for value in (found, captured) if isinstance(value, torch.Tensor)]
    if len(set(ranks)) > 1:
        raise ValueError(f"{node} has {ranks[0]} axes, and {ranks[1]} where the batch is larger")
    return found


@contextlib.contextmanager
def _buffers_kept(module: torch.nn.Module) -> Iterator[None]:
    """What a forward pass writes into buffers, or puts in their place, is taken back."""
    kept = [
        (owner, name, buffer, None if buffer is None else buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, before in kept:
                owner._buffers[name] = buffer
                if buffer is not None and before is not None and not torch.equal(buffer, before):
                    buffer.copy_(before)


def _leaves(result: Any) -> list[Any]:
    return list(pytree.tree_leaves(result))


def _alike(first: list[Any], second: list[Any]) -> bool:
    """Tensors of the same shapes and types with about the same numbers; what else there is does not count."""
    ours, theirs = ([x for x in found if isinstance(x, torch.Tensor)] for found in (first, second))
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b) or a.is_complex()
    wide, other = a.double(), b.double()
    finite = wide.isfinite() & other.isfinite()
    scale = float(other[finite].abs().amax()) if finite.any() else 0.0
    same = torch.equal(wide.isfinite(), other.isfinite())
    return same and bool(((wide - other)[finite].abs() <= _ALIKE * max(scale, 1e-30)).all())

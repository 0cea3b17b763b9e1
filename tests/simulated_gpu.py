"""A GPU that is none: tensors that say so, hold their numbers on the CPU, and mix with no others.

Operands of two devices fail, and while ``capturing`` reading a number of such a tensor and copies between
devices as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)


_READS = tuple(
    getattr(torch.Tensor, name) for name in ("__int__", "__bool__", "__float__", "item", "tolist", "cpu")
)


#: functions that ask for a guard of the device before they can be intercepted as operators
_GUARDED = tuple(getattr(torch.Tensor, name) for name in ("__getitem__", "__setitem__", "__invert__"))
_FOUND = (torch.nonzero, torch.Tensor.nonzero)


class Simulated(torch.Tensor):
    """A tensor of the simulated GPU; ``held`` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Simulated:
        found = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=GPU
        )
        found.held = held
        return found  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*_READS, *_FOUND):
            if Simulation.current is None or Simulation.current.capturing:
                raise RuntimeError(f"{func.__name__} of {list(args[0].shape)} waits for the GPU")
            if func in _FOUND:
                return _run(func, args, kwargs or {})
            return args[0].held if func is torch.Tensor.cpu else func(args[0].held)
        if func in _GUARDED:
            return _run(func, args, kwargs or {})
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """Sends what is made for the GPU there."""

    current: ClassVar[Simulation | None] = None
    capturing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        with self:  # in inference mode composite operators come here, such as ``to``
            if (found := func.decompose(*args, **given)) is not NotImplemented:
                return found
        device = given.get("device")
        there = device is not None and torch.device(device).type == "cuda"
        if func is torch.ops.aten._to_copy.default and device is not None:
            crosses = isinstance(args[0], Simulated) != there
            if crosses and self.capturing:
                raise RuntimeError(
                    f"{list(args[0].shape)} is copied between devices while a graph is captured"
                )
            given["device"] = "cpu"
            found = func(_held(args[0]), **given)
            return Simulated(found) if there else found
        if there:
            given["device"] = "cpu"
            return tree_map(Simulated, func(*tree_map(_held, args), **given))
        return _run(func, args, given)


class _Made(TorchFunctionMode):
    """Tensors of numbers, which are copied to the GPU where they are made for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        device = given.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device) != GPU:
            return func(*args, **given)
        if Simulation.current is None or Simulation.current.capturing:
            raise RuntimeError("numbers are copied to the GPU while a graph is captured")
        return Simulated(func(*args, **{**given, "device": "cpu"}))


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [isinstance(x, Simulated) for x in tensors]
    if not any(there):
        return func(*args, **kwargs)
    if func is torch.ops.aten._local_scalar_dense.default:
        raise RuntimeError(f"{func} waits for the GPU")
    if not all(simulated or x.dim() == 0 for simulated, x in zip(there, tensors, strict=True)):
        raise RuntimeError(f"{func} has operands of two devices: {[list(x.shape) for x in tensors]}")
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return tree_map(lambda x: Simulated(x) if isinstance(x, torch.Tensor) else x, found)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Simulated) else value


@contextmanager
def simulation(patch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """The time in which the GPU is there."""
    found = Simulation()
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    patch.setattr(Simulation, "current", found)
    with found, _Made():
        yield found

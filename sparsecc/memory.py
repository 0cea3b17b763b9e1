"""Memory: running out of it is a property of the model and the machine, and collecting it takes time."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sparsecc.errors import UnsupportedModel

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no type of its own for that on CPUs."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    )


@contextmanager
def within_memory() -> Iterator[None]:
    """Raise UnsupportedModel where what is done inside runs out of memory; also usable as a decorator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UnsupportedModel(
            "the model does not fit in memory at the sizes that it is run with; give example inputs with "
            "smaller dynamic sizes, or use a machine with more memory"
        ) from error


def give_back() -> None:
    """Let glibc return what is free, also between what is not; elsewhere nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def without_collecting() -> Iterator[None]:
    """No cyclic garbage collection inside; also usable as a decorator.

    Planning makes many small objects that live on.  The collector would walk them, and all that
    PyTorch holds, several times, which costs up to a third of planning and finds nothing.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()

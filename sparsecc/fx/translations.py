"""The operator translations of ``torch.onnx``, read once a process instead of at every export.

The exporter parses the source of some five hundred translations each time, which is most of what it takes
for a small model.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

_EXPORTING = threading.RLock()
_known: dict[Any, Any] = {}


@contextlib.contextmanager
def translations_kept() -> Iterator[None]:
    """Inside, exports share what they read of the translations, each with a table of its own.

    One thread at a time.  Where this PyTorch has no such table, exports work as always.
    """
    registry = _registry()
    original = getattr(registry, "__dict__", {}).get(_MAKER)
    if not isinstance(original, classmethod):
        yield
        return

    def made(kind: Any, *args: Any, **kwargs: Any) -> Any:
        key = (kind, args, tuple(sorted(kwargs.items())), _operators())
        if key not in _known:
            _known[key] = original.__func__(kind, *args, **kwargs)
        found = copy.copy(_known[key])
        found.functions = {target: list(known) for target, known in found.functions.items()}
        return found

    with _EXPORTING:
        setattr(registry, _MAKER, classmethod(made))
        try:
            yield
        finally:
            setattr(registry, _MAKER, original)


_MAKER = "from_torchlib"


def _operators() -> int:
    """How many operators there are: translations of those that a library brings later are not read before."""
    import torch

    return len(torch._C._dispatch_get_all_op_names())


def _registry() -> Any:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    return ONNXRegistry

"""That no command writes over what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from sparsecc.errors import InvalidOption

#: options that name files to write
_WRITTEN = ("output", "plan_out")


def check_apart(options: Mapping[str, Any]) -> None:
    """Raise InvalidOption where a file to write is one that another option of the command reads.

    Commands with ``--force`` may write over their model, and say so themselves where it is not given.
    """
    for name in _WRITTEN:
        place = options.get(name)
        if not isinstance(place, str) or not os.path.exists(place):
            continue
        if any(_same(place, source) for source in _read(options)):
            raise InvalidOption(f"cannot write {place}: this command reads it; choose another name")


def _same(place: str, source: str) -> bool:
    try:
        return os.path.samefile(place, source)
    except (OSError, ValueError):  # most options name no file
        return False


def _read(options: Mapping[str, Any]) -> Iterator[str]:
    """Everything that may be a file to read: values, what follows ``NAME=``, the module of ``FILE:NAME``."""
    for name, value in options.items():
        if name in _WRITTEN or (name == "model" and "force" in options and ":" not in str(value)):
            continue
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            yield text
            _, equal, file = text.partition("=")
            if equal:
                yield file
            module, colon, _ = text.rpartition(":")
            if colon:
                yield from (module, f"{module.replace('.', '/')}.py")

"""Measurements in processes of their own: one that dies, or takes too much, costs one figure."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

SECONDS, MEMORY = 900, 10 << 30
"""CPU-seconds and bytes that one measurement may take."""


class Unanswered(Exception):
    """The process gave no figure; the message says why, in a few words."""


def answer(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that ``python -m module arguments`` prints as its last line.

    Raises ``Unanswered``.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, preexec_fn=_limit
    )
    if done.returncode:
        raise Unanswered(_why(done))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode == -24:  # SIGXCPU
        return f"more than {SECONDS} CPU-seconds"
    if done.returncode == -9 or "allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return f"more than {MEMORY >> 30} GB"
    return (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1][:60]

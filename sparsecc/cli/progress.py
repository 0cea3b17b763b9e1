"""Which stage a command is in, shown on standard error once it has taken two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_S = 2.0

_WORDS = {
    "capture": "reading the model",
    "analyse": "analysing",
    "plan": "planning",
    "edit": "editing a copy",
    "verify": "verifying",
    "lower": "lowering to ONNX",
    "build": "building for the target",
    "check": "checking the artifact",
    "time": "measuring latency",
    "write": "writing",
}


class Stages:
    """A bar in a terminal, lines elsewhere; nothing at all for what is quick."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._stages = list(stages)
        self._stage = ""
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._shown = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._timer = threading.Timer(PATIENCE_S, self._show)
        self._timer.daemon = True
        self._timer.start()

    def begin(self, stage: str) -> None:
        """The next stage begins."""
        with self._lock:
            self._stage = stage
            if self._shown:
                self._update()

    def end(self) -> None:
        """Nothing is shown any more."""
        self._timer.cancel()
        with self._lock:
            self._shown = True
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _show(self) -> None:
        with self._lock:
            if self._shown:
                return
            self._shown = True
            if sys.stderr.isatty():
                self._bar = self._new_bar()
                self._task = self._bar.add_task("", total=len(self._stages))
                self._bar.start()
            self._update()

    def _new_bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)

    def _update(self) -> None:
        words = _WORDS.get(self._stage, self._stage)
        if self._bar is not None and self._task is not None:
            done = self._stages.index(self._stage) if self._stage in self._stages else 0
            self._bar.update(self._task, description=words, completed=done)
        elif words and not sys.stderr.isatty():
            print(f"sparsecc: {words} ({time.monotonic() - self._start:.0f} s)", file=sys.stderr, flush=True)

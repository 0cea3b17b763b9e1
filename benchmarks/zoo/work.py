"""Runs entries in processes of their own, so that none can end the run, with limits on time and memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from benchmarks.zoo.entry import Entry, Path
from benchmarks.zoo.measure import Row

#: imported once, by the process that all others are forked from
PRELOAD = ["benchmarks.zoo.preload"]
GRACE = 6
"""Wall-clock seconds allowed for each CPU-second: machines are shared."""


@dataclass(frozen=True)
class Limits:
    """Of one entry on one path: CPU-seconds, bytes of memory, parameters of the model."""

    seconds: int = 600
    memory: int = 12 << 30
    parameters: int = 150_000_000


@dataclass
class _Job:
    entry: Entry
    path: Path
    process: ForkServerProcess
    pipe: Connection
    deadline: float


def run(jobs: Sequence[tuple[Entry, Path]], limits: Limits, processes: int) -> Iterator[Row]:
    """Rows as they come, at most ``processes`` at a time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting = list(reversed(jobs))
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(_start(context, *waiting.pop(), limits))
            yield from _finished(running)
    finally:
        for job in running:
            job.process.kill()


def _start(context: Any, entry: Entry, path: Path, limits: Limits) -> _Job:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(entry.suite, entry.name, path, limits, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Job(entry, path, process, ours, time.monotonic() + GRACE * limits.seconds)


def _finished(running: list[_Job]) -> Iterator[Row]:
    """Rows of the jobs that have ended by now; waits for a moment where there are none."""
    ready = wait([j.pipe for j in running], timeout=1.0)
    for job in list(running):
        late = time.monotonic() > job.deadline
        if job.pipe not in ready and not late:
            continue
        running.remove(job)
        if late:
            job.process.kill()
        yield _row(job, late)
        job.pipe.close()


def _row(job: _Job, late: bool) -> Row:
    if not late:
        with contextlib.suppress(EOFError, OSError):
            row = Row(**job.pipe.recv())
            job.process.join()
            return row
    job.process.join()
    code = job.process.exitcode
    row = Row(job.entry.suite, job.entry.name, job.path, "crash", f"the process ended with code {code}")
    if late or code == -24:  # SIGXCPU
        row.outcome, row.message = "timeout", "more CPU-seconds than --timeout allows"
    elif code == -9:
        row.outcome, row.message = "memory", "the system ended the process, as it does when memory runs out"
    return row


def _work(suite: str, name: str, path: Path, limits: Limits, pipe: Connection) -> None:
    """In the child: measure one entry and send its row."""
    from benchmarks.zoo.measure import measure
    from benchmarks.zoo.suites import find

    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 10))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    void = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries print; what matters is in the row
        os.dup2(void, stream)
    row = measure(find(suite, name), path, max_params=limits.parameters)
    pipe.send(row.to_json())
    pipe.close()

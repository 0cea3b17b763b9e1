"""Runs several batches side by side, call by call, so that a layer can be changed before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsecc.graph import Call
from sparsecc.subject import Step, Stepping

#: told each call with the steps of all runs before any of them goes on; gives the outputs of every run
Visit = Callable[[Call, Sequence[Step]], Sequence[tuple[Any, ...]] | None]


def lockstep(runs: Sequence[Stepping], visit: Visit, *, last: Call | None = None) -> list[list[Any]]:
    """Let ``visit`` see every call of all runs before they go on; the flat outputs of every run.

    Where ``visit`` gives None the calls run as they are.  Nothing runs after ``last``: no outputs then.
    """
    steps = [next(run) for run in runs]
    ends: list[list[Any]] = []
    while not ends:
        replies = visit(steps[0].call, steps) or [step.run(step.operands) for step in steps]
        if steps[0].call is last:
            return []
        moved = [_sent(run, reply) for run, reply in zip(runs, replies, strict=True)]
        del replies
        steps = [m for m in moved if isinstance(m, Step)]
        ends = [m for m in moved if not isinstance(m, Step)]
    return ends


def _sent(run: Stepping, reply: tuple[Any, ...]) -> Step | list[Any]:
    try:
        return run.send(reply)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def watched(run: Stepping, watch: Callable[[Step, tuple[Any, ...]], None]) -> list[Any]:
    """One run, every call of which ``watch`` sees with its outputs; the flat outputs."""

    def visit(call: Call, steps: Sequence[Step]) -> Sequence[tuple[Any, ...]]:
        outputs = steps[0].run(steps[0].operands)
        watch(steps[0], outputs)
        return [outputs]

    return lockstep([run], visit)[0]

"""What a module runs in training alone: heads beside its output that only help it learn."""

from __future__ import annotations

from torch import nn

from sparsecc.errors import SparseccError
from sparsecc.fx.capture import Program, recapture
from sparsecc.fx.program_module import switch_modes
from sparsecc.fx.reader import unread


def training_program(program: Program) -> Program | None:
    """What the module runs in training mode, by operators that evaluate.

    None where evaluation reads every parameter, where training reads no more, needs other inputs (targets,
    say), or cannot be exported.
    """
    if program.module is None or not unread(program):
        return None
    try:
        found = recapture(program.module, program, training=True)
    except Exception:  # the model's own code runs
        return None
    switch_modes(found.graph, False)
    return found if unread(found) != unread(program) else None


def misfit(module: nn.Module, training: Program) -> str:
    """Why a narrowed module does not run in training mode as the original does; '' where it does."""
    try:
        recapture(module, training, training=True)
    except SparseccError as error:
        return str(error)
    except Exception as error:  # the model's own code runs
        return f"{type(error).__name__}: {error}"
    return ""

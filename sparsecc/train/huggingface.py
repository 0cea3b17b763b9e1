"""A callback for the Trainer of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from transformers import TrainerCallback

from sparsecc.atomic import atomic_write
from sparsecc.errors import InvalidOption
from sparsecc.train.schedules import Schedule
from sparsecc.train.sparsifier import Sparsifier

FILE = "sparsifier.safetensors"


class SparsityCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Keeps a model sparse while ``Trainer.train`` trains it.

    Takes the options of ``Sparsifier``.  Masks are saved beside the model in every checkpoint; a training
    that goes on from one reads them there, or from the folder ``resume_from``.
    """

    def __init__(
        self, *, schedule: Schedule, resume_from: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        self.options = {"schedule": schedule, **options}
        self.resume_from = resume_from
        self.sparsifier: Sparsifier | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer; model and optimizer have been loaded where training goes on."""
        found = None
        if state.global_step or self.resume_from is not None:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / FILE).exists():
                raise InvalidOption(
                    f"training goes on from step {state.global_step}, and there is no {folder / FILE}; give "
                    "the checkpoint's folder as resume_from"
                )
            found = load_file(folder / FILE)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.sparsifier = Sparsifier(model, optimizer, state=found, **self.options)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare gradients."""
        if self.sparsifier is not None:
            self.sparsifier.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step after the optimizer."""
        if self.sparsifier is not None:
            self.sparsifier.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store masks in the checkpoint that was just written."""
        if self.sparsifier is None:
            return
        found = {n: t.cpu() for n, t in self.sparsifier.state_dict().items()}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            with atomic_write(folder / FILE) as stream:
                stream.write(save(found))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of single elements; with a structured pattern ``sparsifier.slim()`` is still to come."""
        if self.sparsifier is not None and not self.sparsifier.pattern.structured:
            self.sparsifier.finish()

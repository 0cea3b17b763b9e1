"""A callback for Lightning's Trainer (``pip install 'sparsecc[lightning]'``)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from sparsecc.errors import InvalidOption
from sparsecc.train.schedules import Schedule
from sparsecc.train.sparsifier import Sparsifier


class SparsityCallback(Callback):  # type: ignore[misc]  # untyped where Lightning is not installed
    """Keeps a module sparse while ``Trainer.fit`` trains it with one optimizer.

    Takes the options of ``Sparsifier``.  Masks go into the trainer's checkpoints and come back from them.
    The module has its final weights after the fit; with a structured pattern they are masked, and
    ``callback.sparsifier.slim()`` takes them out.
    """

    def __init__(self, *, schedule: Schedule, **options: Any) -> None:
        self.options = {"schedule": schedule, **options}
        self.sparsifier: Sparsifier | None = None
        self._state: dict[str, torch.Tensor] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizer; from a checkpoint where the fit goes on from one."""
        if len(trainer.optimizers) != 1:
            raise InvalidOption(
                f"the module has {len(trainer.optimizers)} optimizers; SparsityCallback follows one; attach "
                "a Sparsifier to each of them in the module instead"
            )
        self.sparsifier = Sparsifier(pl_module, trainer.optimizers[0], state=self._state, **self.options)
        self._state = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Prepare gradients, before they are clipped."""
        if self.sparsifier is not None:
            self.sparsifier.before_step()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step, if the optimizer did: not while gradients are accumulated."""
        if self.sparsifier is not None:
            self.sparsifier.step()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {} if self.sparsifier is None else dict(self.sparsifier.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What a checkpoint has; it is used when training starts."""
        self._state = state_dict or None

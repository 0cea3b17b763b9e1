"""Callbacks in the real trainers, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecc.errors import InvalidOption
from sparsecc.train import SRSTE, Constant, Cubic
from tests.train_nets import OPTIMIZERS, batch, mlp

WEIGHTS = ["0.weight", "2.weight", "4.weight"]
CASES: dict[str, dict[str, Any]] = {
    "gradual": {"schedule": Cubic(sparsity=0.75, end=8, every=2), "weights": WEIGHTS},
    "srste": {
        "schedule": Constant(sparsity=0.5, end=99),
        "method": SRSTE(),
        "pattern": "2:4",
        "weights": WEIGHTS,
    },
}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows that are always the same."""

    def __init__(self, count: int = 48) -> None:
        parts = [batch(i, mlp()) for i in range(count // 6)]
        self.x, self.y = (torch.cat([p[i] for p in parts]) for i in (0, 1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Classifier(nn.Module):
    """What transformers' Trainer trains: a module that gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


def sparse(model: nn.Module, share: float) -> None:
    for n in WEIGHTS:
        assert (model.get_parameter(n) == 0).float().mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("case", ["gradual", pytest.param("srste", marks=pytest.mark.nightly)])
def test_huggingface(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from sparsecc.train.huggingface import SparsityCallback

    options = {**CASES[case], "weights": [f"net.{n}" for n in WEIGHTS]}

    def run(folder: Path, steps: int, resume: Any = None) -> tuple[Any, Any]:
        model = Classifier()
        callback = SparsityCallback(**options)
        args = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=3, save_steps=6,
            gradient_accumulation_steps=2, use_cpu=True, disable_tqdm=True, learning_rate=0.01,
            lr_scheduler_type="constant", logging_strategy="no", save_strategy="steps", report_to=[],
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=Rows(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        assert callback.sparsifier is not None
        return model, callback.sparsifier

    whole, sparsifier = run(tmp_path / "whole", 12)
    assert sparsifier.count == 12
    sparse(whole.net, 0.75 if case == "gradual" else 0.5)
    assert (tmp_path / "whole" / "checkpoint-6" / "sparsifier.safetensors").exists()
    run(tmp_path / "half", 6)
    resumed, again = run(tmp_path / "half", 12, str(tmp_path / "half" / "checkpoint-6"))
    assert again.count == 12
    assert all(torch.equal(m, again.masks[n]) for n, m in sparsifier.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    (tmp_path / "half" / "checkpoint-6" / "sparsifier.safetensors").unlink()
    with pytest.raises(InvalidOption, match="resume_from"):
        run(tmp_path / "half", 12, str(tmp_path / "half" / "checkpoint-6"))


@pytest.mark.parametrize("case", sorted(CASES))
def test_lightning(case: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed (sparsecc[lightning])")
    from sparsecc.train.lightning import SparsityCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS["sgd"](self.parameters())

    options = {**CASES[case], "weights": [f"net.{n}" for n in WEIGHTS]}

    def run(epochs: int, save: Path | None = None, resume: Path | None = None) -> tuple[Any, Any]:
        module, callback = Module(), SparsityCallback(**options)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
            gradient_clip_val=1.0, default_root_dir=tmp_path, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=6), ckpt_path=resume)
        if save is not None:
            trainer.save_checkpoint(save)
        assert callback.sparsifier is not None
        return module, callback.sparsifier

    whole, sparsifier = run(3)
    assert sparsifier.count == 12
    sparse(whole.net, 0.75 if case == "gradual" else 0.5)
    run(1, save=tmp_path / "half.ckpt")
    resumed, again = run(3, resume=tmp_path / "half.ckpt")
    assert again.count == 12
    assert all(torch.equal(m, again.masks[n]) for n, m in sparsifier.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

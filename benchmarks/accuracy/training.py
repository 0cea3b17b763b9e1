"""Recovery by fine-tuning: ResNet-20, three seeds: ``python -m benchmarks.accuracy.training``.

Every run starts from the committed dense weights, prunes, and trains for a number of steps with a
learning rate that falls to zero; the seed decides the order of the images and their augmentation.  Test
images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy.calibration import fashion
from benchmarks.accuracy.peer import flops, torch_pruned
from benchmarks.accuracy.store import load, save
from benchmarks.datasets import fashion_mnist
from benchmarks.resnet20 import ResNet20, count_correct, load_resnet20
from benchmarks.train_fashion import augment, autocast

SEEDS = (0, 1, 2)
BATCH = 128


@dataclass(frozen=True)
class Training:
    """``recipe`` first, then ``steps`` of training, with a Sparsifier if ``sparsify`` says which.

    ``peer`` prunes in the place of a recipe.  ``rate`` is the learning rate at the start, ``batch`` how many
    images a step sees.
    """

    title: str
    steps: int
    recipe: str = ""
    saliency: str = "l2"
    sparsify: Callable[[int], dict[str, Any]] | None = None
    peer: Callable[[ResNet20], nn.Module] | None = None
    rate: float = 0.05
    batch: int = BATCH

    @property
    def key(self) -> str:
        """Its name among the results."""
        return f"resnet20/{self.title}/{self.steps}"


def _two_of_four(steps: int) -> dict[str, Any]:
    from sparsecc.train import OneShot

    return {"schedule": OneShot(sparsity=0.5, start=0), "pattern": "2:4"}


def _at_once(steps: int) -> dict[str, Any]:
    from sparsecc.train import OneShot

    return {"schedule": OneShot(sparsity=0.9, start=0), "pattern": "global"}


def _in_rounds(steps: int) -> dict[str, Any]:
    from sparsecc.train import Iterative

    end = steps * 3 // 5
    return {"schedule": Iterative(sparsity=0.9, start=0, end=end, every=end // 6), "pattern": "global"}


def _cubic(steps: int) -> dict[str, Any]:
    from sparsecc.train import Cubic

    return {
        "schedule": Cubic(sparsity=0.9, start=0, end=steps * 3 // 5, every=20),
        "pattern": "global",
    }


def _early(steps: int) -> dict[str, Any]:
    from sparsecc.train import Cubic

    return {"schedule": Cubic(sparsity=0.9, start=0, end=steps // 5, every=10), "pattern": "global"}


def _quarter(steps: int) -> dict[str, Any]:
    from sparsecc.train import Cubic

    return {"schedule": Cubic(sparsity=0.9, start=0, end=steps // 4, every=25), "pattern": "global"}


_CHANNELS = "ChannelPruning(sparsity={}, residual=False)"
TRAININGS: tuple[Training, ...] = (
    Training("2:4, magnitude", 200, "NMPattern()", sparsify=_two_of_four),
    Training("2:4, SparseGPT", 200, "SparseGPT(pattern='2:4')", sparsify=_two_of_four),
    Training("25 % of inner channels, L2", 200, _CHANNELS.format(0.25)),
    Training(
        "25 % of inner channels, OBS, least squares", 200,
        f"{_CHANNELS.format(0.25)}; Reconstruction()", "obs",
    ),
    Training(
        "25 % of inner channels, OBS, least squares, learning rate .005", 200,
        f"{_CHANNELS.format(0.25)}; Reconstruction()", "obs", rate=0.005,
    ),
    Training("50 % of inner channels, L2", 200, _CHANNELS.format(0.5)),
    Training(
        "50 % of inner channels, OBS, least squares", 200,
        f"{_CHANNELS.format(0.5)}; Reconstruction()", "obs",
    ),
    Training(
        "Torch-Pruning, group L2, inner channels", 200,
        peer=partial(torch_pruned, share=0.5, inner=True),
    ),
    Training(
        "Torch-Pruning, group L2, all channels", 200,
        peer=partial(torch_pruned, share=0.5, inner=False),
    ),
    Training("90 %, at once", 600, sparsify=_at_once),
    Training("90 %, in six rounds (Han et al.)", 600, sparsify=_in_rounds),
    Training("90 %, cubic (Zhu and Gupta)", 600, sparsify=_cubic),
    Training("90 %, cubic, over within a fifth of the steps", 600, sparsify=_early),
    Training("90 %, at once, batches of 64", 2000, sparsify=_at_once, batch=64),
    Training(
        "90 %, cubic, over within a quarter of the steps, batches of 64", 2000, sparsify=_quarter, batch=64
    ),
)  # fmt: skip


def pruned(training: Training) -> nn.Module:
    """The dense network after the recipe."""
    import sparsecc

    model = load_resnet20()
    if training.peer is not None:
        return training.peer(model)
    if not training.recipe:
        return model
    data = fashion(4)
    x = next(iter(data))[0][:2]
    result = sparsecc.prune(model, (x,), recipe=training.recipe, saliency=training.saliency, calibration=data)
    result.certificate.require()
    return result.model  # type: ignore[no-any-return]


def trained(training: Training, seed: int) -> tuple[float, float]:
    """Accuracy on the test images after training, and the share of the dense network's FLOPs."""
    from sparsecc.train import Sparsifier

    model = pruned(training)
    left = flops(model) / flops(load_resnet20())
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(a) for a in fashion_mnist("train"))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=training.rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    model.train()
    sparsifier = None
    if training.sparsify is not None:
        sparsifier = Sparsifier(
            model, optimizer, example_inputs=(images[:2],), **training.sparsify(training.steps)
        )
    rounds = training.steps * training.batch // len(images) + 1
    order = torch.cat([torch.randperm(len(images)) for _ in range(rounds)])
    for step in range(training.steps):
        chosen = order[step * training.batch : (step + 1) * training.batch]
        inputs = augment(images[chosen]).contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = F.cross_entropy(model(inputs), labels[chosen].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if sparsifier is not None:
            sparsifier.step()
    if sparsifier is not None:
        model = sparsifier.finish()
    test, answers = (torch.from_numpy(a) for a in fashion_mnist("test"))
    return count_correct(model.eval(), test, answers) / len(answers), left


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.training", description=__doc__)
    parser.add_argument("--only", default="*", help="pattern of experiments, such as '*2:4*'")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for training in (t for t in TRAININGS if fnmatch.fnmatch(t.key, chosen.only)):
        for seed in SEEDS:
            found = load().get("training", {}).get(training.key, {})
            if str(seed) in found:
                continue
            start = time.perf_counter()
            score, left = trained(training, seed)
            save(partial(_add, key=training.key, seed=seed, score=score, left=left))
            console.print(f"{training.title}, seed {seed}: {score:.4f} ({time.perf_counter() - start:.0f} s)")
    return 0


def _add(kept: dict[str, Any], *, key: str, seed: int, score: float, left: float) -> None:
    kept.setdefault("training", {}).setdefault(key, {})[str(seed)] = score
    kept.setdefault("training FLOPs", {})[key] = left


def lines(kept: dict[str, Any]) -> list[str]:
    """The table of docs/accuracy.md: mean over seeds, and the half width of its 95 % interval."""
    out = ["| | FLOPs left | steps | accuracy | seeds |", "|---|---|---|---|---|"]
    for training in TRAININGS:
        scores = list(kept.get("training", {}).get(training.key, {}).values())
        if scores:
            mean, many = statistics.mean(scores), len(scores)
            half = _T[many] * statistics.stdev(scores) / many**0.5 if many > 1 else None
            spread = "" if half is None else f" ± {half:.4f}"
            left = kept.get("training FLOPs", {}).get(training.key)
            share = "" if left is None else f"{left:.2f}"
            out.append(f"| {training.title} | {share} | {training.steps} | {mean:.4f}{spread} | {many} |")
    return out if len(out) > 2 else []


#: Student's t, 95 %, by number of runs
_T = {2: 12.71, 3: 4.303}


if __name__ == "__main__":
    sys.exit(main())

"""Recovery by fine-tuning, ResNet-20: ``python -m benchmarks.accuracy.training``.

Every run starts from the committed dense weights, prunes (on the processor), and trains for a number of
steps with a learning rate that falls to zero; the seed decides the order of the images and their
augmentation.  Test images are looked at once, at the end.  What is there already is not run again.
With a GPU: ``--seeds 10 --device cuda --jobs 8``.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import multiprocessing
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
from benchmarks.accuracy.peer import EXAMPLE, flops, torch_pruned
from benchmarks.accuracy.store import load, save
from benchmarks.cuda_graphs import captured
from benchmarks.datasets import fashion_mnist
from benchmarks.resnet20 import ResNet20, count_correct, load_resnet20
from benchmarks.train_fashion import augment, autocast

SEEDS = 3
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


def _at_once(steps: int, sparsity: float = 0.9) -> dict[str, Any]:
    from sparsecc.train import OneShot

    return {"schedule": OneShot(sparsity=sparsity, start=0), "pattern": "global"}


def _in_rounds(steps: int, sparsity: float = 0.9) -> dict[str, Any]:
    from sparsecc.train import Iterative

    end = steps * 3 // 5
    return {"schedule": Iterative(sparsity=sparsity, start=0, end=end, every=end // 6), "pattern": "global"}


def _cubic(steps: int, sparsity: float = 0.9, share: float = 0.6, every: int = 20) -> dict[str, Any]:
    from sparsecc.train import Cubic

    end = int(steps * share)
    return {"schedule": Cubic(sparsity=sparsity, start=0, end=end, every=every), "pattern": "global"}


def _unstructured(sparsity: float) -> tuple[Training, ...]:
    """A share of zeros anywhere: at once, in rounds, and along a cubic that is over soon or late."""
    name, steps = f"{100 * sparsity:g} %", 2000
    given: dict[str, Any] = {"sparsity": sparsity}
    return (
        Training(f"{name}, at once", steps, sparsify=partial(_at_once, **given)),
        Training(f"{name}, in six rounds (Han et al.)", steps, sparsify=partial(_in_rounds, **given)),
        Training(
            f"{name}, cubic (Zhu and Gupta), over within a quarter of the steps", steps,
            sparsify=partial(_cubic, share=0.25, **given),
        ),
        Training(
            f"{name}, cubic, over within three fifths of the steps", steps, sparsify=partial(_cubic, **given)
        ),
    )  # fmt: skip


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
    Training(
        "90 %, cubic, over within a fifth of the steps", 600, sparsify=partial(_cubic, share=0.2, every=10)
    ),
    Training("90 %, at once, batches of 64", 2000, sparsify=_at_once, batch=64),
    Training(
        "90 %, cubic, over within a quarter of the steps, batches of 64", 2000,
        sparsify=partial(_cubic, share=0.25, every=25), batch=64,
    ),
    *_unstructured(0.9),
    *_unstructured(0.95),
    *_unstructured(0.98),
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


def trained(training: Training, start: nn.Module, seed: int, device: torch.device) -> float:
    """Accuracy on the test images of what was ``pruned``, after training."""
    from sparsecc.train import Sparsifier

    model = copy.deepcopy(start).to(device)
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(a).to(device) for a in fashion_mnist("train"))
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
    descend = gradients(model, training.batch, device)
    rounds = training.steps * training.batch // len(images) + 1
    order = torch.cat([torch.randperm(len(images)) for _ in range(rounds)]).to(device)
    for step in range(training.steps):
        chosen = order[step * training.batch : (step + 1) * training.batch]
        descend(augment(images[chosen]), labels[chosen])
        optimizer.step()
        schedule.step()
        if sparsifier is not None:
            sparsifier.step()
    if sparsifier is not None:
        model = sparsifier.finish()
    test, answers = (torch.from_numpy(a).to(device) for a in fashion_mnist("test"))
    with torch.no_grad():
        return count_correct(model.eval(), test, answers) / len(answers)


def gradients(
    model: nn.Module, batch: int, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A function that puts the gradients of the loss of a batch into the parameters.

    On a GPU it is one CUDA graph: such small networks wait for launches otherwise.
    """
    images = torch.zeros(batch, *EXAMPLE[1:], device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def eager() -> None:
        with autocast(device.type):
            loss = F.cross_entropy(model(images), labels)
        model.zero_grad(set_to_none=False)
        loss.backward()

    def given(x: torch.Tensor, y: torch.Tensor) -> None:
        images.copy_(x)
        labels.copy_(y)
        run()

    run = eager if device.type == "cpu" else _graph(model, eager)
    return given


def _graph(model: nn.Module, function: Callable[[], None]) -> Callable[[], None]:
    """A function as a CUDA graph; what trying it out does to the buffers is undone."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    graph = captured(function)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    return graph.replay


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.training", description=__doc__)
    parser.add_argument("--only", default="*", help="pattern of experiments, such as '*2:4*'")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each")
    parser.add_argument("--device", default="cpu", help="what trains, such as cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    chosen = parser.parse_args()
    todo = [
        (place, chosen.device, tuple(seeds))
        for place, training in enumerate(TRAININGS)
        if fnmatch.fnmatch(training.key, chosen.only)
        if (seeds := [n for n in range(chosen.seeds) if str(n) not in _known(training, chosen.device)])
    ]
    parts = [(place, device, seeds[i::_PARTS]) for place, device, seeds in todo for i in range(_PARTS)]
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        for line in pool.imap_unordered(_several, [part for part in parts if part[2]]):
            Console().print(line)
    return 0


#: of how many pieces the seeds of one training are, which processes share
_PARTS = 2


def _several(work: tuple[int, str, tuple[int, ...]]) -> str:
    """Train with some seeds; what was found as text."""
    torch.set_num_threads(1)
    place, device, seeds = work
    training, begin = TRAININGS[place], time.perf_counter()
    start = pruned(training)
    left = flops(start) / flops(load_resnet20())
    scores = []
    for seed in seeds:
        scores.append(trained(training, start, seed, torch.device(device)))
        key = f"{training.key}{_ON[device]}"
        save(partial(_add, key=key, seed=seed, score=scores[-1], left=left))
    each = (time.perf_counter() - begin) / len(seeds)
    return f"{training.key}: {' '.join(f'{score:.4f}' for score in scores)} ({each:.0f} s each)"


def _known(training: Training, device: str) -> dict[str, float]:
    found: dict[str, float] = load().get("training", {}).get(f"{training.key}{_ON[device]}", {})
    return found


def _add(kept: dict[str, Any], *, key: str, seed: int, score: float, left: float) -> None:
    kept.setdefault("training", {}).setdefault(key, {})[str(seed)] = score
    kept.setdefault("training FLOPs", {})[key] = left


def lines(kept: dict[str, Any]) -> list[str]:
    """The table of docs/accuracy.md: mean over seeds, and the half width of its 95 % interval."""
    out = ["| | FLOPs left | steps | on | accuracy | seeds |", "|---|---|---|---|---|---|"]
    for training in TRAININGS:
        for device, ending in _ON.items():
            key = f"{training.key}{ending}"
            scores = list(kept.get("training", {}).get(key, {}).values())
            if not scores:
                continue
            left = kept.get("training FLOPs", {}).get(key)
            out.append(
                f"| {training.title} | {'' if left is None else f'{left:.2f}'} | {training.steps} "
                f"| {_NAMES[device]} | {_mean(scores)} | {len(scores)} |"
            )
    return out if len(out) > 2 else []


def _mean(scores: list[float]) -> str:
    many = len(scores)
    if many == 1:
        return f"{scores[0]:.4f}"
    half = _T.get(many, 1.96) * statistics.stdev(scores) / many**0.5
    return f"{statistics.mean(scores):.4f} ± {half:.4f}"


#: what a device adds to the key of a training, and its name in the table
_ON = {"cpu": "", "cuda": "/cuda"}
_NAMES = {"cpu": "processor", "cuda": "GPU"}

#: Student's t, 95 %, by number of runs
_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 20: 2.093}


if __name__ == "__main__":
    sys.exit(main())

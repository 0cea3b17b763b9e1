"""A trained network becomes smaller and faster, with a certificate: ``make demo``.

ResNet-20, trained on Fashion-MNIST, loses half of the positions of every coupled group.  The result
is verified against the masked original, comes back as the same class, is trained for a few seconds in an
ordinary PyTorch loop, compiled for this machine's processor, saved, and loaded again.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecc
from benchmarks.resnet20 import load_resnet20
from sparsecc.measure import compare_latency

DATA = Path(__file__).parent / "data" / "fashion_mnist.npz"
STEPS, BATCH, RATE = 180, 128, 0.05


def images(split: str) -> tuple[Tensor, Tensor]:
    """Images[N,1,28,28] (normalised) and labels[N] of one split of the data beside this file."""
    with np.load(DATA) as stored:
        pixels, labels = stored[f"{split}_images"], stored[f"{split}_labels"]
    return (torch.from_numpy(pixels).float()[:, None] / 255 - 0.2860) / 0.3530, torch.from_numpy(
        labels
    ).long()


def accuracy(model: object, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        chosen = torch.cat([model(part).argmax(1) for part in x.split(250)])  # type: ignore[operator]
    return float((chosen == y).float().mean())


def fine_tune(model: nn.Module, teacher: nn.Module, x: Tensor) -> None:
    """An ordinary training loop: the pruned model learns from the dense one's answers."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(STEPS), description="fine-tuning", console=Console(stderr=True)):
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        with torch.no_grad():
            target = teacher(batch).log_softmax(1)
        loss = F.kl_div(model(batch).log_softmax(1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    """The demo."""
    torch.manual_seed(0)
    console = Console()
    console.rule("a trained model")
    dense = load_resnet20().eval()
    test_x, test_y = images("test")
    train_x, _ = images("train")
    example = (test_x[:2],)
    dense_accuracy = accuracy(dense, test_x, test_y)
    console.print(f"ResNet-20 on Fashion-MNIST: {dense_accuracy:.1%} of {len(test_x)} test images right")

    console.rule("sparsecc.analyze: what goes together")
    for group in sparsecc.analyze(dense, example).groups[:4]:
        console.print(
            f"  {group.size:3} channels in {len(group.members)} tensors: {group.name}, ...", highlight=False
        )

    console.rule("sparsecc.prune(model, example, sparsity=0.5)")
    start = time.monotonic()
    result = sparsecc.prune(dense, example, sparsity=0.5)
    small = result.model
    one_shot = accuracy(small, test_x, test_y)
    before, after = result.report.before, result.report.after
    console.print(f"{time.monotonic() - start:.1f} s; still a {type(small).__name__}, and trainable")
    console.print(str(result.certificate), highlight=False)

    console.rule("an ordinary training loop")
    fine_tune(small, dense, train_x)
    tuned = accuracy(small, test_x, test_y)

    console.rule('sparsecc.compile(model, example, target="cpu")')
    compiled = sparsecc.compile(small, example, target="cpu")
    reference = sparsecc.compile(dense, example, target="cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet20.scc"
        compiled.save(path)
        loaded = sparsecc.load(path)
        size = path.stat().st_size
    final = accuracy(loaded, test_x, test_y)
    console.print(str(loaded.certificate), highlight=False)
    batch = test_x[:16]
    latency = compare_latency(lambda: reference(batch), lambda: loaded(batch))

    table = Table(title="ResNet-20 on Fashion-MNIST")
    for column in ("", "before", "after", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("parameters", "macs"):
        table.add_row(name, f"{before[name]:,}", f"{after[name]:,}", f"{before[name] / after[name]:.2f}x")
    table.add_row(
        "latency, 16 images (ms)",
        f"{latency.before_ms:.2f}",
        f"{latency.after_ms:.2f}",
        f"{latency.ratio:.2f}x",
    )
    table.add_row("right answers, one shot", f"{dense_accuracy:.1%}", f"{one_shot:.1%}", "")
    table.add_row(f"right answers, {STEPS} steps later", f"{dense_accuracy:.1%}", f"{tuned:.1%}", "")
    table.add_row("right answers, artifact loaded", "", f"{final:.1%}", "")
    console.print(table)
    console.print(
        f"artifact: {size / 1e3:.0f} kB; latency: medians of {latency.rounds} interleaved rounds "
        f"on onnxruntime, load average {latency.load}"
    )


if __name__ == "__main__":
    main()

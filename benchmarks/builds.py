"""Compiles trained models for sparse tensor cores and writes docs/builds.md: ``make bench-builds``.

Every model is compiled for every target in a process of its own, first with an empty store of kernels, then
with what that left.  Every layer that can be sparse is (``choose=always``): what is shown is that the whole
model builds and is verified, not that it would be fast.  An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.data import root
from benchmarks.models import MODELS
from sparsecc.atomic import atomic_write

PAGE = Path(__file__).resolve().parent.parent / "docs" / "builds.md"
TARGETS = ("sm80-2:4", "sm90-2:4")
STAGES = ("capture", "analyse", "plan", "edit", "verify", "lower", "build", "check")
_STORE = "SPARSECC_KERNELS"


@dataclass(frozen=True)
class Build:
    """One compilation: seconds of wall clock and of CPU, in all and the latter by stage."""

    wall: float
    cpu: float
    stages: Mapping[str, float]
    memory_mb: float
    threads: int
    load: float


@dataclass(frozen=True)
class Row:
    """One model for one target: what was built, what the certificate says, and what it took."""

    model: str
    target: str
    layers: int
    sparse: int
    dense: Mapping[str, int]
    kernels: int
    status: str
    measure: str
    error: float
    bound: float
    size: int
    cold: Build
    warm: Build

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Row:
        """Inverse of ``asdict``."""
        builds = {name: Build(**stored[name]) for name in ("cold", "warm")}
        return cls(**{**stored, **builds})


def compiled(model: str, target: str, threads: int) -> dict[str, Any]:
    """Compile one model in this process: a ``Build``, and the fields of ``Row`` that every build shares."""
    import torch

    import sparsecc
    from sparsecc.targets.cuda.launch import KERNELS
    from sparsecc.targets.cuda.listing import layers_of

    torch.set_num_threads(threads)
    loaded = MODELS[model].load()
    stages: dict[str, float] = defaultdict(float)
    stage, since = "", time.process_time()

    def progress(name: str) -> None:
        nonlocal stage, since
        now = time.process_time()
        stages[stage] += now - since
        stage, since = name, now

    start, cpu = time.monotonic(), time.process_time()
    result = sparsecc.compile(
        loaded.model,
        loaded.example_inputs,
        target=target,
        dynamic_shapes=loaded.dynamic_shapes,
        options={"choose": "always"},
        progress=progress,
    )
    progress("")
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.scc")
        result.save(path)
        size = path.stat().st_size
    check = result.certificate.worst("artifact")
    assert check is not None
    layers = layers_of(result.artifact)
    return {
        "layers": len(layers),
        "sparse": sum(entry["sparse"] for entry in layers),
        "dense": dict(Counter(entry["why"] for entry in layers if not entry["sparse"])),
        "kernels": len(json.loads(result.artifact.read(KERNELS))),
        "status": result.certificate.status,
        "measure": check.measure,
        "error": check.error,
        "bound": check.bound,
        "size": size,
        "build": Build(
            wall,
            cpu,
            {name: seconds for name, seconds in stages.items() if name},
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            threads,
            os.getloadavg()[0],
        ),
    }


def measured(model: str, target: str, threads: int) -> Row:
    """Compile one model twice, each time in a new process: with an empty store of kernels, and once more."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_STORE] = folder
        new = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=new, max_tasks_per_child=1) as process:
            cold, warm = (process.submit(compiled, model, target, threads).result() for _ in range(2))
    builds = {"cold": cold.pop("build"), "warm": warm.pop("build")}
    if cold != warm:
        raise SystemExit(f"{model} {target}: two compilations differ: {cold} and {warm}")
    return Row(model, target, **cold, **builds)


_PAGE = """\
# Whole models for sparse tensor cores

Trained models (`make data`), pruned one-shot to 2:4 and compiled with `choose=always`, without a GPU; written
by `make bench-builds`, {rows} of {every} builds. Artifacts were checked in their CPU form: **nothing here ran
on a GPU**.

{built}

Error and bound are those of the check that came closest to its bound ({measure}).

## Layers that stay dense

{dense}

## What it takes

Seconds of `sparsecc.compile` alone (the model is loaded before): with an empty store of kernels (cold), then
in a new process with what that left (warm); torch on {threads} thread, kernels compiled on all {cores} cores.
Load is the machine's average over a minute at the end of both: where it is above the number of cores, wall
clock says more of the other work on the machine than of this.

{taken}

CPU-seconds by stage, cold. `build` chooses layers, writes and compiles kernels and packs weights; it is given
cold and warm.

{stages}
"""


def page(rows: Sequence[Row]) -> str:
    """The document in Markdown."""
    first = rows[0]
    return _PAGE.format(
        rows=len(rows),
        every=len(MODELS) * len(TARGETS),
        built=_built(rows),
        measure=first.measure,
        dense=_dense([row for row in rows if row.target == TARGETS[0]]),
        threads=first.cold.threads,
        cores=os.cpu_count(),
        taken=_taken(rows),
        stages=_stages(rows),
    )


def _built(rows: Sequence[Row]) -> str:
    columns = ("model", "target", "layers 2:4", "kernels", "certificate", "error", "bound", "artifact, MB")
    return _table(
        columns,
        (
            (
                *_name(r),
                f"{r.sparse} of {r.layers}",
                r.kernels,
                r.status,
                f"{r.error:.1e}",
                f"{r.bound:.1e}",
                f"{r.size / 1e6:.1f}",
            )
            for r in rows
        ),
    )


def _dense(rows: Sequence[Row]) -> str:
    counted = ((r, *pair) for r in rows for pair in Counter(r.dense).most_common())
    return _table(("model", "layers", "why"), ((_name(r)[0], count, why) for r, why, count in counted))


def _taken(rows: Sequence[Row]) -> str:
    columns = ("model", "target", "cold, wall", "cold, CPU", "warm, wall", "warm, CPU", "load", "memory, MB")
    return _table(
        columns,
        (
            (
                *_name(r),
                *(f"{seconds:.1f}" for b in (r.cold, r.warm) for seconds in (b.wall, b.cpu)),
                f"{r.cold.load:.1f}, {r.warm.load:.1f}",
                f"{r.cold.memory_mb:.0f}",
            )
            for r in rows
        ),
    )


def _stages(rows: Sequence[Row]) -> str:
    def seconds(row: Row, stage: str) -> str:
        cold, warm = f"{row.cold.stages[stage]:.1f}", f"{row.warm.stages[stage]:.1f}"
        return f"{cold}, {warm}" if stage == "build" else cold

    return _table(
        ("model", "target", *STAGES), ((*_name(r), *(seconds(r, stage) for stage in STAGES)) for r in rows)
    )


def _name(row: Row) -> tuple[str, str]:
    return MODELS[row.model].title, row.target


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--only", multiple=True, metavar="PATTERN", help="Only models of this name or NAME/TARGET.")
@click.option("--fresh", is_flag=True, help="Compile what was chosen again.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--docs/--no-docs", default=True, help="Write docs/builds.md.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(only: Sequence[str], fresh: bool, threads: int, docs: bool, as_json: bool) -> None:
    """Compile trained models for sparse tensor cores, with and without kept kernels.

    The exit code is 1 if a certificate is not VERIFIED.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    file = root() / "derived" / "builds.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    console = Console(stderr=True)
    every = [f"{model}/{target}" for model in MODELS for target in TARGETS]
    wanted = [key for key in every if not only or any(fnmatch.fnmatch(key, f"{p}*") for p in only)]
    for key in wanted:
        if key in stored and not fresh:
            continue
        model, target = key.split("/")
        row = measured(model, target, threads)
        stored[key] = asdict(row)
        with atomic_write(file) as sink:
            sink.write(json.dumps(stored, indent=1).encode())
        console.print(f"{key}: {row.status}, cold {row.cold.wall:.0f} s, warm {row.warm.wall:.0f} s")
    rows = {key: Row.of(stored[key]) for key in every if key in stored}
    if as_json:
        print(json.dumps([stored[key] for key in wanted]))
    if docs:
        PAGE.write_text(page(list(rows.values())))
        console.print(f"written: {PAGE.name}")
    sys.exit(any(rows[key].status != "VERIFIED" for key in wanted))


if __name__ == "__main__":
    main()

"""Running an artifact once for its outputs, and some more times for its latency."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsecc.api  # noqa: F401  (fills the table of targets)
from sparsecc.artifact import MODEL, WEIGHTS, Artifact
from sparsecc.atomic import atomic_write
from sparsecc.cli.models import check_place, dimension_sizes, read_inputs
from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import OnnxFile, to_numpy, to_torch
from sparsecc.target import resolve

BUDGET_S = 5.0
_WARMUP = 2


@dataclass(frozen=True)
class Done:
    """What came out, from what, and how fast; ``stand_in`` ran in the place of the target's own device."""

    target: str
    inputs: list[dict[str, Any]]
    made_up: list[str]
    outputs: list[dict[str, Any]]
    median_ms: float
    rounds: int
    stand_in: str


def run_once(
    path: str,
    inputs: Sequence[str],
    dims: Sequence[str],
    output: str | None,
    *,
    rounds: int,
    threads: int | None,
    options: Mapping[str, str],
    stage: Callable[[str], None],
) -> Done:
    """Run the artifact at ``path``, write the outputs if asked to, and time it."""
    if output is not None:
        check_place(output)
        if Path(output).exists() and Path(path).exists() and Path(output).samefile(path):
            raise InvalidOption(f"cannot write {output}: it is the artifact; choose another name")
    artifact = Artifact.load(path)
    feeds, made_up = _feeds(artifact, read_inputs(inputs), dims)
    executor: Any = resolve(artifact.target, options, to_build=False)[0].executor(artifact, threads=threads)
    named = {spec.name: feeds[spec.name] for spec in artifact.signature.inputs}
    executor(**named)  # the arguments are checked here
    found: dict[str, torch.Tensor] = executor.run_named(named)
    if output is not None:
        import numpy as np

        with atomic_write(output) as stream:
            np.savez(stream, allow_pickle=False, **{name: to_numpy(value) for name, value in found.items()})
    stage("time")
    times = _times(lambda: executor.run_named(named), rounds)
    median = statistics.median(times) * 1e3
    shown = [_described(name, value) for name, value in found.items()]
    given = [_described(name, value) for name, value in named.items()]
    return Done(artifact.target, given, made_up, shown, median, len(times), executor.stand_in)


def _feeds(
    artifact: Artifact, given: Mapping[str, Any], dims: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Inputs by name, and the names of those that were made up."""
    names = [spec.name for spec in artifact.signature.inputs]
    if unknown := sorted(set(given) - set(names)):
        raise InvalidOption(f"no input is named {', '.join(unknown)}; the model takes {artifact.signature}")
    tensors: dict[str, torch.Tensor] = {}
    for name, array in given.items():
        tensor = to_torch(array)
        if tensor is None:
            raise InvalidOption(f"--input {name}: an array of {array.dtype} is no tensor of numbers")
        tensors[name] = tensor
    made_up = [name for name in names if name not in tensors]
    if not made_up:
        return tensors, []
    if MODEL not in artifact.members:
        raise InvalidOption(
            f"give --input for {', '.join(made_up)}: the artifact does not say what they may hold"
        )
    from sparsecc.onnxfile.synth import synthesise

    with tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        artifact.extract(folder, *(name for name in (MODEL, WEIGHTS) if name in artifact.members))
        file = OnnxFile.load(Path(folder, MODEL))
        return dict(synthesise(file, dimension_sizes(file, dims, given), 0, tensors).inputs), made_up


def _times(call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each call; fewer calls than asked for where they take long."""
    for _ in range(_WARMUP):
        call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < rounds and (not times or time.perf_counter() - start < BUDGET_S):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _described(name: str, value: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}

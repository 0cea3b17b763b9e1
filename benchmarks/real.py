"""Prunes the real models and writes the results table into README.md: ``make bench-real``.

For each model: analysis, pruning at 10, 25 and 50 % (one shot, L2, no fine-tuning), verification, task
score before and after.  ``inner`` leaves widths that residual sums share alone and prunes channels
and heads; ``all`` prunes every group that there is.  Rows are kept in a cache and only missing ones
are computed, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.data import root
from benchmarks.models import MODELS, RealModel, as_predict

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results: begin (written by make bench-real) -->", "<!-- results: end -->"
RECIPES = {
    "inner": "ChannelPruning(sparsity={s}, residual=False); HeadPruning(sparsity={s})",
    "all": "ChannelPruning(sparsity={s}); HeadPruning(sparsity={s}, head_dims=True)",
}
SPARSITIES = (0.10, 0.25, 0.50)
#: what no recipe may touch: a fixed Fourier basis
EXCLUDED = {"silero_vad": ("stft",)}


@dataclass(frozen=True)
class Row:
    """One model pruned in one way."""

    model: str
    title: str
    metric: str
    recipe: str
    sparsity: float
    parameters: float
    macs: float
    dense: float
    pruned: float
    speedup: float
    certificate: str
    float64: float
    form: str
    frozen: int
    groups: int
    seconds: float


def rows(entry: RealModel, recipes: list[str], cached: dict[str, Any]) -> Iterator[Row]:
    """Every row of one model; the model is loaded only if something is missing."""
    jobs = [(r, s) for r in recipes for s in SPARSITIES]
    loaded = None
    dense = None
    for recipe, sparsity in jobs:
        key = f"{entry.name}/{recipe}/{sparsity}"
        if key not in cached:
            if loaded is None:
                loaded = entry.load()
                dense = entry.score(loaded.predict)[entry.metric]
            cached[key] = asdict(_row(entry, loaded, float(dense or 0), recipe, sparsity))
        yield Row(**cached[key])


def _row(entry: RealModel, loaded: Any, dense: float, recipe: str, sparsity: float) -> Row:
    import sparsecc

    start = time.monotonic()
    result = sparsecc.prune(
        loaded.model,
        loaded.example_inputs,
        recipe=_recipe(entry, recipe, sparsity),
        dynamic_shapes=loaded.dynamic_shapes,
        latency=True,
    )
    seconds = time.monotonic() - start
    score = entry.score(as_predict(result.model))[entry.metric]
    before, after = result.report.before, result.report.after
    check = result.certificate.worst("float64")
    latency = result.report.latency or {}
    return Row(
        entry.name,
        entry.title,
        entry.metric,
        recipe,
        sparsity,
        after["parameters"] / before["parameters"],
        after["macs"] / before["macs"],
        dense,
        float(score),
        float(latency.get("ratio", float("nan"))),
        result.certificate.status,
        check.error if check is not None else float("nan"),
        result.plan.form or "onnx",
        len(result.report.frozen),
        len(result.report.groups),
        seconds,
    )


def _recipe(entry: RealModel, recipe: str, sparsity: float) -> list[Any]:
    from sparsecc.passes import PASSES
    from sparsecc.recipe import parse

    steps = parse(RECIPES[recipe].format(s=sparsity), PASSES)
    changed: dict[str, Any] = {"exclude": EXCLUDED.get(entry.name, ())}
    return [replace(step, **changed) for step in steps]


def markdown(found: list[Row]) -> str:
    """The table as README holds it."""
    lines = [
        "| model | groups | pruned | parameters left | MACs left | score | latency "
        "| max rel. error, float64 | back as |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        first = r.recipe == "inner" and r.sparsity == SPARSITIES[0]
        lines.append(
            f"| {r.title if first else ''} | {r.groups if first else ''} | {r.recipe} {r.sparsity:.0%} "
            f"| {r.parameters:.2f} | {r.macs:.2f} "
            f"| {r.metric} {r.dense:.3f} -> {r.pruned:.3f} | {r.speedup:.2f}x "
            f"| {r.float64:.1e} {r.certificate} | {r.form} |"
        )
    return "\n".join(lines)


def write_readme(found: list[Row]) -> None:
    """Replace the table between the two marks."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{markdown(found)}\n{END}{tail}")


def main() -> int:
    """The command; exit code 1 where a result is not verified."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-readme", action="store_true", help="print the table only")
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(chosen.threads)
    store = root() / "derived" / "real.json"
    store.parent.mkdir(parents=True, exist_ok=True)
    cached = json.loads(store.read_text()) if store.exists() and not chosen.fresh else {}
    console = Console(stderr=True)
    found: list[Row] = []
    for name in chosen.models or MODELS:
        with console.status(f"{name} ..."):
            for row in rows(MODELS[name], chosen.recipes, cached):
                store.write_text(json.dumps(cached, indent=1))
                found.append(row)
                console.print(
                    f"{row.model:19}{row.recipe:6}{row.sparsity:4.0%}  params {row.parameters:.3f}  "
                    f"macs {row.macs:.3f}  {row.metric} {row.dense:.4f} -> {row.pruned:.4f}  "
                    f"{row.certificate}  {row.seconds:.0f} s"
                )
    print(markdown(found))
    if not chosen.no_readme and not chosen.models:
        write_readme(found)
    bad = [r for r in found if r.certificate != "VERIFIED"]
    for r in bad:
        print(f"{r.model} {r.recipe} {r.sparsity}: {r.certificate}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())

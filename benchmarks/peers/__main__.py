"""``make bench-peers``: every comparison, as tables and in docs/peers.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.peers import memory, perplexity, planning, removal, surgeon
from benchmarks.peers.nets import GRAPH_NETS, MODULE_NETS

PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
Section = tuple[str, list[str], list[list[str]], str, bool]


def _planning(rounds: int) -> Section:
    lines = [planning.compare(net, wanted, rounds) for net, wanted in planning.COMPARED]
    rows = [
        [
            n.net,
            f"{n.nodes:,}",
            f"{n.ours:.3f}",
            f"{n.floor:.3f}",
            f"{n.setup:.2f}",
            f"{n.step:.2f}",
            f"{n.step_ratio:.1f}x",
            _or(n.wanted),
            f"{n.ratio:.1f}x",
        ]
        for n in lines
    ]
    late = any(n.wanted is not None and n.step_ratio < n.wanted for n in lines)
    note = (
        "CPU-seconds on one thread, medians, both in one process in turn. Ours: reading the exported "
        "graph, analysis, saliency, plan and the narrowed module; export excluded. Floor: the norm of every "
        "weight and a copy of a quarter of it. Torch-Pruning: its set-up (the dependency graph, for which it "
        "runs the model once) and its step. The ratio is that of its step alone to all of ours; the last "
        "column counts its set-up, too."
    )
    return "Planning time beside Torch-Pruning 1.6.1", _PLANNING, rows, note, late


_PLANNING = [
    "net",
    "operators",
    "sparsecc",
    "floor",
    "peer's set-up",
    "peer's step",
    "ratio",
    "wanted",
    "with set-up",
]


def _or(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _growth(rounds: int) -> Section:
    found = planning.growth(rounds)
    lines = [*found.lines, *(planning.alone(net, limit, rounds) for net, limit in planning.ALONE)]
    rows = [[n.net, f"{n.nodes:,}", f"{n.ours:.3f}", _or(n.limit)] for n in lines]
    late = found.exponent > 1.1 or any(n.limit is not None and n.ours > n.limit for n in lines)
    note = f"Time grows with the number of operators to the power of {found.exponent:.2f} (at most 1.1)."
    return "Growth of planning time", ["net", "operators", "CPU-seconds", "limit"], rows, note, late


def _memory(_: int) -> Section:
    lines = [memory.peak(name) for name in memory.MODELS]
    rows = [[n.model, f"{n.weights:,.0f}", f"{n.extra:,.0f}", f"{n.limit:,.0f}"] for n in lines]
    note = "Megabytes; peak resident memory of analysis and plan above that of the exported model."
    late = any(n.extra > n.limit for n in lines)
    return "Memory of planning", ["model", "weights", "extra at peak", "limit"], rows, note, late


def _modules(_: int) -> Section:
    lines = [removal.against_modules(net) for net in MODULE_NETS]
    note = (
        "Share of parameters kept when half of every group goes. Torch-Pruning's result counts as usable "
        "if it runs, its outputs keep their shapes, and no layer lost more than the half that was asked for; "
        "whether its numbers are right is not asked."
    )
    rows, late = _removals(lines)
    return "Removal beside Torch-Pruning 1.6.1", ["net", "parameters", "sparsecc", "peer"], rows, note, late


def _graphs(_: int) -> Section:
    lines = [removal.against_graphs(net) for net in GRAPH_NETS]
    rows, late = _removals(lines)
    both = [(n.before, n.ours, n.peer) for n in lines if n.peer is not None]
    ours, theirs = sum(b - o for b, o, _ in both), sum(b - p for b, _, p in both)
    shares = sum(1 - o / b for b, o, _ in both) / sum(1 - p / b for b, _, p in both)
    note = (
        "Share of parameters kept, from the same ONNX exports (onnxsim: channels, then attention heads). "
        f"Summed over the nets, sparsecc removes {ours / max(theirs, 1):.2f} times what onnxsim removes "
        f"(at least 1.75); the mean share removed is {shares:.2f} times onnxsim's."
    )
    late = late or ours < 1.75 * theirs
    return "Removal beside onnxsim 0.8.1", ["net", "parameters", "sparsecc", "peer"], rows, note, late


def _surgeon(rounds: int) -> Section:
    lines = [surgeon.compare(name, 4096, rounds) for name in surgeon.CASES]
    rows = [
        [n.case, f"{n.ours_s:.1f}", f"{n.theirs_s:.1f}", f"{n.ratio:.2f}x"]
        + [f"{v:.4f}" for v in (n.ours_error, n.theirs_error, n.same_zeros)]
        for n in lines
    ]
    note = (
        "Seconds for one layer of 4096 x 4096 on one thread, medians, both with the same second moment in "
        "turn; the share of the outputs' second moment that is lost, and of elements that both keep or both "
        "remove."
    )
    head = ["zeros", "sparsecc", "peer", "ratio", "lost", "lost by the peer", "same"]
    return "SparseGPT beside llm-compressor 0.14", head, rows, note, any(n.ratio < 1 for n in lines)


def _perplexity(_: int) -> Section:
    return _perplexities([perplexity.compare(*which) for which in perplexity.OURS])


def _perplexities(lines: Sequence[perplexity.Line]) -> Section:
    rows = [
        [
            n.method,
            n.pattern,
            "-" if n.ours is None else f"{n.ours:.2f}",
            f"{n.theirs:.2f}",
            f"{n.seconds:.0f}",
        ]
        for n in lines
    ]
    note = (
        "SmolLM2-135M-Instruct on Wikipedia text, float32; calibration text (16 chunks of 512 tokens) and "
        "scored text are the same for both. Ours: the rows of [accuracy.md](accuracy.md), where a layer "
        "reads what all pruned layers before it give. The peer measures all products of a decoder layer "
        "before it prunes them."
    )
    head = ["method", "zeros", "sparsecc", "peer", "peer's seconds"]
    return "Perplexity beside llm-compressor 0.14", head, rows, note, any(n.behind for n in lines)


def _removals(lines: list[removal.Removal]) -> tuple[list[list[str]], bool]:
    rows = [
        [
            n.net,
            f"{n.before:,}",
            f"{n.ours / n.before:.3f}",
            n.why if n.peer is None else f"{n.peer / n.before:.3f}",
        ]
        for n in lines
    ]
    return rows, any(n.behind for n in lines)


SECTIONS: dict[str, Callable[[int], Section]] = {
    "planning": _planning,
    "growth": _growth,
    "memory": _memory,
    "modules": _modules,
    "graphs": _graphs,
    "surgeon": _surgeon,
    "perplexity": _perplexity,
}


def _markdown(title: str, head: list[str], rows: list[list[str]], note: str) -> Iterator[str]:
    yield from (f"## {title}", "", note, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}")
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    yield ""


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Measurements of which the median is taken.")
@click.option("--section", "names", multiple=True, type=click.Choice(list(SECTIONS)), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--write/--no-write", default=True, help="Put the sections into docs/peers.md.")
def main(rounds: int, names: tuple[str, ...], as_json: bool, write: bool) -> None:
    """Measure sparsecc beside Torch-Pruning, onnxsim and llm-compressor; exit code 1 where it falls short."""
    torch.set_num_threads(1)
    parts = _known() if write else {}
    found: dict[str, Any] = {}
    missed = False
    for name in names or tuple(SECTIONS):
        title, head, rows, note, late = SECTIONS[name](rounds)
        missed |= late
        note += f" Load average {os.getloadavg()[0]:.1f} when done."
        parts[name] = "\n".join(_markdown(title, head, rows, note))
        found[name] = [dict(zip(head, row, strict=True)) for row in rows]
        if not as_json:
            print(parts[name], flush=True)
        if write:
            _write(parts)
    if as_json:
        print(json.dumps(found, indent=1))
    raise SystemExit(int(missed))


def _known() -> dict[str, str]:
    """Sections that the page holds already, by name."""
    if not PAGE.exists():
        return {}
    pieces = PAGE.read_text().split("<!-- ")[1:]
    return {p.split(" -->")[0]: p.partition("-->\n")[2].rstrip("\n") + "\n" for p in pieces}


def _write(parts: dict[str, str]) -> None:
    head = "# Beside other pruners\n\nWritten by `make bench-peers`.\n"
    body = "".join(f"\n<!-- {name} -->\n{parts[name]}" for name in SECTIONS if name in parts)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(head + body)


if __name__ == "__main__":
    main()

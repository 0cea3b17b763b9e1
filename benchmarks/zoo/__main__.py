"""The command: ``python -m benchmarks.zoo`` (``make zoo``)."""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks.data import root
from benchmarks.zoo import store, table, work
from benchmarks.zoo.entry import PATHS, SUITES, Entry
from benchmarks.zoo.entry import Path as GraphPath
from benchmarks.zoo.measure import DEFECTS, Row
from benchmarks.zoo.sample import FLOORS
from benchmarks.zoo.suites import entries

DOCS = Path(__file__).resolve().parents[2] / "docs"

Job = tuple[Entry, GraphPath]
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--suite", "suites", multiple=True, type=click.Choice(SUITES), help="Only this suite.")
@click.option("--path", "paths", multiple=True, type=click.Choice(PATHS), help="Only this path.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only models of this name or SUITE/NAME.")
@click.option("--sample", is_flag=True, help="Only the models that the tests prune.")
@click.option("--retry", multiple=True, metavar="OUTCOME", help="Run what had this outcome before again.")
@click.option("--fresh", is_flag=True, help="Run everything that was chosen again.")
@click.option("--jobs", default=1, show_default=True, help="Processes at a time.")
@click.option("--timeout", default=600, show_default=True, help="CPU-seconds for one model on one path.")
@click.option("--memory", default=12, show_default=True, help="GB for one model.")
@click.option("--max-params", default=150_000_000, show_default=True, help="Larger models are not run.")
@click.option("--out", type=click.Path(path_type=Path), help="File of results [default: in the cache].")
@click.option("--docs/--no-docs", default=None, help="Write docs/zoo.* [default: if all models were chosen].")
def main(
    suites: Sequence[str],
    paths: Sequence[str],
    only: Sequence[str],
    sample: bool,
    retry: Sequence[str],
    fresh: bool,
    jobs: int,
    timeout: int,
    memory: int,
    max_params: int,
    out: Path | None,
    docs: bool | None,
) -> None:
    """Prune public architectures at 50 % and prove each result, from PyTorch and from ONNX.

    An interrupted run goes on where it stopped.  The exit code is 1 if a result was wrong or sparsecc
    crashed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes, too
    os.environ.update(_QUIET)
    file = out or root() / "derived" / "zoo.jsonl"
    chosen = [job for job in _all() if _wanted(job, suites, paths, only, sample)]
    if not chosen:
        raise click.UsageError("no model matches")
    rows = store.load(file)
    todo = [j for j in chosen if fresh or _key(j) not in rows or rows[_key(j)].outcome in retry]
    limits = work.Limits(timeout, memory << 30, max_params)
    for count, row in enumerate(work.run(todo, limits, jobs), 1):
        store.append(file, row)
        rows[row.key] = row
        print(f"{count:4}/{len(todo)} {table.line(row)}", flush=True)
    Console().print(table.summary([_row(rows, j) for j in chosen]))
    if docs if docs is not None else len(chosen) == len(_all()):
        write_docs(rows)
    sys.exit(any(_row(rows, j).outcome in DEFECTS for j in chosen))


def _all() -> list[Job]:
    return [(entry, path) for entry in entries() for path in PATHS]


def _key(job: Job) -> str:
    return f"{job[0].key}/{job[1]}"


def _row(rows: dict[str, Row], job: Job) -> Row:
    entry, path = job
    return rows.get(_key(job)) or Row(entry.suite, entry.name, path, "not run")


def _wanted(job: Job, suites: Sequence[str], paths: Sequence[str], only: Sequence[str], sample: bool) -> bool:
    entry, path = job
    return (
        (not suites or entry.suite in suites)
        and (not paths or path in paths)
        and (not only or any(fnmatch.fnmatchcase(n, p) for n in (entry.name, entry.key) for p in only))
        and (not sample or entry.key in FLOORS[path])
    )


def write_docs(rows: dict[str, Row]) -> None:
    """Write docs/zoo.md and docs/zoo.json from every row there is."""
    found = [_row(rows, job) for job in _all()]
    DOCS.mkdir(exist_ok=True)
    (DOCS / "zoo.md").write_text(table.markdown(found), "utf-8")
    (DOCS / "zoo.json").write_text(table.document(found), "utf-8")


if __name__ == "__main__":
    main()

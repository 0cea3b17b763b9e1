"""What was measured of every group, and the shares to remove that follow from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsecc.atomic import atomic_write
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.probing.budget import Option, cheapest
from sparsecc.report import table
from sparsecc.transform import check_count, check_share, keep_count

#: counts between nothing and the largest one measured that a group is offered, at most
_OFFERED = 64


@dataclass(frozen=True)
class Line:
    """One group: by how much the loss rises when it alone loses ``removed[i]`` of its ``size`` positions.

    ``parameters``: how many go with one position.  ``least``: positions that have to stay.
    ``why``: what keeps it whole, where no share of it could be removed.
    """

    group: str
    kind: str
    size: int
    least: int
    parameters: int
    removed: tuple[int, ...]
    rises: tuple[float, ...]
    why: str = ""
    multiple: int = 1

    def rise(self, count: float) -> float:
        """For ``count`` positions removed: what was measured, and straight lines between."""
        return float(np.interp(count, (0, *self.removed), (0.0, *self.rises)))

    def counts(self, multiple_of: int, min_keep: int) -> list[int]:
        """How many positions may go, of those in question; 0 is among them."""
        most = max(self.removed, default=0)
        whole = math.lcm(multiple_of, self.multiple)
        step = max(whole, -(-most // _OFFERED))
        asked = {*range(0, most + 1, step), *self.removed}
        kept = {
            keep_count(self.size, count / self.size, multiple_of=whole, min_keep=max(min_keep, self.least))
            for count in asked
        }
        return sorted({self.size - k for k in kept} | {0})


@dataclass(frozen=True)
class Sensitivity:
    """By how much the loss rises when a group alone loses some of its positions.

    ``loss``: what was measured.  ``saliency``: which positions went, those that matter least by it.
    ``batches``: of how many batches of data the rises are means.
    """

    loss: str
    saliency: str
    batches: int
    lines: tuple[Line, ...]

    def shares(self, sparsity: float, *, multiple_of: int = 1, min_keep: int = 1) -> dict[str, float]:
        """The share to remove of every group, for ``allocation`` of a pass.

        Of all choices that remove ``sparsity`` of the parameters that go with these groups (to within one
        step of one group, and never more) the one with the least sum of rises.  Each group is counted by
        itself: a matrix between two of them counts with both, so that chains of layers lose more of theirs
        than that.  Widths are rounded as passes do it.
        Raises InvalidOption where the largest shares that were measured do not reach that.
        """
        check_share("sparsity", sparsity)
        check_count("multiple_of", multiple_of)
        check_count("min_keep", min_keep)
        whole = sum(line.size * line.parameters for line in self.lines)
        if sparsity > self.most:
            raise InvalidOption(
                f"sparsity={sparsity}: what was measured ends at {self.most:.3g} of the parameters; "
                "measure larger shares, with sparsecc.sensitivity(..., shares=...)"
            )
        counts = [line.counts(multiple_of, min_keep) for line in self.lines]
        options = [
            [Option(count * line.parameters, line.rise(count)) for count in offered]
            for line, offered in zip(self.lines, counts, strict=True)
        ]
        picks = cheapest(options, int(whole * sparsity + 1e-6))
        return {
            line.group: offered[pick] / line.size
            for line, offered, pick in zip(self.lines, counts, picks, strict=True)
        }

    @property
    def most(self) -> float:
        """The largest share of parameters that ``shares`` takes: counts were rounded down."""
        whole = sum(line.size * line.parameters for line in self.lines)
        measured = sum((max(line.removed, default=0) + 1) * line.parameters for line in self.lines)
        return measured / whole if whole else 1.0

    def predicted(self, shares: Mapping[str, float]) -> float:
        """The sum of the rises of groups that lose these shares, as if each did so alone."""
        return sum(line.rise(shares.get(line.group, 0.0) * line.size) for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sensitivity:
        """Inverse of ``to_json``; raises InvalidModel where it is malformed."""
        try:
            lines = tuple(
                Line(**{**line, "removed": tuple(line["removed"]), "rises": tuple(map(float, line["rises"]))})
                for line in document["lines"]
            )
            if wrong := next((line for line in lines if not _sound(line)), None):
                raise ValueError(f"the figures of {wrong.group!r} cannot be")
            return cls(**{**document, "lines": lines})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidModel(f"this is no sensitivity, or it is damaged: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, atomically."""
        with atomic_write(path) as stream:
            stream.write((json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Inverse of ``save``; raises InvalidModel for anything else."""
        try:
            document = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InvalidModel(f"{path}: this is no sensitivity, or it is damaged: {error}") from error
        try:
            return cls.from_json(document)
        except InvalidModel as error:
            raise InvalidModel(f"{path}: {error}") from error

    def __str__(self) -> str:
        rows = [
            [
                line.group,
                str(line.size),
                f"{line.parameters:,}",
                *(f"{c / line.size:.3g}: {r:.3g}" for c, r in zip(line.removed, line.rises, strict=True)),
            ]
            for line in self.lines
        ]
        width = max((len(row) for row in rows), default=3)
        head = ["group", "size", "parameters each", *["removed: rise"] * (width - 3)]
        rows = [row + [""] * (width - len(row)) for row in rows]
        return (
            f"rise of the {self.loss}, mean of {self.batches} batches, least salient by {self.saliency}\n"
            + table(head, rows)
        )


def _sound(line: Line) -> bool:
    """Whether the figures of a line can be those of a group."""
    numbers = (line.size, line.least, line.multiple, line.parameters, *line.removed)
    return (
        all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        and line.size > 0
        and line.multiple > 0
        and line.parameters >= 0
        and all(0 < count <= line.size for count in line.removed)
        and len(line.removed) == len(line.rises)
        and bool(np.isfinite(line.rises).all())
    )

"""Optimal brain surgeon, column by column, as in SparseGPT.

Frantar and Alistarh, "SparseGPT" (2023), algorithm 1.  Columns are taken from left to right: what removing
elements of one costs the outputs is made up for by the columns that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsecc.errors import InvalidOption

#: columns whose mask is chosen together
BLOCK = 128
#: columns that are updated one by one before a product updates the others
_FEW = 16


def dampen_(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H[..., K, K] plus ``damping`` times its mean diagonal, in place; more where nothing was read."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(diagonal == 0, torch.where(mean > 0, mean, 1.0), damping * mean)
    return hessian


def inverse_diagonal(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The diagonal of the inverse of the dampened H, ``[..., K]``."""
    lower = factor(dampen_(hessian.clone(), damping))
    return torch.cholesky_inverse(lower).diagonal(dim1=-2, dim2=-1)


def factor(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor; InvalidOption where rounding has made the matrix indefinite."""
    found, info = torch.linalg.cholesky_ex(matrix)
    _check(info)
    return found  # type: ignore[no-any-return]


def inverse_factor_(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of H ``[K, K]``, in the memory of H: it may be a block's size."""
    columns = hessian.mT  # symmetric; LAPACK works in place on columns
    info = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    _check(info)
    torch.cholesky_inverse(columns, out=columns)
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
    _check(info)
    return columns


def _check(info: torch.Tensor) -> None:
    if int(info.max()):
        raise InvalidOption(
            "the second moment of what a layer reads is not positive definite: give a larger damping, "
            "or more calibration data, and check that activations are finite"
        )


#: scores ``[C, O]`` of C columns -> mask of what stays
Choose = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Columns:
    """How many columns a mask is chosen for at a time, and how."""

    count: int
    choose: Choose


def unstructured(sparsity: float) -> Columns:
    """The lowest scores of every block of 128 columns go; among equals the first ones."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        flat = scores.reshape(-1)
        gone = int(flat.numel() * sparsity + 0.5)
        if not gone:
            return torch.ones_like(scores, dtype=torch.bool)
        last = flat.kthvalue(gone).values
        keep = flat > last
        equal = torch.nonzero(flat == last).flatten()
        keep[equal[gone - int((flat < last).sum()) :]] = True
        return keep.reshape(scores.shape)

    return Columns(BLOCK, choose)


def patterned(n: int, m: int) -> Columns:
    """The ``n`` highest scores of every ``m`` consecutive columns stay; among equals the first ones."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        higher = torch.zeros(scores.shape, dtype=torch.int16)
        for place, row in enumerate(scores):
            higher[:place] += row > scores[:place]
            higher[place + 1 :] += row >= scores[place + 1 :]
        return higher < n

    return Columns(m, choose)


def lowest_of_rows(sparsity: float) -> Choose:
    """That share of the lowest scores ``[O, K]`` of every row goes; among equals the first ones."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        gone = int(scores.shape[1] * sparsity + 1e-9)
        order = torch.argsort(scores, dim=1, stable=True)[:, :gone]
        return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, order, False)

    return choose


def highest_of_groups(n: int, m: int) -> Choose:
    """The ``n`` highest scores ``[O, K]`` of every ``m`` in a row stay; among equals the first ones."""
    choose = patterned(n, m).choose

    def whole(scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.reshape(-1, m).T.contiguous()
        return choose(grouped).T.reshape(scores.shape)

    return whole


def surgeon(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    columns: Columns,
    *,
    damping: float = 0.01,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Updated weight ``[O, K]`` and the mask of what stays, for H = x.T x ``[K, K]`` of the rows read.

    ``allowed`` is False where elements are zero already and stay so.  Runs in the dtype of H, and uses the
    memory of H up: give a copy of one that is needed later.
    """
    work = _Work(weight, hessian, columns, damping, allowed)
    work.run(0, weight.shape[1])
    return work.result()


class _Work:
    """Columns as rows, so that each is contiguous; ``inverse`` is the upper factor of the inverse of H."""

    def __init__(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        columns: Columns,
        damping: float,
        allowed: torch.Tensor | None,
    ) -> None:
        unread = hessian.diagonal() == 0
        self.inverse = inverse_factor_(dampen_(hessian, damping))
        self.columns = columns
        # A copy: the transpose of some matrices is contiguous, and the caller's own memory.
        self.w = weight.to(hessian.dtype).T.clone(memory_format=torch.contiguous_format)
        self.w[unread] = 0
        self.allowed = None if allowed is None else allowed.T
        if self.allowed is not None:
            self.w *= self.allowed
        self.keep = torch.zeros(self.w.shape, dtype=torch.bool)
        self.errors = torch.zeros_like(self.w)
        self.chosen = 0  # columns before this one have their masks

    def run(self, start: int, stop: int) -> None:
        """Columns from ``start`` to ``stop``: one half, its errors into the other one, the other half.

        All of them hold what went before ``start`` already.
        """
        size, count = stop - start, self.columns.count
        if start == self.chosen and size >= min(count, len(self.w) - start):
            self._choose(start)
        if size <= _FEW:
            self._one_by_one(start, stop)
            return
        half = size // 2
        middle = start + (max(count, half - half % count) if size > count else half)
        self.run(start, middle)
        self.w[middle:stop].addmm_(
            self.inverse[start:middle, middle:stop].T, self.errors[start:middle], alpha=-1
        )
        self.run(middle, stop)

    def _choose(self, start: int) -> None:
        stop = self.chosen = min(start + self.columns.count, len(self.w))
        scores = (self.w[start:stop] / self.inverse.diagonal()[start:stop, None]).square()
        if self.allowed is not None:
            scores = torch.where(self.allowed[start:stop], scores, -1.0)
        keep = self.columns.choose(scores)
        self.keep[start:stop] = keep if self.allowed is None else keep & self.allowed[start:stop]

    def _one_by_one(self, start: int, stop: int) -> None:
        for column in range(start, stop):
            if column == self.chosen:
                self._choose(column)
            gone = torch.where(self.keep[column], 0.0, self.w[column])
            error = gone / self.inverse[column, column]
            self.errors[column] = error
            if column + 1 < stop:
                self.w[column + 1 : stop].addr_(self.inverse[column, column + 1 : stop], error, alpha=-1)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight with zeros where elements went, and the mask."""
        del self.errors, self.inverse
        return self.w.mul_(self.keep).T.contiguous(), self.keep.T.contiguous()

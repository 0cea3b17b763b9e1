"""What was checked, on which inputs, with which error and which bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparsecc.errors import InvalidModel, VerificationFailed

Status = Literal["VERIFIED", "VACUOUS", "FAILED", "UNCHECKED"]


@dataclass(frozen=True)
class Check:
    """One comparison: ``error`` must not exceed ``bound`` (both as ``measure`` says)."""

    what: str
    measure: str
    error: float
    bound: float
    inputs: str
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def _blame(failed: set[str]) -> str:
    """What a failure says: whether the graph is wrong, or what runs it computes something else."""
    if failed == {"artifact"}:
        return (
            "The graph is right, but what runs it here computes something else: random numbers, 8-bit "
            "products that saturate on this processor (quantise with reduce_range), or an operator that it "
            "gets wrong; verify=False builds it all the same"
        )
    return (
        "This is a defect of sparsecc or of a rule that was added: exclude the parameter named, and report "
        "it with the model"
    )


@dataclass(frozen=True)
class Certificate:
    """The outcome of verification.

    ``status``: VERIFIED; VACUOUS where no input could have shown an error (``why`` says so); FAILED;
    UNCHECKED where verification was switched off.  ``claim`` says what equals what.
    """

    status: Status
    claim: str
    checks: tuple[Check, ...] = ()
    why: str = ""
    model: str = ""
    plan: str = ""
    versions: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Certificate:
        """Inverse of ``to_json``; raises InvalidModel where it is malformed."""
        try:
            checks = tuple(Check(**c) for c in document["checks"])
            return cls(**{**document, "checks": checks})
        except (KeyError, TypeError) as error:
            raise InvalidModel(f"this is no certificate, or it is damaged: {error}") from error

    def require(self) -> None:
        """Raise VerificationFailed, naming the worst check, unless nothing failed."""
        if self.status != "FAILED":
            return
        failed = [c for c in self.checks if not c.passed]
        worst = max(failed, key=lambda c: c.error / c.bound if c.bound else float("inf"))
        raise VerificationFailed(
            f"{self.claim}: {len(failed)} of {len(self.checks)} checks failed, nothing was written. Worst: "
            f"{worst.what}{' at ' + worst.where if worst.where else ''}: {worst.measure} {worst.error:.3g}, "
            f"bound {worst.bound:.3g} ({worst.inputs}). {_blame({c.what for c in failed})}"
        )

    def worst(self, what: str) -> Check | None:
        """The check of that kind that came closest to its bound."""
        found = [c for c in self.checks if c.what == what]
        return max(found, key=lambda c: c.error / c.bound if c.bound else c.error, default=None)

    def __str__(self) -> str:
        lines = [f"{self.status}: {self.claim}" + (f" ({self.why})" if self.why else "")]
        for what in dict.fromkeys(c.what for c in self.checks):
            worst = self.worst(what)
            count = sum(c.what == what for c in self.checks)
            if worst is not None:
                lines.append(
                    f"  {what}: {count} checks, worst {worst.measure} {worst.error:.2e} "
                    f"(bound {worst.bound:.2e})"
                )
        return "\n".join(lines)

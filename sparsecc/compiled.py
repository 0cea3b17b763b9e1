"""The result of ``sparsecc.compile``: a callable artifact with its report, plan and certificate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidOption
from sparsecc.plan import Plan
from sparsecc.report import Report
from sparsecc.verification import Certificate


@dataclass(frozen=True)
class Built:
    """What a finished compilation holds."""

    artifact: Artifact
    plan: Plan
    certificate: Certificate
    report: Report


class Compiled:
    """A model compiled for a target: call it with torch or NumPy tensors, by position or by name.

    A model that was given without example inputs is compiled at the first call; until then its
    report, plan and certificate do not exist, and asking for them raises InvalidOption.
    """

    def __init__(
        self,
        built: Built | None,
        build: Callable[[tuple[Any, ...], dict[str, Any]], Built] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._built = built
        self._build = build
        self._options = options
        self._executor: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled model."""
        if self._built is None:
            assert self._build is not None
            self._built = self._build(args, kwargs)
        return self.start()(*args, **kwargs)

    def start(self) -> Any:
        """Make what runs the artifact (done by the first call otherwise); returns it."""
        if self._executor is None:
            from sparsecc.target import resolve

            artifact = self._ready().artifact
            target, _ = resolve(artifact.target, self._options, to_build=False)
            self._executor = target.executor(artifact)
        return self._executor

    def _ready(self) -> Built:
        if self._built is None:
            raise InvalidOption(
                "this model has not been compiled yet: it was given without example_inputs, so it compiles "
                "at its first call; call it once, or pass example_inputs to compile()"
            )
        return self._built

    def __repr__(self) -> str:
        if self._built is None:
            return "<Compiled: at its first call>"
        return f"<Compiled for {self.artifact.target}: {self.report.summary(self.certificate)}>"

    def __str__(self) -> str:
        """The report with the artifact's own certificate, where there are such."""
        if self._built is None:
            return repr(self)
        return f"{self!r}\n\n{replace(self.report, certificate=str(self.certificate))}"

    @property
    def artifact(self) -> Artifact:
        """What ``save`` writes."""
        return self._ready().artifact

    @property
    def plan(self) -> Plan:
        """What was decided."""
        return self._ready().plan

    @property
    def certificate(self) -> Certificate:
        """What was checked."""
        return self._ready().certificate

    @property
    def report(self) -> Report:
        """Sizes, work, latency, groups, notes."""
        return self._ready().report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact in one step; a file that is there survives any failure."""
        self._ready().artifact.save(path)


def load(path: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """An artifact that ``Compiled.save`` wrote, ready to run; needs no user code.

    ``options`` are those of the target's own that say how it runs.  Raises InvalidModel for files that are no
    artifacts, TargetUnavailable where its target is not installed, InvalidOption for options that it has not.
    """
    artifact = Artifact.load(path)
    members = {n: artifact.read(n) for n in ("plan.json", "plan.safetensors")}
    manifest = artifact.manifest
    certificate = Certificate.from_json(manifest["certificate"])
    built = Built(artifact, Plan.from_members(members), certificate, Report.from_json(manifest["report"]))
    compiled = Compiled(built, options=options)
    compiled.start()  # the file may be moved or removed afterwards
    return compiled

"""Prunes one entry on one path at 50 % and writes down what came of it."""

from __future__ import annotations

import collections
import contextlib
import math
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from benchmarks.zoo.entry import Built, Entry, Path
from benchmarks.zoo.weights import randomise
from sparsecc.errors import SparseccError, VerificationFailed
from sparsecc.fx.translations import translations_kept

SPARSITY = 0.5
#: kinds of frozen axes that every model has
EXPECTED = ("kernel", "graph input", "graph output")
MAX_REASONS = 8

Outcome = Literal[
    "verified",  # the result is proved to compute what the masked original computes
    "vacuous",  # equal, but no input could have shown an error
    "refused",  # sparsecc says why it does not take the model
    "failed",  # verification found a difference: a defect of sparsecc
    "crash",  # an error that sparsecc did not mean to raise: a defect of sparsecc
    "export failed",  # torch.export or torch.onnx does not take the model
    "no model",  # the library cannot build or run the model here
    "skipped (size)",  # more parameters than --max-params
    "timeout",
    "memory",
]
DEFECTS = ("failed", "crash")


@dataclass
class Row:
    """One entry on one path.

    ``removed`` is the share of parameters that went, ``prunable`` the share that would go if every
    group kept one position.  ``frozen`` counts frozen axes of parameters by the kind of reason,
    ``reasons`` tells the first few that are not what every model has.
    ``error64`` is the worst relative error in float64.  ``seconds`` are CPU-seconds by stage.
    """

    suite: str
    name: str
    path: str
    outcome: str
    message: str = ""
    parameters: int = 0
    removed: float | None = None
    work: float | None = None
    prunable: float | None = None
    groups: int | None = None
    frozen: dict[str, int] = field(default_factory=dict)
    reasons: list[tuple[str, int, str, str]] = field(default_factory=list)
    form: str = ""
    notes: list[str] = field(default_factory=list)
    error64: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """``timm/resnet18/onnx``."""
        return f"{self.suite}/{self.name}/{self.path}"

    @property
    def planning(self) -> float:
        """CPU-seconds for analysis and plan."""
        return sum(self.seconds.get(stage, 0.0) for stage in ("analyse", "plan"))

    @property
    def total(self) -> float:
        """CPU-seconds in all, building and export included."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``Row(**data)`` is the inverse."""
        return asdict(self)


class Stages:
    """CPU-seconds of each stage as it passes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stage = ""
        self._start = time.process_time()

    def begin(self, stage: str) -> None:
        """The next stage begins."""
        now = time.process_time()
        if self.stage:
            self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._start
        self.stage, self._start = stage, now


class Stopped(Exception):
    """The run ends early with a known outcome."""

    def __init__(self, outcome: Outcome, message: str = "") -> None:
        super().__init__(message)
        self.outcome = outcome


def measure(entry: Entry, path: Path, *, max_params: int = 150_000_000) -> Row:
    """Build, prune and verify; whatever goes wrong is the row's outcome."""
    row = Row(entry.suite, entry.name, path, "crash")
    stages = Stages()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _measure(entry, path, max_params, row, stages)
    except Stopped as stop:
        row.outcome, row.message = stop.outcome, str(stop)
    except VerificationFailed as error:
        row.outcome, row.message = "failed", str(error)
    except SparseccError as error:
        row.outcome, row.message = _refusal(error), f"{type(error).__name__}: {error}"
    except MemoryError:
        row.outcome, row.message = "memory", "not enough memory"
    except Exception as error:
        row.outcome, row.message = _accident(error), f"{stages.stage}: {summary(error)}"
    stages.begin("")
    row.seconds = stages.seconds
    return row


def _refusal(error: SparseccError) -> Outcome:
    return "export failed" if "torch.export cannot trace" in str(error) else "refused"


def _accident(error: Exception) -> Outcome:
    return "memory" if "can't allocate memory" in str(error) else "crash"


def summary(error: BaseException) -> str:
    """``TypeError: message (solver.py:12 in equal < layout.py:40 in reshape)``, innermost first."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "benchmarks/zoo" not in f.filename][-4:]
    places = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} in {f.name}" for f in reversed(frames))
    first = (str(error).strip() or "no message").split("\n")[0][:400]
    return f"{type(error).__name__}: {first} ({places})"


def _measure(entry: Entry, path: Path, max_params: int, row: Row, stages: Stages) -> None:
    import sparsecc

    stages.begin("build")
    built = _built(entry, max_params, row)
    model: Any = built.module
    inputs: Any = built.inputs
    if path == "onnx":
        stages.begin("export")
        model, inputs = to_onnx(built)
    result = sparsecc.prune(model, inputs, sparsity=SPARSITY, progress=stages.begin)
    folds = result.subject.analysis.solver.derived
    if folds:
        folded = sparsecc.fold(model, inputs, progress=stages.begin)
        result = sparsecc.prune(folded.model, inputs, sparsity=SPARSITY, progress=stages.begin)
    stages.begin("report")
    _describe(row, result)
    if folds:
        row.notes.append("folded first: weights that it computes from parameters were stored")


def _built(entry: Entry, max_params: int, row: Row) -> Built:
    torch.manual_seed(0)
    if not entry.tiny:
        row.parameters = _size(entry)
        _require_small(row, max_params)
    try:
        built = entry.build()
        built.module.eval()
        row.parameters = _count(built.module)
        _require_small(row, max_params)
        randomise(built.module)
        with torch.no_grad():
            args, kwargs = split(built.inputs)
            built.module(*args, **kwargs)
    except Stopped:
        raise
    except Exception as error:
        raise Stopped("no model", summary(error)) from error
    return built


def _size(entry: Entry) -> int:
    """Parameters of a model that takes no memory; 0 where it cannot be built so: the real one tells."""
    try:
        with torch.device("meta"):
            return _count(entry.build().module)
    except Exception:
        return 0


def _require_small(row: Row, max_params: int) -> None:
    if row.parameters > max_params:
        raise Stopped("skipped (size)", f"{row.parameters / 1e6:.0f} M parameters")


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})


def to_onnx(built: Built) -> tuple[Any, list[torch.Tensor]]:
    """The model as torch.onnx exports it (dynamic batch where that works), and its inputs in order."""
    args, kwargs = split(built.inputs)
    choose = getattr(built.module, "set_experts_implementation", None)
    if choose is not None:
        choose("batched_mm")  # the one of three that the exporter can write
    first: Exception | None = None
    for shapes in (_dynamic(args, kwargs), None):
        try:
            with _quiet(), torch.no_grad(), translations_kept():
                program = torch.onnx.export(
                    built.module,
                    args,
                    kwargs=kwargs or None,
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=shapes,
                )
            assert program is not None
            proto = program.model_proto
            break
        except Exception as error:  # whatever the model or the exporter raises
            first = first or error
    else:
        assert first is not None
        raise Stopped("export failed", summary(first.__cause__ or first)) from first
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return proto, tensors[: len(proto.graph.input)]


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def spec(leaf: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.dim() else None

    return pytree.tree_map(spec, kwargs if kwargs else args)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _describe(row: Row, result: Any) -> None:
    report, analysis = result.report, result.subject.analysis
    before = report.before["parameters"]
    row.outcome = result.certificate.status.lower()
    row.message = result.certificate.why
    row.removed = 1 - report.after["parameters"] / before if before else 0.0
    if report.before["macs"]:
        row.work = 1 - report.after["macs"] / report.before["macs"]
    row.prunable = 1 - _least(analysis) / before if before else 0.0
    row.groups = len(report.groups)
    row.frozen = dict(
        sum((collections.Counter({f.kind: f.axes}) for f in report.frozen), collections.Counter())
    )
    odd = [f for f in report.frozen if f.kind not in EXPECTED]
    row.reasons = [(f.kind, f.axes, f.example, f.reason) for f in odd[:MAX_REASONS]]
    row.form = result.plan.form or "onnx"
    row.notes = list(report.notes)
    check = result.certificate.worst("float64")
    row.error64 = check.error if check is not None and math.isfinite(check.error) else None


def _least(analysis: Any) -> int:
    """Parameters that are left if every group keeps its first position only."""
    import numpy as np

    from sparsecc.report import sizes

    keeps: Mapping[str, Any] = {g.name: np.arange(g.size) == 0 for g in analysis.groups}
    return sizes(analysis, analysis.keeps(keeps))["parameters"]

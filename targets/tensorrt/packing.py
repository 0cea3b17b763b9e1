"""The members of an artifact that build its engine, and the engine where it can be built here."""

from __future__ import annotations

import importlib
import json
import pprint
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from sparsecc.artifact import MODEL, WEIGHTS, Artifact, Member
from sparsecc.errors import InvalidModel
from sparsecc.target import Refusal, refused
from sparsecc.targets.tensorrt.build_engine import BuildFailed, build
from sparsecc.targets.tensorrt.gate import accepted
from sparsecc.targets.tensorrt.profiles import Profiles

BUILD = "build.json"
SCRIPT = "build_engine.py"
TRTEXEC = "trtexec.txt"
ENGINE = "model.engine"

#: TensorRT 11 types strongly in any case and ignores the first; the last shows the lines on sparse weights
_FLAGS = ("--stronglyTyped", "--noTF32", "--sparsity=enable", "--timingCacheFile=timing.cache", "--verbose")
_SLOTS = {"PROFILES": "dict[str, Range]", "NAMES": "dict[str, list[tuple[str, int]]]"}


def scripts(found: Profiles) -> dict[str, Member]:
    """The script that builds the engine, and the command line that does the same."""
    return {SCRIPT: script(found).encode(), TRTEXEC: (trtexec(found) + "\n").encode()}


def script(found: Profiles) -> str:
    """``build_engine.py`` with the profiles of a model in it."""
    text = resources.files(__package__).joinpath(SCRIPT).read_text("utf-8")
    for slot, values in (("PROFILES", found.ranges), ("NAMES", found.places)):
        empty = f"{slot}: {_SLOTS[slot]} = {{}}"
        assert text.count(empty) == 1
        text = text.replace(empty, f"{slot}: {_SLOTS[slot]} = {pprint.pformat(dict(values), width=100)}")
    return text


def trtexec(found: Profiles) -> str:
    """The command line of trtexec that builds the engine."""
    shapes = [
        f"--{which}Shapes={','.join(f'{name}:{_by(range_[place])}' for name, range_ in found.ranges.items())}"
        for place, which in enumerate(("min", "opt", "max"))
        if found.ranges
    ]
    return " ".join(["trtexec", f"--onnx={MODEL}", f"--saveEngine={ENGINE}", *_FLAGS, *shapes])


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@contextmanager
def unpacked(files: Mapping[str, Member]) -> Iterator[Path]:
    """The path of the model, its weights beside it, while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        Artifact({}, files).extract(folder, *(name for name in (MODEL, WEIGHTS) if name in files))
        yield Path(folder, MODEL)


def checked(files: Mapping[str, Member], found: Profiles, target: str) -> str:
    """The version of TensorRT-RTX that parses and builds the model.

    Raises ``TargetUnavailable`` where there is none, ``TargetRefused`` where it does not take the model.
    """
    with unpacked(files) as model:
        said = accepted(model, found.ranges)
    if not said:
        raise refused(target, [Refusal("the model", f"TensorRT-RTX {said.version}: {said.why}")])
    return f"TensorRT-RTX {said.version}"


def built_here(
    files: Mapping[str, Member], found: Profiles, target: str
) -> tuple[dict[str, Member], dict[str, str]]:
    """The engine as a member, where TensorRT and a GPU are here, and facts on it as JSON data.

    Raises ``TargetRefused`` where TensorRT does not take the model.
    """
    trt, why = _tensorrt()
    if trt is None:
        return {}, {"engine": "", "why": why}
    with unpacked(files) as model:
        try:
            engine = build(trt, model, found.ranges)
        except BuildFailed as error:
            raise refused(target, [Refusal("the model", f"TensorRT {trt.__version__}: {error}")]) from error
    return {ENGINE: engine}, {"engine": f"TensorRT {trt.__version__}, {_gpu()}", "why": ""}


def _tensorrt() -> tuple[Any, str]:
    """TensorRT where an engine can be built and run, else why not."""
    import torch

    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, "TensorRT is not installed here" if missing else f"TensorRT does not load here: {error}"
    return (trt, "") if torch.cuda.is_available() else (None, "no GPU is here")


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def facts_of(artifact: Artifact) -> dict[str, str]:
    """What is recorded on the engine.  Raises ``InvalidModel`` where it is damaged."""
    try:
        return {str(key): str(value) for key, value in dict(json.loads(artifact.read(BUILD))).items()}
    except (ValueError, TypeError) as error:
        raise InvalidModel(f"the artifact's {BUILD} cannot be read: {error}") from error


def instructions(artifact: Artifact) -> list[str]:
    """How to get an engine, or which one is there; one sentence each."""
    facts = facts_of(artifact)
    notes = [f"{facts['accepted']} parses and builds the model"] if facts.get("accepted") else []
    if facts.get("engine"):
        return [*notes, f"the artifact holds an engine of {facts['engine']}; it runs on such a GPU alone"]
    line = artifact.read(TRTEXEC).decode().strip()
    return [
        *notes,
        f"{facts.get('why', '')}, so the artifact holds no engine and runs on the CPU: unpack it (a zip "
        f"file) where TensorRT is and run {SCRIPT}, or: {line}",
    ]

"""Runs sparsecc on damaged models, each in a process of its own with little memory and time.

``Sandbox`` starts one worker, which imports everything once and forks for every case; a case that
crashes the interpreter, hangs or eats memory ends its own process, and is a problem like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MEMORY = 3 << 30
"""Bytes of address space; the libraries alone take up 0.7 GB of it."""
SECONDS = 60
"""Processor time of one case; the wall clock gets four times that."""
LONGEST_MESSAGE = 2000


class Sandbox:
    """A worker process; ``run`` gives it the bytes of a file, and returns the problems it found."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None

    def run(self, data: bytes) -> tuple[str, list[str]]:
        """How the model was taken (``verified``, or the refusal), and everything that was wrong."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "case"
            _lay_out(place, data)
            worker = self._started()
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{place}\n".encode())
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
        return answer["outcome"], answer["problems"]

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None and self._worker.stdin is not None:
            self._worker.stdin.close()
            self._worker.wait()
        self._worker = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "tests.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return self._worker


def _lay_out(place: Path, data: bytes) -> None:
    """A folder with the model, its weights, and traps beside and above it."""
    from tests.onnx_seeds import payload

    place.mkdir()
    (place / "model.onnx").write_bytes(data)
    (place / "weights.bin").write_bytes(payload())
    (place.parent / "secret").write_bytes(bytes(4096))
    (place / "link").symlink_to(place.parent / "secret")
    (place / "way").symlink_to(place.parent)
    (place / "endless").symlink_to("/dev/zero")


# -- in the worker -----------------------------------------------------------------------------------


def main() -> None:
    """Read folders from standard input, write one line of JSON for each."""
    import torch

    from tests.onnx_seeds import conv_net

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as folder:  # what is imported and set up now is there in every fork
        _lay_out(Path(folder) / "case", conv_net().SerializeToString())
        answer = _examined(Path(folder) / "case")
        os.chdir("/")
    assert answer == {"outcome": "verified", "problems": []}, answer
    for line in sys.stdin:
        answers.write(json.dumps(_forked(Path(line.strip()))) + "\n")
        answers.flush()


def _forked(place: Path) -> dict[str, Any]:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        code = 1
        try:
            _limit()
            os.write(writes, json.dumps(_examined(place)).encode())
            code = 0
        except BaseException:
            os.write(writes, json.dumps(_problem(traceback.format_exc())).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writes)
    try:
        return _answer(child, reads)
    finally:
        os.close(reads)


def _answer(child: int, reads: int) -> dict[str, Any]:
    found = b""
    deadline = time.monotonic() + 4 * SECONDS
    while True:
        ready, _, _ = select.select([reads], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _problem(f"still running after {4 * SECONDS} s")
        part = os.read(reads, 1 << 16)
        if not part:
            break
        found += part
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return _problem(f"the interpreter was killed by {signal.Signals(os.WTERMSIG(status)).name}")
    return json.loads(found) if found else _problem("the process ended without an answer")  # type: ignore[no-any-return]


def _problem(text: str) -> dict[str, Any]:
    return {"outcome": "problem", "problems": [text]}


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))


def _state(folder: Path) -> dict[str, str]:
    """Files of a folder by the hash of their content."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.name != "endless"
    }


def _examined(place: Path) -> dict[str, Any]:
    """Every way to give a file to sparsecc; each has to end well."""
    import sparsecc

    os.chdir(place)
    before = _state(place)
    problems: list[str] = []
    outcomes: list[str] = []
    calls: dict[str, Callable[[], Any]] = {
        "analyze": lambda: sparsecc.analyze("model.onnx"),
        "prune": lambda: sparsecc.prune("model.onnx", sparsity=0.5),
        "slim": lambda: sparsecc.slim("model.onnx"),
    }
    for name, call in calls.items():
        outcome, wrong = _called(call)
        outcomes.append(outcome)
        problems += [f"{name}: {text}" for text in wrong]
        if _state(place) != before:
            problems.append(f"{name} changed files")
    problems += _commanded(place, before)
    return {"outcome": max(set(outcomes), key=outcomes.count), "problems": problems}


def _called(call: Callable[[], Any]) -> tuple[str, list[str]]:
    from sparsecc import SparseccError, VerificationFailed

    with _quiet():
        try:
            result = call()
        except VerificationFailed as error:
            return "not verified", [] if _undefined() else [f"not verified: {error}"]
        except SparseccError as error:
            return f"{type(error).__name__}", _unclear(str(error))
        except BaseException:
            return "problem", [traceback.format_exc()]
    certificate = getattr(result, "certificate", None)
    if certificate is not None and certificate.status not in ("VERIFIED", "VACUOUS"):
        return "problem", [f"returned with a certificate that says {certificate.status}"]
    return "verified", []


def _unclear(message: str) -> list[str]:
    """What a message lacks."""
    wrong = []
    if not message.isprintable():
        wrong.append("has line breaks or control characters")
    if not 20 <= len(message) <= LONGEST_MESSAGE:
        wrong.append(f"has {len(message)} characters")
    return [f"the message {', '.join(wrong)}: {message[:3000]!r}"] if wrong else []


def _undefined() -> bool:
    """Whether the model computes infinite or undefined numbers, of which nothing can be proved."""
    import torch

    from sparsecc.pipeline import open_subject
    from sparsecc.reference.onnx_run import Runner

    subject: Any = open_subject("model.onnx", None)
    values = [
        value
        for seed in range(3)
        for value in Runner(subject.file).run(subject.inputs(seed, 0)[0], keep_values=True).values()
    ]
    values += [subject.file.tensor(name) for name in subject.file.initializers]
    return any(not bool(v.isfinite().all()) for v in values if isinstance(v, torch.Tensor))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _commanded(place: Path, before: dict[str, str]) -> list[str]:
    """The command line: the right code, one message that names the file, nothing written but the result."""
    from sparsecc.cli.command import run
    from sparsecc.cli.commands import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = run(cli, ["prune", "model.onnx", "-o", "out.onnx"])
        except BaseException:
            return [f"command: {traceback.format_exc()}"]
    text = said.getvalue()
    after = _state(place)
    if code == 0:
        others = {name: content for name, content in after.items() if not name.startswith("out.onnx")}
        return [] if others == before and "out.onnx" in after else ["the command changed other files"]
    problems = [] if after == before else ["the command refused, but wrote files"]
    if code not in (1, 2):
        problems.append(f"the command ended with {code}: {text}")
    elif "model.onnx" not in text and "cannot be made up" not in text and "too large to make up" not in text:
        problems.append(f"the command does not name the file: {text!r}")
    if "Traceback" in text or "sparsecc: " not in text.splitlines()[-1]:
        problems.append(f"the command's message: {text!r}")
    return problems


if __name__ == "__main__":
    main()

"""One run of the command: where its output goes, and the exit code for every way that it can end.

0  done
1  refused (the model or the target), target unavailable, or verification failed
2  bad usage or input: an option, a file, a plan for another model, a place that cannot be written
3  internal error
130  interrupted
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from sparsecc.cli.places import check_apart

if TYPE_CHECKING:
    from rich.console import RenderableType

OK, REFUSED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130

_REPORT = (
    "this is a defect of sparsecc; please report it in the project's issue tracker, with the command, the "
    "model if you can, and what --debug prints"
)

#: arguments of the Python functions, as messages name them, and what the command line calls them
_AS_OPTIONS = {"verify=False": "--no-verify"}


class Run:
    """What a command is given: where results, notes and progress go."""

    def __init__(
        self, *, as_json: bool, debug: bool, stages: Sequence[str] = (), source: str | None = None
    ) -> None:
        self.as_json = as_json
        self.debug = debug
        self.source = source
        self._out = sys.stdout
        self._stages = stages
        self._document: dict[str, Any] = {}
        self._tables: list[RenderableType] = []

    def show(self, document: dict[str, Any], *tables: RenderableType) -> None:
        """Add to the result: data for ``--json``, tables for people."""
        self._document.update(document)
        self._tables.extend(tables)

    def note(self, text: str) -> None:
        """Tell people something that is not part of the result."""
        click.echo(f"sparsecc: {text}", err=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Shows stages on standard error once the whole takes longer than two seconds."""
        from sparsecc.cli.progress import Stages

        stages = Stages(self._stages)
        try:
            yield stages.begin
        finally:
            stages.end()

    def write(self, code: int) -> None:
        """Write the result to standard output; a reader that has seen enough is no error."""
        try:
            self._write(code)
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def _write(self, code: int) -> None:
        if self.as_json:
            self._out.write(_json({"exit_code": code, **self._document}) + "\n")
        elif self._tables:
            _print(self._tables, self._out)
        self._out.flush()

    def fail(self, error: Exception) -> int:
        """Report an error; returns the exit code."""
        code, message = _explain(error, self.source)
        if self.debug:
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        click.echo(f"sparsecc: {message}", err=True)
        self._document = {"error": {"kind": type(error).__name__, "message": message}}
        self._tables = []
        self.write(code)
        return code


def _explain(error: Exception, source: str | None) -> tuple[int, str]:
    """Exit code and message; an error that is about the model names its file."""
    from sparsecc.errors import (
        InvalidModel,
        PlanConflict,
        SparseccError,
        TargetRefused,
        TargetUnavailable,
        UnsupportedModel,
        VerificationFailed,
    )

    text = functools.reduce(lambda said, pair: said.replace(*pair), _AS_OPTIONS.items(), str(error))
    about_model = isinstance(error, (InvalidModel, PlanConflict, UnsupportedModel, VerificationFailed))
    if about_model and source is not None and source not in text:
        text = f"{source}: {text}"
    if isinstance(error, (TargetRefused, TargetUnavailable, UnsupportedModel, VerificationFailed)):
        return REFUSED, text
    if isinstance(error, SparseccError):
        return USAGE, text
    if isinstance(error, MemoryError):
        return REFUSED, "not enough memory for this model here; nothing was written"
    first = (str(error).strip() or "no message").splitlines()[0]
    return INTERNAL, f"internal error: {type(error).__name__}: {first} ({_REPORT})"


def command(*stages: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """A command: adds ``--json`` and ``--debug``, starts its run, and ends with its exit code.

    ``stages`` are those that it goes through where it takes long.  The argument ``model`` or ``file``
    is what its errors are about.
    """

    def decorate(function: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(*, as_json: bool, debug: bool, **options: Any) -> None:
            source = options.get("model", options.get("file"))
            current = Run(as_json=as_json, debug=debug, stages=stages, source=source)
            # Whatever libraries and models print must not mix with the result.
            with contextlib.redirect_stdout(sys.stderr):
                try:
                    check_apart(options)
                    code = function(current, **options) or OK
                    current.write(code)
                except click.ClickException:
                    raise
                except Exception as error:
                    code = current.fail(error)
            click.get_current_context().exit(code)

        wrapper = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(wrapper)
        return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(wrapper)

    return decorate


def run(cli: click.Group, arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    try:
        code = cli.main(list(arguments), prog_name="sparsecc", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except click.ClickException as error:
        error.show()
        if "--json" in arguments:
            kind = {"kind": "Usage", "message": error.format_message()}
            click.echo(_json({"exit_code": USAGE, "error": kind}))
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("sparsecc: interrupted", err=True)
        return INTERRUPTED


def _print(tables: Sequence[RenderableType], stream: TextIO) -> None:
    """Tables as wide as the terminal; as wide as they are where the output goes to a file or program."""
    from rich.console import Console

    console = Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False)
    for place, table in enumerate(tables):
        with console.capture() as text:
            console.print(table)
        lines = [line.rstrip() for line in text.get().splitlines()]
        stream.write("\n" * bool(place) + "\n".join(lines) + "\n")


def _json(document: Any) -> str:
    return json.dumps(_plain(document), indent=1, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """Data with numbers that JSON lacks as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value

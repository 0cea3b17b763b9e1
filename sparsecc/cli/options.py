"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

#: what a MODEL is, for help texts
MODEL = """MODEL is an ONNX file, or PACKAGE.MODULE:CALLABLE, a function that returns (model, example_inputs)
for a PyTorch model. The module is imported from the current folder, which runs its code."""


def model_argument(name: str = "model") -> Callable[[F], F]:
    """A MODEL, with the options that say what its inputs are."""

    def decorate(function: F) -> F:
        for decorator in (
            click.option(
                "--dim",
                "dims",
                multiple=True,
                metavar="NAME=SIZE",
                help="Size of a dynamic dimension (ONNX).",
            ),
            click.option(
                "--input",
                "inputs",
                multiple=True,
                metavar="NAME=FILE.npy",
                help="An example input (ONNX); else made up.",
            ),
            click.argument(name, metavar=name.upper()),
        ):
            function = decorator(function)
        return function

    return decorate


def output_options(function: F) -> F:
    """Where a result goes, and how sure it must be."""
    for decorator in (
        click.option("--latency", is_flag=True, help="Measure latency before and after, on this machine."),
        click.option("--no-verify", is_flag=True, help="Do not check the result (its certificate says so)."),
        click.option("--force", is_flag=True, help="Allow OUT to be the input file."),
        click.option("-o", "--output", required=True, metavar="OUT", help="File to write."),
    ):
        function = decorator(function)
    return function


_RANKING = (
    click.option(
        "--saliency",
        default="l2",
        show_default=True,
        help="Criterion: l1, l2, l1.5, linf, bn, fpgm, random; with data wanda, activation, apoz, obs.",
    ),
    click.option(
        "--calibration",
        "calibration",
        multiple=True,
        metavar="NAME=FILE.npy",
        help="What the model is run on to rank weights: an array per input, samples along its first axis.",
    ),
    click.option(
        "--calibration-batch", type=int, default=8, show_default=True, help="Samples that are run together."
    ),
)


def ranking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What says which weights matter."""
    for option in reversed(_RANKING):
        command = option(command)
    return command


def target_options(command: F) -> F:
    """Options of a target, see ``read_target_options``."""
    return click.option(
        "--option",
        "chosen",
        multiple=True,
        metavar="NAME=VALUE",
        help="An option of the target, as choose=always.",
    )(command)


def read_target_options(chosen: Sequence[str]) -> dict[str, str]:
    """Values by name; raises ``InvalidOption`` for what is no assignment."""
    from sparsecc.errors import InvalidOption

    if wrong := [text for text in chosen if "=" not in text]:
        raise InvalidOption(f"--option {wrong[0]}: write NAME=VALUE, for instance choose=always")
    return dict(text.split("=", 1) for text in chosen)

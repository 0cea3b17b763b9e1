"""``sparsecc sensitivity``: what losing some of its positions does, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsecc.cli.command import Run, command
from sparsecc.cli.options import MODEL, model_argument, ranking_options
from sparsecc.errors import InvalidModel, InvalidOption


@click.command(
    help="Measure by how much the outputs change when one group alone loses positions, as masks in the "
    "model, on the data of --calibration. `prune --allocation OUT` removes where that is least.\n\n"
    f"{MODEL}"
)
@model_argument()
@click.option("-o", "--output", required=True, metavar="OUT", help="JSON file to write the table to.")
@ranking_options
@click.option(
    "--loss",
    type=click.Choice(["error", "kl"]),
    default="error",
    show_default=True,
    help="Relative squared error of the outputs; or divergence, where the first one holds logits.",
)
@click.option(
    "--share",
    "shares",
    type=float,
    multiple=True,
    help="A share of positions to try (several times; default 0.125, 0.25, 0.5, 0.75).",
)
@click.option("--batches", type=int, default=8, show_default=True, help="Batches that trials run on.")
@click.option("--updates", is_flag=True, help="Update what is left by least squares before each trial.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Try only parameters so named (layer1.*).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave parameters so named alone.")
@command("capture", "analyse", "write")
def sensitivity(
    run: Run,
    model: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    output: str,
    calibration: tuple[str, ...],
    calibration_batch: int,
    shares: tuple[float, ...],
    **options: Any,
) -> None:
    """See the help of the command."""
    import sparsecc
    from sparsecc.cli import render
    from sparsecc.cli.models import check_place, read_calibration, read_model

    if shares:
        options["shares"] = shares
    with run.progress() as stage:
        stage("capture")
        given = read_model(model, inputs, dims)
        check_place(output, given)
        found = sparsecc.sensitivity(
            given.model,
            given.inputs,
            calibration=read_calibration(calibration, calibration_batch),
            progress=stage,
            **options,
        )
        stage("write")
        found.save(output)
    run.show(
        {"model": model, "output": output, "sensitivity": found.to_json()},
        *map(render.line, str(found).splitlines()),
        render.line(f"written: {output}"),
    )


def read_allocation(allocation: str, sparsity: float | None, options: dict[str, Any]) -> Any:
    """An allocation's name, or the shares that follow from a table in a file."""
    if not allocation.endswith(".json"):
        return allocation
    from sparsecc.probing.table import Sensitivity

    rounding = {name: options[name] for name in ("multiple_of", "min_keep")}
    try:
        table = Sensitivity.load(Path(allocation))
    except InvalidModel as error:
        raise InvalidOption(f"--allocation: {error}") from error
    return table.shares(0.5 if sparsity is None else sparsity, **rounding)

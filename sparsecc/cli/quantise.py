"""``sparsecc quantize``: a model of 8 bits."""

from __future__ import annotations

from typing import Any

import click

from sparsecc.cli.command import Run, command
from sparsecc.cli.options import MODEL, model_argument


@click.command(
    help="Quantise a float model, pruned or not, to 8 bits (Q/DQ ONNX). Zeros and patterns are checked to be "
    f"there; errors are measured on samples that are held out.\n\n{MODEL}"
)
@model_argument()
@click.option("-o", "--output", required=True, metavar="OUT", help="ONNX file to write.")
@click.option("--force", is_flag=True, help="Allow OUT to be the input file.")
@click.option(
    "--calibration",
    "calibration",
    multiple=True,
    required=True,
    metavar="NAME=FILE.npy",
    help="What ranges follow from: an array per input, samples along its first axis.",
)
@click.option(
    "--calibration-batch", type=int, default=8, show_default=True, help="Samples that are run together."
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "uint8", "none"]),
    default="int8",
    show_default=True,
    help="none: quantised when the model runs, products of matrices only.",
)
@click.option("--per-tensor", is_flag=True, help="One scale for a weight, instead of one for every channel.")
@click.option(
    "--method",
    type=click.Choice(["minmax", "entropy", "percentile"]),
    default="minmax",
    show_default=True,
    help="How ranges follow from calibration data.",
)
@click.option("--float-biases", is_flag=True, help="Leave biases in floats, as TensorRT needs it.")
@click.option("--reduce-range", is_flag=True, help="Weights of 7 bits, for processors that saturate.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave weights, modules or nodes alone.")
@command("capture", "quantise", "check", "measure", "write")
def quantize(
    run: Run,
    model: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    output: str,
    force: bool,
    calibration: tuple[str, ...],
    calibration_batch: int,
    activations: str,
    per_tensor: bool,
    float_biases: bool,
    **options: Any,
) -> None:
    """See the help of the command."""
    import sparsecc
    from sparsecc.cli import render
    from sparsecc.cli.models import check_quantised_output, read_calibration, read_model

    with run.progress() as stage:
        stage("capture")
        given = read_model(model, inputs, dims)
        check_quantised_output(output, given, force=force)
        result = sparsecc.quantize(
            given.model,
            given.inputs,
            calibration=read_calibration(calibration, calibration_batch),
            activations=None if activations == "none" else activations,
            per_channel=not per_tensor,
            biases=not float_biases,
            progress=stage,
            **options,
        )
        stage("write")
        result.save(output)
    for note in result.report.notes:
        run.note(note)
    run.show(
        {"model": model, "output": output, "report": result.report.to_json()},
        render.line(str(result.report)),
        render.line(f"written: {output}"),
    )

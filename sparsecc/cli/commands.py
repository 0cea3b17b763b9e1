"""The commands and their options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecc import __version__
from sparsecc.cli.command import OK, REFUSED, Run, command
from sparsecc.cli.options import (
    MODEL,
    model_argument,
    output_options,
    ranking_options,
    read_target_options,
    target_options,
)
from sparsecc.cli.quantise import quantize
from sparsecc.cli.sensitivity import read_allocation, sensitivity

if TYPE_CHECKING:
    from sparsecc.verification import Certificate


_PRUNING = ("capture", "analyse", "plan", "edit", "verify", "time", "write")
_TUNED = ("choose=measured",)
_COMPILING = ("capture", "analyse", "plan", "edit", "verify", "lower", "build", "check", "time", "write")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sparsecc")
def cli() -> None:
    """Make trained neural networks smaller and faster, with proof that they compute what they should.

    Exit codes: 0 done; 1 refused, target unavailable, or verification failed; 2 bad usage or input;
    3 internal error.
    """


@cli.command(
    "inspect", help=f"Show what a model, artifact or plan holds.\n\n{MODEL} FILE may be an artifact or plan."
)
@model_argument("file")
@command("capture", "analyse")
def inspect_file(run: Run, file: str, inputs: tuple[str, ...], dims: tuple[str, ...]) -> None:
    """See the help of the command."""
    from sparsecc.cli import render
    from sparsecc.cli.models import kind_of, read_model

    kind = kind_of(Path(file))
    if kind == "artifact":
        _inspect_artifact(run, file)
        return
    if kind in ("plan", "bundle"):
        from sparsecc.plan import Plan

        plan = Plan.load(file)
        run.show({"kind": "plan", "file": file, "plan": plan.to_parts()[0]}, render.line(str(plan)))
        return
    with run.progress() as stage:
        stage("capture")
        from sparsecc.pipeline import open_subject
        from sparsecc.report import frozen_lines, sizes

        given = read_model(file, inputs, dims)
        subject = open_subject(given.model, given.inputs)
        stage("analyse")
        analysis = subject.analysis
        size = sizes(analysis)
    for note in subject.notes:
        run.note(note)
    run.show(
        {
            "kind": "model",
            "file": file,
            "dialect": subject.dialect,
            **size,
            "inputs": [_value(v) for v in subject.view.inputs],
            "outputs": [_value(v) for v in subject.view.outputs],
            "groups": [
                {"name": g.name, "kind": g.kind, "size": g.size, "members": [str(m) for m in g.members]}
                for g in analysis.groups
            ],
            "frozen": [
                {"kind": f.kind, "axes": f.axes, "first": f.example, "reason": f.reason}
                for f in frozen_lines(analysis)
            ],
            "notes": subject.notes,
        },
        render.facts("", {"model": file, "kind": subject.dialect}),
        *render.analysis_tables(analysis, size),
    )


def _value(value: Any) -> dict[str, Any]:
    shape = [None if value.is_dynamic(d) else n for d, n in enumerate(value.shape)]
    return {"name": value.name, "dtype": value.dtype, "shape": shape}


def _inspect_artifact(run: Run, file: str) -> None:
    from sparsecc.artifact import Artifact
    from sparsecc.cli import render
    from sparsecc.plan import Plan
    from sparsecc.report import Report
    from sparsecc.verification.certificate import Certificate

    artifact = Artifact.load(file)  # not started: its target may not be installed here
    manifest = artifact.manifest
    members = {name: sum(map(len, artifact.chunks(name))) for name in sorted(artifact.members)}
    signature = artifact.signature
    listing = _listing(artifact)
    plan = Plan.from_members({name: artifact.read(name) for name in ("plan.json", "plan.safetensors")})
    run.show(
        {
            "kind": "artifact",
            "file": file,
            "manifest": manifest,
            "members": members,
            "plan": plan.to_parts()[0],
            "layers": listing,
        },
        render.facts(
            "",
            {
                "artifact": file,
                "target": artifact.target,
                "made by": f"sparsecc {manifest['sparsecc']}",
                "recipe": manifest["recipe"] or "none",
                "members": ", ".join(_by_folder(members)),
            },
        ),
        render.signature_table("inputs", signature.inputs),
        render.signature_table("outputs", signature.outputs),
        *render.report_tables(Report.from_json(manifest["report"])),
        render.plan_table(plan),
        *render.listing_tables(listing),
        *render.certificate_tables(Certificate.from_json(manifest["certificate"])),
    )


def _by_folder(members: Mapping[str, int]) -> Iterator[str]:
    """Files with their sizes, those of a folder together."""
    folders: dict[str, list[int]] = {}
    for name, size in members.items():
        folder, slash, _ = name.partition("/")
        folders.setdefault(folder + slash, []).append(size)
    for name, sizes in folders.items():
        many = f"{len(sizes)} files, " if name.endswith("/") else ""
        yield f"{name} ({many}{sum(sizes):,} bytes)"


def _listing(artifact: Any) -> list[dict[str, str]]:
    """The target's own table of layers; empty where the target is not known here."""
    from sparsecc.errors import TargetUnavailable
    from sparsecc.target import resolve

    try:
        return resolve(artifact.target, to_build=False)[0].listing(artifact)
    except TargetUnavailable:
        return []


@cli.command(help=f"Remove the least salient channels, neurons, heads and head dimensions.\n\n{MODEL}")
@model_argument()
@output_options
@click.option(
    "--sparsity",
    type=float,
    help="Share of the positions of every group to remove (default 0.5); by sensitivity, of the parameters "
    "that go with the groups, each counted by itself.",
)
@click.option(
    "--recipe", metavar="TEXT", help="Passes, such as 'ChannelPruning(sparsity=0.3); HeadPruning()'."
)
@ranking_options
@click.option(
    "--allocation",
    default="uniform",
    show_default=True,
    help="uniform, global, isomorphic; with data sensitivity, sensitivity:kl; FILE.json of `sensitivity`.",
)
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Touch only parameters so named (layer1.*)."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave parameters so named alone.")
@click.option("--multiple-of", type=int, default=1, show_default=True, help="Round widths up to a multiple.")
@click.option("--min-keep", type=int, default=1, show_default=True, help="Positions that every group keeps.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random saliency.")
@click.option("--plan-out", metavar="FILE", help="Also write the plan, for `verify` and for other copies.")
@command(*_PRUNING)
def prune(
    run: Run,
    model: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    output: str,
    plan_out: str | None,
    force: bool,
    no_verify: bool,
    calibration: tuple[str, ...],
    calibration_batch: int,
    **options: Any,
) -> None:
    """See the help of the command."""
    import sparsecc
    from sparsecc.cli.models import read_calibration

    if calibration:
        options["calibration"] = read_calibration(calibration, calibration_batch)
    options["allocation"] = read_allocation(options["allocation"], options["sparsity"], options)
    _produce(
        run, sparsecc.prune, model, inputs, dims, output, plan_out, force, verify=not no_verify, **options
    )


def _lossless(name: str, text: str) -> None:
    """Add a command whose result equals the original."""

    @cli.command(name, help=f"{text} The result equals the original.\n\n{MODEL}")
    @model_argument()
    @output_options
    @click.option("--plan-out", metavar="FILE", help="Also write the plan.")
    @command(*_PRUNING)
    def lossless(
        run: Run,
        model: str,
        inputs: tuple[str, ...],
        dims: tuple[str, ...],
        output: str,
        plan_out: str | None,
        force: bool,
        no_verify: bool,
        latency: bool,
    ) -> None:
        """See the help of the command."""
        import sparsecc

        options = {"verify": not no_verify, "latency": latency}
        _produce(run, getattr(sparsecc, name), model, inputs, dims, output, plan_out, force, **options)


cli.add_command(quantize)
cli.add_command(sensitivity)
_lossless("slim", "Remove what never matters: channels that are zero or constant.")
_lossless("fold", "Store weights that the model computes from its parameters, so that they can be pruned.")


def _produce(
    run: Run,
    function: Callable[..., Any],
    model: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    output: str,
    plan_out: str | None,
    force: bool,
    **options: Any,
) -> None:
    """Read a model, make a smaller one, and write it; everything that can be refused early is."""
    from sparsecc.cli import render
    from sparsecc.cli.models import check_outputs, read_model

    with run.progress() as stage:
        stage("capture")
        given = read_model(model, inputs, dims)
        check_outputs(given, output, plan_out, force=force)
        result = function(given.model, given.inputs, progress=stage, **options)
        stage("write")
        result.save(output)
        if plan_out is not None:
            result.plan.save(plan_out)
    for note in result.report.notes:
        run.note(note)
    run.show(
        {
            "model": model,
            "output": output,
            "plan_file": plan_out,
            "recipe": result.plan.recipe,
            "report": result.report.to_json(),
            "certificate": result.certificate.to_json(),
        },
        *render.report_tables(result.report),
        *render.certificate_tables(result.certificate),
        render.line(f"written: {output}" + (f", {plan_out}" if plan_out else "")),
    )


@cli.command("compile", help=f"Compile a model for a target, into one artifact file.\n\n{MODEL}")
@model_argument()
@output_options
@click.option("--target", default="cpu", show_default=True, help="See `sparsecc targets`.")
@click.option(
    "--recipe",
    metavar="TEXT",
    help="Passes to apply first (default: lossless slimming, or the N:M pattern of the target, by magnitude "
    "or, with calibration data, by SparseGPT).",
)
@ranking_options
@target_options
@click.option(
    "--tune", is_flag=True, help="Measure layers on the GPU at hand and remember: --option choose=measured."
)
@command(*_COMPILING)
def compile_model(
    run: Run,
    model: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    output: str,
    force: bool,
    no_verify: bool,
    target: str,
    recipe: str | None,
    chosen: tuple[str, ...],
    tune: bool,
    latency: bool,
    saliency: str,
    calibration: tuple[str, ...],
    calibration_batch: int,
) -> None:
    """See the help of the command."""
    import sparsecc
    from sparsecc.cli import render
    from sparsecc.cli.models import check_artifact_output, read_calibration, read_model
    from sparsecc.errors import InvalidOption

    of_target = read_target_options((*chosen, *_TUNED * tune))
    if tune and len([text for text in chosen if text.startswith("choose=")]):
        raise InvalidOption(
            "--tune is --option choose=measured: give one of them, not another choice as well"
        )
    with run.progress() as stage:
        stage("capture")
        check_artifact_output(output, target)
        given = read_model(model, inputs, dims)
        check_artifact_output(output, target, given, force=force)
        options: dict[str, Any] = {
            "target": target,
            "recipe": recipe,
            "options": of_target,
            "latency": latency,
            "verify": not no_verify,
            "saliency": saliency,
        }
        if calibration:
            options["calibration"] = read_calibration(calibration, calibration_batch)
        compiled = sparsecc.compile(given.model, given.inputs, progress=stage, **options)
        stage("write")
        compiled.save(output)
    run.show(
        {
            "model": model,
            "output": output,
            "target": target,
            "recipe": compiled.plan.recipe,
            "report": compiled.report.to_json(),
            "certificate": compiled.certificate.to_json(),
        },
        *render.report_tables(compiled.report),
        *render.certificate_tables(compiled.certificate),
        render.line(f"written: {output}"),
    )


@cli.command(
    help="Check RESULT against the ORIGINAL that it was made from, independently of how it was made.\n\n"
    "ORIGINAL is a model as elsewhere; RESULT an ONNX file, an artifact, or the weights and plan of a "
    "PyTorch model. Without a plan (in RESULT or by --plan) the two must compute the same."
)
@model_argument("original")
@click.argument("result")
@click.option("--plan", "plan_file", metavar="FILE", help="The plan that made RESULT.")
@command("capture", "verify")
def verify(
    run: Run,
    original: str,
    result: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    plan_file: str | None,
) -> int:
    """See the help of the command."""
    import sparsecc
    from sparsecc.cli import render
    from sparsecc.cli.models import read_model, read_result
    from sparsecc.plan import Plan

    with run.progress() as stage:
        stage("capture")
        given = read_model(original, inputs, dims)
        plan = None if plan_file is None else Plan.load(plan_file)
        found, plan = read_result(result, given, plan)
        certificate: Certificate = sparsecc.verify(
            given.model, found, given.inputs, plan=plan, progress=stage
        )
    run.show(
        {"original": original, "result": result, "certificate": certificate.to_json()},
        *render.certificate_tables(certificate),
    )
    if certificate.status != "FAILED":
        return OK
    if certificate.claim.startswith("slim"):
        run.note("the two were expected to compute the same; if RESULT was pruned, give the plan (--plan)")
    return REFUSED


@cli.command("run", help="Run an artifact, on random inputs unless they are given, and time it.")
@click.argument("artifact")
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An input.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a dynamic dimension.")
@click.option("-o", "--output", metavar="OUT.npz", help="Write the outputs there.")
@click.option(
    "--rounds", type=click.IntRange(1), default=20, show_default=True, help="Timed runs (at most 5 s)."
)
@click.option("--threads", type=click.IntRange(1), help="Threads within an operator.")
@target_options
@command("capture", "time")
def run_artifact(
    run: Run,
    artifact: str,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    output: str | None,
    rounds: int,
    threads: int | None,
    chosen: tuple[str, ...],
) -> None:
    """See the help of the command."""
    from sparsecc.cli import render
    from sparsecc.cli.running import run_once

    options = read_target_options(chosen)
    with run.progress() as stage:
        stage("capture")
        done = run_once(
            artifact, inputs, dims, output, rounds=rounds, threads=threads, options=options, stage=stage
        )
    if done.made_up:
        run.note(f"random values (seed 0) for {', '.join(done.made_up)}")
    run.show(
        {
            "artifact": artifact,
            "target": done.target,
            "inputs": done.inputs,
            "made_up": done.made_up,
            "outputs": done.outputs,
            "median_ms": done.median_ms,
            "rounds": done.rounds,
            "stand_in": done.stand_in,
            "output": output,
        },
        render.table(
            "outputs", ("name", "type", "shape"), [(o["name"], o["dtype"], o["shape"]) for o in done.outputs]
        ),
        render.line(
            f"median latency: {done.median_ms:.3g} ms ({done.rounds} runs, target {done.target})"
            + (f", of {done.stand_in}: no time of the target" if done.stand_in else "")
        ),
    )


@cli.command()
@command()
def targets(run: Run) -> None:
    """List the targets, what they offer, and whether they can be used here."""
    from dataclasses import asdict

    import sparsecc
    from sparsecc.cli import render

    found = sparsecc.targets()
    run.show({"targets": [asdict(info) for info in found]}, render.targets_table(found))

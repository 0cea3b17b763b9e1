#!/usr/bin/env python3
"""Build a TensorRT engine of model.onnx with sparse weights.  Needs nothing but TensorRT for Python.

    python build_engine.py                                 model.onnx -> model.engine
    python build_engine.py --profile batch=1:8:64          other sizes: min, opt, max
    python build_engine.py --module tensorrt_rtx --capability SM89     TensorRT-RTX, for another GPU

TensorRT says two things about sparse weights while it builds, which are printed at the end:

    (Sparsity) Layers eligible for sparse math: ...
        their weights have the 2:4 pattern along the axis that is summed
    (Sparsity) TRT inference plan picked sparse implementation for layers: ...
        their sparse kernels were the fastest on this GPU

A layer that is eligible and not picked runs dense, because that was faster: small layers usually do.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The smallest, the usual and the largest shape of an input."""

PROFILES: dict[str, Range] = {}
NAMES: dict[str, list[tuple[str, int]]] = {}
"""Where each dynamic size occurs: its name -> inputs and axes."""


class BuildFailed(RuntimeError):
    """TensorRT does not take the model; the message holds what it said."""


def logger_of(trt: Any, verbose: bool = False) -> Any:
    """A logger that keeps what is said, and prints errors and warnings (``verbose``: everything)."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            level = str(severity).rpartition(".")[2]
            self.lines.append((level, text))
            if verbose:
                print(f"[{level}] {text}", file=sys.stderr)

        def errors(self) -> str:
            """What went wrong, in TensorRT's words."""
            return "; ".join(text for level, text in self.lines if level in ("ERROR", "INTERNAL_ERROR"))

        def sparsity(self) -> list[str]:
            """The lines on sparse weights."""
            return [text for _, text in self.lines if "(Sparsity)" in text]

    return Log()


def parsed(trt: Any, builder: Any, model: bytes | str | Path, log: Any) -> tuple[Any, Any]:
    """The network of an ONNX model (bytes, or a path beside which its weights lie), and its parser.

    Raises ``BuildFailed`` with every error of the parser.
    """
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from 11 on
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, log)
    done = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    if not done:
        found = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildFailed("; ".join(found) or log.errors() or "the parser gave no reason")
    return network, parser


def configured(
    trt: Any,
    builder: Any,
    network: Any,
    profiles: Mapping[str, Range],
    *,
    sparse: bool = True,
    capabilities: Sequence[str] = (),
    cache: bytes | None = None,
    workspace: int = 0,
    tf32: bool = False,
) -> Any:
    """The settings of a build; ``capabilities`` (SM80, ...) are TensorRT-RTX's, ``workspace`` in bytes.

    Without ``tf32`` products in float32 are computed in float32, as the model says.

    Raises ``BuildFailed`` where a capability is not known or a dynamic input has no profile.
    """
    config = builder.create_builder_config()
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for place, name in enumerate(capabilities):
            known = getattr(trt.ComputeCapability, name, None)
            if known is None or not config.set_compute_capability(known, place):
                raise BuildFailed(f"{trt.__name__} does not build for compute capability {name}")
    if cache is not None and hasattr(config, "create_timing_cache"):
        config.set_timing_cache(config.create_timing_cache(cache), False)
    profile = builder.create_optimization_profile()
    dynamic = False
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if -1 in tuple(tensor.shape):
            if tensor.name not in profiles:
                raise BuildFailed(f"input {tensor.name} has dynamic sizes and no profile")
            profile.set_shape(tensor.name, *profiles[tensor.name])
            dynamic = True
    if dynamic:
        config.add_optimization_profile(profile)
    return config


def build(
    trt: Any,
    model: bytes | str | Path,
    profiles: Mapping[str, Range],
    log: Any = None,
    *,
    cache_file: Path | None = None,
    **settings: Any,
) -> bytes:
    """A serialised engine; ``cache_file`` keeps TensorRT's timings from one build to the next.

    Raises ``BuildFailed`` where TensorRT does not take the model.
    """
    log = logger_of(trt) if log is None else log
    builder = trt.Builder(log)
    network, _parser = parsed(trt, builder, model, log)
    cache = None
    if cache_file is not None:
        cache = cache_file.read_bytes() if cache_file.exists() else b""
    config = configured(trt, builder, network, profiles, cache=cache, **settings)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildFailed(log.errors() or "the builder gave no reason")
    timings = config.get_timing_cache() if cache_file is not None else None
    if cache_file is not None and timings is not None:
        cache_file.write_bytes(bytes(timings.serialize()))
    return bytes(engine)


def overridden(
    profiles: Mapping[str, Range], names: Mapping[str, Sequence[tuple[str, int]]], texts: Sequence[str]
) -> dict[str, Range]:
    """The profiles with the sizes of ``NAME=MIN:OPT:MAX`` (or ``NAME=SIZE``) in place of those that they had.

    Raises ``ValueError`` for another form, an unknown name, or sizes that do not ascend.
    """
    found = {name: [list(shape) for shape in shapes] for name, shapes in profiles.items()}
    for text in texts:
        name, _, given = text.partition("=")
        sizes = [int(part) if part.isdigit() else 0 for part in given.split(":")]
        sizes = sizes * 3 if len(sizes) == 1 else sizes
        if name not in names:
            raise ValueError(f"there is no dynamic size {name!r}; there is {', '.join(names) or 'none'}")
        if len(sizes) != 3 or not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            raise ValueError(f"{text!r}: give NAME=MIN:OPT:MAX with 0 < MIN <= OPT <= MAX")
        for value, axis in names[name]:
            for shape, size in zip(found[value], sizes, strict=True):
                shape[axis] = size
    return {name: (tuple(a), tuple(b), tuple(c)) for name, (a, b, c) in found.items()}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, default=here / "model.onnx")
    parser.add_argument("--engine", type=Path, default=here / "model.engine", help="the file to write")
    parser.add_argument("--timing-cache", type=Path, default=here / "timing.cache")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME=MIN:OPT:MAX",
        help=f"names: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--workspace", type=int, default=0, metavar="MB", help="scratch memory (default: all)"
    )
    parser.add_argument("--dense", action="store_true", help="without sparse kernels, to compare with")
    parser.add_argument("--tf32", action="store_true", help="round operands of float32 products to TF32")
    parser.add_argument("--module", default="tensorrt", help="tensorrt, or tensorrt_rtx")
    parser.add_argument("--capability", action="append", default=[], metavar="SM89", help="TensorRT-RTX only")
    parser.add_argument("--verbose", action="store_true", help="print all that TensorRT says")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and report; returns the exit code."""
    given = arguments(argv)
    try:
        profiles = overridden(PROFILES, NAMES, given.profile)
        trt = importlib.import_module(given.module)
        log = logger_of(trt, given.verbose)
        started = time.perf_counter()
        engine = build(
            trt,
            given.onnx,
            profiles,
            log,
            cache_file=given.timing_cache,
            sparse=not given.dense,
            capabilities=given.capability,
            workspace=given.workspace << 20,
            tf32=given.tf32,
        )
    except (BuildFailed, ImportError, ValueError) as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return 1
    given.engine.write_bytes(engine)
    print(f"{given.engine}: {len(engine):,} bytes in {time.perf_counter() - started:.1f} s")
    for line in log.sparsity() or ["(TensorRT said nothing of sparse weights)"]:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

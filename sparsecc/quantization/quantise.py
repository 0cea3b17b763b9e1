"""``sparsecc.quantize``: a float model, pruned or not, as one of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparsecc.calibration import CalibrationData
from sparsecc.errors import InvalidOption
from sparsecc.memory import within_memory
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.patterns.layers import INTEGERS
from sparsecc.pipeline import Progress, silent
from sparsecc.quantization.folding import folded
from sparsecc.quantization.measure import measured
from sparsecc.quantization.options import Options, check_quantisable
from sparsecc.quantization.quantisers import dynamic, static
from sparsecc.quantization.result import Error, Layer, Quantised, QuantisedReport
from sparsecc.quantization.source import Source
from sparsecc.quantization.transposes import untransposed
from sparsecc.quantization.zeros import check_zeros

#: of so many calibration batches one is held out, to measure errors on
HELD_OUT = 4
_LISTED = 5
#: by how much exact products have to be nearer for saturation to be told
_SATURATED_DB = 3.0


@within_memory()
def quantize(
    model: Any,
    example_inputs: Any = None,
    *,
    calibration: Any,
    weights: str = "int8",
    activations: str | None = "int8",
    per_channel: bool = True,
    evaluation: Any = None,
    method: str = "minmax",
    biases: bool = True,
    reduce_range: bool = False,
    exclude: Sequence[str] = (),
    dynamic_shapes: Any = None,
    progress: Progress = silent,
) -> Quantised:
    """A model with int8 weights and activations (Q/DQ ONNX), made by onnxruntime's own quantiser.

    ``model``: what ``prune`` takes, or a ``Pruned``.  ``calibration``: batches of inputs or
    ``CalibrationData``; ranges of activations follow from it by ``method`` (minmax, entropy, percentile).
    ``activations``: ``int8`` (symmetric, as TensorRT needs it), ``uint8``, or None: quantised when the model
    runs, products of matrices only.  Weights are symmetric, ``per_channel`` with a scale for every output
    channel.  ``evaluation``: batches to measure errors on; without it every fourth calibration batch is held
    out for that, one at least.  ``biases=False`` keeps biases in floats, as TensorRT needs it.
    ``reduce_range``: weights of 7 bits, for processors that saturate sums of 8.  ``exclude``: name patterns
    of weights, modules or nodes that stay as they are.

    The result says which zeros and patterns are still there, all that were promised, or VerificationFailed is
    raised, and how far outputs are from those of the float model on the held-out batches.  Raises
    InvalidOption for models that are quantised already or not of float32, UnsupportedModel where onnxruntime
    cannot quantise or run the model.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> batches = [(torch.randn(8, 8),) for _ in range(4)]
    >>> [layer.dtype for layer in quantize(net, batches[0], calibration=batches).report.layers]
    ['int8', 'int8']
    """
    options = Options(
        weights=weights,
        activations=activations,
        per_channel=per_channel,
        method=method,
        biases=biases,
        reduce_range=reduce_range,
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
    )
    if calibration is None:
        raise InvalidOption(
            "calibration: give batches of inputs, or CalibrationData: ranges of activations follow from "
            "them, and errors are measured on them"
        )
    progress("capture")
    source = Source.of(model, example_inputs, dynamic_shapes)
    check_quantisable(source.file)
    data = CalibrationData.of(calibration)
    ranging, held = split(data, evaluation, calibrates=options.activations is not None)
    float_model = folded(untransposed(source.file))
    progress("quantise")
    if options.activations is None:
        result = dynamic(float_model, options)
    else:
        result = static(float_model, (source.feeds(data, batch) for batch in ranging), options)
    progress("check")
    layers = check_zeros(float_model, result, source.promised)
    progress("measure")
    other = data if evaluation is None else CalibrationData.of(evaluation)
    errors = measured(source.file, result, (source.feeds(other, batch) for batch in held))
    report = QuantisedReport(
        options.weights,
        options.activations,
        layers,
        errors,
        len(ranging) if options.activations is not None else 0,
        _size(source.file),
        _size(result),
        (*floats_left(layers), *_saturation(errors)),
    )
    return Quantised(result.proto, report, result)


def split(data: CalibrationData, evaluation: Any, *, calibrates: bool) -> tuple[list[Any], list[Any]]:
    """Batches that ranges follow from, and others to measure on; raises InvalidOption for too few."""
    batches = list(data)
    if evaluation is not None:
        ranging, held = batches, list(CalibrationData.of(evaluation))
    elif not calibrates:
        ranging, held = [], batches
    else:
        kept_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}
        ranging = [b for i, b in enumerate(batches) if i not in kept_out]
        held = [b for i, b in enumerate(batches) if i in kept_out]
    if not held or (calibrates and not ranging):
        raise InvalidOption(
            f"calibration: {len(batches)} batches are too few: ranges follow from some, and errors are "
            "measured on others; give two at least, or evaluation=[...]"
        )
    return ranging, held


def floats_left(layers: Sequence[Layer]) -> Iterator[str]:
    """A note on weights of products that were not quantised."""
    left = [layer.weight for layer in layers if layer.dtype not in INTEGERS]
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        yield f"{len(left)} weights of products stay floats: {', '.join(left[:_LISTED])}{more}"


def _saturation(errors: Sequence[Error]) -> Iterator[str]:
    if any(error.exact_db > error.sqnr_db + _SATURATED_DB for error in errors):
        yield (
            "kernels for integers saturate sums on this processor: reduce_range=True (weights of 7 bits) "
            "avoids that; processors with VNNI and GPUs compute them exactly"
        )


def _size(file: OnnxFile) -> int:
    return len(file.to_bytes())

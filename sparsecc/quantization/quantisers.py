"""onnxruntime's own quantisers, on a float model in memory."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from sparsecc.errors import SparseccError, UnsupportedModel, summary
from sparsecc.memory import out_of_memory
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.quantization.options import Options
from sparsecc.quantization.source import Feeds

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader

#: products whose activations can be quantised as they come; convolutions have no kernel for int8 weights then
_DYNAMIC = ("MatMul", "Gemm", "Attention")


def static(file: OnnxFile, feeds: Iterable[Feeds], options: Options) -> OnnxFile:
    """The model with QuantizeLinear and DequantizeLinear, ranges of activations from ``feeds``."""
    quantisation = _quantisation()
    kinds = quantisation.QuantType
    method = {
        "minmax": quantisation.CalibrationMethod.MinMax,
        "entropy": quantisation.CalibrationMethod.Entropy,
        "percentile": quantisation.CalibrationMethod.Percentile,
    }[options.method]
    with _quiet("static quantiser"), tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(_named(file), str(source))
        quantisation.quantize_static(
            str(source),
            str(target),
            _reader(feeds),
            quant_format=quantisation.QuantFormat.QDQ,
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
            activation_type=kinds.QInt8 if options.activations == "int8" else kinds.QUInt8,
            weight_type=kinds.QInt8,
            nodes_to_exclude=_excluded(file, options),
            calibrate_method=method,
            extra_options={
                "WeightSymmetric": True,
                "ActivationSymmetric": options.activations == "int8",
                "QuantizeBias": options.biases,
            },
        )
        return OnnxFile.load(onnx.load(str(target)))


def dynamic(file: OnnxFile, options: Options) -> OnnxFile:
    """The model with integer products whose activations are quantised when it runs."""
    quantisation = _quantisation()
    with _quiet("dynamic quantiser"), tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(_named(file), str(source))
        quantisation.quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=list(_DYNAMIC),
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
            weight_type=quantisation.QuantType.QInt8,
            nodes_to_exclude=_excluded(file, options),
            extra_options={"WeightSymmetric": True},
        )
        return OnnxFile.load(onnx.load(str(target)))


def _named(file: OnnxFile) -> onnx.ModelProto:
    """The model with a name for every node: quantisers tell nodes apart by it."""
    model = onnx.ModelProto()
    model.CopyFrom(file.to_kind("proto"))
    for node, name in zip(model.graph.node, _names(model), strict=True):
        node.name = name
    return model


def _names(model: onnx.ModelProto) -> Iterator[str]:
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        while name in taken:
            name = f"{name}_{index}"
        taken.add(name)
        yield name


def _excluded(file: OnnxFile, options: Options) -> list[str]:
    """Names of nodes that read an excluded weight or match by name."""
    from fnmatch import fnmatchcase

    from sparsecc.errors import InvalidOption

    proto = file.to_kind("proto")
    found: list[str] = []
    for pattern in options.exclude:
        hits = [
            name
            for name, node in zip(_names(proto), proto.graph.node, strict=True)
            if any(
                fnmatchcase(n, p)
                for n in (name, *(i for i in node.input if i in file.initializers))
                for p in (pattern, f"{pattern}.*")
            )
        ]
        if not hits:
            raise InvalidOption(f"exclude: {pattern!r} matches no node and no weight of the lowered model")
        found += hits
    return found


def _reader(feeds: Iterable[Feeds]) -> CalibrationDataReader:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        """Gives one batch after another."""

        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Any:
            """The next batch by input name, None after the last."""
            return next(self.rest, None)

    return Reader()


def _quantisation() -> Any:
    try:
        import onnxruntime.quantization as quantisation
    except ImportError as error:
        raise UnsupportedModel(f"onnxruntime's quantisers do not load here: {summary(error)}") from error
    return quantisation


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Without advice on preprocessing, which is done; errors of the quantiser told as ours."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever a quantiser raises
        if isinstance(error, SparseccError) or out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"onnxruntime's {what} cannot quantise the model: {type(error).__name__}: {summary(error)}"
        ) from error
    finally:
        root.setLevel(level)

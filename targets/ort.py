"""Running an ONNX artifact on onnxruntime (CPU), with the arguments of the model it came from."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from sparsecc.artifact import MODEL, WEIGHTS, Artifact
from sparsecc.errors import InvalidOption, TargetRefused, TargetUnavailable
from sparsecc.onnxfile.model import to_numpy
from sparsecc.target import Executor
from sparsecc.targets.arguments import as_torch, checked

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]

_BITS = {"bfloat16": 16, "float8_e4m3fn": 8, "float8_e4m3fnuz": 8, "float8_e5m2": 8, "float8_e5m2fnuz": 8}
"""Element types that NumPy lacks; they cross into onnxruntime as bits."""


class OrtExecutor(Executor):
    """An artifact's ``model.onnx`` on onnxruntime's CPU provider.

    ``threads`` bounds the threads within an operator; None leaves the choice to onnxruntime.  With
    ``exact`` products of a Q/DQ model run in floats, as the file says, and not in kernels for integers,
    whose sums saturate on some processors.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, exact: bool = False) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InvalidOption(f"threads must be a whole number from 1 up, or None; got {threads!r}")
        self.signature = artifact.signature
        self.threads = threads
        self.exact = exact
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._session = self._start(artifact)
        self._outputs = [spec.name for spec in self.signature.outputs]
        self._as_bits = any(spec.dtype in _BITS for spec in (*self.signature.inputs, *self.signature.outputs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; torch tensors in, torch tensors out, else NumPy arrays.

        Arguments are given by position, by name, or in one dict.  Raises ``InvalidOption`` for
        arguments that do not fit.
        """
        feeds, device = checked(self.signature, args, kwargs)
        outputs = self._run(feeds)
        if device is not None:
            results = {name: as_torch(name, value).to(device) for name, value in outputs.items()}
            return self.signature.assemble(results)
        return self.signature.assemble(outputs)

    def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by their names in the ONNX model, for inputs by theirs; nothing is checked."""
        found = self._run({name: to_numpy(value) for name, value in feeds.items()})
        return {name: as_torch(name, value) for name, value in found.items()}

    def _start(self, artifact: Artifact) -> onnxruntime.InferenceSession:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise TargetUnavailable("onnxruntime is not installed here: pip install onnxruntime") from error
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if self.exact:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        model: str | bytes
        if WEIGHTS in artifact.members:
            self._folder = tempfile.TemporaryDirectory(prefix="sparsecc-")
            artifact.extract(self._folder.name, MODEL, WEIGHTS)
            model = f"{self._folder.name}/{MODEL}"
        else:
            model = artifact.read(MODEL)
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own for each status
            raise TargetRefused(
                f"target {artifact.target!r} cannot run this model: "
                f"onnxruntime {ort.__version__} says: {_first(error)}"
            ) from error

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            if self._as_bits:
                return self._run_bits(feeds)
            results = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise TargetRefused(f"onnxruntime failed on these inputs: {_first(error)}") from error
        return dict(zip(self._outputs, (np.asarray(result) for result in results), strict=True))

    def _run_bits(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import onnxruntime as ort

        values = {}
        for spec in self.signature.inputs:
            array = feeds[spec.name]
            if spec.dtype in _BITS:
                bits = array.view(f"uint{_BITS[spec.dtype]}")
                element = _element_type(spec.dtype)
                values[spec.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)
            else:
                values[spec.name] = ort.OrtValue.ortvalue_from_numpy(array)
        results = self._session.run_with_ort_values(self._outputs, values)
        return {
            spec.name: _from_bits(result, spec.dtype) if spec.dtype in _BITS else result.numpy()
            for spec, result in zip(self.signature.outputs, results, strict=True)
        }


def _from_bits(value: Any, dtype: str) -> Array:
    content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(content), _ml_dtype(dtype)).reshape(value.shape())


def _ml_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def _element_type(dtype: str) -> int:
    import onnx

    return onnx.helper.np_dtype_to_tensor_dtype(_ml_dtype(dtype))


def _first(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]

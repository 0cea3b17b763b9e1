"""Runs an artifact: its engine where that, TensorRT and a GPU are there, else its model on the CPU."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsecc.artifact import MODEL, WEIGHTS, Artifact
from sparsecc.errors import TargetRefused, TargetUnavailable
from sparsecc.onnxfile.model import OnnxFile, to_numpy
from sparsecc.reference.onnx_run import Runner
from sparsecc.target import Executor
from sparsecc.targets.arguments import as_torch, checked
from sparsecc.targets.ort import OrtExecutor
from sparsecc.targets.tensorrt.layers import layers_of
from sparsecc.targets.tensorrt.packing import ENGINE

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def executor(artifact: Artifact, *, threads: int | None = None) -> Executor:
    """What runs an artifact here.  An engine that this GPU cannot run is passed over with a warning."""
    entries = layers_of(artifact)
    rounds = {entry["product"]: DTYPES[entry["rounds"]] for entry in entries if entry["rounds"]}
    found = _on_gpu(artifact) or _on_cpu(artifact, threads, entries)
    found.rounds = rounds
    return found


def _on_gpu(artifact: Artifact) -> Executor | None:
    if ENGINE not in artifact.members or not torch.cuda.is_available():
        return None
    try:
        return EngineExecutor(artifact, importlib.import_module("tensorrt"))
    except (ImportError, TargetUnavailable) as error:
        warnings.warn(f"the engine is not used, the model runs on the CPU: {error}", stacklevel=3)
        return None


def _on_cpu(artifact: Artifact, threads: int | None, entries: list[dict[str, Any]]) -> Executor:
    """onnxruntime; it has no products in bfloat16, which the reference has.

    It stands in for an engine, whose sums of products of 8 bits are exact.
    """
    on_cpu: Executor = (
        ReferenceExecutor(artifact)
        if any(entry["dtype"] == "bfloat16" for entry in entries)
        else OrtExecutor(artifact, threads=threads, exact=True)
    )
    on_cpu.stand_in = "the model on the CPU; no engine of TensorRT runs here"
    return on_cpu


class _Checked(Executor):
    """Checks arguments against the signature, and gives results of the kind of the arguments."""

    def __init__(self, artifact: Artifact) -> None:
        self.signature = artifact.signature
        self.outputs = [spec.name for spec in self.signature.outputs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; torch tensors in, torch tensors out, else NumPy arrays.

        Raises ``InvalidOption`` for arguments that do not fit.
        """
        feeds, device = checked(self.signature, args, kwargs)
        found = self.run_named({name: as_torch(name, value) for name, value in feeds.items()})
        if device is not None:
            return self.signature.assemble({name: value.to(device) for name, value in found.items()})
        return self.signature.assemble({name: to_numpy(value.cpu()) for name, value in found.items()})


class ReferenceExecutor(_Checked):
    """The model on sparsecc's own interpreter, in torch."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._folder = tempfile.TemporaryDirectory(prefix="sparsecc-")  # weights are read from it when needed
        artifact.extract(self._folder.name, *(n for n in (MODEL, WEIGHTS) if n in artifact.members))
        self._runner = Runner(OnnxFile.load(Path(self._folder.name, MODEL)))

    def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by their names in the graph, for inputs by theirs."""
        with torch.inference_mode():
            found = self._runner.run(feeds)
        return {name: found[name] for name in self.outputs}


class EngineExecutor(_Checked):
    """The engine on the current GPU, with torch's memory and its current stream.  Not measured on hardware.

    Raises ``TargetUnavailable`` where TensorRT cannot read the engine here.
    """

    device = "cuda"

    def __init__(self, artifact: Artifact, trt: Any) -> None:
        super().__init__(artifact)
        self._trt = trt
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(artifact.read(ENGINE))
        if self._engine is None:
            raise TargetUnavailable(
                f"TensorRT {trt.__version__} cannot read the engine, which is for another version or GPU: "
                "build it here"
            )
        self._context = self._engine.create_execution_context()

    def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by their names in the graph, for inputs by theirs, on the CPU."""
        given = {name: value.to(self.device).contiguous() for name, value in feeds.items()}
        for name, value in given.items():
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise TargetRefused(
                    f"input {name!r} of shape {list(value.shape)} is outside the engine's profile"
                )
            self._context.set_tensor_address(name, value.data_ptr())
        if missing := self._context.infer_shapes():
            raise TargetRefused(f"the engine's shapes do not follow from its inputs: {', '.join(missing)}")
        found = {name: self._output(name) for name in self.outputs}
        for name, value in found.items():
            self._context.set_tensor_address(name, value.data_ptr())
        if not self._launch():
            raise TargetRefused("TensorRT failed to run the engine on these inputs")
        return {name: value.cpu() for name, value in found.items()}

    def _launch(self) -> bool:
        """Run the engine on the current stream and wait for it."""
        stream = torch.cuda.current_stream()
        done = bool(self._context.execute_async_v3(stream.cuda_stream))
        stream.synchronize()
        return done

    def _output(self, name: str) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise TargetRefused(
                f"the size of output {name!r} depends on data, which this executor does not do"
            )
        return torch.empty(shape, dtype=self._dtype(name), device=self.device)

    def _dtype(self, name: str) -> torch.dtype:
        """The torch type of a value, from TensorRT's name of it."""
        kind = str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]
        return _TORCH[kind]


_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}

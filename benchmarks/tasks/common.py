"""What all tasks share: how a model is called, whatever runs it, and how its outputs are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
# Called exactly as the model: a module, a graph module, an artifact, or an onnxruntime session.
Predict: TypeAlias = Callable[..., Any]
Scores: TypeAlias = dict[str, float]
Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready for sparsecc.

    ``model`` is a module in evaluation mode or the path of an ONNX file; ``example_inputs`` are
    positional (tuple) or by name (dict), as tensors for a module and as arrays for ONNX;
    ``dynamic_shapes`` is what ``torch.export`` takes, None where only the batch varies.
    """

    model: nn.Module | Path
    example_inputs: Inputs
    dynamic_shapes: dict[str, Any] | None = None

    @property
    def predict(self) -> Predict:
        """The dense model as a callable."""
        return as_predict(self.model)


class OnnxPredict:
    """An ONNX model on onnxruntime's CPU provider, called by input name; returns a list of arrays."""

    def __init__(self, model: Path | bytes, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: Any) -> list[Array]:
        return list(self.session.run(None, {name: to_numpy(value) for name, value in inputs.items()}))


def as_predict(model: Any, threads: int = 1) -> Predict:
    """Whatever there is of a model as a callable: module, ONNX path, bytes or proto, or callable."""
    if isinstance(model, nn.Module):
        return inference(model)
    if isinstance(model, (str, Path)):
        return OnnxPredict(Path(model), threads)
    if isinstance(model, bytes):
        return OnnxPredict(model, threads)
    if hasattr(model, "SerializeToString"):
        return OnnxPredict(model.SerializeToString(), threads)
    if not callable(model):
        raise TypeError(f"cannot call a {type(model).__name__}")
    predict: Predict = model
    return predict


def inference(module: nn.Module) -> Predict:
    """The module, called without recording gradients."""

    def predict(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return module(*args, **kwargs)

    return predict


def to_numpy(value: Any) -> Array:
    """A tensor, array or list as an array, in float32 if it was in half precision."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    return np.asarray(value)


def outputs(result: Any) -> list[Array]:
    """All outputs of a call, in order: of a tensor, a tuple, a list or a mapping."""
    if isinstance(result, Mapping):
        return [to_numpy(value) for value in result.values()]
    if isinstance(result, Sequence):
        return [to_numpy(value) for value in result]
    return [to_numpy(result)]


def first(result: Any) -> Array:
    """The first output of a call."""
    return outputs(result)[0]


def batched(predict: Predict, inputs: torch.Tensor, batch: int) -> Array:
    """The first output for all rows of one positional input, computed in batches."""
    return np.concatenate([first(predict(part)) for part in inputs.split(batch)])


def log_softmax(logits: Floats) -> Floats:
    """Logarithm of the softmax along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result

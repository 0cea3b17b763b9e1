"""An ONNX model on onnxruntime, as its users run it; for timing only."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsecc.errors import UnsupportedModel
from sparsecc.onnxfile.model import OnnxFile, to_numpy


@contextmanager
def timed_call(file: OnnxFile, inputs: Mapping[str, torch.Tensor]) -> Iterator[Callable[[], object]]:
    """A call of the model on onnxruntime's CPU provider, with as many threads as PyTorch has.

    Raises ``UnsupportedModel`` where onnxruntime is missing or cannot run the model.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnsupportedModel("onnxruntime is not installed here: pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    feeds = {name: to_numpy(value) for name, value in inputs.items()}
    with tempfile.TemporaryDirectory(prefix="sparsecc-") as folder:
        path = file.path
        if path is None or file.raw is None:
            path = Path(folder, "model.onnx")
            file.save(path)
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            session.run(None, feeds)
        except Exception as error:  # onnxruntime raises a class of its own for each status
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise UnsupportedModel(f"onnxruntime cannot run the model: {first}") from error
        yield lambda: session.run(None, feeds)

"""TensorRT: ONNX files in which it can pick sparse kernels, and what builds engines of them.

    prepare(model)       the same model with its products as sparse kernels need them; in any pipeline
    sparsity(model)      which products satisfy TensorRT's rule for sparse weights, and why the others do not
    accepted(model)      whether TensorRT-RTX parses and builds a model, without a GPU

Nothing here has been measured on hardware.
"""

from sparsecc.targets.tensorrt.gate import Acceptance, accepted
from sparsecc.targets.tensorrt.prepare import Prepared, prepare, prepare_file
from sparsecc.targets.tensorrt.rule import Row, sparsity

__all__ = ["Acceptance", "Prepared", "Row", "accepted", "prepare", "prepare_file", "sparsity"]

"""cuSPARSELt through PyTorch, as another engine for the same artifact, to compare with.

    sparsecc.load("model.scc", options={"engine": "cusparselt"})

It multiplies products of layers without convolutions whose sizes PyTorch takes (multiples of 16); bias,
activation and residual follow in torch.  Its products come out in the element type, so that sums are rounded
once more than by the kernels of this package.  Weights are compressed from the artifact's when first used.
PyTorch's two functions, as the benchmark calls them, gave right results in bfloat16 on an H100
(docs/gpu.md); this module has not run there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparsecc.errors import TargetUnavailable
from sparsecc.targets.cuda.operator import DTYPES, Operands, finished
from sparsecc.targets.cuda.pack import Packed, unpack

NAME = "cusparselt"
"""Stands among the names of a layer's kernels."""

_ELEMENTS = ("fp16", "bf16")
_MULTIPLE = 16
"""Of a weight's rows and columns, in 16-bit elements (torch.sparse.SparseSemiStructuredTensorCUSPARSELT)."""
_TOKENS = 8
"""Of the tokens; they are padded to it."""


@dataclass(eq=False, slots=True)
class Weight:
    """A weight as cuSPARSELt has it; ``algorithms`` are what its search found, by tokens."""

    compressed: Tensor
    algorithms: dict[int, int] = field(default_factory=dict)


#: compressed weights, as long as the packed ones live
_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()


def why_not() -> str:
    """Why this process cannot use it; empty where it can."""
    if not torch.backends.cusparselt.is_available():
        return f"PyTorch {torch.__version__} has no cuSPARSELt"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return ""


def require(device: torch.device | None = None) -> None:
    """Raise ``TargetUnavailable`` where it cannot be used, or where an artifact's ``device`` is no GPU."""
    reason = why_not()
    if not reason and device is not None and device.type != "cuda":
        reason = "no GPU here is one that the artifact has kernels for"
    if reason:
        raise TargetUnavailable(
            f"engine {NAME!r} cannot be used here: {reason}. It is a choice of where an artifact runs: "
            f"compile without it, and give options={{'engine': '{NAME}'}} to sparsecc.load where there is a "
            "GPU and a PyTorch that was built for it"
        )


def takes(out: int, k: int, dtype: str, *, convolution: bool, device: torch.device | None = None) -> bool:
    """Whether PyTorch gives a layer of these sizes to cuSPARSELt, and that may be tried on a GPU.

    ``device`` is the current one if it is None.
    """
    fits = not convolution and dtype in _ELEMENTS and out % _MULTIPLE == 0 and k % _MULTIPLE == 0
    return fits and not (dtype == "fp16" and _on_hopper(device))


def _on_hopper(device: torch.device | None) -> bool:
    """Where cuSPARSELt's search in fp16 runs an illegal instruction, after which a process has no GPU.

    Seen with cuSPARSELt 0.8.0 of PyTorch 2.11 on an H100; bfloat16 and int8 work.
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def chosen(given: Operands) -> bool:
    """Whether the operator's kernels name it, and it can be used."""
    if NAME not in given.kernels.split(",") or why_not():
        return False
    device = given.x.device if given.x.is_cuda else None
    return takes(given.out, given.k, given.dtype, convolution=bool(given.conv), device=device)


def product(given: Operands) -> Tensor:
    """The operator by cuSPARSELt."""
    weight = _weights.get(given.values)
    if weight is None:
        packed = Packed(
            given.values.cpu().numpy(), given.metadata.cpu().numpy(), given.out, given.k, given.dtype
        )
        weight = _weights[given.values] = compressed(unpack(packed).to(given.values.device))
    x = given.x.to(DTYPES[given.dtype])
    y = multiplied(weight, x.reshape(-1, given.k)).reshape(*x.shape[:-1], given.out)
    return finished(given, y.float(), wide=torch.float32)


def compressed(dense: Tensor) -> Weight:
    """A 2:4 weight [out, k], compressed on its GPU."""
    return Weight(torch._cslt_compress(dense.contiguous()))


def multiplied(weight: Weight, x: Tensor) -> Tensor:
    """x[tokens,k] -> y[tokens,out], both in the weight's type.

    Which algorithm is the fastest is searched at the first product of that many tokens, but not while a CUDA
    graph is captured.
    """
    # What is not contiguous is read as the transpose of the memory behind it, so it has to be just that.
    columns = F.pad(x, (0, 0, 0, -len(x) % _TOKENS)).contiguous().t()
    tokens = columns.shape[1]
    if tokens not in weight.algorithms and not _capturing():
        weight.algorithms[tokens] = torch._cslt_sparse_mm_search(
            weight.compressed, columns, transpose_result=True
        )
    y = torch._cslt_sparse_mm(
        weight.compressed, columns, transpose_result=True, alg_id=weight.algorithms.get(tokens, 0)
    )
    return y[: len(x)]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

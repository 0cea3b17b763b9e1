"""How much of a network each pruner removes at one half, side by side."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsecc
from benchmarks.peers.isolated import Unanswered, answer
from benchmarks.peers.nets import MODULE_NETS, Net


@dataclass(frozen=True)
class Removal:
    """Parameters of one net before, and after both pruners; ``why`` where the peer gave no usable result."""

    net: str
    before: int
    ours: int
    peer: int | None
    why: str = ""

    @property
    def behind(self) -> bool:
        """Whether the peer's result is usable and smaller."""
        return self.peer is not None and self.ours > self.peer


def against_modules(net: Net) -> Removal:
    """sparsecc and Torch-Pruning on the module, each in a process of its own."""
    ours = answer(__spec__.name, "ours", net.name)
    try:
        peer = answer(__spec__.name, "peer", net.name)
    except Unanswered as why:
        peer = {"after": None, "why": str(why)}
    return Removal(net.name, ours["before"], ours["after"], peer["after"], peer["why"])


def _by_sparsecc(model: nn.Module, net: Net) -> tuple[int | None, str]:
    result = sparsecc.prune(model, (torch.randn(net.shape),), sparsity=0.5)
    return int(result.report.after["parameters"]), ""


def _by_torch_pruning(model: nn.Module, net: Net) -> tuple[int | None, str]:
    """Parameters left; usable if it runs, keeps its outputs' shapes, and cut no layer below its half."""
    from benchmarks.peers.torch_pruning import pruner

    x = torch.randn(net.shape)
    with torch.no_grad():
        shapes = _shapes(model(x))
    widths = _widths(model)
    try:
        pruner(model, net).step()
        with torch.no_grad():
            after = _shapes(model(x))
    except MemoryError:
        raise
    except Exception as error:  # any way in which the peer fails is what this reports
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
    if after != shapes:
        return None, f"outputs became {after}"
    for name, width in _widths(model).items():
        if width < widths[name] // 2:
            return None, f"left {width} of {widths[name]} outputs of {name}, where half was asked for"
    return _count(model), ""


def _widths(model: nn.Module) -> dict[str, int]:
    """Outputs of every product."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))
    return {n: m.out_features if isinstance(m, nn.Linear) else m.out_channels for n, m in layers}


SIDES = {"ours": _by_sparsecc, "peer": _by_torch_pruning}


def main() -> None:
    """Print what one side makes of one net: ``before``, ``after`` (null where nothing usable) and ``why``."""
    side, name = sys.argv[1:]
    net = next(net for net in MODULE_NETS if net.name == name)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net.make().eval()
    before = _count(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after, why = SIDES[side](model, net)
    print(json.dumps({"before": before, "after": after, "why": why}))


def against_graphs(net: Net) -> Removal:
    """sparsecc and onnxsim on the net's ONNX export."""
    import onnx
    import onnxsim

    torch.manual_seed(0)
    model = net.make().eval()
    path = Path(tempfile.mkdtemp()) / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(net.shape),), path, dynamo=True, external_data=False, verbose=False
        )
    proto = onnx.load(path)
    pruned = sparsecc.prune(proto, sparsity=0.5)
    try:
        smaller = onnxsim.apply_structured_pruning_cpp(proto, sparsity=0.5)
        smaller = onnxsim.apply_attention_head_pruning_cpp(smaller, sparsity=0.5)
        peer, why = _floats(smaller), ""
    except Exception as error:  # any way in which the peer fails is what this reports
        peer, why = None, f"{type(error).__name__}: {error}"[:60]
    return Removal(net.name, _floats(proto), _floats(pruned.model), peer, why)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _floats(model: Any) -> int:
    """Entries of all floating-point initializers."""
    import onnx

    proto = onnx.load(io.BytesIO(model)) if isinstance(model, bytes) else model
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return sum(int(torch.Size(t.dims).numel()) for t in proto.graph.initializer if t.data_type in kinds)


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)]


if __name__ == "__main__":
    main()

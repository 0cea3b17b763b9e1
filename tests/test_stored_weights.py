"""Models whose weights are no plain dense tensors are refused by name, and told what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import sparsecc
from sparsecc.errors import InvalidOption, UnsupportedModel


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def stored(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = net()
    model[0].weight = nn.Parameter(change(model[0].weight.detach()), requires_grad=False)
    return model


def made_by_torchao(config: object) -> nn.Module:
    model = net()
    quantize_(model, config)
    return model


def fake() -> nn.Module:
    with FakeTensorMode():
        return net()


def packed() -> nn.Module:
    model = net()
    model.register_buffer("table", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 32)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stored(torch.Tensor.to_sparse), "'0.weight' is stored as sparse_coo"),
        (lambda: stored(torch.Tensor.to_sparse_csr), "'0.weight' is stored as sparse_csr"),
        (lambda: stored(torch.Tensor.to_mkldnn), "'0.weight' is stored as mkldnn"),
        (lambda: made_by_torchao(Int8WeightOnlyConfig()), "'0.weight' is a torchao.*Int8Tensor"),
        (lambda: made_by_torchao(Int8DynamicActivationInt8WeightConfig()), "'0.weight' is a torchao"),
        (fake, "'0.weight' is a .*FakeTensor"),
        (packed, r"'table' holds packed numbers \(qint8\)"),
    ],
)
def test_other_tensors_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{words}.*; give the model with plain dense tensors"):
        sparsecc.prune(make(), torch.randn(4, 32), sparsity=0.5)


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(InvalidOption, match=r"'0.weight' has no shape yet.*run the model once"):
        sparsecc.prune(lazy(), torch.randn(4, 32), sparsity=0.5)


class Named(torch.Tensor):
    """A subclass without operators of its own."""


def test_subclasses_that_only_have_a_name_are_pruned() -> None:
    model = stored(lambda weight: weight.as_subclass(Named))
    assert sparsecc.prune(model, torch.randn(4, 32), sparsity=0.5).certificate.status == "VERIFIED"

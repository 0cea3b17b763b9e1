"""Ways to tell whether a pruned PyTorch model is right that do not trust what made it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsecc.axes.terms import Keep
from sparsecc.fx.subject import TorchSubject
from sparsecc.plan import Plan, Take
from sparsecc.reference.masked import Masked
from sparsecc.reference.torch_run import ProgramRunner, default_dtype, masked_hook


def leaves(tree: Any) -> list[Any]:
    """Flat values of nested inputs or outputs."""
    return list(pytree.tree_leaves(tree))


def widened(tree: Any) -> Any:
    """The same tree with every float tensor in float64."""
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


def call(model: nn.Module, inputs: Any) -> list[Any]:
    """Flat outputs of a module on example inputs (a tuple, or a dict of keywords)."""
    with torch.no_grad():
        return leaves(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs))


class Widening(TorchFunctionMode):
    """Types of floats that code has written into it, and casts to them, become float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = pytree.tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.dtype) or not (value.is_floating_point or value.is_complex):
        return value
    return torch.complex128 if value.is_complex else torch.float64


def forward64(model: nn.Module, inputs: Any) -> list[Any]:
    """Flat outputs of the module's own forward, in float64 whatever it says, and in evaluation mode."""
    with Widening(), default_dtype(torch.float64):
        return call(copy.deepcopy(model).double().eval(), widened(inputs))


def nested(subject: TorchSubject, flat: list[Any]) -> Any:
    """Flat inputs as the module takes them."""
    args, kwargs = pytree.tree_unflatten(flat, subject.program.in_spec)
    return kwargs if kwargs else args


def masked64(
    subject: TorchSubject,
    kept: Mapping[str, Keep],
    inputs: list[Any],
    weights: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    """Masked semantics in float64, with some weights replaced."""
    runner = ProgramRunner(subject.program, dtype=torch.float64, overrides=weights)
    hook = masked_hook(subject.view, Masked(subject.analysis.keeps(kept)))
    return leaves(runner.run(inputs, hook=hook)[0])


def poisoned(subject: TorchSubject, plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    """Float weights with garbage at every entry that the plan takes away."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for take in plan.of(Take):
        weight = subject.program.weights[take.weight].detach()
        if take.use is not None or not weight.is_floating_point():
            continue
        shape = [1] * weight.dim()
        shape[take.axis] = -1
        removed = torch.ones(take.size, dtype=torch.bool)
        removed[torch.from_numpy(take.indices)] = False
        garbage = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 5 + 3
        before = out.get(take.weight, weight.double())
        out[take.weight] = torch.where(removed.reshape(shape), garbage, before)
    return out


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model whose consumers read nothing of removed positions."""
    out = copy.deepcopy(model)
    modules = dict(out.named_modules())
    with torch.no_grad():
        for take in plan.of(Take):
            path, _, leaf = take.weight.rpartition(".")
            if take.axis == _read_axis(modules[path], leaf):
                removed = torch.ones(take.size, dtype=torch.bool)
                removed[torch.from_numpy(take.indices)] = False
                getattr(modules[path], leaf).index_fill_(take.axis, removed.nonzero()[:, 0], 0)
    return out


def _read_axis(module: nn.Module, leaf: str) -> int | None:
    """The axis of a weight along which the module sums over what it reads."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and leaf == "weight":
        return 0
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and leaf == "weight":
        return 1
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and leaf.startswith("weight"):
        return 1
    return None


def error(ours: list[Any], theirs: list[Any]) -> float:
    """The largest |a - b| / max |b| of any output; infinite where anything else differs."""
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            same = torch.equal(a, b) if isinstance(b, Tensor) else a == b
            worst = max(worst, 0.0 if same else float("inf"))
        elif a.shape != b.shape or not torch.isfinite(b).all() or not torch.isfinite(a).all():
            worst = float("inf")
        elif b.numel():
            worst = max(
                worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
            )
    return worst


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, values, flags and integer attributes of a model."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        digest.update(
            f"{name}{tensor.dtype}{tuple(tensor.shape)}{tensor.requires_grad}{tensor.grad is None}".encode()
        )
        if tensor.device.type != "meta":
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        numbers = sorted((k, v) for k, v in vars(module).items() if isinstance(v, int))
        digest.update(f"{name}{type(module).__name__}{numbers}".encode())
    return digest.hexdigest()

"""What gradients tell of weights, by name: each averaged over the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsecc.calibration.lockstep import watched
from sparsecc.errors import InvalidOption, UnsupportedModel
from sparsecc.subject import Subject

Named = dict[str, torch.Tensor]
#: the loss of a batch as a function of weights
Loss = Callable[[Named], torch.Tensor]

#: random probes of the diagonal of the Hessian for every batch
PROBES = 8


def leaves(subject: Subject) -> Named:
    """Every float parameter as a leaf that gradients are taken for; shares its memory with the model."""
    view = subject.view
    floats = [n for n, v in view.weights.items() if n in view.parameters and "float" in v.dtype]
    found = {n: view.weight(n).detach() for n in floats}
    return {n: t.requires_grad_() for n, t in found.items() if t.is_floating_point()}


def outputs_of(subject: Subject, inputs: Any, weights: Mapping[str, torch.Tensor]) -> list[Any]:
    """Flat outputs of a model that has these weights, differentiable in them."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return watched(subject.stepping(inputs, weights=weights), lambda step, outputs: None)


def derived(value: torch.Tensor, weights: Named, *, again: bool = False) -> Named:
    """Gradients of a scalar; zeros for weights that it does not depend on."""
    if not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise InvalidOption(f"the loss is {_told(value)}: give a scalar tensor")
    if not value.requires_grad:
        raise UnsupportedModel(
            "the loss does not depend on the model's weights in a way that gradients follow; check loss(), "
            "and whether the outputs that it uses are computed by differentiable operators"
        )
    found = torch.autograd.grad(
        value.reshape(()), list(weights.values()), create_graph=again, allow_unused=True
    )
    return {
        n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=True)
    }


def _told(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _gradient(loss: Loss, weights: Named, batch: int) -> Named:
    return derived(loss(weights), weights)


def _square(loss: Loss, weights: Named, batch: int) -> Named:
    return {n: g.square() for n, g in derived(loss(weights), weights).items()}


def _times(grads: Named, vectors: Named, weights: Named) -> Named:
    """Hessian times vectors, from gradients that can be derived again."""
    product = torch.stack([(g * vectors[n]).sum().double() for n, g in grads.items()]).sum()
    if not product.requires_grad:
        return {n: torch.zeros_like(w) for n, w in weights.items()}
    found = torch.autograd.grad(product, list(weights.values()), retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(w) if g is None else g.to(w.dtype)
        for (n, w), g in zip(weights.items(), found, strict=True)
    }


def _curvature(loss: Loss, weights: Named, batch: int) -> Named:
    """Diagonal of the Hessian, Hutchinson's estimate: the mean of v * Hv over random signs v.

    Every batch has signs of its own, so that more batches make the estimate better.
    """
    grads = derived(loss(weights), weights, again=True)
    generator = torch.Generator().manual_seed(batch)
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    for _ in range(PROBES):
        signs = {
            n: torch.randint(0, 2, w.shape, generator=generator).to(w).mul_(2).sub_(1)
            for n, w in weights.items()
        }
        for name, product in _times(grads, signs, weights).items():
            total[name] += product * signs[name] / PROBES
    return total


def _hessian_gradient(loss: Loss, weights: Named, batch: int) -> Named:
    grads = derived(loss(weights), weights, again=True)
    return _times(grads, {n: g.detach() for n, g in grads.items()}, weights)


#: name -> what is averaged over batches (each with its number), for every weight in its own shape
GRADIENTS: dict[str, Callable[[Loss, Named, int], Named]] = {
    "gradient": _gradient,
    "gradient_square": _square,
    "curvature": _curvature,
    "hessian_gradient": _hessian_gradient,
}


def flow(subject: Subject, inputs: Any) -> Named:
    """SynFlow (Tanaka et al., 2020, eq. 1 and section 5): |w| dR/d|w|, R the sum of the outputs.

    The model has the magnitudes of its weights and reads ones.
    """
    weights = {n: w.detach().abs().requires_grad_() for n, w in leaves(subject).items()}
    outputs = outputs_of(subject, _ones(inputs), weights)
    total = torch.stack([y.double().sum() for y in outputs if _is_float(y)]).sum()
    grads = derived(total, weights)
    return {n: (g * weights[n]).detach() for n, g in grads.items()}


def _ones(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {n: torch.ones_like(x) if _is_float(x) else x for n, x in inputs.items()}
    assert isinstance(inputs, Sequence)
    return [torch.ones_like(x) if _is_float(x) else x for x in inputs]


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()

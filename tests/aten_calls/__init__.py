"""Calls of the ATen operators that sparsecc has in its table, with arguments from their schemas.

What the table gains is called the day it lands: an elementwise operator, a reduction or anything else
whose arguments can be told from their names and types needs nothing here; what needs more has a recipe.
Every call is a step of a random network (``tests.random_nets``), told by the digits of one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsecc.fx.ops import TABLE
from tests.aten_calls import decomposed, indexed, products, recipes, signal
from tests.aten_calls.derived import derived, overloads
from tests.aten_calls.site import SPATIAL, Recipe, Site, parts

if TYPE_CHECKING:
    from tests.random_nets import Net

__all__ = ["APART", "RECIPES", "SPATIAL", "landed", "steps"]


def landed(net: Net, x: Tensor, made: Any) -> Tensor:
    """What comes of a call as a value of the network: floats, not large, with the samples first.

    A result in another form scales the operand by its mean.
    """
    # a cast would put the dtype of the example into the graph; a product takes that of the run
    found = [p if p.is_floating_point() else p * net.weight(1) for p in parts(made) if p.numel()]
    fits = [p for p in found if p.dim() == x.dim() and p.shape[0] == x.shape[0]]
    y = fits[0] if fits else x
    for part in found:
        if part is not y:
            y = y * (1 + 0.3 * torch.tanh(part.mean()))
    return net.tame(y)


def _step(recipe: Recipe) -> Callable[[Net, Tensor, int, int, int], Tensor]:
    def step(net: Net, x: Tensor, b: int, c: int, a: int) -> Tensor:
        return landed(net, x, recipe(Site(net, x, (a * 6 + b) * 6 + c)))

    return step


RECIPES: dict[str, tuple[Sequence[str], Recipe]] = {
    **recipes.RECIPES, **indexed.RECIPES, **products.RECIPES, **signal.RECIPES, **decomposed.RECIPES
}  # fmt: skip

#: entries that no network calls: results in one type whatever the operand's, stored integers, and forms for
#: other devices, which do not run here (tests/test_aten_operators.py calls most of them alone)
APART = frozenset(
    word
    for line in (
        "_conj _grouped_mm _to_cpu cudnn_batch_norm fake_quantize_per_channel_affine float_power",
        "fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine miopen_batch_norm",
        "fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "_fft_c2c _fft_c2r _fft_r2c pin_memory quantized_decomposed.dequantize_per_channel",
        "quantized_decomposed.dequantize_per_tensor quantized_decomposed.quantize_per_channel",
        "quantized_decomposed.quantize_per_tensor transformers.grouped_mm_fallback",
        "quantized_decomposed.choose_qparams quantized_decomposed.choose_qparams_symmetric",
        "quantized_decomposed.choose_qparams_per_token quantized_decomposed.convert_element_type",
        "quantized_decomposed.choose_qparams_per_token_asymmetric quantized_decomposed.quantize_per_token",
        "quantized_decomposed._choose_qparams_per_token_asymmetric_impl",
        "quantized_decomposed.dequantize_per_token quantized_decomposed.fake_quant_per_channel",
        "quantized_decomposed.quantize_per_channel_group quantized_decomposed.dequantize_per_channel_group",
        "view_as_complex_copy view_as_real_copy",
    )
    for word in line.split()
)


def steps(kind: str) -> dict[str, Callable[[Net, Tensor, int, int, int], Tensor]]:
    """Every call that fits a kind of network, by ``name`` or ``name.overload``."""
    found: dict[str, Callable[[Net, Tensor, int, int, int], Tensor]] = {}
    for name in TABLE:
        if name in APART:
            continue
        if name in RECIPES:
            kinds, recipe = RECIPES[name]
            if kind in kinds:
                found[name] = _step(recipe)
            continue
        for overload in overloads(name):
            found[f"{name}.{overload._overloadname}"] = _step(derived(overload))
    return found

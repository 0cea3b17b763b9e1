"""Entries of ATen operators that work along some axes: transforms, windows, samplers, quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparsecc.fx.spec import Bound, Entry, Shapes, Spec, ints, operand, same, tensors, whole, words


def _whole(b: Bound, s: Shapes, dims: Sequence[int]) -> Spec:
    """Works along ``dims`` as a whole, and treats every other axis alike."""
    rank = s.rank(operand(b))
    gone = {d % rank for d in dims}
    return Spec("mixed", (operand(b),), {"kept": [d for d in range(rank) if d not in gone]})


def _one_dim(b: Bound, s: Shapes) -> Spec:
    return _whole(b, s, [b["dim"]])


def _some_dims(b: Bound, s: Shapes) -> Spec:
    """``dim`` may be absent: then as many last axes as ``s`` has sizes, or all."""
    dims: Any = b["dim"]
    if dims is None:
        rank = s.rank(operand(b))
        dims = range(rank - len(b["s"]), rank) if b.get("s") is not None else range(rank)
    return _whole(b, s, ints(dims) if isinstance(dims, int) else list(dims))


def _fixed(*dims: int) -> Entry:
    return lambda b, s: _whole(b, s, dims)


def _carried(source: Sequence[int | None], *names: str) -> Entry:
    """``source`` counts from the first axis; further operands are read as a whole."""
    return lambda b, s: Spec("carried", [b.get(n) for n in names], {"source": list(source)})


def _stft(b: Bound, s: Shapes) -> Spec:
    """x[N,T] or x[T] -> y[N,F,L], or with a last axis of two (real and imaginary parts)"""
    x = b["self"]
    batch: list[int | None] = [0] if s.rank(x) == 2 else []
    extra = 2 if b["return_complex"] else 3
    return Spec("carried", (x, b["window"]), {"source": [*batch, *[None] * extra]})


def _istft(b: Bound, s: Shapes) -> Spec:
    """x[N,F,L] complex -> y[N,T]"""
    x = b["self"]
    batch: list[int | None] = [0] if s.rank(x) == 3 else []
    return Spec("carried", (x, b["window"]), {"source": [*batch, None]})


def _windowed(b: Bound, s: Shapes) -> Spec:
    """x[*,D,*] -> y[*,n,*,size] (Tensor.unfold)"""
    rank = s.rank(b["self"])
    if not rank:
        return Spec("carried", (b["self"],), {"source": [None]})
    dim = b["dimension"] % rank
    return Spec("carried", (b["self"],), {"source": [*(None if d == dim else d for d in range(rank)), None]})


def _to_real(b: Bound, s: Shapes) -> Spec:
    return Spec("carried", (b["self"],), {"source": [*range(s.rank(b["self"])), None]})


def _to_complex(b: Bound, s: Shapes) -> Spec:
    return Spec("carried", (b["self"],), {"source": list(range(s.rank(b["self"]) - 1))})


def _affine_grid(b: Bound, s: Shapes) -> Spec:
    """theta[N,d,d+1] -> y[N,*S,d]"""
    return Spec("carried", (b["theta"],), {"source": [0, *[None] * (len(b["size"]) - 1)]})


def _each(*others: str) -> Entry:
    """Every position of the first operand is treated alike; the others are read as a whole."""

    def entry(b: Bound, s: Shapes) -> Spec:
        x = operand(b) if "elements" not in b else b["elements"]
        return Spec("carried", [x, *(b.get(n) for n in others)], {"source": list(range(s.rank(x)))})

    return entry


def _per_channel(axis: str, *names: str) -> Entry:
    return lambda b, s: Spec("per_channel", [b[n] for n in names], {"dim": b[axis]})


def _per_tensor(b: Bound, s: Shapes) -> Spec:
    """Scale and zero point may be tensors of one entry."""
    return Spec("elementwise", tensors(b))


def _range(b: Bound, s: Shapes) -> Spec:
    """x[*] -> scale[1] zero[1], from the smallest and the largest entry, 0 included"""
    return Spec("quantisation_range", (b["input"],), {"outputs": [0, 1]})


def _range_by_token(b: Bound, s: Shapes) -> Spec:
    """x[*,D] -> scale[*,1] zero[*,1]"""
    return Spec("reduce", (b["input"],), {"kind": "range", "dims": [-1], "keepdim": True})


def _grouped(b: Bound, s: Shapes) -> Spec:
    """x[N,K] with scales[N,K/group]; with scales[N] a group is a whole row, whose length the call states."""
    if s.rank(b["scales"]) != s.rank(b["input"]):
        return whole("quantize", "has one group in each row", b)
    zeros = b["zero_points"] if isinstance(b["zero_points"], Node) else None
    return Spec("quantize", (b["input"], b["scales"], zeros), {"axis": -1, "block": b["group_size"]})


def _unpool(spatial: int) -> Entry:
    return lambda b, s: Spec("unpool", (b["self"], b["indices"]), {"spatial": spatial})


_FAKE = ("self", "scale", "zero_point")


def _matrix_norm(b: Bound, s: Shapes) -> Spec:
    """Frobenius' norm is that of the entries; the others need every entry of the matrix."""
    if b["ord"] != "fro":
        return whole("aten.linalg_matrix_norm", "takes a norm of whole matrices", b)
    rank = s.rank(b["self"])
    attrs = {"kind": "norm", "dims": [d % rank for d in b["dim"]], "keepdim": b["keepdim"]}
    return Spec("reduce", (b["self"],), attrs)


TABLE: dict[str, Entry] = {
    **dict.fromkeys(words("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"), _one_dim),
    **dict.fromkeys(
        words(
            """
            fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn
            fft_irfftn fft_hfftn fft_ihfftn fft_fftshift fft_ifftshift _fft_r2c _fft_c2r _fft_c2c
            """
        ),
        _some_dims,
    ),
    "linalg_matrix_norm": _matrix_norm,
    "stft": _stft,
    "istft": _istft,
    **dict.fromkeys(("unfold", "unfold_copy"), _windowed),
    "im2col": same("windows", "self"),
    "col2im": same("from_windows", "self"),
    **dict.fromkeys(
        ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), same("grid_sample", "input", "grid")
    ),
    "affine_grid_generator": _affine_grid,
    "view_as_real": _to_real,
    "view_as_complex": _to_complex,
    "max_unpool2d": _unpool(2),
    "max_unpool3d": _unpool(3),
    "bucketize": _each("boundaries"),
    "isin": _each("test_elements"),
    "fliplr": _fixed(1),
    "flipud": _fixed(0),
    "fake_quantize_per_tensor_affine": _per_tensor,
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _per_tensor,
    "fake_quantize_per_tensor_affine_cachemask": _per_tensor,
    "fake_quantize_per_channel_affine": _per_channel("axis", *_FAKE),
    "fake_quantize_per_channel_affine_cachemask": _per_channel("axis", *_FAKE),
    "quantized_decomposed.quantize_per_tensor": _per_tensor,
    "quantized_decomposed.dequantize_per_tensor": _per_tensor,
    "quantized_decomposed.quantize_per_channel": _per_channel("axis", "input", "scales", "zero_points"),
    "quantized_decomposed.dequantize_per_channel": _per_channel("axis", "input", "scales", "zero_points"),
    "quantized_decomposed.fake_quant_per_channel": _per_channel("axis", "input", "scales", "zero_points"),
    "quantized_decomposed.quantize_per_channel_group": _grouped,
    "quantized_decomposed.dequantize_per_channel_group": _grouped,
    "quantized_decomposed.quantize_per_token": _per_tensor,
    "quantized_decomposed.dequantize_per_token": _per_tensor,
    "quantized_decomposed.convert_element_type": _per_tensor,
    "quantized_decomposed.choose_qparams": _range,
    "quantized_decomposed.choose_qparams_symmetric": _range,
    "quantized_decomposed.choose_qparams_per_token": _range_by_token,
    "quantized_decomposed.choose_qparams_per_token_asymmetric": _range_by_token,
    "quantized_decomposed._choose_qparams_per_token_asymmetric_impl": _range_by_token,
}

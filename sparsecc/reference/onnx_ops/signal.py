"""Windows and Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsecc.reference.onnx_ops.registry import Ctx, op, positive_axis

_WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


def _window(ctx: Ctx, size: Tensor, name: str) -> Tensor:
    """size[] -> y[size]"""
    count = int(ctx.item(size))
    dtype = ctx.need_dtype(ctx.integer("output_datatype", 1))
    if ctx.abstract:
        return torch.empty(count, dtype=dtype, device="meta")
    period = count if ctx.flag("periodic", True) else count - 1
    a0, a1, a2 = _WINDOWS[name]
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / max(period, 1)
    return (a0 - a1 * torch.cos(angle) + a2 * torch.cos(2 * angle)).to(dtype)


def _register_windows() -> None:
    for name in _WINDOWS:
        op(name, kind="raw")(lambda ctx, size, name=name: _window(ctx, size, name))


_register_windows()


def _complex(x: Tensor) -> Tensor:
    """x[*S,1|2] -> complex[*S]"""
    return x[..., 0] if x.shape[-1] == 1 else torch.complex(x[..., 0], x[..., 1])


def _fft(function: Callable[..., Tensor], x: Tensor, length: int, axis: int) -> Tensor:
    if x.numel():
        return function(x, n=length, dim=axis)
    shape = function(x.to("meta"), n=length, dim=axis)  # the library refuses tensors without elements
    return shape if x.is_meta else torch.zeros_like(shape, device=x.device)


def _transform(ctx: Ctx, x: Tensor, length: int | None, axis: int) -> Tensor:
    signal = _complex(x)
    inverse, onesided = ctx.flag("inverse"), ctx.flag("onesided")
    if inverse and onesided:
        return _fft(torch.fft.irfft, signal, length or 2 * (x.shape[axis] - 1), axis)[..., None]
    found = _fft(torch.fft.ifft if inverse else torch.fft.fft, signal, length or x.shape[axis], axis)
    if onesided:
        found = found.narrow(axis, 0, found.shape[axis] // 2 + 1)
    return torch.view_as_real(found).to(x.dtype)


@op("DFT", since=17)
def dft_17(ctx: Ctx, x: Tensor, length: Tensor | None = None) -> Tensor:
    """x[N,*S,1|2] length[] -> y[N,*S',2]"""
    axis = positive_axis(ctx.integer("axis", 1), x.ndim)
    return _transform(ctx, x, None if length is None else int(ctx.item(length)), axis)


@op("DFT", since=20)
def dft(ctx: Ctx, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """x[N,*S,1|2] length[] axis[] -> y[N,*S',2]"""
    along = positive_axis(-2 if axis is None else int(ctx.item(axis)), x.ndim)
    return _transform(ctx, x, None if length is None else int(ctx.item(length)), along)


@op("STFT")
def stft(
    ctx: Ctx, x: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None
) -> Tensor:
    """x[N,T,1|2] step[] window[L] length[] -> y[N,frames,L or L/2+1,2]"""
    signal = _complex(x) if x.ndim == 3 else x
    size = int(ctx.item(length)) if length is not None else x.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, size, int(ctx.item(step)))
    if window is not None:
        frames = frames * window
    found = _fft(torch.fft.fft, frames, size, -1)
    if ctx.flag("onesided", True):
        found = found[..., : size // 2 + 1]
    return torch.view_as_real(found).to(x.dtype)
